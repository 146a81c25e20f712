"""The bounds of screened neighbours: no error is beyond, and some are near."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from conftest import CUDA, require
from topk_oracle import (
    DTYPES,
    HARD,
    inverse,
)
from torch import Tensor

from fused_losses import backends
from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.topk import bounds, certified
from fused_losses.primitives.topk.inputs import TOPK_KINDS, TopkInputs
from fused_losses.primitives.topk.op import quantize_rows


def long(rows: Tensor) -> np.ndarray:
    return rows.double().numpy().astype(np.longdouble)


def real_scores(p: TopkInputs, center: Tensor | None, directions: bool) -> np.ndarray:
    """m <x - c, y - c> + a in long double, turned; directions: over |x|. [N, M]"""
    c = np.longdouble(0) if center is None else long(center)
    x, y = long(p.x) - c, long(p.y) - c
    if p.y_scale is not None:
        y = y * long(p.y_scale)[:, None]
    product = (x[:, None] * y).sum(-1)
    if p.kind == "cosine":
        product = product * inverse(y)
        product = product * inverse(x)[:, None] if directions else product
        return product if p.largest else -product
    if p.kind == "dot":
        return product if p.largest else -product
    half = (y * y).sum(-1) / 2
    return half - product if p.largest else product - half


Found = tuple[np.ndarray, np.ndarray, np.ndarray]  # scores, bounds, the real scores


def of_compiled(p: TopkInputs, capability: str) -> Found:
    module = extension()
    module.force_capability(capability)
    try:
        codes = (p.codes, p.codes_scale, p.codes_error, p.codes_signs)
        scores, errors, center = module.topk_scores(p.x, p.y, p.kind, p.largest, p.screen, *codes)
    finally:
        module.force_capability(None)
    return scores.numpy(), errors.numpy(), real_scores(p, center, directions=True)


def placed(rank: Tensor, index: Tensor, m: int) -> np.ndarray:
    """Keys of lists in the order of their columns."""
    out = rank.new_full((rank.shape[0], m), torch.nan)
    return out.scatter(1, index.long(), rank).numpy()


def of_bounded(p: TopkInputs, _: str = "") -> Found:
    screen = replace(certified.prepared(p), keep=p.y.shape[0])
    scores = placed(*certified.products_of_blocks(p, screen), p.y.shape[0])
    real = real_scores(p, screen.center, directions=False)
    return scores, screen.error.numpy()[:, None] + 0 * scores, real


def of_cuda(p: TopkInputs, _: str = "") -> Found:
    from fused_losses.primitives.topk import cuda  # noqa: PLC0415  # needs its library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certified, "kept", lambda p: p.y.shape[0])
        screen, rank, index = cuda.screened(p._replace(k=2))
    scores = placed(rank, index, p.y.shape[0])
    real = real_scores(p, screen.center, directions=False)
    return scores, screen.error.numpy()[:, None] + 0 * scores, real


def capabilities() -> list[str]:
    """The instruction sets that run here, the best last."""
    names = ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"]
    if backends.unavailable("cpu"):
        return []
    return names[: names.index(extension().capability()) + 1]


SCREENS = {
    **{f"cpu-{c}-fp32": (of_compiled, c, "fp32") for c in capabilities()},
    **{
        f"cpu-{c}-{s}": (of_compiled, c, s)
        for c in ("avx512_bf16", "amx_bf16")
        for s in ("bf16", "codes", "rotated")
    },
    "bounded-f32": (of_bounded, "", "fp32"),
    "bounded-f64": (of_bounded, "", "wide"),
    **{f"cuda-{s}": (of_cuda, "", s) for s in ("fp32", "bf16") if CUDA},
}
SCREENS = {
    name: value
    for name, value in SCREENS.items()
    if not name.startswith("cpu-") or value[1] in capabilities()
}


def worst_of_rounding(n: int, digits: int, d: int) -> Tensor:
    """Entries just below the middle of two numbers of so many bits, and of all products' signs."""
    base = 1 + torch.randint(1, 30, (n, d)).double() * 2.0 ** (1 - digits)
    return base + 2.0**-digits * (1 - 2.0**-6 * torch.rand(n, d).double())


