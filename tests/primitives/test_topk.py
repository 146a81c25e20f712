"""`pairwise_topk`: every backend and screen gives the sorted scores of float64, exactly."""

from __future__ import annotations

import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import backends
from fused_losses.pairwise.distance import pairwise_distance
from fused_losses.pairwise.topk import pairwise_topk
from fused_losses.primitives.topk import bounded as bounded_topk
from fused_losses.primitives.topk import certified as certified_topk
from fused_losses.primitives.topk.inputs import TopkInputs
from fused_losses.primitives.topk.op import quantize_rows, select
from fused_losses.primitives.topk.rotation import rotated_back

PRODUCTS = ("dot", "euclidean", "sqeuclidean", "cosine", "angular")
OTHERS = ("cityblock", "chebyshev", "canberra", "poincare", "snr", "jensenshannon")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SCREENS = ("fp32", "bf16", "codes", "rotated")


def scores(x: Tensor, y: Tensor, metric: str) -> Tensor:
    """The metric in float64, all at once. [N, M]"""
    x, y = x.double(), y.double()
    # the same bits for equal rows, which a matrix product does not promise
    product = (x[:, None] * y).sum(dim=-1)
    lengths = x.norm(dim=1)[:, None] * y.norm(dim=1)
    cosine = torch.where(lengths == 0, 0, product / torch.where(lengths == 0, 1, lengths))
    squared = (x[:, None] - y).square().sum(dim=-1)
    named = {
        "dot": product,
        "sqeuclidean": squared,
        "euclidean": squared.sqrt(),
        "cosine": 1 - cosine,
        "angular": cosine.clamp(-1, 1).arccos() / torch.pi,
    }
    return named[metric] if metric in named else pairwise_distance(x, y, metric)


