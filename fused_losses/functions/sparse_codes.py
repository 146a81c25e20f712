"""Sparse codes: of a large dictionary the k atoms of most score, and what they decode to."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_losses.base import validation
from fused_losses.base.examples import UNJUDGED, examples
from fused_losses.base.numerics import accumulate_dtype, nan_where_infinite, no_autocast
from fused_losses.base.validation import check_columns, check_integers, check_vector, describe
from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.op import primals


def sparse_codes(
    x: Tensor,  # [N, D]
    dictionary: Tensor,  # [F, D]
    k: int,
    *,
    bias: Tensor | None = None,  # [F]
    among: Tensor | None = None,  # [F] bool
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k atoms of a dictionary with the highest scores, streamed: never an N x F matrix.

        s_if = <x_i, w_f> + b_f

    Args:
        x, dictionary: [N, D] and [F, D], of one dtype. k: in [1, F]. bias: [F], in their dtype.
        among: [F] bool, the atoms that may be chosen; None: all.

    The choice is that of the scores in float64 (of equal ones the lowest index), on every backend.
    Returns (values [N, k] float32, or float64 for float64 x, best first, not rectified; indices
    [N, k] int64). Where fewer than k atoms may be chosen the index is -1 and the value 0; a row of
    x with NaN or inf has NaN and -1 throughout, and an atom with inf the scores that it gives.
    values are differentiable in x, dictionary and bias, once.
    Raises ValueError, TypeError for bad arguments. Time O(N F D); memory O(N k) and a few blocks,
    with a bias a copy of x and of the dictionary. Papers: Makhzani and Frey, k-sparse autoencoders,
    2014; Gao et al., 2024.
    """
    validation.check_pair("x", x, "dictionary", dictionary)
    dictionary = validation.beside("x", x, "dictionary", dictionary)
    atoms = dictionary.shape[0]
    validation.check_count("k", k)
    if k > atoms:
        raise ValueError(f"k: expected at most the {atoms} atoms of the dictionary, got {k}")
    if bias is not None:
        check_vector("bias", bias, atoms, "a value an atom", x)
        bias = validation.beside("x", x, "bias", bias)
    with no_autocast(x.device):
        if bias is not None:
            # one more coordinate: the score's float64 sum has the bias in it
            x = torch.cat(
                [x, torch.ones_like(x[:, :1]) if x.shape[1] else x.new_ones(len(x), 1)], 1
            )
            dictionary = torch.cat([dictionary, bias[:, None]], 1)
        labels: dict[str, Any] = {}
        if among is not None:
            _check_among(among, atoms, x)
            ones = torch.ones(x.shape[0], dtype=torch.int32, device=x.device)
            labels = dict(x_labels=ones, y_labels=among.int(), match="same")
        values, index = pairwise_topk(x, dictionary, k, "dot", backend=backend, **labels)
        # a row with inf is one with NaN: `pairwise_topk` would order its infinite scores
        mark = nan_where_infinite(x)[:, None]
        values = torch.where((index < 0) & ~values.isnan(), 0, values) + mark
        return values, index.masked_fill(mark.isnan(), -1)


