"""Scores over pairs that a forward keeps for its backward: the same bits, and no more than fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import require, widest
from pair_calls import draw, statistics
from pair_cases import small_blocks
from torch.utils.flop_counter import FlopCounterMode

from fused_losses.backends.cpu.capability import extension
from fused_losses.base.memory_budget import Room
from fused_losses.base.numerics import accumulate_dtype
from fused_losses.primitives.pairs import blocks, bounded
from fused_losses.primitives.pairs.inputs import PairInputs, PairNeeds
from fused_losses.primitives.pairs.keeping import KEEPING, SMALL, kept_scores

EVERYTHING = 1 << 40


@pytest.fixture(params=KEEPING)
def keeper(request: pytest.FixtureRequest) -> str:
    return require(request.param)


def rooms(name: str, p: PairInputs) -> list[Room]:
    """For one score, for a part of those that there are, for all of them."""
    everything = KEEPING[name](p, EVERYTHING) * p.scale.element_size()
    return [Room(8), *(Room(everything * part // 7) for part in (1, 3, 6)), Room(everything)]


def few_blocks(p: PairInputs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ragged blocks of rows by four of columns, however large: a room ends among them."""
    n, m = p.x.shape[0], p.y.shape[0]
    high, wide = max(8, n // 3 + 1), max(16, m // 4 + 1)
    size = accumulate_dtype(p.x.dtype).itemsize
    monkeypatch.setattr(blocks, "BLOCK_ROWS", high)
    monkeypatch.setattr(blocks, "BLOCK_BYTES", min(n, high) * wide * size)


def check(p: PairInputs, reduction: str, cols: bool, name: str) -> None:
    wanted, slopes = statistics(p, reduction, cols, name)
    for room in rooms(name, p):
        got, found = statistics(p, reduction, cols, name, room=room)
        for a, b in zip((*got, *found.values()), (*wanted, *slopes.values()), strict=True):
            assert torch.equal(a, b) or torch.equal(a.isnan(), b.isnan())
            assert torch.equal(a.nan_to_num(), b.nan_to_num())
        assert room.left >= 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(500, 530))
