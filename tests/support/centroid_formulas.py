"""Triplets of rows and centroids, written out; nothing of the package is used."""

from __future__ import annotations

import torch
from pair_rows import Inputs
from row_loss_formulas import hinged, members, single, zero
from torch import Tensor


def centroids(
    t: Inputs, centroid_anchors: bool = True, margin: float | None = 0.5, total: bool = False
) -> Tensor:
    """The rounds one after another."""
    labels = t.labels.tolist()
    rows = {c: [i for i, own in enumerate(labels) if own == c] for c in labels}
    losses, x = [], single(t.x)
    for r in range(max(len(v) for v in rows.values())):
        taking = [c for c, v in rows.items() if len(v) > max(r, 1)]
        if not taking:
            continue
        queries = torch.stack([x[rows[c][r]] for c in taking])
        means = torch.stack(
            [x[[i for k, i in enumerate(rows[c]) if k != r]].mean(0) for c in taking]
        )
        if centroid_anchors:
            anchors = others = torch.cat([queries, means])
            own = torch.tensor(taking * 2)
            near, far = members(own)
        else:
            anchors, others = queries, means
            own = torch.tensor(taking)
            near, far = members(own, own)
        squared = (anchors[:, None] - others).square().sum(-1)
        d = squared.clamp_min(1e-12).sqrt()
        for i, row in enumerate(d):
            if far[i]:
                gap = row[near[i]].max() - row[far[i]].min()
                losses.append(hinged(gap, margin))
    if not losses:
        return zero(t)
    return (torch.stack(losses).sum() if total else torch.stack(losses).mean()) + zero(t)
