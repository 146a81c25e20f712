"""The table's updates in one process, against torch's optimisers on the whole table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from class_center_cases import C, D, batch, head
from counted import COUNTER, told_by_child
from torch import Tensor

from fused_losses.centers import ClassCenters
from fused_losses.centers.sampling import sample
from fused_losses.functions.margin_softmax import margin_softmax

SGD = dict(lr=0.3, momentum=0.9, weight_decay=0.01)
OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD),
    "nesterov": ({**SGD, "nesterov": True}, torch.optim.SGD),
    "adamw": (dict(lr=0.01, weight_decay=0.1), torch.optim.AdamW),
    "adagrad": (dict(lr=0.1), torch.optim.Adagrad),
}


def steps_apart(
    name: str, rate: float, update: str, clip: float | None, count: int = 9
) -> tuple[list[float], ClassCenters]:
    settings, _ = OPTIMIZERS[name]
    found = head(
        sample_rate=rate,
        optimizer="sgd" if name == "nesterov" else name,
        optimizer_options=settings,
        update=update,
        max_grad_norm=clip,
        seed=3,
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(found.optimizer, 0.9)
    losses = []
    for step in range(count):
        x, y = batch(step)
        loss = found(x, y)
        loss.backward()
        found.optimizer.step()
        schedule.step()
        losses.append(loss.item())
    found.settle()
    return losses, found


def steps_together(
    name: str, rate: float, clip: float | None, count: int = 9
) -> tuple[list[float], Tensor]:
    """The same with a dense gradient, zero for who takes no part, and torch's own optimiser."""
    settings, kind = OPTIMIZERS[name]
    weight = head(seed=3).weight.detach().clone().requires_grad_()
    optimizer = kind([weight], **settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    losses = []
    for step in range(count):
        x, y = batch(step)
        part = None
        if rate < 1:
            part = torch.cat([sample(0, C, rate, seed=3, step=step), y]).unique()
        loss = margin_softmax(x, weight, y, scale=16.0, classes=part, backend="reference")
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_([weight], clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, weight.detach()


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("update", ["backward", "step"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
@pytest.mark.parametrize("name", ["sgd", "nesterov"])
def test_sgd_inside_backward_is_torchs(
    name: str, rate: float, update: str, clip: float | None
) -> None:
    losses, found = steps_apart(name, rate, update, clip)
    expected, weight = steps_together(name, rate, clip)
    torch.testing.assert_close(losses, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.weight, weight, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["adamw", "adagrad"])
def test_other_optimisers_inside_backward_are_torchs(name: str) -> None:
    losses, found = steps_apart(name, 1.0, "backward", None)
    expected, weight = steps_together(name, 1.0, None)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.weight, weight, rtol=1e-9, atol=1e-9)


def test_backwards_add_up_until_a_step() -> None:
    """Three batches in one step are one batch of all their rows, three times its mean."""
    for rate in (1.0, 0.4):
        options = dict(optimizer="sgd", optimizer_options=dict(lr=0.5), seed=2, sample_rate=rate)
        apart, whole = head(update="step", **options), head(**options)
        batches = [batch(step) for step in range(3)]
        for x, y in batches:
            (apart(x, y) / 3).backward()
        assert torch.equal(apart.weight, whole.weight)
        apart.optimizer.step()
        # each other batch's classes are drawn ones to this one, or not: the full table has no doubt
        if rate == 1:
            whole(*(torch.cat(part) for part in zip(*batches, strict=True))).backward()
            torch.testing.assert_close(apart.weight, whole.weight, rtol=1e-10, atol=1e-10)
        else:
            weight = whole.weight.clone().requires_grad_()
            drawn = sample(0, C, rate, seed=2, step=0)
            for x, y in batches:
                part = torch.cat([drawn, y]).unique()
                loss = margin_softmax(x, weight, y, scale=16.0, classes=part, backend="reference")
                (loss / 3).backward()
            expected = whole.weight - 0.5 * weight.grad
            torch.testing.assert_close(apart.weight, expected, rtol=1e-10, atol=1e-10)
        assert apart.step_count == 1


def test_a_waiting_gradient_is_scaled_and_measured() -> None:
    options = dict(optimizer="sgd", optimizer_options=dict(lr=1.0), update="step", seed=2)
    found = head(**options)
    before = found.weight.clone()
    x, y = batch(0)
    found(x, y).backward()
    norm = found.grad_norm()
    weight = before.clone().requires_grad_()
    margin_softmax(x, weight, y, scale=16.0, backend="reference").backward()
    assert norm == pytest.approx(weight.grad.norm().item(), rel=1e-10)
    found.scale_grad(0.25)
    assert found.grad_norm() == pytest.approx(norm / 4)
    found.optimizer.step()
    torch.testing.assert_close(found.weight, before - weight.grad / 4, rtol=1e-10, atol=1e-10)
    found(x, y).backward()
    found.optimizer.zero_grad()
    after = found.weight.clone()
    found.optimizer.step()
    assert torch.equal(found.weight, after)


def test_a_second_backward_of_an_updated_table_is_refused() -> None:
    found = head(optimizer="sgd")
    loss = found(*batch(0))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="updated after this forward"):
        loss.backward()
    with pytest.raises(RuntimeError, match="'step'"):
        found.grad_norm()


def test_a_frozen_backbone_still_moves_the_centres() -> None:
    found = head(optimizer="sgd", optimizer_options=dict(lr=1.0))
    before = found.weight.clone()
    x, y = batch(0)
    found(x.detach(), y).backward()
    assert not torch.equal(found.weight, before) and found.step_count == 1


@pytest.mark.parametrize("rate", [1.0, 0.5])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", None])
def test_state_dict_goes_on_where_it_stopped(optimizer: str | None, rate: float) -> None:
    def made(seed: int) -> ClassCenters:
        settings = dict(lr=0.1, momentum=0.9) if optimizer == "sgd" else dict(lr=0.1)
        return head(
            optimizer=optimizer,
            optimizer_options=settings if optimizer else None,
            sample_rate=rate,
            seed=6,
        )

    first, second = made(6), made(6)
    with torch.no_grad():
        second.weight.add_(1)
    for step in range(3):
        first(*batch(step)).backward()
    second.load_state_dict(first.state_dict())
    assert second.step_count == 3
    losses = []
    for found in (first, second):
        losses.append([])
        for step in range(3, 6):
            loss = found(*batch(step))
            loss.backward()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


def test_a_mapped_table_trains_as_one_in_memory(tmp_path: Path) -> None:
    options = dict(optimizer="sgd", optimizer_options=SGD, sample_rate=0.5, seed=3)
    tables = [head(**options), head(storage=tmp_path, **options)]
    for step in range(4):
        values = []
        for found in tables:
            loss = found(*batch(step))
            loss.backward()
            values.append(loss.item())
        assert values[0] == values[1]
    assert torch.equal(tables[0].weight, tables[1].weight)
    size = C * D * 8
    files = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert files == {"weight-0-of-1.bin": size, "momentum_buffer-0-of-1.bin": size}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_tables_learn(dtype: torch.dtype) -> None:
    """Steps far below the last digit of a 16-bit number arrive, in the mean."""
    torch.manual_seed(0)
    options = dict(optimizer_options=dict(lr=1e-3), sample_rate=0.5, scale=8.0, seed=1)
    exact = head(optimizer="sgd", dtype=torch.float32, **options)
    half = head(optimizer="sgd", dtype=dtype, **options)
    with torch.no_grad():
        exact.weight.copy_(torch.nn.functional.normalize(torch.randn(C, D)).to(dtype))
        half.weight.copy_(exact.weight)
    start = exact.weight.clone()
    x, y = torch.randn(64, D), torch.randint(0, C, (64,))
    for _ in range(200):
        exact(x, y).backward()
        half(x, y).backward()
    moved = exact.weight - start
    along = ((half.weight.float() - start) * moved).sum() / moved.square().sum()
    assert along == pytest.approx(1, abs=0.1)


# ---- memory -------------------------------------------------------------------------------------

CHILD = (
    COUNTER
    + """
from fused_losses.centers import ClassCenters

def made(classes, **options):
    head = ClassCenters(classes, 64, chunk_bytes=1 << 20, **options)
    x, y = torch.randn(32, 64, requires_grad=True), torch.randint(0, classes, (32,))
    head(x, y).backward()
    return extra(lambda: head(x, y).backward())

sgd = dict(optimizer="sgd", optimizer_options=dict(lr=0.1, momentum=0.9))
cases = {"full": sgd, "sampled": {**sgd, "sample_rate": 0.1},
         "clipped": {**sgd, "max_grad_norm": 1.0}, "apart": {**sgd, "update": "step"},
         "sub-centres": {**sgd, "sub_centers": 2}}
print(json.dumps({name: [made(c, **options) for c in (80_000, 320_000)]
                  for name, options in cases.items()}))
"""
)


@pytest.mark.slow
def test_no_gradient_of_the_table_ever_exists() -> None:
    """Beyond table and momentum: a few chunks, and a few numbers a class for the sample's ids."""
    told = told_by_child(CHILD, None)
    for name, (small, large) in told.items():
        assert large < 12 << 20, (name, large)  # the smaller table has 20 MB
        assert large - small < 240_000 * 16, (name, small, large)
