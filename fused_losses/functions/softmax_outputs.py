"""What a softmax over classes knows of each row, with gradients: for losses of one's own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import against, joined, no_autocast
from fused_losses.base.parameters import check_above
from fused_losses.base.validation import NO_TARGET, describe
from fused_losses.functions.class_rows import ClassOptions, ClassRows, class_rows
from fused_losses.functions.class_values import check_floats
from fused_losses.functions.positions import over_positions
from fused_losses.primitives.class_rules.bounded import targets
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import class_statistics


class SoftmaxOutputs(NamedTuple):
    """Of each row, differentiable, in the accumulation dtype; 0 of an ignored row."""

    logsumexp: Tensor  # [N] of the scores
    log_prob: Tensor  # [N] of the label
    entropy: Tensor | None  # [N]; None: not asked for
    selected: Tensor | None  # [N, S] log-probabilities; None: none asked for


@over_positions
def softmax_outputs(
    embeddings: Tensor,  # [N, D] or [..., D]
    weight: Tensor,  # [C, D]
    labels: Tensor,  # [N] or [...]
    *,
    selected: Tensor | None = None,  # [N, S] or [..., S]
    entropy: bool = False,
    scale: float = 1.0,
    normalize: bool = False,
    softcap: float | None = None,
    classes: Tensor | None = None,  # [K]
    ignore_index: int = -100,
    precision: str = "fp32",
    backend: str | None = None,
) -> SoftmaxOutputs:
    """Logsumexp, log-probabilities and entropy of a softmax over C classes, without N x C scores.

        z_j = scale <x, w_j>,   or softcap tanh(scale <x, w_j> / softcap)
        log sum_j e^{z_j},   log p_y,   -sum_j p_j log p_j,   log p_s of chosen classes

    Each may be part of a loss: a Z-loss, an entropy bonus, ratios of policies, distillation on a
    few classes.

    Args:
        embeddings, weight, labels, normalize, classes, ignore_index, precision: as in
            `margin_softmax`.
        selected: [N, S] int64 ids of classes, among `classes` where these are given;
            `ignore_index`: none there, 0.
        entropy: whether to give it; a second sweep, its rule in PyTorch on tiles.
        scale: > 0. softcap: > 0 or None; its rule is in PyTorch on tiles, too.

    Raises ValueError, TypeError, IndexError for bad arguments; RuntimeError when the backend cannot
    run the call. Time O(N C D), twice that with entropy; memory O(N D + N S D) and a tile. Any
    number of derivatives on backend "reference", else one. The same bits in every run on one number
    of threads.
    """
    check_floats(check_above, scale=scale)
    if softcap is not None:
        check_floats(check_above, softcap=softcap)
    options = ClassOptions(normalize, ignore_index, classes, precision, "none", backend)
    rows = class_rows(embeddings, weight, labels, options)
    chosen = None if selected is None else _checked(selected, rows, ignore_index)
    with no_autocast(embeddings.device):
        return _outputs(rows, chosen, entropy, float(scale), softcap)


def _outputs(
    rows: ClassRows, chosen: Tensor | None, entropy: bool, scale: float, softcap: float | None
) -> SoftmaxOutputs:
    if softcap is None:
        others, own = rows.statistics(scale)
    else:
        found = class_statistics(
            _rule(rows, "capped_softmax", [scale, softcap]), backend=rows.options.backend
        )
        others, own = found.statistics[0], _capped(scale * found.targets[:, 0], softcap)
    whole = joined(own, others)
    log_prob = -against(own, others)
    spread = picked = None
    if entropy:
        spread = _entropy(rows, whole, log_prob, scale, softcap)
    if chosen is not None:
        z = targets(rows.x, rows.weight, chosen, 1, 0.0, rows.options.normalize)
        picked = torch.where(chosen < 0, 0, _capped(scale * z, softcap) - whole[:, None])
    blank = [
        None if each is None else torch.where(_like(rows.valid, each), each, 0).to(rows.x.dtype)
        for each in (whole, log_prob, spread, picked)
    ]
    return SoftmaxOutputs(*blank)  # pyright: ignore[reportArgumentType] (the first two are no None)


def _like(valid: Tensor, each: Tensor) -> Tensor:
    return valid[:, None] if each.dim() == 2 else valid


def _entropy(
    rows: ClassRows, whole: Tensor, log_prob: Tensor, scale: float, softcap: float | None
) -> Tensor:
    """sum_j e^{z_j - L} (L - z_j): the rule takes L, and what L's slope is worth comes after."""
    reference = rows.options.backend == "reference"
    used = whole if reference else whole.detach()
    used = used.to(rows.x.dtype).to(whole.dtype)  # as the rule takes it
    p = _rule(rows, "entropy", [scale, softcap or 0.0])._replace(values=used[None])
    of_others = class_statistics(p, backend=rows.options.backend).statistics[0]
    share = log_prob.exp()
    slope = (-torch.expm1(log_prob) - of_others).detach()
    return of_others + (whole - used) * slope - share * log_prob


def _rule(rows: ClassRows, rule: str, params: list[float]) -> ClassInputs:
    p = rows.options
    return ClassInputs(
        rows.x,
        rows.weight,
        rows.labels[:, None],
        p.classes,
        rule=rule,
        params=params,
        normalize=p.normalize,
        precision=p.precision,
    )


def _capped(z: Tensor, softcap: float | None) -> Tensor:
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def _checked(selected: Tensor, rows: ClassRows, ignore_index: int) -> Tensor:
    """[N, S] int64, NO_TARGET: none."""
    n, c = rows.x.shape[0], rows.weight.shape[0]
    if not isinstance(selected, Tensor) or selected.dim() != 2 or selected.shape[0] != n:
        got = describe(selected) if isinstance(selected, Tensor) else type(selected).__name__
        raise ValueError(f"selected: expected class ids [{n}, S], got {got}")
    flat = selected.flatten()
    validation.check_index_vector("selected", flat, None, rows.x)
    flat = flat.long()
    if not (torch.compiler.is_compiling() or flat.is_cuda or flat.is_meta):
        named = flat[flat != ignore_index]
        validation.check_class_ids("selected", named, c)
        classes = rows.options.classes
        if classes is not None:
            strays = named[~torch.isin(named, classes)]
            if len(strays):
                raise ValueError(f"selected: expected ids among `classes`, got {int(strays[0])}")
    flat = torch.where(flat == ignore_index, NO_TARGET, flat)
    return flat.view_as(selected)


examples(
    softmax_outputs,
    lambda f, t: f(t.x, t.w, t.targets),
    {
        "": {},
        "entropy": dict(entropy=True, scale=4.0, normalize=True),
        "capped": lambda t: dict(softcap=3.0, selected=torch.stack([t.targets, t.targets // 2], 1)),
    },
)
