"""Matryoshka: one loss at several widths of the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fused_losses.base.validation import check_count, check_number, check_plain, describe
from fused_losses.losses.registry import entry


@entry(
    "Kusupati et al., Matryoshka Representation Learning",
    2022,
    block="pairs",
    primitive="pairs",
)
class MatryoshkaLoss(nn.Module):
    """A loss of the rows' first coordinates, at several widths, summed.

        loss = sum_w weight_w loss(x[:, :w], ...)

    called as the loss is. A width's rows are normalised by themselves, where the loss normalises.
    Args:
        loss: any loss of the catalogue, or a module that is called with rows first.
        widths: how many coordinates, each once. weights: one a width, >= 0; None: 1, the paper's.
        rows: how many of the first arguments are embeddings (2 of two towers). Of the keyword
            arguments those named in `cut` are.
        tied: a parameter or buffer of the loss [..., D] is cut to the width as well (the paper's
            MRL-E: one classifier for all widths); False: the loss has none, or they stay whole.

    A loss with `at_widths` (`InfoNCELoss`, `ClipLoss`, softmaxes with a margin) is asked for all
    widths at once: one product of the widest in place of one each, where the call's backend has
    that sweep; equal to the losses one by one but for rounding. A class with a `forward` of its
    own, and a module with hooks, is called once a width.

    Nothing is copied here: a narrow view is given on. Its averages (buffers that a call moves) a
    loss would move once a width, so a tied one must have none. Time and memory: those of the loss
    at each width, the memory O(N D) of its gradients once a width; from one sweep those of the
    widest, and O(N M + N + M) more a width.
    """

    def __init__(
        self,
        loss: nn.Module,
        widths: Sequence[int],
        weights: Sequence[float] | None = None,
        *,
        rows: int = 1,
        cut: Sequence[str] = ("ref_emb",),
        tied: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(loss, nn.Module):
            raise TypeError(f"loss: expected a module, got {type(loss).__name__}")
        widths = list(widths)
        for width in widths:
            check_count("widths", width)
        if not widths or len(set(widths)) != len(widths):
            raise ValueError(f"widths: expected at least one, each once, got {widths}")
        check_plain(weights=weights)
        weights = [1.0] * len(widths) if weights is None else list(weights)
        if len(weights) != len(widths):
            raise ValueError(f"weights: expected {len(widths)}, one a width, got {len(weights)}")
        for weight in weights:
            check_number("weights", weight)
            if not 0 <= weight < math.inf:
                raise ValueError(f"weights: expected values >= 0, got {weight}")
        check_count("rows", rows)
        self.loss, self.widths, self.weights = loss, widths, weights
        self.rows, self.cut, self.tied = rows, tuple(cut), tied

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        if len(arguments) < self.rows:
            raise TypeError(
                f"{type(self).__name__}: expected {self.rows} embeddings first, got "
                f"{len(arguments)} arguments"
            )
        width = self._width(arguments[: self.rows])
        at_once = self._at_once(width, arguments, options)
        if at_once is not None:
            weights = at_once.new_tensor(self.weights)
            return torch.tensordot(weights, at_once, dims=1)
        total = None
        for w, weight in zip(self.widths, self.weights, strict=True):
            given = tuple(a[..., :w] for a in arguments[: self.rows])
            more = {k: v[..., :w] if self._is_cut(k, v) else v for k, v in options.items()}
            call = (*given, *arguments[self.rows :])
            held = self._narrowed(width, w) if self.tied else {}
            one = functional_call(self.loss, held, call, more) if held else self.loss(*call, **more)
            total = weight * one if total is None else total + weight * one
        assert total is not None
        return total

    def _at_once(
        self, width: int, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> Tensor | None:
        """The loss at all widths, [W] or [W, N]; None: it is called once a width."""
        at_widths = getattr(self.loss, "at_widths", None)
        if at_widths is None or self.loss._forward_hooks or self.loss._forward_pre_hooks:
            return None
        if not self.tied and self._narrowed(width, 0):
            return None
        return at_widths(self.widths, self.rows, *arguments, **options)

    def _is_cut(self, name: str, value: object) -> bool:
        return name in self.cut and isinstance(value, Tensor)

    def _width(self, rows: tuple[Any, ...]) -> int:
        for x in rows:
            if not isinstance(x, Tensor) or x.dim() == 0:
                got = describe(x) if isinstance(x, Tensor) else type(x).__name__
                raise TypeError(f"embeddings: expected a tensor [..., D], got {got}")
            if x.shape[-1] != rows[0].shape[-1] or x.shape[-1] < max(self.widths):
                raise ValueError(
                    f"embeddings: expected rows of one width, at least {max(self.widths)} as in "
                    f"widths, got {describe(x)}"
                )
        return rows[0].shape[-1]

    def _narrowed(self, width: int, w: int) -> dict[str, Tensor]:
        """The loss's own tensors of the rows' width, cut."""
        own = (*self.loss.named_parameters(), *self.loss.named_buffers())
        return {n: t[..., :w] for n, t in own if t.dim() > 1 and t.shape[-1] == width and w < width}

    def extra_repr(self) -> str:
        return f"widths={self.widths}, weights={self.weights}"
