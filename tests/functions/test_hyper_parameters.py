"""Hyper-parameters given as tensors: each carries its gradient or refuses it where asked."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import fused_losses
from fused_losses.base.examples import TABLE, ExampleInputs

# what differs from the default: where the default is None, or is not differentiable there
VALUES = {
    ("distillation", "temperature"): 2.0,
    ("distillation", "alpha"): 0.5,
    ("distillation", "beta"): 2.0,
    ("distillation", "removed"): -3.0,
    ("batch_hard_triplet", "margin"): 0.3,
    ("info_nce", "false_negative_margin"): 0.1,
    ("info_nce", "hardness"): 0.5,
    ("info_nce", "share"): 0.5,
    ("multi_similarity", "mining_margin"): 0.1,
    ("pairwise_distance", "base"): 2.0,
    ("pairwise_similarity", "gamma"): 0.5,
    ("sinkhorn", "tolerance"): 1e-6,
    ("sinkhorn", "unbalanced"): 2.0,
    ("sinkhorn_divergence", "tolerance"): 1e-6,
    ("sinkhorn_divergence", "unbalanced"): 2.0,
    ("supervised_contrastive", "base_temperature"): 0.5,
    ("trilinear_attention", "scale"): 0.5,
    ("cauchy_schwarz_divergence", "target_bandwidth"): 1.5,
    ("similarity_attention", "scale"): 0.7,
    ("sigmoid_contrastive", "scale"): 2.0,
    ("margin_softmax", "softcap"): 3.0,
    ("linear_cross_entropy", "softcap"): 3.0,
    ("softmax_outputs", "softcap"): 3.0,
    ("sigmoid_contrastive", "bias"): -1.0,
}
# the example that makes use of the argument, where another comes first
USED_BY = {
    ("distillation", "alpha"): "distillation, dkd",
    ("distillation", "beta"): "distillation, dkd",
    ("distillation", "removed"): "distillation, dkd",
    ("distillation", "eps"): "distillation, ofa",
    ("pairwise_similarity", "gamma"): "pairwise_similarity, polynomial",
    ("pairwise_similarity", "coef0"): "pairwise_similarity, polynomial",
    ("pairwise_similarity", "degree"): "pairwise_similarity, polynomial",
}
CHOOSES = ("mine_pairs", "mine_triplets")  # indices, of which nothing has a gradient


def _hyper_parameters() -> dict[str, tuple[str, str]]:
    found = {}
    for name in fused_losses.__all__:
        function = getattr(fused_losses, name)
        if not inspect.isfunction(function) or name in CHOOSES:
            continue
        for p in inspect.signature(function).parameters.values():
            # a pair of numbers is a range, and no number
            if "float" in str(p.annotation) and "tuple" not in str(p.annotation):
                found[f"{name}, {p.name}"] = (name, p.name)
    return found


PARAMETERS = _hyper_parameters()


def loss_of(name: str, parameter: str) -> Any:
    """The function's sum as a function of this argument, and a value of it."""
    function = getattr(fused_losses, name)
    rows = [row for row, example in TABLE.items() if example.function is function]
    example = TABLE[USED_BY.get((name, parameter), rows[0])]
    given = ExampleInputs(8, 13, 6, torch.float64)
    # float64 leaves without gradients
    for field in [k for k, v in vars(ExampleInputs).items() if isinstance(v, cached_property)]:
        setattr(given, field, getattr(given, field).detach())
    _, told = example.arguments(given)
    value = VALUES.get((name, parameter), told.get(parameter))
    if value is None:
        value = inspect.signature(function).parameters[parameter].default

    def loss(at: Any) -> Tensor:
        def call(*args: Any, **options: Any) -> Any:
            return function(*args, **{**options, parameter: at})

        out = example._with(call, given)
        out = out if isinstance(out, Tensor) else out[0]
        # weights, or what normalises would have a constant sum
        return (out * torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)).sum()

    return loss, torch.as_tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_tensor_carries_its_gradient_or_is_refused(case: str) -> None:
    name, parameter = PARAMETERS[case]
    loss, value = loss_of(name, parameter)
    leaf = value.clone().requires_grad_()
    try:
        found = torch.autograd.grad(loss(leaf), leaf)[0]
    except TypeError as refusal:
        assert str(refusal).startswith(f"{parameter}: ") and "gradient" in str(refusal)
        # in forward mode, too
        with forward_ad.dual_level(), pytest.raises(TypeError, match=f"{parameter}: .*gradient"):
            loss(forward_ad.make_dual(value, torch.ones_like(value)))
        return
    step = 1e-5
    want = (loss(value + step) - loss(value - step)) / (2 * step)
    # the difference's own error: step^2 of a third derivative, and 1e-15 of the value / step
    assert abs(found - want) <= 1e-7 * (1 + abs(want) + abs(loss(value)))


@pytest.mark.parametrize("side", ["x_weight", "y_weight"])
def test_the_weights_of_sinkhorn_refuse_a_gradient(side: str) -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 3)
    weight = torch.full((4,), 0.25, requires_grad=True)
    with pytest.raises(TypeError, match=f"{side}: .*gradient"):
        fused_losses.sinkhorn(x, y, **{side: weight})


def test_a_weight_of_zero_has_its_gradient() -> None:
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    weight = torch.zeros((), dtype=torch.float64, requires_grad=True)
    fused_losses.n_pairs(x, y, l2_weight=weight).backward()
    want = (x.square().sum(1) + y.square().sum(1)).mean() / 2
    torch.testing.assert_close(weight.grad, want)
