"""Verification (same person or not?) and retrieval on people whom the training never saw.

A pair is accepted where its cosine is above the threshold. TAR@FAR: the share of same-person pairs
accepted at the lowest threshold that accepts at most that share of different-person pairs; all
pairs of a fold count. Accuracy: as many different-person pairs (drawn once, seeded) as same-person
pairs, at the threshold that does best on the *other* folds' held-out pairs, each under its own
model (as in LFW): no threshold ever sees a score of the people that it judges. With one fold only
there are no others: then the threshold comes from the training people, and the record says so.
Recall@1 is that of one shot: the gallery has one picture of each person. With all pictures in the
gallery the nearest one is near whatever the network is: an untrained one finds every ORL face.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.metrics import tar_at_far
from fused_losses.metrics.verification import best_threshold
from fused_losses.train.frame.seeds import seed_from

FARS = {"tar_at_far_1e-2": 1e-2, "tar_at_far_1e-3": 1e-3}
FIGURES = ("verification_accuracy", *FARS, "recall_at_1")
ROC_FARS = torch.logspace(-3.5, 0, 141, dtype=torch.float64)


class PairScores(NamedTuple):
    """Cosines of pairs, by whether both pictures show one person."""

    genuine: Tensor  # [g]
    impostor: Tensor  # [i]

    def balanced(self, seed: int) -> PairScores:
        """As many pairs of either kind, drawn without replacement."""
        n = min(len(self.genuine), len(self.impostor))
        generator = torch.Generator().manual_seed(seed_from("pairs", seed))

        def draw(scores: Tensor) -> Tensor:
            return scores[torch.randperm(len(scores), generator=generator)[:n]]

        return PairScores(draw(self.genuine), draw(self.impostor))

    def listed(self) -> tuple[Tensor, Tensor]:
        """(scores [n], same [n] bool), as `fused_losses.metrics` has them."""
        same = [torch.ones(len(self.genuine)), torch.zeros(len(self.impostor))]
        return torch.cat(self), torch.cat(same).bool()

    def accuracy(self, threshold: float) -> float:
        """The share of pairs judged rightly; 0 without pairs."""
        right = (self.genuine > threshold).sum() + (self.impostor <= threshold).sum()
        return right.item() / max(1, len(self.genuine) + len(self.impostor))


class FoldEmbeddings(NamedTuple):
    """What one model says of its held-out people, and of its own for want of other folds."""

    embeddings: Tensor  # [n, D] unit rows
    labels: Tensor  # [n]
    training: PairScores | None = None


def pair_scores(embeddings: Tensor, labels: Tensor) -> PairScores:  # [n, D] unit rows, [n]
    """The cosine of every pair of different pictures, once."""
    scores = embeddings @ embeddings.T
    same = labels[:, None] == labels
    above = torch.ones_like(same).triu(1)
    return PairScores(scores[same & above].double(), scores[~same & above].double())


def one_shot_recall(embeddings: Tensor, labels: Tensor) -> float:  # [n, D] unit rows, [n]
    """The share of pictures whose person is nearest, where each person shows one other picture.

    The expectation over every gallery of one picture a person, each as likely: a picture with its
    mate at cosine c is right if each other person's drawn picture is below c, which for one of m
    pictures, k of them below, has the chance k / m. Ties count as wrong, a person without a second
    picture is in the galleries alone; NaN without any pair. O(n^2 D), and O(n) for each pair.
    """
    pictures = labels.bincount().double()
    chances: list[Tensor] = []
    for row, scores in enumerate((embeddings @ embeddings.T).double()):
        mates = labels == labels[row]
        mates[row] = False
        below = scores[None, :] < scores[mates][:, None]  # [mates, n]
        share = torch.zeros(len(below), len(pictures), dtype=torch.float64)
        share.index_add_(1, labels, below.double()).div_(pictures)
        share[:, labels[row]] = 1
        share[:, pictures == 0] = 1
        chances.append(share.prod(1))
    found = torch.cat(chances)
    return found.mean().item() if len(found) else float("nan")


def evaluate(folds: Sequence[FoldEmbeddings], *, seed: int = 0) -> dict[str, object]:
    """The metrics of each fold, their mean and their standard deviation over folds.

    Returns {metric: mean, ..., "spread": {metric: deviation}, "folds": [{metric: value}],
    "threshold_from": text, "roc": [[TAR at each of ROC_FARS] for each fold]}.
    """
    scores = [pair_scores(fold.embeddings, fold.labels) for fold in folds]
    judged = [s.balanced(seed + i) for i, s in enumerate(scores)]
    if len(folds) > 1:
        source = "the other folds' held-out people"
        others = [judged[:i] + judged[i + 1 :] for i in range(len(folds))]
        learnt = [PairScores(*map(torch.cat, zip(*one, strict=True))) for one in others]
    else:
        source = "the training people (one fold: there are no others)"
        if folds[0].training is None:
            raise ValueError("folds: expected more than one, or one with its training scores")
        learnt = [folds[0].training.balanced(seed)]
    rows, curves = [], []
    for i, fold in enumerate(folds):
        pairs = scores[i].listed()
        threshold = best_threshold(*learnt[i].listed())
        rows.append(
            {
                "verification_accuracy": judged[i].accuracy(threshold),
                **{name: tar_at_far(*pairs, far) for name, far in FARS.items()},
                "recall_at_1": one_shot_recall(fold.embeddings, fold.labels),
                "threshold": threshold,
            }
        )
        curves.append(list(tar_at_far(*pairs, ROC_FARS.tolist()).values()))
    mean, spread = {}, {}
    for metric in FIGURES:
        values = torch.tensor([row[metric] for row in rows], dtype=torch.float64)
        mean[metric] = values.mean().item()
        spread[metric] = values.std(correction=0).item()
    return {
        **mean,
        "spread": spread,
        "folds": rows,
        "threshold_from": source,
        "roc": curves,
    }
