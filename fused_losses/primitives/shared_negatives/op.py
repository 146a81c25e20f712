"""UNPG: pairs of different classes in the batch, as negatives that every row's softmax shares.

    c_ab = cos(x_a, x_b)         over the n pairs a < b of different labels
    kept: q1 - w (q3 - q1) <= c_ab <= q3 + w (q3 - q1), q1 and q3 the sorted c at [n / 4], [3 n / 4]
    lambda = log sum_kept exp(scale c_ab)
    loss_i = log(sum_j exp z_ij + exp lambda) - z_iy        z: any margin softmax's logits

The quartiles are exact, without the pairs in memory: a radix selection on the floats' bits, 16 bits
a sweep, counts the pairs tile by tile. Every sweep computes a pair from the same tile, to the same
bits. (Jung et al., Unified Negative Pair Generation toward Well-discriminative Feature Space for
Face Recognition, 2022.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base.examples import examples
from fused_losses.base.numerics import (
    accumulate_dtype,
    merged,
    nan_where_infinite,
    no_autocast,
    row_dtype,
    unit_rows,
)
from fused_losses.base.parameters import check_parameter
from fused_losses.base.validation import check_integers, check_plain, check_rows, number
from fused_losses.primitives.op import PYTHON_BACKENDS, StreamedOp
from fused_losses.primitives.shared_negatives import bounded
from fused_losses.primitives.shared_negatives.inputs import BACKWARD, FORWARD, SharedInputs
from fused_losses.primitives.shared_negatives.reference import reference


def _check_whisker(whisker: float) -> None:
    check_parameter("whisker", whisker, 0)


def shared_negatives(
    embeddings: Tensor,  # [N, D]
    labels: Tensor,  # [N]
    *,
    scale: float | Tensor,
    whisker: float = 1.5,
    normalize: bool = True,
    ignore_index: int = -100,
    backend: str | None = None,
) -> Tensor:
    """lambda of the module docstring, [] in float64 (float32 where the device lacks it).

    Differentiable in embeddings and scale; the quartiles only choose and have no gradient.
    -inf without a pair. A pair's row with NaN or inf makes it NaN; rows labelled `ignore_index` are
    in none.
    scale > 0, whisker >= 0 (w). normalize=False: products instead of cosines.
    Raises TypeError or ValueError for bad arguments; NotImplementedError for a second derivative,
    but on "reference". Time O(N^2 D) for each of 4 sweeps (6 in float64), one of them backward's;
    memory O(N D) plus a tile, on "reference" O(N^2). The same bits in every run on one number of
    threads.
    """
    check_plain(whisker=whisker)
    check_rows("embeddings", embeddings, "fp32")
    check_integers("labels", labels, (embeddings.shape[0],), embeddings)
    scale = number("scale", scale, embeddings)
    _check_whisker(whisker)
    name, _ = backends.choose(
        backend, embeddings.device, embeddings.dtype, "fp32", "pairs", embeddings.shape[1]
    )
    with no_autocast(embeddings.device):
        valid = labels != ignore_index
        # an ignored row must not reach the gradients, not even with NaN
        x = embeddings.to(accumulate_dtype(embeddings.dtype))
        x = torch.where(valid[:, None], x, 0)
        # as in every sweep over pairs, a row with inf is one with NaN
        x = unit_rows(x) if normalize else x + nan_where_infinite(x)[:, None]
        pairs = SharedInputs(x, labels, valid)
        if name == "reference":
            found = reference(pairs, scale, whisker)
        else:
            found = SHARED_NEGATIVES(name, *pairs, scale, float(whisker))[0]
        # the logarithm of nothing has a NaN tangent
        return torch.where(found == -torch.inf, -torch.inf, found)


def add_shared(lse: Tensor, shared: Tensor) -> Tensor:
    """log(exp lse_i + exp lambda): the shared negatives among each row's. [N], [] -> [N]

    Differentiable, also where one or neither has a term (-inf).
    """
    return merged(lse, shared)


# ---- the op: autograd and registration ----------------------------------------------------------


class SharedNegativesOp(StreamedOp):
    """lambda of the module docstring, with its gradient."""

    name = primitive = "shared_negatives"
    schema, backward_schema = FORWARD, BACKWARD
    # products of the library and comparisons: nothing here is compiled
    python_backends = (*PYTHON_BACKENDS, "cpu")

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:4], *output)
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        if grads[0] is None:
            return (None,) * 5
        dx, dscale = backward_op(grads[0], *ctx.saved_tensors, needed[0], needed[3])
        return dx if needed[0] else None, None, None, dscale if needed[3] else None, None

    def fake_forward(self, x: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return x.new_empty((), dtype=row_dtype(x.device)), x.new_empty(()), x.new_empty(())

    def fake_backward(self, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        scale, need_x, need_scale = rest[2], *rest[-2:]
        return x.new_empty(x.shape if need_x else 0), scale.new_empty(() if need_scale else 0)

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        *pairs, scale, whisker = arguments
        return bounded.forward(SharedInputs(*pairs), scale, whisker)

    def backward(self, backend: str, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        x, labels, valid, *rest, need_x, need_scale = arguments
        dx, dscale = bounded.backward(grad, SharedInputs(x, labels, valid), *rest)
        return dx if need_x else x.new_empty(0), dscale if need_scale else dscale.new_empty(0)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        at = 1 if direction else 0
        return bounded.workspace(SharedInputs(*arguments[at : at + 3]), bool(direction))


SHARED_NEGATIVES = SharedNegativesOp()
SHARED_NEGATIVES.define()


examples(shared_negatives, lambda f, t: f(t.x, t.labels, scale=t.scale))
