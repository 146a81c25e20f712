"""The memory that grows, what its rows say of others, and AdaNPC's own numbers."""

from __future__ import annotations

import copy
import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from torch import Tensor

from fused_losses.metrics import EmbeddingMemory, knn_classify, radius_classify


def filled(rows: Tensor, labels: Tensor, step: int, **options: Any) -> EmbeddingMemory:
    memory = EmbeddingMemory(rows.shape[1], dtype=rows.dtype, **options)
    for i in range(0, len(rows), step):
        memory.append(rows[i : i + step], labels[i : i + step])
    return memory


def test_rows_come_one_after_another_and_room_doubles() -> None:
    rows, labels = torch.randn(100, 3), torch.arange(100)
    memory, rooms = EmbeddingMemory(3, capacity=2), []
    for i in range(0, 100, 7):
        places = memory.append(rows[i : i + 7], labels[i : i + 7].int())
        assert (
            torch.equal(places, torch.arange(i, min(i + 7, 100))) and len(memory) == places[-1] + 1
        )
        rooms.append(len(memory.label_memory))
    assert torch.equal(memory.embeddings, rows) and torch.equal(memory.labels, labels)
    assert rooms[-1] <= 2 * 100 and len(set(rooms)) <= 6
    memory.reset()
    assert len(memory) == 0 and memory.embeddings.shape == (0, 3)
    assert memory.append(rows[:2], labels[:2]).tolist() == [0, 1]


def test_some_rows_of_a_batch_alone() -> None:
    rows, labels = torch.randn(6, 2), torch.arange(6)
    memory = EmbeddingMemory(2)
    memory.append(rows.requires_grad_(), labels, labels % 2 == 0)
    assert torch.equal(memory.embeddings, rows[::2]) and memory.labels.tolist() == [0, 2, 4]
    assert not memory.embeddings.requires_grad


