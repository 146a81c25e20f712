"""1 / temperature in the extension: values, gradients and errors of PyTorch's operations."""

from __future__ import annotations

import pytest
import torch
from conftest import require

from fused_losses.base.compiled import extension
from fused_losses.base.integers import count_up
from fused_losses.base.scalars import inverse
from fused_losses.base.validation import number

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
LIKE = torch.zeros(1, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_inverse_is_that_of_the_number(dtype: torch.dtype) -> None:
    require("cpu")
    found = []
    for compute in (inverse, lambda *given: number(*given).reciprocal()):
        t = torch.tensor(0.07, dtype=dtype, requires_grad=True)
        out = compute("temperature", t, LIKE)
        (first,) = torch.autograd.grad(out.square(), t, create_graph=True)
        (second,) = torch.autograd.grad(first, t)
        plain = torch.autograd.grad(compute("temperature", t, LIKE), t)
        found.append((out, first, second, *plain))
    assert type(found[0][0].grad_fn).__name__ != type(found[1][0].grad_fn).__name__
    for i, (got, want) in enumerate(zip(*found, strict=True)):
        assert got.dtype == want.dtype and got.shape == want.shape == ()
        # parts of a second derivative are rounded one by one
        few = 4 * torch.finfo(dtype).eps if i == 2 else 0.0
        torch.testing.assert_close(got, want, rtol=few, atol=0.0)


def test_the_inverse_has_the_numbers_errors() -> None:
    for wrong in (0.0, -1.0, torch.tensor(0.0), torch.tensor(-2.0)):
        with pytest.raises(ValueError, match="temperature: expected a value > 0"):
            inverse("temperature", wrong, LIKE)
    for odd in (torch.ones(2), torch.tensor(3)):
        with pytest.raises(ValueError, match="temperature: expected a number or a scalar tensor"):
            inverse("temperature", odd, LIKE)
    assert inverse("temperature", torch.tensor([4.0]), LIKE) == 0.25
    assert inverse("temperature", 4, LIKE).dtype == torch.float64
    assert inverse("temperature", torch.tensor(torch.nan), LIKE).isnan()


def test_numbers_in_order() -> None:
    require("cpu")
    assert extension() is not None
    for n, start in ((0, 0), (1, 3), (70, 5)):
        found = count_up(n, LIKE, start)
        assert torch.equal(found, torch.arange(start, start + n, dtype=torch.int32))
        assert found.dtype == torch.int32
