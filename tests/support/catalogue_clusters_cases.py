"""Rows of the catalogue: losses of rows and their clusters, neighbours and atoms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from catalogue_table import Call, Case
from torch import Tensor, nn

from fused_losses import losses


def rows_alone(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    return Call((torch.randn(n, d, generator=generator, dtype=torch.float64),))


def with_logits(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return Call((x, torch.randn(n, 4, generator=generator, dtype=torch.float64)))


def with_support(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    x, support = (torch.randn(k, d, generator=generator, dtype=torch.float64) for k in (n, 8))
    return Call((x, labels.remainder(3), support, torch.arange(8).remainder(3)))


def prototypes(_: nn.Module, x: Tensor, labels: Tensor, support: Tensor, known: Tensor) -> Tensor:
    means = torch.stack([support[known == c].mean(dim=0) for c in range(3)])
    return F.cross_entropy(-(x[:, None] - means).square().sum(dim=2), labels)


def depict(module: nn.Module, x: Tensor) -> Tensor:
    p = (x @ module.weight.T + module.bias).softmax(dim=1)
    q = (p / p.sum(dim=0).sqrt()).detach()
    return -((q / q.sum(dim=1, keepdim=True)) * p.log()).sum(dim=1).mean()


def attracted(_: nn.Module, x: Tensor, logits: Tensor) -> Tensor:
    p, unit = logits.softmax(dim=1), F.normalize(x.detach(), dim=1)
    loss = (x * 0).sum()
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        others.sort(key=lambda j: (-float(unit[i] @ unit[j]), j))
        near = sum((p[i] @ p[j].detach() for j in others[:5]), loss * 0)
        loss = loss + sum((p[i] @ p[m] for m in others), loss * 0) - near
    return loss / len(x)


def autoencoder(d: int) -> nn.Module:
    module = losses.TopKSparseAutoencoderLoss(4 * d, d, 2, aux_k=3)
    # half of them died long ago
    module.quiet_rows[::2] = 2**40
    with torch.no_grad():
        module.latent_bias.uniform_(-0.2, 0.2)
        module.pre_bias.uniform_(-0.2, 0.2)
    return module


def reconstructed(module: nn.Module, x: Tensor) -> Tensor:
    scores = (x - module.pre_bias) @ module.encoder.T + module.latent_bias

    def decoded(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, index = scores.topk(k, dim=1)
        z = torch.zeros_like(scores).scatter(1, index, values.relu())
        return z @ module.decoder, z

    back, z = decoded(scores, 2)
    error = x - back - module.pre_bias
    loss = error.square().mean()
    dead = (module.quiet_rows + len(x) > 10_000_000) & ~(z > 0).any(dim=0)
    if dead.any():
        rest, _ = decoded(scores.masked_fill(~dead, -torch.inf), 3)
        loss = loss + (error.detach() - rest).square().mean() / 32
    return loss


CASES = {
    "DEPICTLoss": Case(lambda d: losses.DEPICTLoss(5, d), depict, rows_alone, gradcheck=False),
    "AaDLoss": Case(lambda d: losses.AaDLoss(), attracted, with_logits, gradcheck=False),
    "PrototypicalLoss": Case(lambda d: losses.PrototypicalLoss(3), prototypes, with_support),
    # what the dead latents learn from is not differentiated
    "TopKSparseAutoencoderLoss": Case(autoencoder, reconstructed, rows_alone, gradcheck=False),
}
