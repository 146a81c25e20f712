"""Whether float32 products of the library may be tf32 ones: a call's own, in its thread alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from fused_losses.backends.gpu import products
from fused_losses.backends.gpu.products import float32_products
from fused_losses.base.compiled import extension

needs_extension = pytest.mark.skipif(extension() is None, reason="the extension is not built")


@pytest.fixture(params=("highest", "high", None))
def allowed(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a process may have asked for, by either of PyTorch's switches."""
    if request.param is None:
        matmul = torch.backends.cuda.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "tf32"
        yield "tf32"
        matmul.fp32_precision = before
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def switch() -> str:
    return torch.backends.cuda.matmul.fp32_precision


@needs_extension
def test_the_processs_switch_is_left_alone(allowed: str) -> None:
    off, before = extension().tf32_is_off, switch()
    with float32_products(tf32=False):
        assert off() and switch() == before
        with float32_products(tf32=True):
            assert not off() and switch() == before
            with float32_products(tf32=False):
                assert off()
            assert not off()
        assert off() and switch() == before
    with float32_products(tf32=True):
        assert not off() and switch() == before
    assert not off() and switch() == before


@needs_extension
def test_other_threads_know_nothing_of_it() -> None:
    off = extension().tf32_is_off
    seen: list[bool] = []
    with float32_products(tf32=False):
        beside = threading.Thread(target=lambda: seen.append(off()))
        beside.start()
        beside.join()
        assert off()
    assert seen == [False]


@needs_extension
def test_an_exception_ends_it() -> None:
    with pytest.raises(KeyError), float32_products(tf32=False):
        raise KeyError
    assert not extension().tf32_is_off()


@needs_extension
def test_a_backward_pass_has_its_own() -> None:
    """Autograd's thread, where another thread's calls run meanwhile."""
    off, seen = extension().tf32_is_off, []

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            with float32_products(tf32=False):
                seen.append(off())
            return grad

    x = torch.ones(2, requires_grad=True)
    beside = threading.Thread(target=lambda: Within.apply(x).sum().backward())
    with float32_products(tf32=True):
        beside.start()
        beside.join()
        assert not off()
    assert seen == [True]


def test_without_the_extension_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "extension", lambda: None)
    products._warn_of_tf32.cache_clear()
    before = switch()
    with float32_products(tf32=False):  # nobody asked for tf32
        pass
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.warns(UserWarning, match="without the C"), float32_products(tf32=False):
            assert switch() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
