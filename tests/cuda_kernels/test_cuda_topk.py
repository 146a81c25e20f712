"""The top-k's CUDA kernels in the host execution: many tiles, no certainty, no waiting."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import CUDA, require
from far_rows import far_rows
from torch import Tensor

from fused_losses.primitives.topk import bounded as bounded_topk
from fused_losses.primitives.topk import certified as certified_topk
from fused_losses.primitives.topk import cuda as cuda_topk
from fused_losses.primitives.topk import reference as reference_topk
from fused_losses.primitives.topk.inputs import TOPK_KINDS, TopkInputs
from fused_losses.primitives.topk.op import quantize_rows

if not CUDA:
    pytest.skip("FUSED_LOSSES_CUDA_ON_HOST=1 runs the CUDA kernels", allow_module_level=True)

# whatever asks a device for a value
ASKING = ("item", "tolist", "nonzero", "cpu", "numpy", "__bool__", "__int__", "__float__")
ASKING += ("__index__", "unique", "masked_select", "argwhere", "equal")


@pytest.fixture(autouse=True, params=["1", "2", "3"])
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the order of threads."""
    require("cuda")
    monkeypatch.setenv("FUSED_LOSSES_CUDA_SEED", request.param)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several ragged tiles each way, of several parts, and several splits of an unsure row."""
    monkeypatch.setattr(cuda_topk, "TILE_BYTES", 4 * 16 * 516)
    monkeypatch.setattr(cuda_topk, "TILE_ROWS", 16)
    monkeypatch.setattr(cuda_topk, "STORED_COLUMNS", 500)
    monkeypatch.setattr(cuda_topk, "SPLIT", 300)


def inputs(n: int = 21, m: int = 1150, d: int = 6, integers: bool = False, **options) -> TopkInputs:
    draw = (lambda *s: torch.randint(-2, 3, s).float()) if integers else torch.randn
    numbers = lambda size, high: torch.randint(0, high, (size,)).int()
    return TopkInputs(
        draw(n, d),
        draw(m, d),
        x_labels=numbers(n, 3),
        y_labels=numbers(m, 3),
        x_ids=numbers(n, 40),
        y_ids=numbers(m, 40),
        exclude=torch.randint(-1, m, (n, 3)).int(),
        skip_self=True,
        **options,
    )


def same(got: tuple[Tensor, Tensor], p: TopkInputs) -> None:
    want = reference_topk.select(p)
    assert torch.equal(got[1], want[1])
    torch.testing.assert_close(got[0], want[0], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("k", [1, 9, 200], ids=["registers", "shared", "stored"])
def test_candidates_in_order(k: int, small: None) -> None:
    """Keys of small integers are exact: the order, ties among it, is that of a stable sort."""
    p = inputs(k=k, match="different", integers=True)
    screen, keys, index = cuda_topk.screened(p)
    every = p.x @ p.y.T
    rows, columns = slice(0, 21), slice(0, 1150)
    every = every.masked_fill(~reference_topk.allowed(p, rows, columns), -torch.inf)
    want, at = every.sort(dim=1, descending=True, stable=True)
    assert screen.keep == (4 if k == 1 else k + max(16, k // 2))
    assert torch.equal(keys, want[:, : screen.keep])
    assert torch.equal(index, at[:, : screen.keep].int())


@pytest.mark.parametrize("k", [1, 9, 200])
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_tiles_and_parts(kind: str, k: int, small: None) -> None:
    p = inputs(k=k, kind=kind, match="same", largest=kind != "sqeuclidean")
    same(cuda_topk.select(p), p)


def test_codes_of_a_bank_in_tiles(small: None) -> None:
    p = inputs(k=3, kind="cosine")
    codes = quantize_rows(p.y)
    p = p._replace(y=codes.codes, y_scale=codes.scale)
    same(cuda_topk.select(p), p)


@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_no_row_is_certain(kind: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A screen that keeps k candidates rules nothing out: every column is scored."""
    monkeypatch.setattr(certified_topk, "kept", lambda p: p.k)
    monkeypatch.setattr(cuda_topk, "FEW", 1)
    for k, largest in ((1, True), (5, False)):
        p = inputs(n=5, k=k, kind=kind, largest=largest)
        screen, rank, index = cuda_topk.screened(p)
        keys, _ = cuda_topk.IN_KERNELS.listed(p, index)
        ends = rank[:, -1], index[:, -1], keys[:, -1]
        assert not certified_topk._certain(p, screen, *ends).any()
        same(cuda_topk.select(p), p)


