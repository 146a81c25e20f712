"""A labelled memory that grows, and what its rows say of others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fused_losses.base import validation
from fused_losses.metrics.knn import KnnClasses, knn_classify, radius_classify


class EmbeddingMemory(nn.Module):
    """Embeddings with labels, appended without end: a bank to classify by.

    Args:
        embedding_size: D. capacity: rows to make room for at first. dtype: what is stored.

    `places = memory.append(embeddings, labels)` stores a batch after all others; nothing is ever
    overwritten. Room doubles where it ends, so that appending costs O(D) a row on average and the
    memory at most twice its rows. `state_dict` has the rows that are there, no empty room, and
    loads into a memory of any size. `classify` is `knn_classify` over it, or `radius_classify`.
    No gradient flows into it. Paper: Zhang et al., AdaNPC, 2023. `miners.CrossBatchMemory` is a
    ring of fixed size.
    """

    embedding_memory: Tensor  # [room, D]
    label_memory: Tensor  # [room] int64

    def __init__(
        self,
        embedding_size: int,
        *,
        capacity: int = 1024,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        validation.check_count("embedding_size", embedding_size)
        validation.check_count("capacity", capacity)
        if dtype not in validation.FLOATS:
            raise TypeError(f"dtype: expected one of {validation.FLOATS}, got {dtype}")
        self.embedding_size = embedding_size
        rows = torch.zeros(capacity, embedding_size, dtype=dtype, device=device)
        labels = torch.zeros(capacity, dtype=torch.int64, device=device)
        # what is saved are the rows that are there: `_save_to_state_dict`
        self.register_buffer("embedding_memory", rows, persistent=False)
        self.register_buffer("label_memory", labels, persistent=False)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    @property
    def embeddings(self) -> Tensor:
        """[len, D], a view, in the order in which they came."""
        return self.embedding_memory[: self._count]

    @property
    def labels(self) -> Tensor:
        """[len] int64, a view."""
        return self.label_memory[: self._count]

    @torch.no_grad()
    def append(self, embeddings: Tensor, labels: Tensor, where: Tensor | None = None) -> Tensor:
        """Stores a batch [N, D] with labels [N] >= 0, or the rows of it where `where` [N] is True.

        Returns their places int64, as many as were stored. Raises ValueError, TypeError for tensors
        that do not fit, IndexError for a label below 0. Time O(N D), where room ends O(len D).
        """
        validation.check_matrix("embeddings", embeddings, f"[N, {self.embedding_size}]")
        if embeddings.shape[1] != self.embedding_size:
            raise ValueError(
                f"embeddings: expected [N, {self.embedding_size}], got "
                f"{validation.describe(embeddings)}"
            )
        validation.check_device("the memory", self.embedding_memory, "embeddings", embeddings)
        validation.check_integers("labels", labels, (embeddings.shape[0],), embeddings)
        if where is not None:
            if not isinstance(where, Tensor) or where.dtype != torch.bool:
                raise TypeError(f"where: expected a bool tensor [{embeddings.shape[0]}]")
            if tuple(where.shape) != tuple(labels.shape):
                raise ValueError(
                    f"where: expected [{embeddings.shape[0]}], got {validation.describe(where)}"
                )
            embeddings, labels = embeddings[where], labels[where]
        if len(labels) and int(labels.min()) < 0:
            raise IndexError(f"labels: expected values >= 0, got {int(labels.min())}")
        end = self._count + len(labels)
        self._make_room(end)
        self.embedding_memory[self._count : end] = embeddings.to(self.embedding_memory.dtype)
        self.label_memory[self._count : end] = labels.long()
        places = torch.arange(self._count, end, device=embeddings.device)
        self._count = end
        return places

    def classify(
        self, embeddings: Tensor, *, radius: float | None = None, **options: Any
    ) -> KnnClasses:
        """`knn_classify` over the rows that are there; with a radius `radius_classify`.

        options: theirs. Embeddings are taken in the memory's dtype.
        """
        validation.check_matrix("embeddings", embeddings, f"[N, {self.embedding_size}]")
        rows = embeddings.detach().to(self.embedding_memory.dtype)
        if radius is None:
            return knn_classify(rows, self.embeddings, self.labels, **options)
        return radius_classify(rows, self.embeddings, self.labels, radius, **options)

    def reset(self) -> None:
        """Forgets everything; the room stays."""
        self._count = 0

    def extra_repr(self) -> str:
        room = len(self.label_memory)
        return f"embedding_size={self.embedding_size}, held={self._count}, room={room}"

    def _make_room(self, rows: int) -> None:
        room = len(self.label_memory)
        if rows <= room:
            return
        wide = max(rows, 2 * room)
        for name in ("embedding_memory", "label_memory"):
            held = getattr(self, name)
            grown = held.new_zeros((wide, *held.shape[1:]))
            grown[: self._count] = held[: self._count]
            setattr(self, name, grown)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # copies: a view would be saved with all of its storage
        destination[prefix + "embeddings"] = self.embeddings.clone()
        destination[prefix + "labels"] = self.labels.clone()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        missing_keys, _, error_msgs = rest[2:]
        names = prefix + "embeddings", prefix + "labels"
        rows, labels = (state_dict.get(name) for name in names)
        if rows is None or labels is None:
            missing_keys.extend(name for name in names if name not in state_dict)
            return
        if tuple(rows.shape) != (len(labels), self.embedding_size) or labels.dim() != 1:
            error_msgs.append(
                f"{names[0]}: expected [N, {self.embedding_size}] with labels [N], got "
                f"{tuple(rows.shape)} and {tuple(labels.shape)}"
            )
            return
        self._count = 0
        self._make_room(len(labels))
        self._count = len(labels)
        self.embeddings.copy_(rows)
        self.labels.copy_(labels)