def test_a_room_changes_no_bit(
    seed: int, dtype: torch.dtype, keeper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_blocks(monkeypatch):
        p, reduction, cols = draw(seed, dtype)
        few_blocks(p, monkeypatch)
        check(p, reduction, cols, keeper)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_products_of_a_precision_are_kept_as_they_are(precision: str) -> None:
    require("cpu")
    if not extension().has_bf16():
        pytest.skip("this CPU has no bf16 products")
    p, reduction, cols = draw(501, torch.float32)
    check(p._replace(precision=precision), reduction, cols, "cpu")


@pytest.mark.parametrize("shape", ["", "triangle"])
@pytest.mark.parametrize("score", ["linear", "root"])
def test_distances_whose_pairs_are_near(score: str, shape: str, keeper: str) -> None:
    """They come from differences, which are taken again."""
    torch.manual_seed(0)
    x, y = (1 + 0.01 * torch.randn(n, 33) for n in (450, 300))
    more: dict[str, Any] = dict(x_labels=torch.arange(450, dtype=torch.int32) % 7)
    if shape:
        y, more["triangle"] = x, True
    else:
        more["y_labels"] = torch.arange(300, dtype=torch.int32) % 7
    p = PairInputs(x, y, torch.tensor(3.0).double(), score=score, apart=True, **more)
    check(p, "lse", not shape, keeper)


@pytest.mark.parametrize("triangle", [False, True])
def test_threads_read_what_other_threads_have_kept(triangle: bool) -> None:
    require("cpu")
    torch.manual_seed(1)
    x, y = torch.randn(900, 40), torch.randn(1300, 40)
    labels = torch.randint(0, 20, (1300,), dtype=torch.int32)
    p = PairInputs(x, y, torch.tensor(3.0).double(), x_labels=labels[:900], y_labels=labels)
    if triangle:
        p = p._replace(y=x, y_labels=None, triangle=True)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            got, gradients = statistics(p, "lse", not triangle, "cpu", room=Room(2_000_000))
            found.append([*got, *gradients.values()])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("seed", range(500, 530))
def test_as_many_whole_blocks_are_kept_as_fit(seed: int, keeper: str) -> None:
    p = draw(seed, widest(keeper))[0]
    most = KEEPING[keeper](p, EVERYTHING)
    n, m = p.x.shape[0], p.y.shape[0]
    pairs = n * (n - 1) // 2 if p.triangle else n * m
    # rows are padded to 64 scores; of a triangle whole tiles of 192 x 256 are kept
    assert pairs <= most <= (n * (m + 64) if not p.triangle else pairs + 512 * n)
    assert (most > 0) == (pairs > 0)
    found = [KEEPING[keeper](p, room) for room in (0, most // 3, max(most - 1, 0), most)]
    assert found[0] == 0 and found[3] == most and found == sorted(found)
    assert found[1] <= most // 3 and (found[2] < most or most == 0)


def test_a_room_is_for_all_sweeps_of_a_call() -> None:
    p = draw(503, torch.float32)[0]
    p = p._replace(x=p.x.requires_grad_())
    room = Room(EVERYTHING)
    kept = kept_scores("bounded", p, room)
    assert room.left == EVERYTHING - 4 * kept > 0
    exact = Room(4 * kept + 3)
    assert kept_scores("bounded", p, exact) == kept and exact.left == 3
    assert kept_scores("bounded", p, exact) == 0 and exact.left == 3


def test_nothing_is_kept_where_nobody_asks_or_no_form_keeps() -> None:
    p, room = draw(503, torch.float32)[0], Room(EVERYTHING)
    assert kept_scores("bounded", p, room) == 0  # no gradient
    p = p._replace(x=p.x.requires_grad_())
    with torch.no_grad():
        assert kept_scores("bounded", p, room) == 0
    assert kept_scores("triton", p, room) == kept_scores("cuda", p, room) == 0
    assert kept_scores("bounded", p, None) == 0
    assert room.left == EVERYTHING
    assert kept_scores("bounded", p, room) > 0


def test_one_product_of_four_is_spared() -> None:
    p = PairInputs(torch.randn(200, 24), torch.randn(300, 24), torch.tensor(3.0).double())
    rows, columns = bounded.statistics(p, "lse", True)
    grads = torch.ones_like(rows[:2]), torch.ones_like(columns[:2])
    product = 2 * 200 * 300 * 24
    for kept, products in ((None, 4), (torch.empty(200 * 300), 3)):
        with FlopCounterMode(display=False) as counted:
            bounded.statistics(p, "lse", True, kept)
            needs = PairNeeds(True, True, True, False, False)
            given = *grads, rows, columns, p, "lse", True, needs
            bounded.statistics_backward(*given, kept=kept)
        assert counted.get_total_flops() == products * product


def test_a_small_call_keeps_its_scores_with_no_room() -> None:
    require("cpu")

    def rows(n: int, m: int, dtype: torch.dtype = torch.float32) -> PairInputs:
        x, y = (torch.randn(size, 8, dtype=dtype).requires_grad_() for size in (n, m))
        return PairInputs(x, y, torch.tensor(2.0, dtype=torch.float64))

    p = rows(250, 200)
    assert 250 * 200 <= kept_scores("cpu", p, None) <= SMALL // 4
    assert kept_scores("cpu", p, Room(8)) == 0  # what is told holds
    assert kept_scores("bounded", p, None) == kept_scores("triton", p, None) == 0
    with torch.no_grad():
        assert kept_scores("cpu", p, None) == 0
    assert kept_scores("cpu", rows(256, 256), None) == SMALL // 4
    assert kept_scores("cpu", rows(256, 257), None) == 0
    assert kept_scores("cpu", rows(256, 200, torch.float64), None) == 0
    wanted, slopes = statistics(p, "lse", True, "cpu", room=Room(8))
    got, found = statistics(p, "lse", True, "cpu")
    for a, b in zip((*got, *found.values()), (*wanted, *slopes.values()), strict=True):
        assert torch.equal(a, b)
