"""The rule "triplets" of `row_rules` by the compiled counting, a block of scores at a time."""

from __future__ import annotations

import pytest
import torch
from conftest import CUDA
from row_loss_cases import require_rows
from torch import Tensor

from fused_losses.primitives.row_rules import cuda as cuda_triplets
from fused_losses.primitives.row_rules.inputs import TRIPLETS, RowBlock
from fused_losses.primitives.row_rules.rules import ROW_FOLDS

RULE = ROW_FOLDS["triplets"]
KINDS = ("all", "hard", "semihard")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=("cpu", *CUDA))
def compiled(request: pytest.FixtureRequest) -> str:
    return require_rows(request.param)


@pytest.fixture(autouse=True)
def _small_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """8 blocks at most: some take a second and a third row."""
    monkeypatch.setenv("FUSED_LOSSES_CUDA_PROCESSORS", "1")


def block(rows: int, columns: int, positives: float, kind: str) -> RowBlock:
    """Scores with ties and gaps that equal the margin, and some pairs of neither class."""
    score = torch.randn(rows, columns).mul(8).round().div(8)
    drawn = torch.rand(rows, columns)
    classes = drawn < positives, drawn > positives + 0.05
    return RowBlock(score, *classes, None, [0.25, float(TRIPLETS.index(kind)), 0.0])


def check(b: RowBlock, backend: str) -> None:
    """Of numbers in steps of 1/8 every sum is exact: equal to PyTorch's in float64."""
    wide = b._replace(score=b.score.double())
    want = RULE.forward(wide)
    got = RULE.on(backend).forward(b)
    broken = want[:, 0].isnan()
    assert torch.equal(got[:, 0].isnan(), broken)
    assert torch.equal(got[~broken], want[~broken])
    grad = torch.randn(b.score.shape[0], 2)
    got = RULE.on(backend).gradient(b, grad)[0]
    # float32 holds these counts
    want = RULE.gradient(wide, torch.ones_like(grad, dtype=torch.float64))[0].float() * grad[:, :1]
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0), want.nan_to_num(0))


@kinds
@pytest.mark.parametrize(
    ("rows", "columns", "positives"),
    [
        (5, 29, 0.3),
        (21, 150, 0.3),
        (3, 32, 0.3),
        (9, 4, 0.5),
        (4, 1, 0.5),
        (2, 260, 0.02),
        (3, 300, 0.17),
        (2, 1030, 0.2),
    ],
    ids=str,
)
def test_is_its_formula(
    kind: str, rows: int, columns: int, positives: float, compiled: str
) -> None:
    check(block(rows, columns, positives, kind), compiled)


@kinds
@pytest.mark.parametrize(("columns", "positives"), [(1100, 0.94), (2400, 0.9)])
def test_more_positives_than_are_held_at_once(
    kind: str, columns: int, positives: float, compiled: str
) -> None:
    b = block(2, columns, positives, kind)
    assert int(b.positive.sum(dim=1).min()) > 1000
    check(b, compiled)


@kinds
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_unaligned(kind: str, offset: int, compiled: str) -> None:
    b = block(3, 32, 0.3, kind)
    shifted = [torch.cat([t.flatten()[:offset], t.flatten()])[offset:].view(3, 32) for t in b[:3]]
    check(RowBlock(*shifted, *b[3:]), compiled)


@kinds
def test_rows_without_triplets(kind: str, compiled: str) -> None:
    for positives in (-1.0, 0.0, 0.98, 2.0):
        check(block(4, 24, positives, kind), compiled)
    for rows, columns in ((0, 5), (3, 0)):
        check(block(rows, columns, 0.5, kind), compiled)
    b = block(2, 60, 2.0, kind)
    b.score[:, ::3] = torch.nan  # which has no place in an order
    assert not RULE.on(compiled).forward(b).any()
    assert not RULE.on(compiled).gradient(b, torch.ones(2, 2))[0].any()


@kinds
def test_nan_breaks_its_row_alone(kind: str, compiled: str) -> None:
    b = block(5, 40, 0.4, kind)
    b.positive[2, 7] = b.negative[2, 7] = False
    for row, mask in enumerate((b.positive, b.negative, ~(b.positive | b.negative))):
        b.score[row, int(mask[row].nonzero()[0])] = torch.nan
    b.negative[3] = False  # no triplets: its NaN is of no account
    b.score[3] = torch.nan
    got = RULE.on(compiled).forward(b)
    assert got[:, 0].isnan().tolist() == [True, True, False, False, False]
    slope = RULE.on(compiled).gradient(b, torch.ones(5, 2))[0]
    taken = b.positive | b.negative
    for row, broken in enumerate((True, True, False, False, False)):
        assert torch.equal(slope[row].isnan(), taken[row] & broken)


@kinds
@pytest.mark.parametrize("infinity", [torch.inf, -torch.inf])
def test_infinite_scores(kind: str, infinity: float, compiled: str) -> None:
    """inf among the negatives is never near; other infinities give infinite sums, not NaN."""
    b = block(4, 60, 0.4, kind)
    for row in range(4):
        side = b.negative if row < 2 else b.positive
        at = side[row].nonzero()[: 1 + row % 2, 0]
        b.score[row, at] = infinity
    got, want = RULE.on(compiled).forward(b), torch.zeros(4, 2, dtype=torch.float64)
    for row in range(4):
        near, far = b.score[row][b.positive[row]].double(), b.score[row][b.negative[row]].double()
        gap = near[:, None] - far
        loss = (gap + 0.25).clamp_min(0)
        if kind != "all":
            loss = torch.where((gap >= 0) if kind == "hard" else (gap < 0), loss, 0)
        want[row] = torch.stack([loss.sum(), (loss > 0).sum().double()])
    assert torch.equal(got, want)


@pytest.mark.skipif(not CUDA, reason="FUSED_LOSSES_CUDA_ON_HOST is not 1")
@kinds
def test_the_same_bits_in_any_order(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_rows("cuda")
    b = block(3, 1300, 0.85, kind)
    b.score.add_(torch.rand_like(b.score))
    found: list[tuple[Tensor, Tensor]] = []
    for seed in ("1", "2", "3"):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", seed)
        rule = RULE.on("cuda")
        found.append((rule.forward(b), rule.gradient(b, torch.ones(3, 2))[0]))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_the_kernel_cannot_take() -> None:
    b = block(2, 8, 0.5, "all")
    with pytest.raises(TypeError, match="score: expected float32"):
        cuda_triplets.forward(b.score.double(), b.positive, b.negative, 0.1, "all")
    wide = torch.zeros(1, 1).expand(1, 2**31)
    with pytest.raises(ValueError, match="score: expected at most 1073741824 columns"):
        cuda_triplets.forward(wide, wide, wide, 0.1, "all")
