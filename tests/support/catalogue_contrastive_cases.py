"""Rows of the catalogue: losses of rows against their positives and many negatives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from torch import Tensor, nn

from fused_losses import losses


def towers(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Two sides of n rows."""
    return Call(tuple(rows(n, d, generator) for _ in range(2)))


def labelled_towers(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    return Call((*towers(n, d, labels, generator).arguments, labels))


def unlabelled(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    return Call((rows(n, d, generator),))


def rows(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def cosines(x: Tensor, y: Tensor) -> Tensor:
    return F.normalize(x, dim=1) @ F.normalize(y, dim=1).T


def diagonal_share(z: Tensor) -> Tensor:
    """log sum_j e^z_ij - z_ii. [N]"""
    return z.logsumexp(dim=1) - z.diagonal()


def off_diagonal(z: Tensor) -> Tensor:
    """z without its diagonal, -inf there."""
    return z.masked_fill(torch.eye(*z.shape, dtype=torch.bool), -torch.inf)


def info_nce(_: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    return diagonal_share(cosines(q, k) / 0.07).mean()


def clip(module: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    z = module.logit_scale.exp() * image @ text.T
    return (diagonal_share(z) + diagonal_share(z.T)).mean() / 2


def siglip(module: nn.Module, image: Tensor, text: Tensor) -> Tensor:
    z = module.logit_scale.exp() * image @ text.T + module.logit_bias
    sign = 2 * torch.eye(len(z), dtype=z.dtype) - 1
    return -F.logsigmoid(sign * z).sum() / len(z)


def simclr(_: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    x = torch.cat([first, second])
    z = off_diagonal(cosines(x, x) / 0.5)
    other = (torch.arange(len(x)) + len(first)) % len(x)
    return (z.logsumexp(dim=1) - z[torch.arange(len(x)), other]).mean()


def moco(module: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    own = F.cosine_similarity(q, k)[:, None] / 0.07
    z = torch.cat([own, cosines(q, module.queue) / 0.07], dim=1)
    return (z.logsumexp(dim=1) - own[:, 0]).mean()


def hard_negatives(_: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    halves = []
    for z in (cosines(q, k) / 0.5, cosines(k, q) / 0.5):
        count, far = len(z) - 1, off_diagonal(z)
        if count == 0:
            return (q * 0).sum()
        weights = far.softmax(dim=1)
        negative = count * (weights * z.exp()).sum(dim=1)
        halves.append((1 + negative / z.diagonal().exp()).log().mean())
    return (halves[0] + halves[1]) / 2


def compatibility(_: nn.Module, new: Tensor, old: Tensor, labels: Tensor) -> Tensor:
    s = 10 * old @ new.T
    kept = torch.where(labels[:, None] == labels, 0, s)
    return (kept.logsumexp(dim=1) - s.diagonal()).mean()


def uniformity(_: nn.Module, x: Tensor) -> Tensor:
    if len(x) < 2:
        return (x * 0).sum()
    u = F.normalize(x, dim=1)
    i, j = torch.triu_indices(len(x), len(x), 1)
    return (-2 * (u[i] - u[j]).square().sum(dim=1)).exp().mean().log()


def guided_towers(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Two sides and the guide's of both, then hard negatives and theirs."""
    sizes = (n, d), (n, d), (n, 5), (n, 5), (7, d), (7, 5)
    return Call(tuple(rows(*size, generator) for size in sizes))


def gist(_: nn.Module, a: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
    a_guide, p_guide, far, far_guide = rest
    bound = cosines(a_guide, p_guide).diagonal()[:, None]
    own = torch.eye(len(a), dtype=torch.bool)
    every = [
        (cosines(a, p), ~own & (cosines(a_guide, p_guide) > bound)),
        (cosines(a, a), own | (cosines(a_guide, a_guide) > bound)),
        (cosines(p, p), own | (cosines(p_guide, p_guide) > bound)),
        (cosines(a, far), cosines(a_guide, far_guide) > bound),
    ]
    z = torch.cat([(s / 0.01).masked_fill(out, -torch.inf) for s, out in every], dim=1)
    return (z.logsumexp(dim=1) - z.diagonal()).mean()


def masked_maps(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    channels = max(1, d // 4)
    shape = (channels, d // channels)
    query, key = (rows(n, d, generator).view(n, *shape) for _ in range(2))
    mask = torch.rand(n, shape[1], generator=generator) < 0.7
    return Call((query, key, mask))


def crisp(_: nn.Module, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
    q = mask[:, None] * query
    product = torch.einsum("ncp,mcp->nm", q, key)
    norm = torch.einsum("np,mcp->nm", mask.to(key.dtype), key.square()).sqrt()
    own = q.flatten(1).norm(dim=1, keepdim=True)
    seen = mask.any(dim=1, keepdim=True)
    safe = torch.where(seen, own, 1) * torch.where(seen, norm, 1)
    return diagonal_share(torch.where(seen, product / safe, 0) / 0.07).mean()


def hard_share(_: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    z = cosines(q, k) / 0.07
    negative = off_diagonal(z)
    count = -(-3 * (len(z) - 1) // 10)
    hardest = negative.sort(dim=1, descending=True).values[:, :count]
    taken = torch.cat([z.diagonal()[:, None], hardest], dim=1)
    return (taken.logsumexp(dim=1) - z.diagonal()).mean()


def headed(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Two views of two heads."""
    return Call(tuple(rows(n, 2 * d, generator).view(n, 2, d) for _ in range(2)))


def amcl(module: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    total = first.new_zeros(())
    for head in range(first.shape[1]):
        x = F.normalize(torch.cat([first[:, head], second[:, head]]), dim=1)
        f = module.phi(x)
        s, t = x @ x.T, 1e-5 + (2 - 1e-5) * (-(f @ f.T)).sigmoid()
        i = torch.arange(len(x))
        p = (i + len(first)) % len(x)
        out = torch.eye(len(x), dtype=torch.bool)
        out[i, p] = True
        near = s.masked_fill(out, -torch.inf).topk(min(5, len(x) - 2), dim=1).indices
        s_near, t_near, own = s.gather(1, near), t.gather(1, near), t[i, p]
        pull = -s[i, p] / own + 1e-4 * (x.shape[1] / 2 * own.log() + 1 / own)
        push = (s_near / t_near).sum(dim=1) / max(near.shape[1], 1)
        total = total + (pull + push - 1e-4 * (t_near.log() + 1 / t_near).sum(dim=1)).mean()
    return total


def clustered(_: nn.Module, q: Tensor, k: Tensor, clusters: Tensor) -> Tensor:
    z = (cosines(q, k) / 0.5).masked_fill(clusters[:, None] != clusters, -torch.inf)
    return (diagonal_share(z) + diagonal_share(z.T)).mean() / 2


def decoupled(_: nn.Module, first: Tensor, second: Tensor) -> Tensor:
    if len(first) == 1:
        return (first * second).sum() * 0
    ways = []
    for a, b in ((first, second), (second, first)):
        z = torch.cat([off_diagonal(cosines(a, b)), off_diagonal(cosines(a, a))], dim=1) / 0.1
        ways.append((z.logsumexp(dim=1) - cosines(a, b).diagonal() / 0.1).mean())
    return (ways[0] + ways[1]) / 2


def aligned(_: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square().sum(dim=1).mean()


def judged(_: nn.Module, scores: Tensor, judge: Tensor) -> Tensor:
    p, q = (scores / 0.1).softmax(dim=1), (judge / 0.1).softmax(dim=1)
    forward = (q * (q.log() - (p + 1e-8).log())).sum(dim=1)
    return ((forward + (p * (p.log() - (q + 1e-8).log())).sum(dim=1)) / 2).mean()


def with_negatives(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    far = rows(2 * n, d, generator).view(n, 2, d)
    return Call((*towers(n, d, labels, generator).arguments, far))


EVERY_WAY = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def ranked_negatives(module: nn.Module, a: Tensor, p: Tensor, negatives: Tensor) -> Tensor:
    n, documents = len(a), torch.cat([p, negatives[:, 0], negatives[:, 1]])
    same = torch.eye(n, dtype=torch.bool)
    z = {
        "query_to_doc": cosines(a, documents),
        "query_to_query": cosines(a, a).masked_fill(same, -torch.inf),
        "doc_to_query": cosines(p, a),
        "doc_to_doc": cosines(p, documents).masked_fill(same.repeat(1, 3), -torch.inf),
    }
    chosen = [20 * z[way] for way in module.directions]
    own = chosen[0].diagonal()
    if module.partition_mode == "joint":
        return (torch.cat(chosen, dim=1).logsumexp(dim=1) - own).mean()
    # of one row alone two directions have no pair
    shares = [s.logsumexp(dim=1) - own for s in chosen if (s > -torch.inf).any()]
    return torch.stack(shares).sum(dim=0).mean() / len(chosen)


def gated_towers(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """Two sides, the second's classes in another order, and a gate for each two classes."""
    classes, labels = 5, labels % 4
    gates = torch.rand(classes, classes, d, generator=generator, dtype=torch.float64)
    return Call((*towers(n, d, labels, generator).arguments, gates, labels, labels.flip(0)))


def hydra(_: nn.Module, q: Tensor, k: Tensor, gates: Tensor, a: Tensor, b: Tensor) -> Tensor:
    opened = gates[a[:, None], b]
    u, v = F.normalize(q, dim=1), F.normalize(k, dim=1)
    return diagonal_share(torch.einsum("nd,md,nmd->nm", u, v, opened) / 0.07).mean()


CASES = {
    "InfoNCELoss": Case(lambda d: losses.InfoNCELoss(), info_nce, towers),
    "ClipLoss": Case(lambda d: losses.ClipLoss(), clip, towers),
    "SigLipLoss": Case(lambda d: losses.SigLipLoss(), siglip, towers),
    "SimCLRLoss": Case(lambda d: losses.SimCLRLoss(), simclr, towers),
    "MoCoLoss": Case(lambda d: losses.MoCoLoss(d, 37), moco, towers),
    "HardNegativeNCELoss": Case(lambda d: losses.HardNegativeNCELoss(), hard_negatives, towers),
    "HOCLoss": Case(lambda d: losses.HOCLoss(), compatibility, labelled_towers),
    "UniformityLoss": Case(lambda d: losses.UniformityLoss(), uniformity, unlabelled),
    "GISTEmbedLoss": Case(lambda d: losses.GISTEmbedLoss(), gist, guided_towers),
    "CriSpLoss": Case(lambda d: losses.CriSpLoss(), crisp, masked_maps),
    "HardContrastiveLoss": Case(lambda d: losses.HardContrastiveLoss(0.3), hard_share, towers),
    "AMCLLoss": Case(lambda d: losses.AMCLLoss(d, 5), amcl, headed),
    "MCLLoss": Case(lambda d: losses.MCLLoss(), clustered, labelled_towers),
    "DecoupledContrastiveLoss": Case(
        lambda d: losses.DecoupledContrastiveLoss(), decoupled, towers
    ),
    "MultipleNegativesRankingLoss": Case(
        lambda d: losses.MultipleNegativesRankingLoss(directions=EVERY_WAY),
        ranked_negatives,
        with_negatives,
    ),
    "HydraLoss": Case(lambda d: losses.HydraLoss(), hydra, gated_towers),
    "AlignmentLoss": Case(lambda d: losses.AlignmentLoss(), aligned, towers),
    "UniMEKLLoss": Case(lambda d: losses.UniMEKLLoss(), judged, towers),
}
