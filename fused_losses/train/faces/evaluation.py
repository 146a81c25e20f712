"""Verification (same person or not?) and retrieval on people whom the training never saw.

A pair is accepted where its cosine is above the threshold. TAR@FAR: the share of same-person pairs
accepted at the lowest threshold that accepts at most that share of different-person pairs; all
pairs of a fold count. Accuracy: as many different-person pairs (drawn once, seeded) as same-person
pairs, at the threshold that does best on the *other* folds' held-out pairs, each under its own
model (as in LFW): no threshold ever sees a score of the people that it judges. With one fold only
there are no others: then the threshold comes from the training people, and the record says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_losses.train.faces.data import seed_from

FARS = {"tar_at_far_1e-2": 1e-2, "tar_at_far_1e-3": 1e-3}
METRICS = ("verification_accuracy", *FARS, "recall_at_1")
ROC_FARS = torch.logspace(-3.5, 0, 141, dtype=torch.float64)


class Scores(NamedTuple):
    """Cosines of pairs, by whether both pictures show one person."""

    genuine: Tensor  # [g]
    impostor: Tensor  # [i]

    def balanced(self, seed: int) -> Scores:
        """As many pairs of either kind, drawn without replacement."""
        n = min(len(self.genuine), len(self.impostor))
        generator = torch.Generator().manual_seed(seed_from("pairs", seed))

        def draw(scores: Tensor) -> Tensor:
            return scores[torch.randperm(len(scores), generator=generator)[:n]]

        return Scores(draw(self.genuine), draw(self.impostor))


class FoldEmbeddings(NamedTuple):
    """What one model says of its held-out people, and of its own for want of other folds."""

    embeddings: Tensor  # [n, D] unit rows
    labels: Tensor  # [n]
    training: Scores | None = None


def pair_scores(embeddings: Tensor, labels: Tensor) -> Scores:  # [n, D] unit rows, [n]
    """The cosine of every pair of different pictures, once."""
    scores = embeddings @ embeddings.T
    same = labels[:, None] == labels
    above = torch.ones_like(same).triu(1)
    return Scores(scores[same & above].double(), scores[~same & above].double())


def threshold_at_far(impostor: Tensor, far: float) -> float:
    """The lowest threshold above which lies at most a share `far` of the impostors."""
    allowed = int(far * len(impostor) + 1e-9)  # 0.29 * 100 is 28.999...
    if allowed >= len(impostor):
        return float("-inf")
    return impostor.topk(allowed + 1).values[-1].item()


def tar_at_far(scores: Scores, far: float) -> float:
    """The share of genuine pairs accepted at that false accept rate."""
    if not len(scores.genuine):
        return float("nan")
    threshold = threshold_at_far(scores.impostor, far)
    return (scores.genuine > threshold).double().mean().item()


def accuracy(scores: Scores, threshold: float) -> float:
    """The share of pairs judged rightly."""
    right = (scores.genuine > threshold).sum() + (scores.impostor <= threshold).sum()
    return right.item() / max(1, len(scores.genuine) + len(scores.impostor))


def best_threshold(scores: Scores) -> float:
    """The threshold with the highest accuracy; midway between two scores, the lowest of equals."""
    values = torch.cat(scores).unique()  # ascending
    if not len(values):
        return 0.0
    middle = (values[1:] + values[:-1]) / 2
    candidates = torch.cat([values[:1] - 1, middle, values[-1:] + 1])
    accepted = len(scores.genuine) - torch.searchsorted(
        scores.genuine.sort().values, candidates, right=True
    )
    refused = torch.searchsorted(scores.impostor.sort().values, candidates, right=True)
    return candidates[(accepted + refused).argmax()].item()


def recall_at_1(embeddings: Tensor, labels: Tensor, rows: int = 1024) -> float:
    """The share of pictures whose nearest other picture shows the same person.

    Pictures without another of their person don't count. Memory O(rows n).
    """
    hits = queries = 0
    for start in range(0, len(labels), rows):
        at = torch.arange(start, min(start + rows, len(labels)))
        scores = embeddings[at] @ embeddings.T
        scores[torch.arange(len(at)), at] = float("-inf")
        same = labels[at][:, None] == labels
        has_mate = same.sum(1) > 1
        hits += int((same[torch.arange(len(at)), scores.argmax(1)] & has_mate).sum())
        queries += int(has_mate.sum())
    return hits / queries if queries else float("nan")


def roc(scores: Scores) -> list[float]:
    """TAR at each rate of `ROC_FARS`."""
    return [tar_at_far(scores, far) for far in ROC_FARS.tolist()]


def evaluate(folds: Sequence[FoldEmbeddings], *, seed: int = 0) -> dict[str, object]:
    """The metrics of each fold, their mean and their standard deviation over folds.

    Returns {metric: mean, ..., "spread": {metric: deviation}, "folds": [{metric: value}],
    "threshold_from": text, "roc": [[TAR at each of ROC_FARS] for each fold]}.
    """
    scores = [pair_scores(fold.embeddings, fold.labels) for fold in folds]
    judged = [s.balanced(seed + i) for i, s in enumerate(scores)]
    if len(folds) > 1:
        source = "the other folds' held-out people"
        learnt = [
            Scores(*(torch.cat(kind) for kind in zip(*(judged[:i] + judged[i + 1 :]), strict=True)))
            for i in range(len(folds))
        ]
    else:
        source = "the training people (one fold: there are no others)"
        if folds[0].training is None:
            raise ValueError("folds: expected more than one, or one with its training scores")
        learnt = [folds[0].training.balanced(seed)]
    rows = []
    for i, fold in enumerate(folds):
        threshold = best_threshold(learnt[i])
        rows.append(
            {
                "verification_accuracy": accuracy(judged[i], threshold),
                **{name: tar_at_far(scores[i], far) for name, far in FARS.items()},
                "recall_at_1": recall_at_1(fold.embeddings, fold.labels),
                "threshold": threshold,
            }
        )
    mean, spread = {}, {}
    for metric in METRICS:
        values = torch.tensor([row[metric] for row in rows], dtype=torch.float64)
        mean[metric] = values.mean().item()
        spread[metric] = values.std(correction=0).item()
    return {
        **mean,
        "spread": spread,
        "folds": rows,
        "threshold_from": source,
        "roc": [roc(s) for s in scores],
    }
