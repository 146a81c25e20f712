"""Large rooms of kept scores: the next call finds the last one, if the system left it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import functional as f

N = 3000  # 36 MB of scores in float32
ALL = 1 << 28
ROLLUP = Path("/proc/self/smaps_rollup")

Loss = Callable[[Tensor, Tensor, int], Tensor]


def nce(x: Tensor, y: Tensor, budget: int) -> Tensor:
    return f.info_nce(x, y, memory_budget=budget, backend="cpu")


def softmax(x: Tensor, y: Tensor, budget: int) -> Tensor:
    labels = torch.arange(len(x)) % len(y)
    loss = f.margin_softmax(x, y, labels, memory_budget=budget, backend="cpu")
    assert isinstance(loss, Tensor)
    return loss


def taught(x: Tensor, y: Tensor, budget: int) -> Tensor:
    teacher = x.detach().flip(1), y.detach().flip(1)
    return f.distillation(x, y, *teacher, memory_budget=budget, backend="cpu")


LOSSES: dict[str, Loss] = {"pairs": nce, "classes": softmax, "teacher": taught}


def rows(n: int = N) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 4, generator=make) for _ in range(2))
    return x.requires_grad_(), y.requires_grad_()


def begun(loss: Loss, x: Tensor, y: Tensor) -> tuple[Tensor, int]:
    """A loss before its backward, and where its kept scores lie."""
    places = []

    def seen(t: Tensor) -> Tensor:
        if t.numel() >= len(x) * len(y):
            places.append(t.data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda t: t):
        value = loss(x, y, ALL)
    assert len(set(places)) == 1
    return value, places[0]


def ended(value: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value, (x, y))]


def same(got: Any, want: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_the_next_call_finds_it(loss: Loss) -> None:
    require("cpu")
    x, y = rows()
    want = ended(loss(x, y, 0), x, y)
    places = set()
    for _ in range(3):
        value, place = begun(loss, x, y)
        assert same(ended(value, x, y), want)
        places.add(place)
        del value
    assert len(places) == 1


def test_two_that_are_alive_have_two() -> None:
    require("cpu")
    (x, y), (a, b) = rows(), rows(N + 100)
    want, other = ended(nce(x, y, 0), x, y), ended(nce(a, b, 0), a, b)
    first, place = begun(nce, x, y)
    second, its = begun(nce, a, b)
    assert place != its
    assert same(ended(first, x, y), want)
    assert same(ended(second, a, b), other)
    # one of them waits, and serves what is a little smaller
    del first, second
    value, place = begun(nce, x, y)
    assert same(ended(value, x, y), want)


def test_one_of_another_size_is_not_taken() -> None:
    require("cpu")
    for n in (5000, N, 5000):  # of 5,000 rows the room is 2.8 times as large
        x, y = rows(n)
        value, _ = begun(nce, x, y)
        assert same(ended(value, x, y), ended(nce(x, y, 0), x, y))


@pytest.mark.skipif(not ROLLUP.exists(), reason="the system tells no pages of a process")
def test_the_system_may_have_what_waits() -> None:
    require("cpu")
    x, y = rows()
    room = N * N * 4 - (4 << 20)  # but for the rest of a large page
    ended(nce(x, y, ALL), x, y)
    assert lazily_free() > room
    # what is in use is not: it was taken, and the next backward leaves it again
    value = nce(x, y, ALL)
    assert lazily_free() < 4 << 20
    ended(value, x, y)
    assert lazily_free() > room


def lazily_free() -> int:
    """Bytes that the system takes when it wants them."""
    told = [line.split() for line in ROLLUP.read_text().splitlines()]
    return 1024 * sum(int(words[1]) for words in told if words[0] == "LazyFree:")


def test_threads_share_what_waits() -> None:
    require("cpu")
    x, y = rows()
    want = ended(nce(x, y, 0), x, y)
    right: list[bool] = []

    def work() -> None:
        a, b = (t.detach().clone().requires_grad_() for t in (x, y))
        right.extend(same(ended(begun(nce, a, b)[0], a, b), want) for _ in range(4))

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert right == [True] * 12
