"""More losses over classes for the draws, one label a row: calls, and literal formulas.

The formulas follow the papers and the authors' code and use nothing of the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from margin_draws import softplus
from pair_cases import Case
from pair_rows import Inputs, proxies, unit
from torch import Tensor

import fused_losses.functional as fl
from fused_losses import class_losses as cl

Ends = Callable[[Tensor, Tensor], Tensor]  # scores [N, C], one-hot labels -> a loss a row


def weighted(n: int, m: int, d: int) -> Inputs:
    """Rows, classes, and weights of rows, of which one is 0."""
    t = proxies(n, m, d)
    t.counts = torch.rand(n)
    t.counts[0] += 0.5
    t.counts[1 : n // 2 + 1 : 2] = 0
    return t


def _own(z: Tensor, hot: Tensor) -> Tensor:
    return torch.where(hot, z, 0).sum(1)


def _apart(z: Tensor, hot: Tensor, threshold: float) -> Tensor:
    """z_j - z_y, and the threshold but for the label."""
    above = z - _own(z, hot)[:, None]
    return torch.where(hot, 0, above + threshold)


def cross_entropy(z: Tensor, hot: Tensor) -> Tensor:
    return z.logsumexp(1) - _own(z, hot)


def nce(z: Tensor, hot: Tensor) -> Tensor:
    log_p = z - z.logsumexp(1, keepdim=True)
    if z.shape[1] == 1:
        return 0 * z.sum(1)
    # of one class more than others: its own term from the others' sum, where p is near 1
    others = torch.where(hot, -torch.inf, z).logsumexp(1)
    own = softplus(others - _own(z, hot))
    return own / (own - torch.where(hot, 0, log_p).sum(1))


def mse(z: Tensor, hot: Tensor) -> Tensor:
    others = torch.where(hot, -torch.inf, z).logsumexp(1)
    rest = torch.sigmoid(others - _own(z, hot))
    return rest**2 + torch.where(hot, 0, z.softmax(1) ** 2).sum(1)


def active_passive(z: Tensor, hot: Tensor) -> Tensor:
    others = torch.where(hot, -torch.inf, z).logsumexp(1)
    rest = torch.sigmoid(others - _own(z, hot))
    return 0.5 * nce(z, hot) + 2.0 * rest * (4 + 2 - rest) / 2


def ldr(threshold: float, lam: float) -> Ends:
    def loss(z: Tensor, hot: Tensor) -> Tensor:
        moved = _apart(z, hot, threshold) / lam
        return lam * (moved.logsumexp(1) - math.log(z.shape[1]))

    return loss


def mapped(kind: str, threshold: float, lam: float) -> Ends:
    def loss(z: Tensor, hot: Tensor) -> Tensor:
        return ldr(threshold, lam)(mean_of_one(softplus(z) if kind == "softplus" else z), hot)

    return loss


def crammer_singer(z: Tensor, hot: Tensor) -> Tensor:
    return _apart(z, hot, 0.3).clamp_min(0).amax(1)


def weston_watkins(z: Tensor, hot: Tensor) -> Tensor:
    return _apart(z, hot, 0.3).clamp_min(0).mean(1)


def capped(z: Tensor, hot: Tensor) -> Tensor:
    z = 5 * torch.tanh(z / 5)
    return cross_entropy(z, hot) + 0.25 * z.logsumexp(1) ** 2


def with_square(z: Tensor, hot: Tensor) -> Tensor:
    return cross_entropy(z, hot) + 0.25 * z.logsumexp(1) ** 2


def capped_gce(z: Tensor, hot: Tensor) -> Tensor:
    z = 5 * torch.tanh(z / 5)
    return -torch.expm1(-0.5 * cross_entropy(z, hot)) / 0.5


def mean_of_one(u: Tensor) -> Tensor:
    whole = u.abs().mean(1, keepdim=True)
    return torch.where(whole == 0, 0, u / torch.where(whole == 0, 1, whole))


def aldr(z: Tensor, hot: Tensor, kind: str = "l1") -> Tensor:
    """From lambda 0.8, one step."""
    count = z.shape[1]
    u = mean_of_one(softplus(z) if kind == "softplus" else z)
    q = (u.detach() / 0.8).softmax(1) + 1e-5
    q = q / q.sum(1, keepdim=True)
    divergence = (q * (count * q).log()).sum(1)
    lam = 0.8 - 0.8 * divergence / (3 * math.log(count)) if count > 1 else 0.8 + 0 * divergence
    moved = _apart(u, hot, 0.5) / lam[:, None]
    slack = 3 * math.log(count) / (2 * 0.8) * (lam - 0.8) ** 2
    return lam * (moved.logsumexp(1) - math.log(count)) - slack


LOSSES: dict[str, tuple[Any, Ends]] = {
    "NCE": (cl.NCE(scale=16.0), nce),
    "MSE": (cl.MSE(scale=16.0), mse),
    "ActivePassive": (
        cl.ActivePassive(cl.AGCE(2.0, 2.0), alpha=0.5, beta=2.0, scale=16.0),
        active_passive,
    ),
    "LDR": (cl.LDR(threshold=1.0, lam=0.5, scale=8.0), lambda z, h: ldr(1.0, 0.5)(z / 2, h)),
    "MappedLDR_softplus": (
        cl.MappedLDR(threshold=1.0, lam=0.5, scale=16.0),
        mapped("softplus", 1.0, 0.5),
    ),
    "MappedLDR_l1": (cl.MappedLDR(1.0, 0.5, "l1", scale=16.0), mapped("l1", 1.0, 0.5)),
    "CrammerSinger": (cl.CrammerSinger(threshold=0.3, scale=16.0), crammer_singer),
    "WestonWatkins": (cl.WestonWatkins(threshold=0.3, scale=16.0), weston_watkins),
    "Softmax_capped": (cl.Softmax(None, 16.0, z_loss=0.25, softcap=5.0), capped),
    "GCE_capped": (cl.GCE(0.5, scale=16.0, softcap=5.0), capped_gce),
}


def mean(ends: Ends, plain: bool = False, counts: bool = False) -> Callable[[Inputs], Tensor]:
    """Of 16 cosines, or of products as they are; by the weights of rows, or all alike."""

    def formula(t: Inputs) -> Tensor:
        z = t.x @ t.w.T if plain else 16 * (unit(t.x) @ unit(t.w).T)
        each = ends(z, t.targets[:, None] == torch.arange(len(t.w)))
        if not counts:
            return each.mean()
        w = t.counts.to(each)
        total = w.sum()
        return torch.where(w > 0, each * w, 0).sum() / (total if total > 0 else 1)

    return formula


def _of(function: str, **options: Any) -> Callable[..., Tensor]:
    def call(t: Inputs, **more: Any) -> Tensor:
        weights = {"row_weight": t.counts} if hasattr(t, "counts") else {}
        return getattr(fl, function)(t.x, t.w, t.targets, **options, **weights, **more)

    return call


def _aldr(t: Inputs, map: str = "l1", **more: Any) -> Tensor:
    table = cl.ALDR(len(t.x), threshold=0.5, lam=0.8, alpha=3.0, map=map, scale=16.0)
    return table(t.x, t.w, t.targets, torch.arange(len(t.x)), **more)


def outputs(t: Inputs, cap: float | None = None) -> Tensor:
    """Of 16 cosines: logsumexp, the label's log-probability, entropy, two classes' logarithms."""
    z = 16 * (unit(t.x) @ unit(t.w).T)
    z = z if cap is None else cap * torch.tanh(z / cap)
    hot = t.targets[:, None] == torch.arange(len(t.w))
    lse = z.logsumexp(1)
    others = torch.where(hot, -torch.inf, z).logsumexp(1)
    log_p = z - lse[:, None]
    chosen = torch.stack([t.targets, torch.zeros_like(t.targets)], 1)
    columns = [lse, -softplus(others - _own(z, hot)), -(log_p.exp() * log_p).sum(1)]
    return torch.cat([torch.stack(columns, 1), log_p.gather(1, chosen)], 1)


def _outputs(cap: float | None) -> Callable[..., Tensor]:
    def call(t: Inputs, **more: Any) -> Tensor:
        chosen = torch.stack([t.targets, torch.zeros_like(t.targets)], 1)
        options: dict[str, Any] = dict(scale=16.0, normalize=True, entropy=True, softcap=cap)
        found = fl.softmax_outputs(t.x, t.w, t.targets, selected=chosen, **(options | more))
        assert found.entropy is not None and found.selected is not None
        columns = torch.stack([found.logsumexp, found.log_prob, found.entropy], 1)
        return torch.cat([columns, found.selected], 1)

    return call


ROWS = ("x", "w")
_gce = cl.GCE(0.5, scale=16.0)
_by_gce = lambda z, h: -torch.expm1(-0.5 * cross_entropy(z, h)) / 0.5
_plus = dict(z_loss=0.25)
DRAWN = [
    *(
        Case(
            f"one_label_{name}",
            proxies,
            _of("class_loss", loss=loss),
            mean(ends),
            ROWS,
            function=fl.class_loss,
        )
        for name, (loss, ends) in LOSSES.items()
    ),
    *(
        Case(
            f"one_label_ALDR{name}",
            proxies,
            partial(_aldr, map=map),
            mean(partial(aldr, kind=map)),
            ROWS,
            function=fl.class_loss,
        )
        for name, map in (("", "l1"), ("_softplus", "softplus"))
    ),
    Case(
        "class_loss_weighted",
        weighted,
        _of("class_loss", loss=_gce),
        mean(_by_gce, counts=True),
        ROWS,
        function=fl.class_loss,
    ),
    Case(
        "margin_softmax_weighted",
        weighted,
        _of("margin_softmax", margin=None, scale=16.0, **_plus),
        mean(with_square, counts=True),
        ROWS,
        function=fl.margin_softmax,
    ),
    Case(
        "margin_softmax_capped",
        weighted,
        _of("margin_softmax", margin=None, scale=16.0, softcap=5.0, **_plus),
        mean(capped, counts=True),
        ROWS,
        function=fl.margin_softmax,
    ),
    Case(
        "linear_cross_entropy_weighted",
        weighted,
        _of("linear_cross_entropy", **_plus),
        mean(with_square, plain=True, counts=True),
        ROWS,
        function=fl.linear_cross_entropy,
    ),
    Case(
        "linear_cross_entropy_capped",
        proxies,
        _of("linear_cross_entropy", softcap=5.0, **_plus),
        mean(capped, plain=True),
        ROWS,
        function=fl.linear_cross_entropy,
    ),
    *(
        Case(
            f"softmax_outputs{name}",
            proxies,
            _outputs(cap),
            lambda t, cap=cap: outputs(t, cap),
            ROWS,
            function=fl.softmax_outputs,
        )
        for name, cap in (("", None), ("_capped", 5.0))
    ),
]
