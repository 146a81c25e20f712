"""What D x D Grams tell of a set of rows: linear CKA and log-det coding rates."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_losses.base import plans, validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, no_autocast, row_dtype
from fused_losses.base.products import product
from fused_losses.base.unit_norm import unit
from fused_losses.base.validation import check_matrix, describe, number


def cka(
    x: Tensor,  # [N, Dx]
    y: Tensor,  # [N, Dy]
) -> Tensor:
    """Linear centred kernel alignment of two features of the same samples, in [0, 1].

        |Y^T X|^2 / (|X^T X| |Y^T Y|),    Frobenius norms, columns less their means

    From D x D products in float64: the N x N kernels are not needed. Features that do not vary have
    CKA 0. Returns float32 (float64 for float64 inputs); differentiable, again too. Raises
    ValueError, TypeError for bad arguments. Time O(N (Dx + Dy)^2); memory O(N (Dx + Dy) +
    (Dx + Dy)^2). Paper: Kornblith et al., 2019.
    """
    check_matrix("x", x, "[N, Dx]")
    check_matrix("y", y, "[N, Dy]")
    if x.shape[0] != y.shape[0]:
        raise ValueError(f"y: expected {x.shape[0]} rows to match x, got {describe(y)}")
    y = validation.beside("x", x, "y", y)
    with no_autocast(x.device):
        rows = [_varying(t) for t in (x, y)]
        grams = [product(a.mT, b.mT).square().sum() for a, b in (rows, rows[:1] * 2, rows[1:] * 2)]
        some = ~((grams[1] == 0) | (grams[2] == 0))
        # roots apart: a product of fourth powers leaves the range
        below = torch.where(some, grams[1], 1).sqrt() * torch.where(some, grams[2], 1).sqrt()
        return torch.where(some, grams[0] / below, 0 * grams[0]).to(accumulate_dtype(x.dtype))


def _varying(t: Tensor) -> Tensor:
    """Columns less their means; what rounding leaves of a constant one is nothing."""
    wide = t.to(row_dtype(t.device))
    if not t.shape[0]:
        return wide
    moved = wide - wide.mean(dim=0)
    # its gradient is 0, and not its curve
    return torch.where((wide == wide[:1]).all(dim=0), moved - moved.detach(), moved)


def coding_rate(
    x: Tensor,  # [N, D]
    *,
    labels: Tensor | None = None,  # [N]
    membership: Tensor | None = None,  # [N, K]
    eps: float | Tensor = 0.5,
    normalize: bool = False,
) -> Tensor:
    """How many nats code rows as they are (`CodingRateLoss`: unit rows) up to eps, or their parts.

        R   = log det(I + D / (N eps^2) X^T X) / 2
        R_c = sum_k n_k / (2 N) log det(I + D / (n_k eps^2) X^T diag(p_k) X),    n_k = sum_i p_ik

    Args:
        x: [N, D], of norm 1 in the papers (normalize=True).
        labels: [N] integers: R_c of classes. membership: [N, K] >= 0: R_c of soft ones, as the
            plan of `sinkhorn` carries them over. Neither: R. A part without rows adds 0.
        eps: > 0; a number or a scalar tensor, which may need a gradient.

    MCR^2 is R - R_c. Returns float32 (float64 for float64 inputs), 0 of no rows; differentiable,
    again too. Raises ValueError, TypeError for bad arguments. With labels the sizes of classes are
    read on the host. Time O(N D^2 + K D^3), with membership O(K N D^2); memory O(N D + K D^2). In
    float64. Papers: Yu et al., 2020 (MCR^2); Ding et al., 2023.
    """
    check_matrix("x", x, "[N, D]")
    width = number("eps", eps, x)
    if labels is not None and membership is not None:
        raise ValueError("labels, membership: expected at most one of them, got both")
    n, d = x.shape
    with no_autocast(x.device):
        dtype = accumulate_dtype(x.dtype)
        rows = (unit(x) if normalize else x).to(row_dtype(x.device))
        factor = d / width.square()
        if membership is not None:
            check_matrix("membership", membership, "[N, K]")
            if membership.shape[0] != n:
                raise ValueError(
                    f"membership: expected {n} rows to match x, got {describe(membership)}"
                )
            validation.check_device("x", x, "membership", membership)
            weights = membership.to(rows.dtype)
            parts = [(rows, w) for w in weights.unbind(dim=1)]
        elif labels is not None:
            validation.check_integers("labels", labels, (n,), x)
            if plans.explaining() or labels.is_meta:
                # as many of the largest Grams as there can be
                sizes = [d or 1] * (n // (d or 1)) + [n % (d or 1)]
            else:
                sizes = labels.unique(return_counts=True)[1].tolist()
            parts = [(part, None) for part in rows[labels.argsort()].split(sizes)]
        else:
            parts = [(rows, None)]
        total = (rows.sum() + factor) * 0
        for part, weight in parts:
            mass = part.new_full((), part.shape[0]) if weight is None else weight.sum()
            safe = torch.where(mass > 0, mass, 1)
            weighed = part if weight is None else part * weight[:, None]
            # of the smaller side: both have this determinant
            if weight is None and part.shape[0] < d:
                gram = product(part, part)
            else:
                gram = product(part.mT, weighed.mT)
            one = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
            root, _ = torch.linalg.cholesky_ex(one + factor / safe * gram)
            total = total + mass / max(n, 1) * root.diagonal().log().sum()
        return total.to(dtype)


_paired = lambda f, t: f(t.x, t.y[: len(t.x)])
examples(cka, _paired)
examples(
    coding_rate,
    lambda f, t: f(t.x),
    {
        "": dict(normalize=True),
        "labels": lambda t: dict(labels=t.labels),
        "membership": lambda t: dict(membership=t.z[: len(t.x)].square()),
    },
)
