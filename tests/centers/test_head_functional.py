"""What puts another tensor in the table's place: torch.func, and parametrizations."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from class_center_cases import data, gradients, head, same
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

SGD = dict(optimizer="sgd", optimizer_options=dict(lr=0.5, momentum=0.9))


@pytest.mark.parametrize("rate", [1.0, 0.4])
def test_a_functional_call_differentiates_the_table_given(rate: float) -> None:
    found, (x, y) = head(sample_rate=rate), data()
    expected = gradients(found(x, y), x, found.weight)
    weight = found.weight.detach() * 1
    found.weight.data.zero_()
    weight.requires_grad_()
    given = weight * 1  # no leaf
    found_sparse = gradients(functional_call(head(sample_rate=rate), {"weight": given}, (x, y)), x)
    same(found_sparse, expected[:2])
    loss = functional_call(head(sample_rate=rate), {"weight": weight}, (x, y))
    same(gradients(loss, x, weight), [t.to_dense() for t in expected])


def test_where_none_would_reach_it_it_says_so() -> None:
    found, (x, y) = head(**SGD), data()
    before = found.weight.clone()
    weight = before.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="weight: expected a tensor without gradient.*optimizer"):
        functional_call(found, {"weight": weight}, (x, y))
    assert torch.equal(found.weight, before)
    with torch.no_grad():
        other = functional_call(found, {"weight": before.flip(0)}, (x, y))
    assert torch.equal(found.weight, before)
    found.weight = nn.Parameter(before.flip(0))  # of which the values are meant
    same([found(x, y).detach()], [other])


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight / 2


@pytest.mark.parametrize(
    "register",
    [
        lambda h: parametrize.register_parametrization(h, "weight", Halved()),
        parametrizations.weight_norm,
        parametrizations.orthogonal,
        parametrizations.spectral_norm,
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
    ],
)
def test_parametrizations_are_refused(register: Callable[[nn.Module], object]) -> None:
    found, (x, y) = head(), data()
    expected = found(x, y)
    with pytest.raises(RuntimeError, match="weight: expected the table to stay the head's own"):
        register(found)
    # these have deleted it, or written it, before
    writes = (nn.utils.weight_norm, nn.utils.spectral_norm, parametrizations.orthogonal)
    if register not in writes:
        assert torch.equal(found(x, y), expected)


@pytest.mark.parametrize(
    "take",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        parametrizations.weight_norm,
        lambda h: prune.l1_unstructured(h, "weight", 0.5),
        lambda h: prune.random_structured(h, "weight", 0.5, dim=0),
    ],
)
def test_beside_an_optimizer_nothing_takes_the_table(take: Callable[[nn.Module], object]) -> None:
    found, (x, y) = head(**SGD), data()
    expected, names = found(x, y), list(found.state_dict())
    told = "weight: expected the table to stay|parametrized element|cannot assign 'torch.Double"
    with pytest.raises((RuntimeError, ValueError, TypeError), match=told):
        take(found)
    assert torch.equal(found(x, y), expected) and list(found.state_dict()) == names
    for made in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        with pytest.raises(RuntimeError, match="weight: expected the table to stay the head's own"):
            nn.utils.weight_norm(made)