def test_ends_of_splits(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best columns are the first and the last of every split."""
    monkeypatch.setattr(certified_topk, "kept", lambda p: p.k)
    ends = torch.tensor([0, 299, 300, 599, 600, 899, 900, 1199])
    x, y = torch.rand(3, 6) + 0.1, torch.rand(1200, 6)
    y[ends] += 10
    p = TopkInputs(x, y, k=8)
    same(cuda_topk.select(p), p)
    assert torch.equal(cuda_topk.select(p)[1].sort(dim=1)[0], ends.expand(3, 8))


def test_equal_rows(small: None) -> None:
    """More equal rows than are kept: the lowest of them, from every split."""
    p = TopkInputs(torch.randn(5, 6), torch.randn(1, 6).expand(1000, 6).contiguous(), k=7)
    for kind in TOPK_KINDS:
        keys, index = cuda_topk.select(p._replace(kind=kind))
        assert torch.equal(index, torch.arange(7).expand(5, 7))
        assert torch.equal(keys, keys[:, :1].expand(5, 7))


def test_rows_alone_are_unsure(small: None) -> None:
    """One row in the middle ties; the others keep what the candidates gave."""
    x, y = torch.eye(3, 4), torch.randn(900, 4)
    y[:, 1] = 0.25
    p = TopkInputs(x, y, k=4)
    found = []
    listed, rows = cuda_topk.IN_KERNELS
    spied = lambda p, unsure, *out: (found.append(unsure.clone()), rows(p, unsure, *out))
    screen, rank, index = cuda_topk.screened(p)
    judge = certified_topk.Judge(listed, spied)
    same(certified_topk.judged(p, screen, rank, index, judge), p)
    assert found[0].tolist() == [False, True, False]


@pytest.mark.parametrize("sure", [True, False])
def test_nothing_waits_for_the_device(sure: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    p = inputs(n=4, m=90, k=3)
    p = p if sure else p._replace(y=p.y[:2].repeat(45, 1))
    want = reference_topk.select(p)

    def refuse(name: str) -> Callable:
        def asked(*_: object, **__: object) -> None:
            raise AssertionError(f"{name} waits for the device")

        return asked

    with monkeypatch.context() as patched:
        for name in ASKING:
            patched.setattr(Tensor, name, refuse(name))
        patched.setattr(torch, "nonzero", refuse("nonzero"))
        found = [
            cuda_topk.select(p._replace(kind=kind, largest=kind != "dot")) for kind in TOPK_KINDS
        ]
        found.append(cuda_topk.select(p))
        with pytest.raises(AssertionError, match="waits"):
            bounded_topk.select(p)
    assert torch.equal(found[-1][1], want[1])


def test_offsets_past_two_to_the_31() -> None:
    far = far_rows(torch.randn(3, 16).half())
    for x, y in ((torch.randn(4, 16).half(), far), (far, torch.randn(50, 16).half())):
        p = TopkInputs(x, y, k=2, kind="cosine")
        near = p._replace(x=x.clone(), y=y.clone())
        same(cuda_topk.select(p), near)


def test_long_rows_go_to_torch() -> None:
    """Rows and lists that shared memory does not hold."""
    p = TopkInputs(torch.randn(2, 13_000), torch.randn(9, 13_000), k=3)
    assert cuda_topk.judge(p) is certified_topk.IN_TORCH
    same(cuda_topk.select(p), p)
    assert cuda_topk.judge(p._replace(x=p.x[:, :4096])) is cuda_topk.IN_KERNELS
    assert cuda_topk.judge(p._replace(x=p.x[:, :512], k=2048)) is cuda_topk.IN_KERNELS


def test_nan_and_infinities() -> None:
    """NaN is no candidate, and a bank that has some is still certified by the others."""
    x, y = torch.randn(4, 5), torch.randn(60, 5)
    x[2, 1], y[7, 0], y[9] = torch.nan, torch.nan, torch.inf
    for kind in TOPK_KINDS:
        for largest in (True, False):
            p = TopkInputs(x, y, k=59, kind=kind, largest=largest)
            found = cuda_topk.select(p)
            assert not (found[1] == 7).any() and (found[1][2] == -1).all()
            want = reference_topk.select(p)
            assert torch.equal(found[1], want[1])
            assert torch.equal(found[0].isnan(), want[0].isnan())


def test_double_rows_with_a_narrow_screen() -> None:
    x, y = torch.randn(5, 7).double(), torch.randn(80, 7).double()
    for kind in TOPK_KINDS:
        p = TopkInputs(x, y, k=4, kind=kind, screen="bf16")
        same(cuda_topk.select(p), p)


@pytest.mark.parametrize("y_dtype", (torch.float32, torch.bfloat16, torch.float64, torch.int8))
@pytest.mark.parametrize("kind", TOPK_KINDS)
def test_a_bank_is_prepared_by_one_launch(
    kind: str, y_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a GPU's screens read of the bank, beside PyTorch's blocks and the literal lengths."""
    codes = y_dtype == torch.int8
    x, y = torch.randn(19, 27), torch.randn(530, 27)
    y[7] = 0
    bank = (20 * y).to(y_dtype) if codes else y.to(y_dtype)
    p = TopkInputs(
        x, bank, k=3, kind=kind, largest=kind != "sqeuclidean",
        y_scale=torch.rand(530) + 0.5 if codes else None,
    )  # fmt: skip
    blocks = certified_topk.prepared(p, narrow=torch.float32)
    launched = []
    plain = cuda_topk.cuda_launch.launch
    monkeypatch.setattr(
        cuda_topk.cuda_launch, "launch", lambda name, **a: (launched.append(name), plain(name, **a))
    )
    monkeypatch.setattr(certified_topk, "_by_kernels", lambda p: True)
    kernels = certified_topk.prepared(p, narrow=torch.float32)
    assert launched == ["topk_bank", "topk_bank"]  # of the bank, of the rows
    # sums of 27 squares in another order, in double, and a root; then one rounding to float32
    apart = 2 * (27 + 4) * 2.0**-53
    torch.testing.assert_close(kernels.squares, blocks.squares, rtol=apart, atol=0)
    torch.testing.assert_close(kernels.error, blocks.error, rtol=2 * apart, atol=0)
    for ours, theirs in (
        (kernels.multiplier, blocks.multiplier),
        (kernels.offset, blocks.offset),
    ):
        torch.testing.assert_close(ours, theirs, rtol=2 * 2.0**-23, atol=0)
    if kind == "sqeuclidean" and not codes:
        assert kernels.center is not None
        literal = (bank.double() - kernels.center.double()).square().sum(1)
        torch.testing.assert_close(-2 * kernels.offset.double(), literal, rtol=2.0**-23, atol=0)
