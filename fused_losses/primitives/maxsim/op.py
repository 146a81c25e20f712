"""MaxSim (late interaction): the largest product a query token finds in each document, summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses import backends
from fused_losses.base import validation
from fused_losses.base.examples import examples
from fused_losses.base.numerics import accumulate_dtype, nan_where_infinite, no_autocast
from fused_losses.primitives.maxsim.inputs import BACKWARD, FORWARD, MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.maxsim.reference import scores
from fused_losses.primitives.op import StreamedOp


def maxsim(
    queries: Tensor,  # [Q, Lq, D]
    documents: Tensor,  # [B, Ld, D], or [T, D] with lengths
    *,
    query_mask: Tensor | None = None,  # [Q, Lq] bool
    document_mask: Tensor | None = None,  # [B, Ld] bool
    lengths: Tensor | None = None,  # [B] tokens of each document
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """score[q, b] = sum over query tokens i of max over document tokens j of <q_i, d_j>. [Q, B]

    Args:
        queries: [Q, Lq, D] float32, bfloat16, float16 or float64; normalise them first for cosines.
        documents: [B, Ld, D] padded, or ragged: [T, D], document after document, with `lengths`.
        query_mask: [Q, Lq] bool, False: a padding token, which adds nothing.
        document_mask: [B, Ld] bool, False: a padding token, which is never the largest.
        lengths: [B] integers >= 0: how many tokens of each document are real (padded form: its
            first ones); with the ragged form they sum to T.

    A document without tokens scores 0. The gradient goes to the first of equal largest tokens.
    Returns float32 (float64 for float64 inputs). Tokens with NaN or inf give NaN scores.
    Raises ValueError or TypeError for arguments that do not fit; RuntimeError when the backend
    cannot run the call, and for a second derivative (backend="reference" has every order).
    Time O(Q Lq B Ld D); memory beyond inputs and gradients: Q Lq B int32, and copies of the tokens
    where a mask leaves some out. Never Q Lq x B Ld.
    Paper: Khattab and Zaharia, ColBERT, 2020.
    """
    _check("queries", queries, 3)
    ragged = documents.dim() == 2 if isinstance(documents, Tensor) else False
    _check("documents", documents, 2 if ragged else 3)
    validation.check_choice("precision", precision, validation.PRECISIONS)
    if documents.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"documents: expected tokens of size {queries.shape[-1]} as in queries, got "
            f"{validation.describe(documents)}"
        )
    documents = validation.beside("queries", queries, "documents", documents)
    if ragged and (lengths is None or document_mask is not None):
        raise ValueError(
            "lengths: expected the documents' lengths [B], and no document_mask, with ragged "
            f"documents [T, D], got {'no lengths' if lengths is None else 'a document_mask'}"
        )
    if lengths is not None:
        _check_lengths(lengths, documents, ragged)
    if ragged:
        assert lengths is not None
        flat_documents, document_offsets = documents, _offsets(lengths.to(documents.device))
    else:
        if lengths is not None:
            if document_mask is not None:
                raise ValueError("lengths: expected document_mask or lengths, got both")
            places = torch.arange(documents.shape[1], device=documents.device)
            document_mask = places < lengths.to(documents.device)[:, None]
        flat_documents, document_offsets = _flatten("document_mask", documents, document_mask)
    flat_queries, query_offsets = _flatten("query_mask", queries, query_mask)
    name, _ = backends.choose(backend, queries.device, queries.dtype, precision, "maxsim")
    arguments = (flat_queries, flat_documents, query_offsets, document_offsets)
    with no_autocast(queries.device):
        if name == "reference":
            found = scores(*arguments)
        else:
            found = MAXSIM(name, *arguments, precision)[0]
        if name == "cpu":
            return found  # its kernels mark the texts as they go by
        of_queries, of_documents = (
            _bad(flat_queries, query_offsets),
            _bad(flat_documents, document_offsets),
        )
        some = document_offsets.diff() > 0  # a document without tokens scores 0
        return found + torch.where(some, of_queries[:, None], 0) + of_documents


def _check(name: str, tensor: Tensor, dims: int) -> None:
    shape = "[tokens, D]" if dims == 2 else "[count, tokens, D]"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor {shape}, got {type(tensor).__name__}")
    if tensor.dtype not in validation.FLOATS:
        raise TypeError(
            f"{name}: expected a floating point tensor {shape}, got {validation.describe(tensor)}"
        )
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {shape}, got {validation.describe(tensor)}")


def _check_lengths(lengths: Tensor, documents: Tensor, ragged: bool) -> None:
    if not isinstance(lengths, Tensor) or lengths.is_floating_point() or lengths.dim() != 1:
        got = validation.describe(lengths) if isinstance(lengths, Tensor) else repr(lengths)
        raise TypeError(f"lengths: expected integers [B], got {got}")
    if not ragged and lengths.shape[0] != documents.shape[0]:
        raise ValueError(
            f"lengths: expected [{documents.shape[0]}], one a document, got "
            f"{validation.describe(lengths)}"
        )
    if validation.asserted(lengths):
        fits = lengths.sum() == documents.shape[0] if ragged else lengths <= documents.shape[1]
        sound = (lengths >= 0).all() & fits.all()
        validation.assert_async(sound, "lengths: expected values >= 0 that fit the documents")
        return
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"lengths: expected values >= 0, got {int(lengths.min())}")
    if ragged and int(lengths.sum()) != documents.shape[0]:
        raise ValueError(
            f"lengths: expected a sum of {documents.shape[0]}, the tokens of documents, got "
            f"{int(lengths.sum())}"
        )
    if not ragged and lengths.numel() and int(lengths.max()) > documents.shape[1]:
        raise ValueError(
            f"lengths: expected at most {documents.shape[1]} tokens a document, got "
            f"{int(lengths.max())}"
        )


def _bad(tokens: Tensor, offsets: Tensor) -> Tensor:
    """0 a text, NaN where a token has NaN or inf: which maximum is inf would be a kernel's own."""
    at = torch.arange(tokens.shape[0], device=tokens.device)
    owner = torch.bucketize(at, offsets[1:], right=True)
    marks = nan_where_infinite(tokens).to(accumulate_dtype(tokens.dtype))
    return marks.new_zeros(offsets.shape[0] - 1).index_add(0, owner, marks)


