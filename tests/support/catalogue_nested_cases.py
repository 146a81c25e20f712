"""Rows of the catalogue: one loss at several widths."""

from __future__ import annotations

from catalogue_pairs_cases import multi_similarity
from catalogue_table import Case
from torch import Tensor, nn

from fused_losses import losses


def matryoshka(module: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    d = x.shape[1]
    half = multi_similarity(module, x[:, : (d + 1) // 2], labels)
    return 0.5 * half + multi_similarity(module, x, labels)


def build(d: int) -> nn.Module:
    return losses.MatryoshkaLoss(losses.MultiSimilarityLoss(), [(d + 1) // 2, d], [0.5, 1.0])


CASES = {"MatryoshkaLoss": Case(build, matryoshka)}