def adversaries(screen: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows that a screen rounds the most, and hard ones."""
    for d in (1, 2, 5, 40):
        for digits in (8, 24):
            yield worst_of_rounding(40, digits, d), worst_of_rounding(200, digits, d)
        # all 53 bits
        yield 1 + torch.rand(40, d).double() / 32, 1 + torch.rand(200, d).double() / 32
        # a sum that grows by what its last bit cannot hold
        yield torch.full((3, d), 1 + 2.0**-12), torch.full((5, d), 1 + 3 * 2.0**-13)
    for draw in HARD.values():
        yield draw(12), draw(60)
    # along what codes lose
    for d in (9, 16):
        y = torch.randn(40, d)
        codes = quantize_rows(y, rotate=screen == "rotated")
        yield (y - codes.dequantize()) * 100, y
    if screen == "wide":
        return
    yield 1e-22 * torch.randn(6, 5).double(), 1e-18 * torch.randn(20, 5).double()
    yield 1e18 * torch.randn(6, 5).double(), 1e-25 * torch.randn(20, 5).double()


@cache
def margins(name: str) -> dict[str, float]:
    """The largest error over its bound, by kind."""
    scored, capability, screen = SCREENS[name]
    largest = {}
    for kind in TOPK_KINDS:
        worst = [0.0]
        for x, y in adversaries(screen):
            types = [DTYPES["f64"]] if screen == "wide" else [torch.float64, torch.float32]
            if scored is not of_compiled and screen != "wide":
                types = [torch.float32]
            types += [] if screen in ("wide", "codes", "rotated") else [torch.bfloat16]
            for dtype in types:
                for other in {dtype, torch.float64}:
                    p = TopkInputs(x.to(dtype), y.to(other), kind=kind, largest=len(worst) % 2 == 0)
                    if screen in ("codes", "rotated"):
                        codes = quantize_rows(p.y, rotate=screen == "rotated")
                        p = p._replace(**dict(zip(p._fields[3:7], codes, strict=True)))
                    p = p._replace(screen="bf16" if screen == "bf16" else "fp32")
                    scores, errors, real = scored(p, capability)
                    # beyond the screen's range the bound is inf, or the score NaN or inf: kept
                    judged = np.isfinite(errors) & (scores < np.inf)
                    apart = np.abs(scores.astype(np.longdouble) - real)
                    assert not np.isnan(real).any()
                    excess = judged & ~(apart <= errors)
                    assert not excess.any(), (name, kind, dtype, other, apart[excess][0])
                    some = judged & (errors > 0)
                    worst.append(float((apart[some] / errors[some]).max(initial=0)))
        largest[kind] = max(worst)
    return largest


@pytest.mark.parametrize("name", SCREENS)
def test_no_error_is_beyond_its_bound_and_some_are_near(name: str) -> None:
    found = margins(name)
    print(name, {kind: round(ratio, 3) for kind, ratio in found.items()})
    assert max(found.values()) <= 1
    assert max(found.values()) >= 1 / 8


@pytest.mark.parametrize("d", [1, 3, 64, 1000])
def test_the_compiled_bound_is_that_of_python(d: int) -> None:
    """On rows of length 1: the product's part, and what is added for float lengths."""
    require("cpu")
    x = torch.zeros(1, d)
    x[0, 0] = 1
    for screen in ("fp32", "bf16"):
        if screen == "bf16" and not extension().has_bf16():
            continue
        products = bounds.BF16 if screen == "bf16" else bounds.IEEE
        types = torch.float32, torch.float64, products
        want = bounds.of_products(d, "dot", *types)
        found = extension().topk_scores(x, x, "dot", True, screen, *[None] * 4)[1].item()
        assert want <= found <= want * (1 + 2e-5 + (d + 8) * 2.0**-24)
        want, more = bounds.of_products(d, "cosine", *types), (0.5 * d + 4) * 2.0**-24
        found = extension().topk_scores(x, x, "cosine", True, screen, *[None] * 4)[1].item()
        assert want + more <= found <= (want + more) * (1 + 2e-5 + 2.0**-7)


def test_beyond_the_range_nothing_is_ruled_out() -> None:
    """2^63: a row's length from which on no bound is given."""
    x = torch.tensor([[2.0**62, 0], [2.0**63, 0]])
    p = TopkInputs(x, torch.randn(30, 2), k=1)
    assert certified.prepared(p).error.isinf().tolist() == [False, True]
    p = TopkInputs(torch.randn(2, 2), torch.tensor([[1.0, 0], [2.0**63, 0]]), k=1)
    assert certified.prepared(p).error.isinf().all()
