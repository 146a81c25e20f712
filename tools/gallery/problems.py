"""What a loss is built and called with: by the names in its signatures, on one small batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_losses import losses
from fused_losses.losses.owned import LabelledLoss
from fused_losses.losses.registry import CatalogueEntry

CLASSES = 3


class Batch(NamedTuple):
    """Rows that are learnt and what stays as it is; of two towers the rows lie in turn."""

    rows: Tensor  # [n, d]
    labels: Tensor  # [n], of towers one a pair of rows
    goal: Tensor  # [n, d] where a teacher, an old model or another sample has them
    centers: Tensor  # [C, d] directions of the classes


Value = Callable[[Batch], Any]

# a side of two towers, by its name
FIRST = ("query", "first", "image_features", "anchor", "new")
SECOND = ("key", "second", "text_features", "positive", "old")


def _cosines(rows: Tensor) -> Tensor:
    unit = nn.functional.normalize(rows, dim=1)
    return unit[::2] @ unit[1::2].T


def _answers(b: Batch) -> Tensor:
    """Of one question a class, which the label answers."""
    return nn.functional.one_hot(b.labels, len(b.centers)).to(b.rows)


# of rows alone
VALUES: dict[str, Value] = {
    **dict.fromkeys("embeddings x student features synthetic".split(), lambda b: b.rows),
    **dict.fromkeys("teacher goal y target real frozen ref_emb".split(), lambda b: b.goal),
    **dict.fromkeys(
        "student_weight teacher_weight weight aspect_weight centers prototypes".split(),
        lambda b: b.centers,
    ),
    **dict.fromkeys("labels ref_labels clusters".split(), lambda b: b.labels),
    "predicted": lambda b: b.rows,
    "logits": lambda b: b.rows @ b.centers.T,
    "answers": _answers,
    "left": lambda b: b.rows,
    "right": lambda b: b.goal,
    "frontness": lambda b: torch.ones_like(b.rows[:, 0]),
    "samples": lambda b: torch.arange(len(b.rows)),
    "likelihood": lambda b: torch.linspace(0.2, 1, len(b.rows)).to(b.rows),
}

# of two towers
PAIRED: dict[str, Value] = {
    **dict.fromkeys((*FIRST, "x"), lambda b: b.rows[::2]),
    **dict.fromkeys((*SECOND, "y"), lambda b: b.rows[1::2]),
    **dict.fromkeys("labels key_labels clusters".split(), lambda b: b.labels[::2]),
    "anchor_guide": lambda b: b.goal[::2],
    "positive_guide": lambda b: b.goal[1::2],
    "scores": lambda b: _cosines(b.rows),
    "judged": lambda b: _cosines(b.goal),
    "gates": lambda b: b.rows.new_ones(int(b.labels.max()) + 1, int(b.labels.max()) + 1, 1).expand(
        -1, -1, b.rows.shape[1]
    ),
}

# rows are maps of a position, heads of one head
SHAPED: dict[str, Callable[[Tensor], Tensor]] = {
    "CriSpLoss": lambda t: t[:, :, None],
    "AMCLLoss": lambda t: t[:, None],
}
PAIRED["mask"] = lambda b: torch.ones(len(b.rows) // 2, 1, dtype=torch.bool)

# what a constructor asks for, or has by default too large for a dozen rows
BUILT: dict[str, Value] = {
    **dict.fromkeys(("num_classes", "num_clusters"), lambda b: len(b.centers)),
    **dict.fromkeys("embedding_size dim descriptors_dim".split(), lambda b: b.rows.shape[1]),
    "num_samples": lambda b: len(b.rows),
    "prototypes": lambda b: b.centers,
    # a row on its own mean has loss -inf
    "means": lambda b: b.centers / 2,
    "covariance": lambda b: (
        0.3 * torch.eye(b.rows.shape[1]).to(b.rows).expand(len(b.centers), -1, -1)
    ),
    "num_latents": lambda b: 8,
    **dict.fromkeys(("size", "queue_size"), lambda b: 16),
    "topk": lambda b: 4,
    "loss": lambda b: losses.MultiSimilarityLoss(),
    "widths": lambda b: (b.rows.shape[1] // 2, b.rows.shape[1]),
}
SMALLER: dict[str, dict[str, Any]] = {
    "TopKSparseAutoencoderLoss": dict(k=2, aux_k=2),
    "AaDLoss": dict(k=1),
}


class Problem(NamedTuple):
    """A loss of the catalogue with how it is built and called."""

    entry: CatalogueEntry
    towers: bool
    values: dict[str, Value]  # of its call
    wraps: bool = False  # it hands on what it is called with

    @property
    def length(self) -> float:
        """Of rows: those that meet classes are long, for products to be scores."""
        name = self.entry.name
        scored = issubclass(self.entry.module, LabelledLoss) or "student_weight" in self.values
        near = name == "CenterLoss" or self.entry.primitive == "rows"
        return 10.0 if (scored and not near) or name in {"AaDLoss", "MultiAspectKDLoss"} else 1.0

    def build(self, b: Batch) -> nn.Module:
        """The module with its paper's defaults, in float64, from seed 0."""
        torch.manual_seed(0)
        asked = inspect.signature(self.entry.module.__init__).parameters
        given = {name: BUILT[name](b) for name in asked if name in BUILT}
        given |= SMALLER.get(self.entry.name, {})
        return self.entry.module(**given).double()

    def loss(self, module: nn.Module, b: Batch) -> Tensor:
        """The loss of a batch; what it draws, it draws from seed 0."""
        # torch.manual_seed looks for GPUs each time
        torch.default_generator.manual_seed(0)
        scaled = b._replace(rows=self.length * b.rows, goal=self.length * b.goal)
        given = {name: value(scaled) for name, value in self.values.items()}
        shape = SHAPED.get(self.entry.name)
        if shape is not None:
            given = {k: v if k == "mask" else shape(v) for k, v in given.items()}
        # of a loss of another loss, whose names it does not know
        return module(*given.values()) if self.wraps else module(**given)


def problem(entry: CatalogueEntry) -> Problem:
    """How a loss is called, by the names of what its `forward`, and `loss` behind it, ask for."""
    asked = dict(inspect.signature(entry.module.forward).parameters)
    if any(p.kind is p.VAR_POSITIONAL for p in asked.values()):
        return Problem(entry, False, {k: VALUES[k] for k in ("embeddings", "labels")}, True)
    first = list(asked)[1]
    towers = entry.block == "contrastive" and (first in (*FIRST, "scores") or "y" in asked)
    own = getattr(entry.module, "loss", None)
    if own is not None:
        # a head's own options stand behind **given
        asked |= {
            name: p
            for name, p in inspect.signature(own).parameters.items()
            if p.default is p.empty and name not in asked and name in VALUES
        }
    table = PAIRED if towers else VALUES
    wanted = {
        name
        for name, p in asked.items()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and name != "self"
        if p.default is p.empty or (name in ("labels", "teacher_weight") and not towers)
    }
    unknown = wanted - table.keys()
    if unknown:
        raise ValueError(f"{entry.name}: the gallery has nothing for {', '.join(sorted(unknown))}")
    return Problem(entry, towers, {name: table[name] for name in asked if name in wanted})