def sparse_decode(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    dictionary: Tensor,  # [F, D]
    *,
    bias: Tensor | None = None,  # [D]
) -> Tensor:
    """Sums of chosen atoms, each times its value, without gathering them: [N, D].

        out_i = sum_l values_il dictionary[indices_il] + bias

    Args:
        values: [N, k] floats; indices: [N, k] integers in [0, F), or -1 for none, whose value must
            be 0 (a NaN makes its row NaN).
        dictionary: [F, D]. bias: [D].

    Returns float32, or float64 for a float64 dictionary; sums are in that. Differentiable in
    values, dictionary and bias; a second derivative holds O(N k D). Raises ValueError, TypeError,
    IndexError for bad arguments. Time O(N k D); memory O(N k), and a float32 copy of a
    16-bit dictionary.
    """
    validation.check_matrix("dictionary", dictionary, "[F, D]")
    validation.check_matrix("values", values, "[N, k]")
    validation.check_device("dictionary", dictionary, "values", values)
    check_integers("indices", indices, tuple(values.shape), dictionary)
    width = dictionary.shape[1]
    if bias is not None:
        check_vector("bias", bias, width, "a value a coordinate", dictionary)
    columns = check_columns("indices", indices, dictionary.shape[0])
    dtype = accumulate_dtype(dictionary.dtype)
    with no_autocast(dictionary.device):
        if 0 in (*values.shape, *dictionary.shape):
            # of nothing; every side keeps its gradient
            nothing = values.sum() + dictionary.sum()
            out = (0 * nothing).to(dtype).expand(values.shape[0], width)
        else:
            summed = _bag if torch.compiler.is_compiling() else _Decoded.apply
            out = summed(values.to(dtype), columns.clamp_min(0).long(), dictionary.to(dtype))
        return out if bias is None else out + bias.to(dtype)


def _bag(values: Tensor, columns: Tensor, dictionary: Tensor) -> Tensor:
    """The sums [N, D] without the rows that are summed."""
    return F.embedding_bag(columns, dictionary, per_sample_weights=values, mode="sum")


def _one_by_one(values: Tensor, columns: Tensor, dictionary: Tensor) -> Tensor:
    """`_bag` of operations that have second derivatives, which keep every row."""
    parts = zip(values.split(1, dim=1), columns.unbind(1), strict=True)
    return torch.stack([v * dictionary.index_select(0, c) for v, c in parts]).sum(dim=0)


class _Decoded(torch.autograd.Function):
    """`_bag`, whose operator in PyTorch knows neither tangents nor second derivatives."""

    @staticmethod
    def forward(values: Tensor, columns: Tensor, dictionary: Tensor) -> Tensor:
        return _bag(values, columns, dictionary)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        values, columns, dictionary = ctx.saved_tensors
        further = torch.is_grad_enabled()
        wanted = (ctx.needs_input_grad[0], ctx.needs_input_grad[2])
        with torch.enable_grad():
            leaves = [
                t.view_as(t) if further else t.detach().requires_grad_(need)
                for t, need in zip((values, dictionary), wanted, strict=True)
            ]
            out = (_one_by_one if further else _bag)(leaves[0], columns, leaves[1])
            asked = [t for t, need in zip(leaves, wanted, strict=True) if need]
            found = iter(torch.autograd.grad(out, asked, grad, create_graph=further))
        of_values, of_dictionary = (next(found) if need else None for need in wanted)
        return of_values, None, of_dictionary

    @staticmethod
    def jvp(ctx: Any, of_values: Tensor | None, _: None, of_dictionary: Tensor | None) -> Tensor:
        values, columns, dictionary = primals(ctx.saved_tensors)
        moved = torch.zeros_like(dictionary[:1]).expand(values.shape[0], -1)
        if of_values is not None:
            moved = moved + _bag(of_values, columns, dictionary)
        return moved if of_dictionary is None else moved + _bag(values, columns, of_dictionary)


def _check_among(among: Tensor, atoms: int, x: Tensor) -> None:
    if not isinstance(among, Tensor) or among.dtype != torch.bool:
        got = describe(among) if isinstance(among, Tensor) else type(among).__name__
        raise TypeError(f"among: expected a bool tensor [{atoms}], got {got}")
    if tuple(among.shape) != (atoms,):
        raise ValueError(f"among: expected shape ({atoms},), got {describe(among)}")
    validation.check_device("x", x, "among", among)


examples(
    sparse_codes,
    lambda f, t: f(t.x, t.few, 3),
    bound=UNJUDGED,
    value=lambda found: found[0],
    precisions=("fp32",),
)
examples(
    sparse_decode,
    lambda f, t: f(t.x, torch.arange(t.x.numel(), device=t.x.device).view_as(t.x) % 8, t.few),
)