def _offsets(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.long().cumsum(0), (1, 0))


def _flatten(name: str, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Real tokens one after another [T, D], and where each text begins [count + 1]."""
    count, length, d = tokens.shape
    if mask is None:
        offsets = torch.arange(count + 1, device=tokens.device) * length
        return tokens.reshape(count * length, d), offsets
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = validation.describe(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{name}: expected a bool tensor [{count}, {length}], got {got}")
    if tuple(mask.shape) != (count, length):
        raise ValueError(f"{name}: expected [{count}, {length}], got {validation.describe(mask)}")
    validation.check_device("queries", tokens, name, mask)
    return tokens[mask], _offsets(mask.sum(dim=1))


# ---- the op: autograd and registration ----------------------------------------------------------


class MaxsimOp(StreamedOp):
    """Scores of queries against documents, with their gradient."""

    name = primitive = "maxsim"
    schema, backward_schema = FORWARD, BACKWARD

    def setup_context(self, ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs[:4], output[1])
        # or backward would be handed zeros of the size of the index
        ctx.set_materialize_grads(False)

    def gradients(self, backward_op: Any, ctx: Any, needed: tuple, grads: tuple) -> tuple:
        if grads[0] is None:
            return (None,) * 5
        queries, documents, query_offsets, document_offsets, index = ctx.saved_tensors
        inputs = (queries, documents, query_offsets, document_offsets)
        found = backward_op(grads[0].contiguous(), index, *inputs, *needed[:2])
        some = (g if need else None for g, need in zip(found, needed[:2], strict=True))
        return (*some, None, None, None)

    def fake_forward(
        self,
        queries: Tensor,
        documents: Tensor,
        query_offsets: Tensor,
        document_offsets: Tensor,
        *_: Any,
    ) -> tuple[Tensor, Tensor]:
        count = document_offsets.shape[0] - 1
        scores = queries.new_empty(
            (query_offsets.shape[0] - 1, count), dtype=accumulate_dtype(queries.dtype)
        )
        return scores, queries.new_empty((queries.shape[0], count), dtype=torch.int32)

    def fake_backward(
        self, grad: Tensor, index: Tensor, queries: Tensor, documents: Tensor, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        need_queries, need_documents = rest[-2:]
        return (
            queries.new_empty(queries.shape if need_queries else 0),
            documents.new_empty(documents.shape if need_documents else 0),
        )

    def forward(self, backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        return self.form(backend).forward(MaxsimInputs(*arguments))

    def backward(self, backend: str, grad: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        p, needs = MaxsimInputs(*rest[:-2]), MaxsimNeeds(*rest[-2:])
        return self.form(backend).backward(grad, index, p, needs)

    def workspace(self, backend: str, direction: str, arguments: tuple) -> int:
        if not direction:
            return self.form(backend).workspace(MaxsimInputs(*arguments), None)
        p, needs = MaxsimInputs(*arguments[2:6]), MaxsimNeeds(*arguments[-2:])
        return self.form(backend).workspace(p, needs)


MAXSIM = MaxsimOp()
MAXSIM.define()


_tokens = lambda t: t[: len(t) // 8 * 8].unflatten(0, (-1, 8))
examples(
    maxsim,
    lambda f, t: f(_tokens(t.x), _tokens(t.y)),
    {"": {}, "lengths": lambda t: dict(lengths=t.y_labels[: len(t.y) // 8] % 8 + 1)},
)