def test_a_state_has_the_rows_that_are_there() -> None:
    rows, labels = torch.randn(33, 5), torch.arange(33)
    memory = torch.nn.ModuleDict({"memory": filled(rows, labels, 10, capacity=4_000)})
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    assert file.tell() < 33 * 5 * 4 + 33 * 8 + 4_000
    file.seek(0)
    for capacity in (1, 4_000):
        fresh = torch.nn.ModuleDict({"memory": EmbeddingMemory(5, capacity=capacity)})
        fresh["memory"].append(rows[:3], labels[:3] + 9)
        fresh.load_state_dict(torch.load(file))
        file.seek(0)
        again = fresh["memory"]
        assert torch.equal(again.embeddings, rows) and torch.equal(again.labels, labels)
        again.append(rows[:1], labels[:1])
        assert len(again) == 34 and len(memory["memory"]) == 33
    copied = copy.deepcopy(memory["memory"]).double()
    assert copied.embeddings.dtype == torch.float64 and len(copied) == 33
    with pytest.raises(RuntimeError, match=r"embeddings: expected \[N, 4\]"):
        EmbeddingMemory(4).load_state_dict(memory["memory"].state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        EmbeddingMemory(5).load_state_dict({"labels": labels})


def test_adanpc(backend: str) -> None:
    """The authors' numbers: k = 10, T = 0.1, and 1e-5 on every score."""
    if backend == "cuda":
        return  # float64
    with np.load(GOLDEN / "search" / "adanpc_knn.npz") as record:
        x, rows, labels, scores = (
            torch.from_numpy(record[k]) for k in ("x", "memory", "memory_label", "scores")
        )
    memory = filled(rows, labels, 33, capacity=1)
    found = memory.classify(x, k=10, temperature=0.1, num_classes=7, backend=backend)
    torch.testing.assert_close(found.scores + 1e-5, scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, scores.argmax(dim=1))


def votes(x: Tensor, rows: Tensor, labels: Tensor, eps: float, weights: str) -> Tensor:
    """Scores of seven classes from all rows of a cosine of at least eps, in a matrix."""
    s = F.normalize(x.double(), dim=1) @ F.normalize(rows.double(), dim=1).T
    w = torch.ones_like(s) if weights == "uniform" else (s / 0.2).exp()
    w = torch.where(s >= eps, w, 0)
    total = torch.zeros(len(x), 7, dtype=torch.float64).index_add(1, labels, w)
    return total / total.sum(1, keepdim=True).clamp_min(1e-300) if weights == "softmax" else total


@pytest.mark.parametrize("weights", ["uniform", "exp", "softmax"])
@pytest.mark.parametrize("eps", [-1.0, 0.3, 0.8, 1.0])
def test_all_rows_within_a_radius(eps: float, weights: str, streamed: str) -> None:
    x, rows, labels = torch.randn(21, 6), torch.randn(90, 6), torch.randint(0, 7, (90,))
    want = votes(x, rows, labels, eps, weights)
    memory = filled(rows, labels, 50)
    options: dict[str, Any] = dict(weights=weights, temperature=0.2, num_classes=7)
    found = memory.classify(x, radius=1 - eps, backend=streamed, **options)
    torch.testing.assert_close(
        found.scores.double(), want, rtol=1e-5, atol=1e-5 * float(want.max())
    )
    some = want.sum(dim=1) > 0
    assert torch.equal(found.labels == -1, ~some) and (found.score[~some] == 0).all()
    torch.testing.assert_close(found.score.double(), want.amax(1), rtol=1e-5, atol=1e-9)
    chosen = want.gather(1, found.labels.clamp_min(0)[:, None])[:, 0]
    torch.testing.assert_close(chosen[some], want.amax(1)[some], rtol=1e-5, atol=0)


def test_itself_and_its_id_are_left_out() -> None:
    x, labels = torch.eye(3)[[0, 0, 1, 1]], torch.tensor([2, 1, 0, 3])
    found = radius_classify(x, x, labels, 0.5)
    assert found.labels.tolist() == [1, 2, 3, 0] and found.scores is None
    ids = torch.tensor([0, 0, 1, 2])
    found = radius_classify(x, x, labels, 0.5, ids=ids)
    assert found.labels.tolist() == [-1, -1, 3, 0]
    found = radius_classify(x, x.clone(), labels, 0.5, weights="uniform")
    # of equal classes the lowest
    assert found.labels.tolist() == [1, 1, 0, 0] and found.score.tolist() == [1.0] * 4


def test_nothing_to_ask() -> None:
    memory = EmbeddingMemory(3)
    for radius in (None, 0.5):
        found = memory.classify(torch.randn(2, 3), radius=radius, num_classes=2)
        assert found.labels.tolist() == [-1, -1] and torch.equal(found.scores, torch.zeros(2, 2))
    memory.append(torch.randn(4, 3), torch.arange(4))
    assert memory.classify(torch.zeros(0, 3), radius=0.5).labels.shape == (0,)
    want = knn_classify(torch.ones(1, 3), memory.embeddings, memory.labels, k=2)
    assert torch.equal(memory.classify(torch.ones(1, 3).bfloat16(), k=2).labels, want.labels)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: EmbeddingMemory(0), ValueError, "embedding_size: expected"),
        (lambda m: EmbeddingMemory(3, capacity=0), ValueError, "capacity: expected"),
        (lambda m: EmbeddingMemory(3, dtype=torch.int64), TypeError, "dtype: expected"),
        (
            lambda m: m.append(torch.randn(2, 4), torch.arange(2)),
            ValueError,
            "embeddings: expected",
        ),
        (lambda m: m.append(torch.randn(2, 3), torch.arange(3)), ValueError, "labels: expected"),
        (lambda m: m.append(torch.randn(2, 3), -torch.arange(2)), IndexError, "labels: expected"),
        (
            lambda m: m.append(torch.randn(2, 3), torch.arange(2), torch.arange(2)),
            TypeError,
            "where: expected a bool",
        ),
        (
            lambda m: m.append(torch.randn(2, 3), torch.arange(2), torch.ones(3).bool()),
            ValueError,
            r"where: expected \[2\]",
        ),
        (lambda m: m.classify(torch.randn(2, 3), radius=-1.0), ValueError, "radius: expected"),
        (lambda m: m.classify(torch.randn(2, 3), radius=1.0, weights="?"), ValueError, "weights"),
    ],
)
def test_bad_arguments(call, error: type, words: str) -> None:
    memory = EmbeddingMemory(3)
    memory.append(torch.randn(4, 3), torch.arange(4))
    with pytest.raises(error, match=words):
        call(memory)