def sorted_out(
    table: Tensor, k: int, largest: bool, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The first k of each row; what is not kept or NaN is no candidate."""
    nothing = -torch.inf if largest else torch.inf
    dead = table.isnan() if kept is None else table.isnan() | ~kept
    # a candidate's own infinity stands before what is no candidate
    index = torch.full((table.shape[0], k), -1)
    values = torch.full((table.shape[0], k), nothing, dtype=torch.float64)
    for i, row in enumerate(table.tolist()):
        order = [j for j in range(len(row)) if not dead[i, j]]
        order.sort(key=lambda j: (-row[j] if largest else row[j], j))
        for place, j in enumerate(order[:k]):
            index[i, place], values[i, place] = j, row[j]
    return values, index


def agree(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], rtol: float = 2e-6) -> None:
    assert torch.equal(found[1], want[1])
    torch.testing.assert_close(found[0].double(), want[0], rtol=rtol, atol=rtol)


def can_screen(screen: str, backend: str) -> bool:
    return (
        screen != "bf16"
        or backend == "cuda"
        or (
            backend == "cpu"
            and not backends.reasons_against("cpu", torch.device("cpu"), torch.float32, "bf16")
        )
    )


@pytest.mark.parametrize("metric", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (17, 130, 33, 5), (65, 40, 7, 50)])
def test_against_sorted_scores(n, m, d, k, dtype, metric, backend: str) -> None:
    x, y = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
    for largest in (True, False):
        found = pairwise_topk(x, y, k, metric, largest=largest, backend=backend)
        agree(found, sorted_out(scores(x, y, metric), k, largest))
        assert found[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("metric", ["correlation", "hellinger", "mahalanobis", *OTHERS])
def test_other_metrics(metric: str, backend: str) -> None:
    x, y = torch.rand(9, 6) / 6, torch.rand(70, 6) / 6
    given = {"covariance": torch.eye(6) + 0.1} if metric == "mahalanobis" else {}
    found = pairwise_topk(x, y, 7, metric, backend=backend, **given)
    table = pairwise_distance(x, y, metric, backend="reference", **given)
    values, index = sorted_out(table, 7, False)
    torch.testing.assert_close(found[0].double(), values, rtol=2e-5, atol=2e-5)
    # distances that are equal but for rounding may change places
    picked = table.double().gather(1, found[1])
    torch.testing.assert_close(picked, values, rtol=2e-5, atol=2e-5)
    assert float((found[1] == index).double().mean()) > 0.95


def test_metrics_of_bits(backend: str) -> None:
    x, y = torch.rand(5, 40) < 0.5, torch.rand(30, 40) < 0.5
    for metric in ("hamming", "jaccard"):
        values, index = pairwise_topk(x, y, 4, metric, backend=backend)
        table = pairwise_distance(x, y, metric, backend="reference")
        agree((values, index), sorted_out(table, 4, False))


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("metric", ["dot", "cosine", "euclidean"])
def test_a_screen_never_changes_the_answer(metric: str, screen: str, streamed: str) -> None:
    """Rows that differ by less than any screen's rounding, copies, and a far origin."""
    if not can_screen(screen, streamed):
        device = torch.device("cpu")
        assert backends.reasons_against(streamed, device, torch.float32, "bf16") or (
            streamed == "bounded"
        )
        return
    base = torch.randn(1, 24)
    close = base + 1e-4 * torch.randn(300, 24)
    close[100:140] = close[7]
    for shift in (0.0, 100.0):
        y = close + shift
        x = base + shift + 0.1 * torch.randn(5, 24)
        codes = screen in ("codes", "rotated")
        given = quantize_rows(y, rotate=screen == "rotated") if codes else screen
        found = pairwise_topk(x, y, 20, metric, screen=given, backend=streamed)
        reference = pairwise_topk(x, y, 20, metric, backend="reference")
        assert torch.equal(found[1], reference[1])
        torch.testing.assert_close(found[0], reference[0], rtol=1e-6, atol=1e-12)


def test_rows_that_a_bf16_screen_moves_the_furthest(streamed: str) -> None:
    """Entries just below the middle of two bf16 numbers: every one loses all but 2^-8 of itself."""
    if not can_screen("bf16", streamed):
        return
    x = torch.full((1, 256), 1.00389)
    bank = torch.zeros(64, 256)
    bank[0], bank[40] = 1.003, 1.00389
    assert pairwise_topk(x, bank, 1, "dot", screen="bf16", backend=streamed)[1].item() == 40
    rows = 1.00389 + 2e-5 * torch.rand(500, 256) - 1e-5
    found = pairwise_topk(rows, rows, 10, "dot", screen="bf16", backend=streamed)[1]
    assert torch.equal(found, pairwise_topk(rows, rows, 10, "dot", backend="reference")[1])


@pytest.mark.parametrize("rotate", [False, True])
def test_quantized_rows_are_the_bank(rotate: bool, backend: str) -> None:
    x = torch.randn(6, 20, requires_grad=True)
    y = quantize_rows(torch.randn(90, 20), rotate=rotate)
    bank = y.codes.double() * y.scale[:, None].double()
    bank = bank if y.signs is None else rotated_back(bank, y.signs)
    torch.testing.assert_close(y.dequantize(), bank.float())
    for metric in ("dot", "cosine", "euclidean"):
        found = pairwise_topk(x, y, 5, metric, backend=backend)
        table = scores(x.detach(), bank, metric)
        agree(found, sorted_out(table, 5, metric == "dot"))
        (dx,) = torch.autograd.grad(found[0].sum(), x)
        wide = x.detach().double().requires_grad_()
        picked = scores(wide, bank, metric).gather(1, found[1])
        torch.testing.assert_close(dx.double(), torch.autograd.grad(picked.sum(), wide)[0])


def test_quantize_rows_bounds_its_error() -> None:
    y = torch.cat([torch.randn(50, 30), torch.zeros(2, 30), 1e-20 * torch.randn(3, 30)])
    rows = quantize_rows(y, rows=7, rotate=False)
    apart = (y.double() - rows.codes.double() * rows.scale[:, None].double()).norm(dim=1)
    assert bool((apart <= rows.error.double()).all())
    assert bool((rows.error.double() <= apart * (1 + 1e-5) + 1e-30).all())
    assert torch.equal(rows.dequantize()[50:52], torch.zeros(2, 30))


@pytest.mark.parametrize("match", ["same", "different"])
@pytest.mark.parametrize("itself", [False, True])
def test_labels(match: str, itself: bool, backend: str) -> None:
    x, y = torch.randn(40, 5), None if itself else torch.randn(60, 5)
    bank = x if itself else y
    x_labels = torch.randint(0, 6, (40,)) * 2**40
    y_labels = x_labels if itself else torch.randint(0, 6, (60,)) * 2**40
    labels = dict(x_labels=x_labels) if itself else dict(x_labels=x_labels, y_labels=y_labels)
    kept = (x_labels[:, None] == y_labels) == (match == "same")
    for largest in (False, True):
        given = dict(match=match, skip_self=itself, largest=largest, backend=backend)
        found = pairwise_topk(x, y, 9, "euclidean", **labels, **given)
        table = scores(x, bank, "euclidean")
        agree(
            found,
            sorted_out(
                table, 9, largest, kept & ~(torch.eye(40).bool() if itself else kept.new_zeros(()))
            ),
        )


def test_ids_and_exclusions(backend: str) -> None:
    x, y = torch.randn(12, 4), torch.randn(30, 4)
    x_ids, y_ids = torch.arange(12), torch.arange(30) // 2
    exclude = torch.stack([torch.arange(12), torch.full((12,), -1), torch.arange(12) + 9], 1)
    kept = x_ids[:, None] != y_ids
    for column in exclude.T:
        kept &= column[:, None] != torch.arange(30)
    given = dict(x_ids=x_ids, y_ids=y_ids, exclude=exclude, backend=backend)
    for metric in ("dot", "cityblock"):
        found = pairwise_topk(x, y, 30, metric, **given)
        agree(found, sorted_out(scores(x, y, metric), 30, metric == "dot", kept))


def test_ties_go_to_the_lowest_index(backend: str) -> None:
    y = torch.randn(4, 8)[torch.randint(0, 4, (500,))]
    x = torch.randn(9, 8)
    for metric in ("dot", "cosine", "euclidean", "cityblock"):
        found = pairwise_topk(x, y, 30, metric, backend=backend)
        agree(found, sorted_out(scores(x, y, metric), 30, metric == "dot"))
    y = torch.zeros(200, 8)
    assert torch.equal(
        pairwise_topk(x, y, 3, "cosine", backend=backend)[1], torch.arange(3).expand(9, 3)
    )


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot", "cityblock", "canberra"])
def test_equal_rows_tie_wherever_they_stand(metric: str, backend: str) -> None:
    """Rounding must not part equal rows of long values, over blocks and beyond a few of k."""
    kinds = 1e3 + torch.randn(6, 33)
    which = torch.randint(0, 6, (700,))
    y, x = kinds[which], 1e3 + torch.randn(5, 33)
    values, index = pairwise_topk(x, y, 400, metric, backend=backend)
    for row, found in zip(values, which[index], strict=True):
        # one kind after another, each by its lowest indices and with one value
        changes = (found[1:] != found[:-1]).nonzero().flatten() + 1
        assert len(changes) == len(found.unique()) - 1
        for part in row.tensor_split(changes):
            assert (part == part[0]).all()
    for row, found in zip(index, which[index], strict=True):
        for kind in found.unique():
            mine = row[found == kind]
            assert torch.equal(mine, (which == kind).nonzero().flatten()[: len(mine)])


def test_too_few_candidates(backend: str) -> None:
    x = torch.randn(3, 4)
    labels = torch.tensor([0, 0, 1])
    for metric, nothing in (
        ("dot", -torch.inf),
        ("euclidean", torch.inf),
        ("cityblock", torch.inf),
    ):
        given = dict(x_labels=labels, match="same", skip_self=True, backend=backend)
        values, index = pairwise_topk(x, None, 2, metric, **given)
        assert torch.equal(index, torch.tensor([[1, -1], [0, -1], [-1, -1]]))
        assert torch.equal(values[:, 1], torch.full((3,), nothing)) and values[2, 0] == nothing
        assert bool(values[:2, 0].isfinite().all())


@pytest.mark.parametrize(("n", "m"), [(0, 5), (4, 0), (0, 0)])
def test_empty(n: int, m: int, backend: str) -> None:
    x, y = torch.randn(n, 3, requires_grad=True), torch.randn(m, 3, requires_grad=True)
    for metric in ("dot", "cityblock"):
        values, index = pairwise_topk(x, y, 2, metric, backend=backend)
        assert values.shape == index.shape == (n, 2) and bool((index == -1).all())


def test_nan(backend: str) -> None:
    x, y = torch.randn(6, 4), torch.randn(50, 4)
    x[2, 1], y[7, 0] = torch.nan, torch.nan
    for metric in ("dot", "cosine", "euclidean", "cityblock"):
        values, index = pairwise_topk(x, y, 50, metric, backend=backend)
        assert bool((index[2] == -1).all()) and bool(values[2].isnan().all())
        rest = [0, 1, 3, 4, 5]
        assert not bool((index[rest] == 7).any()) and bool((index[rest, 48] >= 0).all())
        assert bool((index[rest, 49] == -1).all())


def test_infinite_and_huge_entries(backend: str) -> None:
    x, y = torch.randn(5, 4), torch.randn(40, 4)
    y[3, 0] = torch.inf
    y[5] *= 1e30
    x[1] *= 1e30
    for metric in ("dot", "sqeuclidean"):
        for largest in (False, True):
            values, index = pairwise_topk(x, y, 12, metric, largest=largest, backend=backend)
            want = sorted_out(scores(x, y, metric), 12, largest)
            assert torch.equal(index, want[1])
            torch.testing.assert_close(values, want[0].float())


def test_a_bank_on_disk(tmp_path, streamed: str) -> None:
    y = torch.randn(3_000, 16)
    file = tmp_path / "bank.bin"
    y.numpy().tofile(file)
    bank = torch.from_file(str(file), shared=True, size=y.numel()).view(3_000, 16)
    x = torch.randn(5, 16)
    found, want = (pairwise_topk(x, b, 8, "dot", backend=streamed) for b in (bank, y))
    assert torch.equal(found[0], want[0]) and torch.equal(found[1], want[1])


def test_non_contiguous(backend: str) -> None:
    x, y = torch.randn(12, 10)[:, ::2], torch.randn(5, 80).T
    for metric in ("dot", "euclidean"):
        found = pairwise_topk(x, y, 6, metric, backend=backend)
        agree(found, sorted_out(scores(x, y, metric), 6, metric == "dot"))
    wide = torch.randn(60, 9)
    found = pairwise_topk(x, wide[:, 2:7], 6, "dot", backend=backend)
    agree(found, sorted_out(scores(x, wide[:, 2:7], "dot"), 6, True))


def test_many_neighbours(backend: str) -> None:
    x, y = torch.randn(3, 6), torch.randn(2_500, 6)
    agree(
        pairwise_topk(x, y, 2_048, "euclidean", backend=backend),
        sorted_out(scores(x, y, "euclidean"), 2_048, False),
    )


@pytest.mark.float64
@pytest.mark.parametrize("metric", ["dot", "euclidean", "cosine", "angular", "cityblock", "snr"])
def test_gradients(metric: str, backend: str) -> None:
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    y = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(5) % 2, torch.arange(12) % 4
    given = dict(x_labels=labels[0], y_labels=labels[1], match="same", backend=backend)

    def values(x: Tensor, y: Tensor) -> Tensor:
        found, index = pairwise_topk(x, y, 4, metric, **given)
        return torch.where(index < 0, 0, found)

    assert torch.autograd.gradcheck(values, (x, y))


def test_gradient_at_distance_zero_is_zero(backend: str) -> None:
    x = torch.randn(4, 3, requires_grad=True)
    values, _ = pairwise_topk(x, x.detach().clone(), 1, "euclidean", backend=backend)
    values.sum().backward()
    assert torch.equal(x.grad, torch.zeros(4, 3))


def test_gradient_of_half_precision_rows_is_summed_wide(backend: str) -> None:
    """One row of the bank is the nearest of all queries."""
    x = torch.randn(4_000, 2).bfloat16()
    y = torch.zeros(1, 2, dtype=torch.bfloat16, requires_grad=True)
    values, _ = pairwise_topk(x, y, 1, "dot", backend=backend)
    values.sum().backward()
    torch.testing.assert_close(y.grad.double()[0], x.double().sum(dim=0), rtol=5e-3, atol=0.3)


def test_certificates() -> None:
    """A screen that sees nothing certifies nothing, and every row goes the long way."""
    x, y = torch.randn(4, 6), torch.randn(80, 6)
    p = TopkInputs(x, y, k=3)
    screen = certified_topk.prepared(p)
    anything = torch.arange(screen.keep).expand(4, screen.keep)
    blind = lambda p, s: (torch.full((4, s.keep), torch.inf), anything)
    found = certified_topk.certified(p, screen, blind)
    want = select(p, "reference")
    assert torch.equal(found[1], want[1])
    seen = []

    def spied(p: TopkInputs, s: certified_topk.Screen) -> tuple[Tensor, Tensor]:
        seen.append(s.keep)
        return certified_topk.products_of_blocks(p, s)

    assert torch.equal(certified_topk.certified(p, screen, spied)[1], want[1]) and seen
    assert torch.equal(bounded_topk.select(p)[1], want[1])


def test_a_forced_screen_that_cannot_run_is_refused() -> None:
    require("cpu")
    if can_screen("bf16", "cpu"):
        x = torch.randn(3, 4)
        a, b = (pairwise_topk(x, x, 2, "dot", screen=s, backend="cpu") for s in ("bf16", "fp32"))
        assert torch.equal(a[1], b[1])
    else:
        with pytest.raises(RuntimeError, match="AVX512_BF16"):
            pairwise_topk(torch.randn(3, 4), None, 2, "dot", screen="bf16", backend="cpu")
