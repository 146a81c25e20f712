"""The k best columns of each row, streamed: nearest neighbours, hard negatives, retrieval.

The primitive is `select`: scores <x, y>, their cosine or |x - y|^2. A product screens the pairs,
and whatever a bound on its rounding cannot rule out is scored again in float64: the answer is that
of the scores in float64 on every backend and at every precision of the screen, with ties going to
the lowest index.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.numerics import no_autocast, row_dtype
from fused_losses.primitives.op import StreamedOp
from fused_losses.primitives.topk.inputs import MOST, SCHEMA, QuantizedRows, TopkInputs
from fused_losses.primitives.topk.rotation import drawn, rotated, rounding


def quantize_rows(
    y: Tensor, *, rows: int = 8_192, rotate: bool | None = None, seed: int = 0
) -> QuantizedRows:
    """Rounds rows [M, D] to int8, each with its own scale, a run of `rows` at a time.

    As `y` of `pairwise_topk` they are the bank itself; as `screen` they are read in the place of a
    larger bank, whose rows are then read for the few candidates only: the answer stays exact.

    Args:
        y: [M, D] of any floating point type, or a view of a file.
        rows: how many at a time, at least 1.
        rotate: whether rows are first turned by a random rotation, which spreads the length of
            those that a few entries hold, as of real embeddings, and so lowers the rounding; None:
            where 256 rows say that it lowers it by a tenth.
        seed: of the rotation; its signs stay with the codes.

    Raises ValueError, TypeError unless y is a floating point matrix, and of options that do not
    fit. Time O(M D), and O(M D sqrt(D)) for a rotation; memory of a run's rows in float64.
    """
    validation.check_matrix("y", y, "[M, D]")
    validation.check_count("rows", rows)
    if isinstance(seed, bool) or not isinstance(seed, Integral):
        raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
    if rotate is not None and not isinstance(rotate, bool):
        raise TypeError(f"rotate: expected True, False or None, got {rotate!r}")
    signs = None
    if rotate is not False:
        signs = drawn(y.shape[1], int(seed)).to(y.device)
        if rotate is None and not _rounds_less(y, signs):
            signs = None
    m, d = y.shape
    codes = torch.empty((m, d), dtype=torch.int8, device=y.device)
    scale = torch.empty(m, dtype=torch.float32, device=y.device)
    error = torch.empty_like(scale)
    for i in range(0, m, rows):
        run = slice(i, i + rows)
        codes[run], scale[run], error[run] = _quantized(y[run], signs)
    return QuantizedRows(codes, scale, error, signs)


def _quantized(y: Tensor, signs: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, their scale and the most that rows [M, D] are from them."""
    d, dtype = y.shape[1], row_dtype(y.device)
    part = y.to(dtype) if signs is None else rotated(y.to(dtype), signs)
    step = (part.abs().amax(dim=1) / 127 if d else part.sum(dim=1)).float()
    wide = step.to(dtype)[:, None]
    code = torch.where(wide > 0, part / torch.where(wide > 0, wide, 1), 0).round()
    code = code.nan_to_num(0, 127, -127).clamp(-127, 127)
    error = (part - code * wide).square().sum(dim=1).sqrt()
    if signs is not None:
        # what the rotation rounds of the row and of a query that it meets
        length = torch.linalg.vector_norm(part, dim=1) + error
        error = error + 4 * rounding(d, len(signs), dtype) * length
    # a bound must not be rounded down
    return code.to(torch.int8), step, (error * (1 + 1e-6)).float()


def _rounds_less(y: Tensor, signs: Tensor) -> bool:
    """Whether some rows of y lose less by rounding when they are rotated."""
    if y.is_meta or not y.numel():
        return False
    sample = y[:: max(1, len(y) // 256)]
    plain, turned = (_quantized(sample, s)[2].double() for s in (None, signs))
    some = plain.isfinite() & turned.isfinite() & (plain > 0)
    return bool(torch.where(some, turned / plain, 0).sum() < 0.9 * some.sum())


def select(inputs: TopkInputs, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The k best columns of each row: keys [N, k] float64 and indices [N, k] int64, no gradient.

    keys are <x, y>, the cosine or |x - y|^2, best first; where a row has fewer than k candidates
    the index is -1 and the key NaN. A pair whose score is NaN is no candidate. Time O(N M D), half
    for the kernels where symmetric with skip_self; memory O(N k) and a few blocks.
    """
    precision = "bf16" if inputs.screen == "bf16" else "fp32"
    # a screen of float64 rows may be narrow: the answer is not
    dtype = torch.float32 if inputs.x.dtype == torch.float64 else inputs.x.dtype
    name, _ = backends.choose(backend, inputs.x.device, dtype, precision, "topk", inputs.x.shape[1])
    if inputs.k > MOST and name in ("triton", "cuda"):
        if backends.requested(backend) != "auto":
            raise RuntimeError(
                f"backend={name!r} cannot run this call: its kernels hold k <= {MOST}, got "
                f"k={inputs.k}; bounded and reference take any"
            )
        name = "bounded"
    inputs = inputs._replace(x=inputs.x.detach(), y=inputs.y.detach())
    with no_autocast(inputs.x.device):
        if name == "reference":
            return backends.module("topk", "reference").select(inputs)
        return PAIR_TOPK(name, *inputs)


def best_screen(x: Tensor, backend: str | None) -> str:
    """The fastest products to screen with that can run here."""
    refused = backends.reasons_against("cpu", x.device, torch.float32, "bf16")
    return "bf16" if backends.requested(backend) in ("auto", "cpu") and not refused else "fp32"


# ---- the op -------------------------------------------------------------------------------------


class PairTopkOp(StreamedOp):
    """`select` on a backend."""

    name, primitive = "pair_topk", "topk"
    schema = SCHEMA

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, Tensor]:
        return self.form(backend).select(TopkInputs(*arguments))

    def fake_forward(self, *arguments: Any) -> tuple[Tensor, Tensor]:
        p = TopkInputs(*arguments)
        keys = p.x.new_empty((p.x.shape[0], p.k), dtype=row_dtype(p.x.device))
        return keys, torch.empty_like(keys, dtype=torch.int64)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        return self.form(backend).workspace(TopkInputs(*arguments))


PAIR_TOPK = PairTopkOp()
PAIR_TOPK.define()
