"""The best classes, scores of chosen ones, clean sub-centres: sharded, against the whole table."""

from __future__ import annotations

import math
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fused_losses import class_losses
from fused_losses.centers import ClassCenters, SubCenters, class_scores, top_classes

C, D, K, N = 23, 6, 3, 9
COUNTS = {1: [9], 2: [4, 5], 3: [5, 0, 4]}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sampled, behind": dict(
        sample_rate=0.3, optimizer="sgd", optimizer_options=dict(lr=0.5, weight_decay=0.3)
    ),
    "sub-centres": dict(sub_centers=K),
    "pooled": dict(sub_centers=K, margin=class_losses.SoftTriple(gamma=0.2)),
    "products": dict(normalize=False),
}


def head(name: str) -> ClassCenters:
    made = ClassCenters(
        C, D, dtype=torch.float64, scale=16.0, seed=1, chunk_bytes=4 * D * 8, **HEADS[name]
    )
    if made.optimizer is not None:
        for step in range(3):
            x, y = batch(step)
            made(*own(x, y)).backward()
    return made


def batch(step: int = 7) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, dtype=torch.float64, generator=draw)
    y = torch.randint(0, C, (N,), generator=draw)
    y[2] = -100
    return x, y


def own(*rows: Tensor) -> list[Tensor]:
    ranks = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if ranks else (0, 1)
    start = sum(COUNTS[world][:rank])
    return [t[start : start + COUNTS[world][rank]] for t in rows]


def answers(_: int) -> dict[str, Any]:
    x, y = batch()
    found: dict[str, Any] = {}
    for name in HEADS:
        made = head(name)
        best = {k: top_classes(made, *own(x), k=k) for k in (1, 5, C)}
        chosen = class_scores(made, *own(x), torch.tensor([22, 0, 7, 7]))
        found[name] = dict(best=best, chosen=chosen, weight=made.weight.detach())
    centers = SubCenters(head("sub-centres"))
    for step in range(4):
        centers.add(*own(*batch(step)))
    noisy = centers.noisy(*own(x, y))
    rows = centers.main_rows()
    return {**found, "sub": dict(counts=centers.counts, noisy=noisy, rows=rows)}


def literal_scores(name: str, weight: Tensor, x: Tensor) -> Tensor:
    centers = weight.reshape(C, -1, D)
    if HEADS[name].get("normalize", True):
        x = x / x.norm(dim=1, keepdim=True)
        centers = centers / centers.norm(dim=2, keepdim=True)
    products = torch.einsum("nd,ckd->nck", x, centers)
    if name == "pooled":
        shares = (products / 0.2).exp()
        return (shares * products).sum(2) / shares.sum(2)
    return products.amax(2)


@pytest.mark.processes
@pytest.mark.parametrize("world", [1, 2, 3])
def test_scores_are_those_of_the_whole_table(world: int) -> None:
    found = processes.run(world, answers)
    x, y = batch()
    for name in HEADS:
        weight = torch.cat([ranks[name]["weight"] for ranks in found])
        expected = literal_scores(name, weight, x)
        for k in (1, 5, C):
            values = torch.cat([ranks[name]["best"][k].scores for ranks in found])
            ids = torch.cat([ranks[name]["best"][k].classes for ranks in found])
            order = expected.argsort(dim=1, descending=True)[:, :k]
            assert torch.equal(ids, order), name
            torch.testing.assert_close(values, expected.gather(1, order), rtol=1e-12, atol=1e-12)
        chosen = torch.cat([ranks[name]["chosen"] for ranks in found])
        torch.testing.assert_close(chosen, expected[:, [22, 0, 7, 7]], rtol=1e-12, atol=1e-12)
    weight = torch.cat([ranks["sub-centres"]["weight"] for ranks in found])
    counts = torch.zeros(C, K, dtype=torch.int64)
    for step in range(4):
        for row, label in zip(*batch(step), strict=True):
            if label >= 0:
                centers = weight[label] / weight[label].norm(dim=1, keepdim=True)
                counts[label, int((centers @ row).argmax())] += 1
    assert torch.equal(torch.cat([ranks["sub"]["counts"] for ranks in found]), counts)
    main = weight[torch.arange(C), counts.argmax(dim=1)]
    assert torch.equal(torch.cat([ranks["sub"]["rows"] for ranks in found]), main)
    angle = torch.nn.functional.cosine_similarity(x, main[y.clamp_min(0)]).acos()
    noisy = (angle > math.radians(75)) & (y >= 0)
    assert noisy.any() and not noisy.all()
    assert torch.equal(torch.cat([ranks["sub"]["noisy"] for ranks in found]), noisy)


def test_bad_questions() -> None:
    made, (x, y) = head("plain"), batch()
    for k in (0, C + 1):
        with pytest.raises(ValueError, match=f"k: .*{C}"):
            top_classes(made, x, k)
    with pytest.raises(ValueError, match=r"embeddings: expected \[n, 6\]"):
        top_classes(made, x[:, :3])
    with pytest.raises(IndexError, match="classes"):
        class_scores(made, x, torch.tensor([0, C]))
    with pytest.raises(ValueError, match="sub_centers > 1"):
        SubCenters(made)
    with pytest.raises(ValueError, match="degrees"):
        SubCenters(head("sub-centres")).noisy(x, y, degrees=180)
