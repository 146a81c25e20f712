"""One clipping over a head and its backbone, against torch's over the parameters of all."""

from __future__ import annotations

import pytest
import torch
from class_center_cases import C, D, batch, head
from torch import Tensor, nn

from fused_losses.centers import SphericalHead, clip_grad_norm_
from fused_losses.functions.margin_softmax import margin_softmax

STEP = dict(optimizer="sgd", optimizer_options=dict(lr=0.1, momentum=0.9), update="step")


def net() -> nn.Linear:
    torch.manual_seed(7)
    return nn.Linear(D, D).double()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("max_norm", [0.0, 0.05, 1e6])
def test_it_is_torchs_over_all_parameters(max_norm: float) -> None:
    """Two backwards, and a scale that learns among the parameters; the table as of one process."""
    found = head(**STEP, scale=nn.Parameter(torch.tensor(8.0, dtype=torch.float64)))
    mine, theirs = net(), net()
    weight, scale = nn.Parameter(found.weight.clone()), nn.Parameter(found.scale.detach().clone())
    for seed in range(2):
        x, y = batch(seed)
        found(mine(x), y).backward()
        unscaled = margin_softmax(theirs(x), weight, y, scale=scale, backend="reference")
        unscaled.backward()
    norm = clip_grad_norm_([*mine.parameters(), *found.parameters()], max_norm, found)
    expected = nn.utils.clip_grad_norm_([*theirs.parameters(), weight, scale], max_norm)
    assert weight.grad is not None
    close(norm, expected)
    assert found.grad_norm() == pytest.approx(float(weight.grad.norm()), rel=1e-10, abs=1e-12)
    for a, b in zip([*mine.parameters(), found.scale], [*theirs.parameters(), scale], strict=True):
        close(a.grad, b.grad)
    before = weight.detach().clone()
    found.optimizer.step()
    close(found.weight, before - 0.1 * weight.grad)


def test_several_heads_at_once() -> None:
    heads = [head(**STEP), SphericalHead(C, D, lr=0.1, dtype=torch.float64)]
    x, y = batch(0)
    sum(each(x, y) for each in heads).backward()
    assert x.grad is not None
    norms = [each.grad_norm() for each in heads]
    leaf = x.detach().clone()
    leaf.grad = x.grad.clone()
    expected = torch.tensor([float(leaf.grad.norm()), *norms], dtype=torch.float64).norm()
    close(clip_grad_norm_(leaf, 0.1, *heads), expected)
    factor = float(0.1 / (expected + 1e-6))
    close(leaf.grad, x.grad * factor)
    assert [each.grad_norm() for each in heads] == pytest.approx([n * factor for n in norms])


def test_a_norm_that_is_not_finite() -> None:
    """It is refused before anything changes, or leaves no row unharmed by passing it on."""
    found, own = head(**STEP), net()
    x, y = batch(0)
    found(own(x), y).backward()
    own.weight.grad[0, 0] = torch.inf
    before, norm = found.weight.clone(), found.grad_norm()
    with pytest.raises(RuntimeError, match="finite norm"):
        clip_grad_norm_(own.parameters(), 1.0, found, error_if_nonfinite=True)
    assert found.grad_norm() == norm
    own.weight.grad[0, 0] = torch.nan
    assert clip_grad_norm_(own.parameters(), 1.0, found).isnan()
    with pytest.raises(FloatingPointError, match="no row was changed"):
        found.optimizer.step()
    assert torch.equal(found.weight, before)


def test_bad_arguments() -> None:
    x, y = batch(0)
    for options in (dict(optimizer="sgd"), {}):
        found = head(**options)
        found(x, y).backward()
        grad = x.grad.clone()
        with pytest.raises(RuntimeError, match="update='step'.*max_grad_norm"):
            clip_grad_norm_(x, 0.1, found)
        assert torch.equal(x.grad, grad)
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_(x, -1.0)
