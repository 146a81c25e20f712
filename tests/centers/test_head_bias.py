"""A head with a bias is a linear layer's cross entropy, its bias stepped beside its weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from class_center_cases import C, D, batch, data, gradients, head, same
from conftest import STREAMED, require
from torch import Tensor, nn

from fused_losses.centers import ClassCenters, carry_over, class_scores, set_rows, top_classes
from fused_losses.centers.insightface import export_checkpoints
from fused_losses.centers.sampling import sample
from fused_losses.margins import ArcFace

PLAIN: dict[str, Any] = dict(margin=None, normalize=False, bias=True)
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, dict(lr=0.3, momentum=0.9, weight_decay=0.01)),
    "adamw": (torch.optim.AdamW, dict(lr=0.1, weight_decay=0.1)),
}


def linear(found: ClassCenters) -> nn.Linear:
    """A layer with the head's rows, and another bias for both."""
    made = nn.Linear(D, found.num_classes, dtype=torch.float64)
    with torch.no_grad():
        assert found.bias is not None and bool((found.bias == 0).all())
        found.weight[:, -1].copy_(torch.linspace(-2, 1, found.num_classes))
        made.weight.copy_(found.weight[:, :D])
        made.bias.copy_(found.bias)
    return made


def logits(made: nn.Linear, x: Tensor, scale: float | Tensor) -> Tensor:
    return scale * F.linear(x, made.weight) + made.bias


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradients_are_those_of_a_linear_layer(smoothing: float) -> None:
    scale = nn.Parameter(torch.tensor(3.0, dtype=torch.float64))
    found, (x, y) = head(scale=scale, **PLAIN, label_smoothing=smoothing), data()
    made, own = linear(found), scale.detach().clone().requires_grad_()
    loss = F.cross_entropy(logits(made, x, own), y, label_smoothing=smoothing)
    expected = gradients(loss, x, made.weight, made.bias, own)
    of_head = gradients(found(x, y), x, found.weight, scale)
    d_weight, d_bias = of_head[2][:, :D], of_head[2][:, D]
    same([*of_head[:2], d_weight, d_bias, of_head[3]], expected)


@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_both_step_as_in_torch(name: str, update: str, rate: float) -> None:
    kind, options = OPTIMIZERS[name]
    if rate < 1 and name == "adamw":
        rate = 1.0  # its moments rest, in torch they do not
    found = head(
        scale=2.0, **PLAIN, optimizer=name, optimizer_options=options, update=update,
        sample_rate=rate, seed=3,
    )  # fmt: skip
    made = linear(found)
    optimizer = kind(made.parameters(), **options)
    for step in range(6):
        x, y = batch(step)
        z = logits(made, x, 2.0)
        if rate < 1:
            part = torch.cat([sample(0, C, rate, seed=3, step=step), y]).unique()
            away = torch.ones(C, dtype=torch.bool).index_fill(0, part, False)
            z = z.masked_fill(away, -torch.inf)
        optimizer.zero_grad()
        F.cross_entropy(z, y).backward()
        optimizer.step()
        found(x, y).backward()
        found.optimizer.step()
    assert found.bias is not None
    same([found.weight[:, :D], found.bias], [made.weight.detach(), made.bias.detach()], 1e-9)


def test_scores_have_it() -> None:
    found, (x, _) = head(scale=2.0, **PLAIN), data()
    z = logits(linear(found), x, 2.0).detach()
    chosen = torch.tensor([3, 50, 7])
    same([2.0 * class_scores(found, x, chosen)], [z[:, chosen]])
    best = top_classes(found, x, 4)
    same([2.0 * best.scores], [z.topk(4).values])
    assert torch.equal(best.classes, z.topk(4).indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", STREAMED)
def test_on_every_backend(backend: str, dtype: torch.dtype) -> None:
    require(backend)
    x, y = data()
    found = head(scale=1.0, **PLAIN, dtype=dtype, backend=backend, precision="fp32")
    with torch.no_grad():
        found.weight.mul_(50)[:, -1].copy_(torch.linspace(-2, 1, C))
    rows = x.detach().to(dtype).requires_grad_()
    weight = found.weight.detach().double().requires_grad_()
    wide = rows.detach().double().requires_grad_()
    loss = F.cross_entropy(F.linear(wide, weight[:, :D], weight[:, D]), y)
    expected = gradients(loss, wide, weight)
    of_head = [t.double() for t in gradients(found(rows, y), rows, found.weight)]
    # the loss rounds in float32; gradients once to the rows' dtype, in products of it besides
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    same(of_head, expected, tolerance)


def test_it_goes_where_the_rows_go() -> None:
    options = dict(optimizer="sgd", optimizer_options=dict(lr=0.3, momentum=0.9))
    old = head(scale=2.0, **PLAIN, **options)
    old(*batch(0)).backward()
    assert old.bias is not None and bool(old.bias.any())
    same_size, more = head(scale=2.0, **PLAIN, **options), ClassCenters(
        C + 3, D, dtype=torch.float64, scale=2.0, **PLAIN, **options
    )  # fmt: skip
    same_size.load_state_dict(copy.deepcopy(old.state_dict()))
    carry_over(old, more)
    assert torch.equal(same_size.weight, old.weight)
    assert more.bias is not None
    assert torch.equal(more.bias, F.pad(old.bias, (0, 3)))
    set_rows(more, torch.ones(2, D, dtype=torch.float64), C)
    assert torch.equal(more.weight[C : C + 2], F.pad(torch.ones(2, D), (0, 1)).double())
    set_rows(more, torch.full((1, D + 1), 4.0, dtype=torch.float64), C)
    assert float(more.bias[C]) == 4
    assert "bias" in repr(old) and head().bias is None and "bias" not in repr(head())


def test_what_it_cannot_stand_beside(tmp_path: Any) -> None:
    for options in (
        dict(bias=True),
        dict(PLAIN, margin=ArcFace(0.1)),
        dict(PLAIN, normalize=True),
        dict(PLAIN, sub_centers=2),
    ):
        with pytest.raises(ValueError, match="bias: expected margin=None, normalize=False and"):
            head(**options)
    found = head(**PLAIN)
    before = found.weight.clone()
    for name, value in (("margin", ArcFace(0.1)), ("normalize", True)):
        with pytest.raises(ValueError, match="bias: expected margin=None"):
            setattr(found, name, value)
    with pytest.raises(ValueError, match=r"embeddings: expected \[n, 6\]"):
        found(torch.zeros(2, D + 1, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="insightface has neither sub-centres nor a bias"):
        export_checkpoints(found, tmp_path, 1)
    with pytest.raises(ValueError, match="new: expected weight"):
        carry_over(head(), found)
    assert torch.equal(found.weight, before)
