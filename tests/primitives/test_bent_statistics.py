"""Row statistics of bent scores: the sweep's psi on every backend, and its compact gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fused_losses
from fused_losses.primitives.row_statistics import reference
from fused_losses.primitives.row_statistics.op import op, row_statistics

F64, F32, BF16, FP16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
EXACT = 1e-9


def random_bend(n: int, dtype: torch.dtype = F64) -> Tensor:
    """[4, N]: thresholds amid the products, polynomials of both signs."""
    t = 0.5 * torch.randn(n, dtype=dtype)
    return torch.stack((t, *torch.randn(2, n, dtype=dtype), 0.3 * torch.randn(n, dtype=dtype)))


@dataclass
class Statistics:
    """A call of the op, and the same spelled out on the matrix."""

    x: Tensor
    w: Tensor
    labels: Tensor
    bend: Tensor
    classes: Tensor | None = None
    bias: Tensor | None = None
    shares: Tensor | None = None
    normalize: bool = False
    weighted: bool = False

    @staticmethod
    def drawn(n: int, c: int, d: int, full: bool, dtype: torch.dtype = F64) -> Statistics:
        labels = torch.randint(-1, c, (n,))
        x, w = torch.randn(n, d, dtype=dtype), torch.randn(c, d, dtype=dtype)
        made = Statistics(x, w, labels, random_bend(n, dtype))
        if full:
            keep = torch.rand(c) < 0.5
            keep[labels[labels >= 0]] = True
            keep[:2] = True
            made.classes = keep.nonzero()[:, 0]
            made.bias, made.shares = torch.randn(c, dtype=dtype), torch.rand(c, dtype=dtype)
            made.normalize = made.weighted = True
        return made

    def arguments(self, kept: int = 0) -> tuple[Any, ...]:
        return (self.x, self.w, self.labels, self.classes, self.bias, self.shares,
                self.normalize, self.weighted, "fp32", self.bend, kept)  # fmt: skip

    def backward_arguments(
        self, out: tuple, grads: tuple, compact: bool, needs: tuple = (True, True, None)
    ) -> tuple[Any, ...]:
        need_bias = self.bias is not None if needs[2] is None else needs[2]
        return (*grads, *self.arguments()[:6], out[0], out[5], self.normalize, self.weighted,
                "fp32", self.bend, compact, *needs[:2], need_bias)  # fmt: skip

    def gradients_in(self, out: tuple) -> tuple:
        draw = torch.randn_like
        return draw(out[0]), draw(out[1]), draw(out[2]) if self.weighted else None

    def spelled_out(self) -> dict[str, Tensor]:
        ids = torch.arange(len(self.w)) if self.classes is None else self.classes
        w = self.w[ids]
        raw = self.x @ (F.normalize(w) if self.normalize else w).T
        t, p, q, r = self.bend[:, :, None]
        z = torch.where(raw > t, p + q * raw + r * raw * raw, raw)
        z = z if self.bias is None else z + self.bias[ids]
        is_target = self.labels[:, None] == ids
        others = z.masked_fill(is_target, -torch.inf)
        shares = torch.ones(len(ids), dtype=raw.dtype) if self.shares is None else self.shares[ids]
        best = others.max(1)
        return {
            "lse": others.logsumexp(1),
            "target": (raw * is_target).sum(1),
            "weighted_sum": (z * shares).masked_fill(is_target, 0).sum(1),
            "hardest": ids[best.indices],
            "hardest_score": best.values,
        }

    def wanted_gradients(self, grads: tuple) -> list[Tensor]:
        leaves = [t for t in (self.x, self.w, self.bias) if t is not None]
        for leaf in leaves:
            leaf.requires_grad_()
        out = self.spelled_out()
        value = sum(
            (g * out[name]).sum()
            for g, name in zip(grads, ("lse", "target", "weighted_sum"), strict=True)
            if g is not None
        )
        found = list(torch.autograd.grad(value, leaves))
        for leaf in leaves:
            leaf.requires_grad_(False)
        return found


SIZES = [(1, 2, 3), (37, 53, 24), (300, 211, 9), (5, 700, 33)]


@pytest.mark.float64
@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bent_statistics(size: tuple[int, int, int], full: bool, streamed: str) -> None:
    given = Statistics.drawn(*size, full)
    out = op(streamed)(*given.arguments())
    names = ("lse", "target", "weighted_sum", "hardest", "hardest_score")
    wanted = given.spelled_out()
    for got, name in zip(out, names, strict=False):
        if name != "weighted_sum" or full:
            torch.testing.assert_close(got, wanted[name], rtol=1e-11, atol=1e-11)
    grads = given.gradients_in(out)
    found = op(streamed, "_backward")(*given.backward_arguments(out, grads, False))
    for got, want in zip(found, given.wanted_gradients(grads), strict=False):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_the_reference_spells_the_same_statistics() -> None:
    given = Statistics.drawn(23, 41, 5, True)
    found = reference.row_statistics(
        given.x, given.w, given.labels, given.classes, given.bias, given.shares, True, given.bend
    )
    for name, want in given.spelled_out().items():
        torch.testing.assert_close(found[name], want)


@pytest.mark.float64
@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
def test_gradcheck_of_the_bent_primitive(full: bool, streamed: str) -> None:
    given = Statistics.drawn(7, 13, 5, full)
    leaves = [t.requires_grad_() for t in (given.x, given.w, given.bias) if t is not None]

    def statistics(*leaves: Tensor) -> tuple[Tensor, ...]:
        out = row_statistics(
            given.x, given.w, given.labels, classes=given.classes, bias=given.bias,
            column_weight=given.shares, normalize=full, weighted=full, bend=given.bend,
            backend=streamed,
        )  # fmt: skip
        return out[:3] if full else out[:2]

    assert torch.autograd.gradcheck(statistics, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, FP16], ids=str)
def test_a_score_on_the_threshold_is_kept(dtype: torch.dtype, streamed: str) -> None:
    # small integers: every product is exact in every dtype, and so is every comparison
    n, c, d = 9, 31, 6
    x, w = (torch.randint(-3, 4, (rows, d)).to(dtype) for rows in (n, c))
    accumulate = F64 if dtype == F64 else F32
    labels = torch.randint(0, c, (n,))
    raw = x.double() @ w.double().T
    t = raw[:, 5]  # class 5 stands on every row's threshold
    bend = torch.stack((t, t.new_full((n,), 100), -torch.ones(n), torch.zeros(n))).to(accumulate)
    given = Statistics(x, w, labels, bend)
    out = op(streamed)(*given.arguments())
    z = torch.where(raw > t[:, None], 100 - raw, raw)
    others = z.scatter(1, labels[:, None], -torch.inf)
    assert (out[4].double() == others.max(1).values).all()
    # among equals the lowest class
    assert torch.equal(out[3], (others == others.max(1, keepdim=True).values).int().argmax(1))
    torch.testing.assert_close(out[0], others.logsumexp(1), rtol=1e-6, atol=1e-6)
    # the gradient of a sum of all scores: 1 where kept, -1 where bent
    weighted = Statistics(x, w, torch.full((n,), -1), bend, weighted=True)
    out = op(streamed)(*weighted.arguments())
    assert (out[2].double() == z.sum(1)).all()
    zero = torch.zeros_like(out[0])
    grads = (zero, zero, torch.ones_like(out[2]))
    dx, dw, _ = op(streamed, "_backward")(*weighted.backward_arguments(out, grads, False))
    slope = torch.where(raw > t[:, None], -1.0, 1.0).double()
    assert torch.equal(dx.double(), (slope @ w.double()).to(dtype).double())
    assert torch.equal(dw.double(), (slope.T @ x.double()).to(dtype).double())


@pytest.mark.float64
def test_thresholds_of_no_bend_and_of_nothing_but(streamed: str) -> None:
    given = Statistics.drawn(37, 53, 8, True)
    straight = op(streamed)(*given.arguments()[:-2], None, 0)
    given.bend[0] = torch.inf
    for got, want in zip(op(streamed)(*given.arguments())[:5], straight[:5], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)
    given.bend[0] = -torch.inf
    given.bend[1:] = torch.tensor([0.0, 1.0, 0.0], dtype=F64)[:, None]
    for got, want in zip(op(streamed)(*given.arguments())[:5], straight[:5], strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.float64
def test_nan_stays_in_its_row(streamed: str) -> None:
    given = Statistics.drawn(37, 53, 8, False)
    clean = op(streamed)(*given.arguments())
    given.x[4] = torch.nan
    given.bend[:, 9] = torch.nan  # no score is above NaN: the row is straight
    out = op(streamed)(*given.arguments())
    assert out[0][4].isnan()
    others = torch.ones(37, dtype=torch.bool)
    others[[4, 9]] = False
    for got, want in zip(out[:2], clean[:2], strict=True):
        assert torch.equal(got[others], want[others])
    assert torch.isfinite(out[0][9])
    # nor is what a NaN polynomial says below its threshold
    given.bend[0, 9], given.x[4] = torch.inf, 0.0
    grads = given.gradients_in(out)
    found = op(streamed, "_backward")(
        *given.backward_arguments(op(streamed)(*given.arguments()), grads, False)
    )
    assert all(torch.isfinite(g).all() for g in found)


def test_kept_scores_are_those_before_the_bend() -> None:
    if fused_losses.backends.unavailable("cpu"):
        pytest.skip("only the cpu kernels keep scores")
    given = Statistics.drawn(130, 90, 7, True)
    without = op("cpu")(*given.arguments())
    kept = op("cpu")(*given.arguments(kept=len(given.classes)))
    grads = given.gradients_in(without)
    both = [
        op("cpu", "_backward")(*given.backward_arguments(out, grads, False))
        for out in (without, kept)
    ]
    for a, b in zip((*without[:5], *both[0]), (*kept[:5], *both[1]), strict=True):
        assert torch.equal(a, b)


# --- the compact gradient -------------------------------------------------------------------------


@pytest.mark.parametrize("bent", [False, True], ids=["straight", "bent"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_compact_is_the_rows_that_took_part(
    size: tuple[int, int, int], dtype: torch.dtype, bent: bool, streamed: str
) -> None:
    given = Statistics.drawn(*size, True, F64 if dtype == F64 else F32)
    given.x, given.w = given.x.to(dtype), given.w.to(dtype)
    given.bend = given.bend if bent else None
    out = op(streamed)(*given.arguments())
    grads = given.gradients_in(out)
    dense, compact = (
        op(streamed, "_backward")(*given.backward_arguments(out, grads, how))
        for how in (False, True)
    )
    assert compact[1].shape == (len(given.classes), size[2]) and compact[1].dtype == dtype
    assert torch.equal(compact[1], dense[1][given.classes])
    assert torch.equal(compact[0], dense[0]) and torch.equal(compact[2], dense[2])


@pytest.mark.float64
def test_compact_without_classes_changes_nothing(streamed: str) -> None:
    given = Statistics.drawn(7, 13, 5, False)
    out = op(streamed)(*given.arguments())
    grads = given.gradients_in(out)
    dense, compact = (
        op(streamed, "_backward")(*given.backward_arguments(out, grads, how))
        for how in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(dense, compact, strict=True))


@pytest.mark.float64
def test_compact_of_no_rows_is_zero(streamed: str) -> None:
    given = Statistics.drawn(5, 13, 4, True)
    given.x, given.labels, given.bend = given.x[:0], given.labels[:0], given.bend[:, :0]
    out = op(streamed)(*given.arguments())
    grads = given.gradients_in(out)
    _, dw, _ = op(streamed, "_backward")(*given.backward_arguments(out, grads, True))
    assert dw.shape == (len(given.classes), 4) and (dw == 0).all()


@pytest.mark.parametrize("full", [False, True], ids=["plain", "everything"])
def test_opcheck(full: bool, streamed: str) -> None:
    given = Statistics.drawn(7, 13, 5, full, F32)
    leaves = [t.requires_grad_() for t in (given.x, given.w, given.bias) if t is not None]
    torch.library.opcheck(op(streamed), given.arguments())
    for leaf in leaves:
        leaf.requires_grad_(False)
    out = op(streamed)(*given.arguments())
    grads = given.gradients_in(out)
    for needs in ((True, True, None), (False, True, False)):
        given_back = given.backward_arguments(out, grads, True, needs)
        torch.library.opcheck(op(streamed, "_backward"), given_back)


def test_a_bend_of_the_wrong_shape_is_refused() -> None:
    if fused_losses.backends.unavailable("cpu"):
        pytest.skip("the C++ kernels read it unchecked otherwise")
    given = Statistics.drawn(7, 13, 5, False)
    for wrong in (given.bend[:, :6], given.bend[:3], given.bend[0]):
        given.bend = wrong
        with pytest.raises(ValueError, match=r"bend: expected \[4, 7\]"):
            op("cpu")(*given.arguments())
