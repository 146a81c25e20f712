"""The top-k's screen against a plain formula, in Triton's interpreter.

`test_interpreted.py` runs this file. Keys of small integers are exact in every type, so that the
order, ties to the lowest column among it, must be the very one of a stable sort.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from far_rows import far_rows
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.primitives.topk import bounded as bounded_topk
from fused_losses.primitives.topk import reference as reference_topk
from fused_losses.primitives.topk import triton as backend
from fused_losses.primitives.topk.inputs import TOPK_KINDS, TopkInputs

STEP = {"fp32": 2**-22, "tf32": 2**-10, "bf16": 2**-8}


@dataclass
class Case:
    """One call."""

    keep: int = 5
    n: int = 37
    m: int = 150
    d: int = 24
    dtype: torch.dtype = torch.float32
    y_dtype: torch.dtype | None = None  # of y; None: that of x
    match: str = "any"
    multiplier: bool = False
    ids: bool = False
    exclude: int = 0
    skip_self: bool = False
    center: bool = False
    precision: str = "fp32"
    integers: bool = True  # exact keys, many of them equal
    name: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.name or f"{self.keep}-{self.match}-{str(self.dtype)[6:]}"


def inputs(case: Case, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)

    def values(*shape: int, high: int = 2) -> Tensor:
        if case.integers:
            return torch.randint(-high, high + 1, shape, generator=g).float()
        return torch.randn(shape, generator=g)

    def integers(size: int, high: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=g, dtype=torch.int32)

    labels = case.match != "any"
    exclude = torch.randint(-1, case.m, (case.n, max(case.exclude, 1)), generator=g)
    return dict(
        x=values(case.n, case.d).to(case.dtype),
        y=values(case.m, case.d).to(case.y_dtype or case.dtype),
        a=values(case.m),
        m=values(case.m, high=3) if case.multiplier else None,
        keep=case.keep,
        x_labels=integers(case.n, 4) if labels else None,
        y_labels=integers(case.m, 4) if labels else None,
        match=case.match,
        x_ids=integers(case.n, 20) if case.ids else None,
        y_ids=integers(case.m, 20) if case.ids else None,
        exclude=exclude.int() if case.exclude else None,
        skip_self=case.skip_self,
        precision=case.precision,
        center=values(case.d) if case.center else None,
    )


def keys_of(call: dict[str, Any]) -> Tensor:
    """Every key in float64, -inf where a pair is left out. [N, M]"""
    x, y = call["x"].double(), call["y"].double()
    if call["center"] is not None:
        y = y - call["center"].double()
    keys = x @ y.T
    if call["m"] is not None:
        keys = keys * call["m"].double()
    keys = keys + call["a"].double()
    out = torch.zeros(keys.shape, dtype=torch.bool)
    if call["match"] != "any":
        same = call["x_labels"][:, None] == call["y_labels"]
        out |= ~same if call["match"] == "same" else same
    if call["x_ids"] is not None:
        out |= call["x_ids"][:, None] == call["y_ids"]
    if call["skip_self"]:
        out |= torch.eye(*keys.shape, dtype=torch.bool)
    if call["exclude"] is not None:
        for column in call["exclude"].T:
            out |= column[:, None] == torch.arange(keys.shape[1])
    return keys.masked_fill(out, -torch.inf)


def check(case: Case, call: dict[str, Any], keys: Tensor, index: Tensor) -> None:
    every = keys_of(call)
    shape = (every.shape[0], case.keep)
    assert keys.shape == index.shape == shape
    assert keys.dtype == torch.float32 and index.dtype == torch.int32
    order = every.sort(dim=1, descending=True, stable=True)
    width = min(case.keep, every.shape[1])
    want, at = order[0][:, :width], order[1][:, :width]
    at = at.masked_fill(want == -torch.inf, -1)
    assert (index[:, width:] == -1).all() and (keys[:, width:] == -torch.inf).all()
    keys, index = keys[:, :width], index[:, :width].long()
    if case.integers:
        assert torch.equal(keys.double(), want) and torch.equal(index, at)
        return
    assert torch.equal(index < 0, at < 0)
    assert (keys[:, 1:] <= keys[:, :-1]).all()
    there = index >= 0
    for row, real in zip(index, there, strict=True):
        assert len(row[real].unique()) == int(real.sum())
    allowed = 16 * STEP[case.precision] * every[every.isfinite()].abs().max()
    mine = every.gather(1, index.clamp_min(0))
    assert ((keys - mine).abs()[there] <= allowed).all()
    assert ((mine - want).abs()[there] <= allowed).all()


BF16, FP16 = torch.bfloat16, torch.float16
MANY = dict(multiplier=True, ids=True, exclude=3, skip_self=True)
CASES = [
    Case(),
    Case(keep=1),
    Case(keep=16, dtype=BF16),
    Case(keep=20, dtype=FP16, d=33),
    Case(keep=7, match="same", **MANY, name="same-everything"),
    Case(keep=60, match="different", **MANY, name="different-everything"),
    Case(keep=128, m=300, name="all-slots"),
    Case(keep=40, m=20, name="fewer-columns"),
    Case(keep=200, match="same", **MANY, name="stored"),
    Case(keep=300, n=40, m=70, dtype=BF16, name="stored-fewer-columns"),
    Case(dtype=BF16, y_dtype=torch.int8, multiplier=True, name="int8"),
    Case(y_dtype=torch.int8, center=True, name="int8-centered"),
    Case(dtype=BF16, y_dtype=FP16, name="mixed-types"),
    Case(y_dtype=BF16, center=True, d=33, multiplier=True, name="centered"),
    Case(keep=150, center=True, name="stored-centered"),
    Case(n=1, m=1, d=1, keep=1, name="one"),
    *(Case(keep=9, integers=False, precision=p, multiplier=True, name=p) for p in STEP),
    Case(keep=33, m=400, integers=False, match="different", name="random"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_a_stable_sort(case: Case) -> None:
    call = inputs(case)
    check(case, call, *backend.screen(**call))


@pytest.mark.parametrize("keep", (6, 140))
def test_ranges_and_blocks(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same in one range, in several ragged ones, and by several ragged blocks."""
    case = Case(keep=keep, m=333, match="different", **MANY)
    call = inputs(case)
    for processors in (1, 40):
        monkeypatch.setattr(gpu_device, "processors", lambda device, p=processors: p)
        check(case, call, *backend.screen(**call))
    monkeypatch.setattr(backend, "FUSED", 0)
    monkeypatch.setattr(backend, "BLOCK_BYTES", 8 * 20 * 352)
    check(case, call, *backend.screen(**call))


