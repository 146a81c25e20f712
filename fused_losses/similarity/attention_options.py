"""Keyword arguments of the functions over pairs whose results a flag chooses, for type checkers."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor


class LogsumexpOptions(TypedDict, total=False):
    """Keywords of `logsumexp_similarity`, whose own signature has their defaults."""

    similarity: str
    scale: float | Tensor
    x_labels: Tensor | None
    y_labels: Tensor | None
    match: str
    x_ids: Tensor | None
    y_ids: Tensor | None
    x_groups: Tensor | None
    y_groups: Tensor | None
    exclude: Tensor | None
    skip_self: bool
    zero: str | None
    precision: str
    backend: str | None


class AttentionOptions(TypedDict, total=False):
    """Keywords of `similarity_attention`, whose own signature has their defaults."""

    similarity: str
    scale: float | Tensor | None
    query_labels: Tensor | None
    key_labels: Tensor | None
    match: str
    precision: str
    backend: str | None