def test_several_blocks_of_columns() -> None:
    case = Case(keep=130, n=3, m=9000, d=3)
    call = inputs(case)
    check(case, call, *backend.screen(**call))


@pytest.mark.parametrize("keep", (4, 140))
def test_nan_and_infinities(keep: int) -> None:
    """A NaN is a candidate before all finite ones; -inf is one, after them."""
    x, y, a = torch.ones(20, 3), torch.randn(50, 3), torch.zeros(50)
    y[7, 1], a[30], a[40] = torch.nan, -torch.inf, torch.inf
    x[5] = torch.nan
    call = dict(m=None, x_labels=None, y_labels=None, match="any", x_ids=None, y_ids=None)
    call |= dict(exclude=None, skip_self=False, precision="fp32")
    keys, index = backend.screen(x, y, a, keep=keep, **call)
    assert index[0, :2].tolist() == [7, 40] and (keys[0, :2] == torch.inf).all()
    assert index[5, :4].tolist() == [0, 1, 2, 3]
    if keep > 50:
        assert index[0, 49] == 30 and keys[0, 49] == torch.finfo(torch.float32).min
        assert (index[:, 50:] == -1).all()


def test_zeros_of_either_sign_are_equal() -> None:
    x, y = torch.tensor([[1.0], [-1.0]]), torch.zeros(9, 1)
    # sums begin with +0, and so a product alone is never -0
    call = dict(m=torch.full((9,), -1.0), x_labels=None, y_labels=None, match="any", x_ids=None)
    a = torch.tensor([-0.0, 0.0] * 4 + [-0.0])
    assert (0 * call["m"] + a).signbit().tolist() == a.signbit().tolist()
    call |= dict(y_ids=None, exclude=None, skip_self=False, precision="fp32")
    for keep in (3, 130):
        assert backend.screen(x, y, a, keep=keep, **call)[1][:, :3].tolist() == [[0, 1, 2]] * 2


def test_nothing_to_do() -> None:
    for change in (dict(n=0), dict(m=0), dict(keep=0), dict(d=0), dict(exclude=0)):
        case = Case(**change)
        call = inputs(case)
        check(case, call, *backend.screen(**call))


def test_strided_rows() -> None:
    case = Case()
    call = inputs(case)
    wide = torch.zeros(37, 30)
    wide[:, 3:27] = call["x"]
    call |= dict(x=wide[:, 3:27], y=call["y"].T.contiguous().T)
    check(case, call, *backend.screen(**call))


@pytest.mark.parametrize("kind", TOPK_KINDS)
@pytest.mark.parametrize("largest", (False, True))
@pytest.mark.parametrize("screen", ("fp32", "bf16"))
def test_select_is_the_bounded_one(kind: str, largest: bool, screen: str) -> None:
    """Whatever the screen, the k best in float64, to the last bit and the last tie."""
    for dtype, d in ((torch.float32, 5), (BF16, 32)):
        x, y = (torch.randn(n, d).to(dtype) for n in (33, 90))
        y[50:70] = y[:20]
        labels = [torch.randint(0, 3, (n,)).int() for n in (33, 90)]
        options = (kind, 4, largest, "different", True, False, screen)
        p = TopkInputs(x, y, *[None] * 5, *labels, *[None] * 3, *options)
        got, want = backend.select(p), bounded_topk.select(p)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_offsets_past_two_to_the_31() -> None:
    case = Case(n=3, m=3, d=16, dtype=FP16, keep=2)
    call = inputs(case)
    far = far_rows(call["y"])
    check(case, call | dict(y=far), *backend.screen(**call | dict(y=far)))


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_errors_stay_below_their_bound(precision: str) -> None:
    """Entries just below the middle of two numbers of the narrow type, which all round one way."""
    nearest = 0.0
    wide = torch.float64
    for kind in TOPK_KINDS:
        for dtype, y_dtype in (
            (torch.float32,) * 2,
            (wide, wide),
            (torch.float32, wide),
            (BF16,) * 2,
        ):
            for d in (1, 3, 40):
                digits = 8 if precision == "bf16" else 24
                rows = 1 + torch.randint(1, 30, (80, d)).double() * 2.0 ** (1 - digits)
                rows += 2.0**-digits * (1 - 2.0**-6 * torch.rand(80, d).double())
                p = TopkInputs(rows[:20].to(dtype), rows.to(y_dtype), kind=kind, screen=precision)
                made = backend.prepared(p)
                keys, index = backend._candidates(p, replace(made, keep=80))
                x, y = p.x.double(), p.y.double()
                if made.center is not None:
                    x, y = x - made.center, y - made.center
                real = x @ y.T
                if kind == "cosine":
                    real = real / y.norm(dim=1)
                elif kind == "sqeuclidean":
                    real = y.square().sum(dim=1) / 2 - real
                ratio = (keys - real.gather(1, index.long())).abs() / made.error[:, None]
                assert float(ratio.max()) <= 1, (kind, dtype, y_dtype, d)
                nearest = max(nearest, float(ratio.max()))
    print(precision, nearest)
    assert nearest >= 1 / 8


@pytest.mark.parametrize("screen", ("fp32", "bf16"))
def test_rows_of_float64_are_moved_before_they_are_rounded(screen: str) -> None:
    """Consecutive seconds, which in float32 are whole minutes."""
    rows = 1.7e9 + torch.arange(40).double()[:, None]
    for x, y in ((rows, rows), (rows.float(), rows), (rows, rows.float())):
        p = TopkInputs(x, y, kind="sqeuclidean", k=2, largest=False, skip_self=True, screen=screen)
        got, want = backend.select(p), reference_topk.select(p)
        assert torch.equal(got[1], want[1]) and torch.equal(got[0], want[0])
