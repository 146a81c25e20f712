"""What a head is given: numbers, margins that keep state, and what stands around its calls."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from class_center_cases import C, D, data, head
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fused_losses import class_losses
from fused_losses.centers import ClassCenters
from fused_losses.functions.unpg import UNPG
from fused_losses.margins import AdaFace, ArcFace, CosFace, CurricularFace, InterclassFilter


class ForwardMargin(CosFace):
    """As one extends a module."""

    def forward(self, cosine: Tensor) -> Tensor:
        return cosine


class ForwardLoss(class_losses.SFace):
    def forward(self, rows: Any) -> Any:
        return rows


class Shifted(AdaFace):
    """Whose own forward counts: it is a module."""

    def forward(self, cosine: Tensor, *of_row: Tensor) -> Tensor:
        return super().forward(cosine, *of_row) - 0.1


REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number for a margin": (dict(margin=0.5), TypeError, r"margin: .*write ArcFace\(0.5\)"),
    "a class": (dict(margin=ArcFace), TypeError, r"margin: .*write ArcFace\(\)"),
    "a loss's class": (dict(margin=class_losses.SFace), TypeError, r"margin: .*write SFace\(\)"),
    "a name": (dict(margin="arcface"), TypeError, "margin: .*got 'arcface'"),
    "a scale that learns": (
        dict(scale=torch.ones((), requires_grad=True)), TypeError, "scale: .*gradient",
    ),
    "no scale": (dict(scale=0), ValueError, "scale: expected a finite value > 0, got 0"),
    "an endless scale": (dict(scale=float("inf")), ValueError, "scale: expected a finite"),
    "a rate of 0": (dict(sample_rate=0), ValueError, r"sample_rate: expected a value in \(0, 1\]"),
    "a rate of 2": (dict(sample_rate=2), ValueError, r"sample_rate: expected a value in \(0, 1\]"),
    "no norm": (
        dict(max_grad_norm=0.0, optimizer="sgd"), ValueError, "max_grad_norm: expected a finite",
    ),
    "half a centre": (dict(sub_centers=1.5), TypeError, "sub_centers: expected an integer"),
    "no centre": (dict(sub_centers=0), ValueError, "sub_centers: expected at least 1, got 0"),
    "a gradient of no kind": (
        dict(gradient_scale="mean"), ValueError, "gradient_scale: expected one of ddp_mean",
    ),
    "no bytes": (dict(chunk_bytes=0), ValueError, "chunk_bytes: expected at least 1, got 0"),
    "a layer for negatives": (
        dict(batch_negatives=nn.Linear(2, 2)), TypeError, r"batch_negatives: .* UNPG\(\), got Lin",
    ),
    "options in a list": (
        dict(optimizer="sgd", optimizer_options=[0.1]), TypeError, "optimizer_options: .* a dict",
    ),
    "a group by its number": (
        dict(process_group=0), TypeError, "process_group: .* a group that this rank is in, got 0",
    ),
    "a mesh by its shape": (dict(device_mesh=(2,)), TypeError, "device_mesh: .* a DeviceMesh"),
    "a number of bytes": (dict(storage=4096), TypeError, "storage: expected None or a folder"),
    "an optimizer of torch": (
        dict(optimizer=torch.optim.SGD), ValueError, "optimizer: expected one of sgd, adamw",
    ),
    "a forward that nobody calls": (
        dict(margin=ForwardMargin(0.2)), TypeError, "margin: .*ForwardMargin.forward .*__call__",
    ),
    "a loss's forward": (
        dict(margin=ForwardLoss()), TypeError, "margin: .*ForwardLoss.forward .*row_loss",
    ),
    "a seed of words": (dict(seed="a"), TypeError, "seed: expected an integer, got 'a'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_arguments_are_refused_by_name(case: str) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        head(**options)


CALLABLES: dict[str, tuple[Any, type[Exception], str]] = {
    "a layer": (
        nn.Linear(3, 3), TypeError,
        r"margin: expected a callable on 1 vector of shape \(13,\), .*got Linear, which raised Run",
    ),
    "of two vectors": (
        lambda cosine, norm: cosine, TypeError, "margin: .* 1 vector .*got function, which raised",
    ),
    "to a pair": (lambda t: (t, t), ValueError, r"margin: .* return shape \(13,\), got tuple"),
    "to a number": (lambda t: t.sum(), ValueError, r"margin: .* shape \(13,\), got \(\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLABLES)
def test_a_callable_that_is_no_margin_is_refused_by_name(case: str) -> None:
    margin, error, message = CALLABLES[case]
    found, before = head(margin=margin, optimizer="sgd"), head().weight
    with pytest.raises(error, match=message):
        found(*data()).backward()
    assert torch.equal(found.weight, before) and found.step_count == 0
    found.margin = None
    found(*data()).backward()


def test_a_modules_own_forward_counts() -> None:
    x, y = data()
    assert head(margin=Shifted())(x, y) > head(margin=AdaFace())(x, y)


def test_the_order_of_partial_fc_is_told() -> None:
    x, y = data()
    with pytest.raises(ValueError, match=rf"num_classes, embedding_dim\) was given \({D}, {C}\)"):
        ClassCenters(D, C, dtype=torch.float64)(x, y.clamp_max(D - 1))
    with pytest.raises(ValueError, match=r"expected \[n, 7\] for embedding_dim=7, got shape"):
        ClassCenters(C, 7, dtype=torch.float64)(x, y)


LATER = ("scale", "sample_rate", "max_grad_norm", "chunk_bytes", "gradient_scale")


@pytest.mark.parametrize("name", LATER)
def test_what_is_set_later_is_checked_as_at_construction(name: str) -> None:
    """A negative norm would turn the step round, a rate of 0 leave the negatives out."""
    found = head(optimizer="sgd", max_grad_norm=2.0)
    before = getattr(found, name)
    for wrong in ("mean", -1):
        with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
            setattr(found, name, wrong)
        assert getattr(found, name) == before
    setattr(found, name, before)
    found(*data()).backward()


def test_what_stands_since_the_construction_is_refused_later() -> None:
    found = head(optimizer="sgd", label_smoothing=0.1)
    for name in ("num_classes", "embedding_dim", "sub_centers", "class_start", "num_local"):
        before = getattr(found, name)
        with pytest.raises(AttributeError, match=f"{name}: stands since the construction"):
            setattr(found, name, 3)
        assert getattr(found, name) == before
    for name, wrong in (("batch_negatives", UNPG(1.0)), ("label_smoothing", 3.0)):
        with pytest.raises(ValueError, match="label_smoothing: expected"):
            setattr(found, name, wrong)
    found.label_smoothing = 0.0
    found.sample_rate = 0.5
    found(*data()).backward()


def test_rows_and_labels_that_are_none_are_refused_by_name() -> None:
    x, y = data()
    found = head(optimizer="sgd")
    for wrong in (None, x.tolist(), x.detach().to_sparse()):
        with pytest.raises(TypeError, match="embeddings: expected"):
            found(wrong, y)
    with pytest.raises(ValueError, match="labels: expected class ids, .* one column a class"):
        found(x, torch.nn.functional.one_hot(y.clamp_min(0), C))
    found(x, y[:, None]).backward()


def test_numbers_of_numpy() -> None:
    x, y = data()
    losses = []
    kinds: Any = ((int, float), (np.int64, np.float32))
    for integer, real in kinds:
        found = ClassCenters(
            integer(C), integer(D), dtype=torch.float64, scale=real(16), sample_rate=real(0.5),
            sub_centers=integer(2), seed=integer(3), ignore_index=integer(-100),
            chunk_bytes=integer(4096), optimizer="sgd", optimizer_options=dict(lr=real(0.125)),
        )  # fmt: skip
        for _ in range(2):
            loss = found(x, y)
            loss.backward()
        losses.append(loss.detach())
    assert losses[0] == losses[1]


def test_the_table_is_not_what_the_same_seed_draws_elsewhere() -> None:
    for seed in (0, 1, 7):
        found = head(seed=seed, dtype=torch.float32).weight.detach()
        torch.manual_seed(seed)
        drawn = torch.randn(C, D)
        cosines = torch.cosine_similarity(found, drawn, dim=1)
        assert cosines.abs().mean() < 0.7  # of random directions in 6 dimensions: 0.34
        assert not torch.equal(found, head(seed=seed + 1, dtype=torch.float32).weight)
        assert torch.equal(found, head(seed=seed, dtype=torch.float32).weight)


# --- margins with a state ------------------------------------------------------------------------

HELD: dict[str, Any] = {
    "in a loss": lambda m: class_losses.Softmax(m, 16.0),
    "in a filter in a loss": lambda m: class_losses.Softmax(InterclassFilter(m), 16.0),
    "alone": lambda m: m,
}


@pytest.mark.parametrize("how", HELD)
@pytest.mark.parametrize("kind", [AdaFace, CurricularFace])
def test_a_margin_within_belongs_to_the_head(how: str, kind: type) -> None:
    if kind is CurricularFace and "filter" in how:
        with pytest.raises(ValueError, match="bends no other class"):
            InterclassFilter(kind())
        return
    x, y = data()
    inner = kind(momentum=0.5)
    found = head(margin=HELD[how](inner))
    found(x * 3, y)
    kept = {k: v.clone() for k, v in inner.state_dict().items()}
    assert kept != kind().state_dict()
    names = [k for k in found.state_dict() if k.split(".")[-1] in kept]
    assert len(names) == len(kept)
    assert {k.split(".")[-1] for k in found.state() if k.startswith("margin.")} == set(kept)

    found.eval()
    assert not inner.training
    with torch.no_grad():
        found(x * 9, y)
    assert all(torch.equal(v, kept[k]) for k, v in inner.state_dict().items())

    fresh = kind(momentum=0.5)
    head(margin=HELD[how](fresh)).load_state_dict(found.state_dict())
    assert all(torch.equal(v, kept[k]) for k, v in fresh.state_dict().items())

    twin = copy.deepcopy(found).train()
    twin(x * 5, y)
    assert all(torch.equal(v, kept[k]) for k, v in inner.state_dict().items())  # its own
    assert any(not torch.equal(v, kept[k.split(".")[-1]]) for k, v in twin.state_dict().items()
               if k in names)  # fmt: skip


def test_a_parameter_within_a_loss_trains_with_the_head() -> None:
    x, y = data()
    bias = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))
    margin = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    for value, leaf in (
        (class_losses.SphereFace2(bias), bias),
        (CosFace(margin), margin),
        (class_losses.Softmax(CosFace(margin), 16.0), margin),
    ):
        found = head(margin=value, optimizer="sgd")
        assert any(p is leaf for p in found.parameters())
        found(x, y).backward()
        assert leaf.grad is not None and leaf.grad.abs() > 0
        leaf.grad = None
        saved = copy.deepcopy(found.state_dict())
        with torch.no_grad():
            leaf.add_(1)
        found.load_state_dict(saved)
        assert leaf.item() in (pytest.approx(0.3), pytest.approx(0.2))


def test_another_margin_is_the_heads_and_the_former_is_not() -> None:
    x, y = data()
    leaf = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))
    values: list[Any] = [
        ArcFace(0.5), AdaFace(), class_losses.Softmax(AdaFace(), 16.0), CosFace(leaf), None,
        class_losses.Softmax(CosFace(leaf), 16.0), CurricularFace(), class_losses.SFace(),
    ]  # fmt: skip
    for first in values:
        for second in values:
            found, fresh = head(margin=first), head(margin=second)
            found(x, y)
            found.margin = second
            assert found.margin is second
            assert list(found.state_dict()) == list(fresh.state_dict())
            assert list(found.state()) == list(fresh.state())
            assert [id(p) for p in found.parameters()][1:] == [id(p) for p in fresh.parameters()][
                1:
            ]
            fresh.load_state_dict(found.state_dict())
            with torch.no_grad():
                assert torch.equal(found.eval()(x, y), fresh.eval()(x, y))
    found = head(margin=AdaFace(), batch_negatives=UNPG(1.0))
    for wrong, error in (
        (0.5, TypeError),
        (ArcFace, TypeError),
        (class_losses.SFace(), ValueError),
    ):
        with pytest.raises(error, match="margin: expected|batch_negatives: expected a softmax"):
            found.margin = wrong
        assert isinstance(found.margin, AdaFace)


MOVES: dict[str, Any] = {
    "to": lambda m: m.to(torch.float32).to(torch.float64),
    "half": lambda m: m.half().double(),
    "empty": lambda m: _filled(m),
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "deepcopy": copy.deepcopy,
    "assign": lambda m: _assigned(m),
}


def _filled(found: ClassCenters) -> ClassCenters:
    """By way of the meta device, where torch puts other parameters in place of the first."""
    saved = copy.deepcopy(found.state_dict())
    found.to("meta").to_empty(device="cpu").load_state_dict(saved)
    return found


def _assigned(found: ClassCenters) -> ClassCenters:
    found.load_state_dict(copy.deepcopy(found.state_dict()), assign=True)
    return found


@pytest.mark.parametrize("move", MOVES)
def test_what_a_loss_holds_goes_where_the_head_goes(move: str) -> None:
    x, y = data()
    leaf = nn.Parameter(torch.tensor(0.25, dtype=torch.float64))  # exact in 16 bits
    for value in (
        class_losses.Softmax(CosFace(leaf), 16.0),
        class_losses.Softmax(AdaFace().double(), 16.0),
        CosFace(leaf),
    ):
        found = head(margin=value)
        with torch.no_grad():
            found.weight.copy_(found.weight.half())
            for buffer in found.buffers():
                buffer.copy_(buffer.half())
        moved = MOVES[move](found)
        loss = moved.margin
        inner = loss.margin if isinstance(loss, class_losses.Softmax) else loss
        own = list(moved.parameters())[1:]
        if isinstance(inner, CosFace):
            used = inner.margin
            assert isinstance(used, Tensor)
            assert len(own) == 1 and used is own[0] and used.dtype == torch.float64
            moved(x, y).backward()
            assert used.grad is not None and used.grad.abs() > 0
            with torch.no_grad():
                before = moved(x, y)
                own[0].add_(0.5)
                assert moved(x, y) > before
                own[0].sub_(0.5)
        else:
            moved(x * 3, y)
            kept = {k.split(".")[-1]: v for k, v in moved.named_buffers()}
            assert kept.keys() == inner.state_dict().keys()
            assert all(v is kept[k] for k, v in inner.named_buffers())


# --- around a call -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [None, "sgd"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_shows_the_loss_of_its_gradient(reentrant: bool, optimizer: str) -> None:
    x, y = data()
    plain = head(sample_rate=0.4, optimizer=optimizer)
    checked = head(sample_rate=0.4, optimizer=optimizer)
    for step in range(3):
        want = plain(x, y)
        x.grad = None
        want.backward()
        slope, leaf = x.grad, x.detach().requires_grad_()
        got: Any = checkpoint(checked, leaf, y, use_reentrant=reentrant)
        got.backward()
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(leaf.grad, slope, rtol=1e-12, atol=1e-14)
        assert plain.step_count == checked.step_count == step + 1


@pytest.mark.parametrize(
    "options",
    [{}, dict(sample_rate=0.5), dict(optimizer="sgd"),
     dict(optimizer="adamw", sample_rate=0.5, update="step", max_grad_norm=1.0)],
    ids=str,
)  # fmt: skip
def test_a_head_on_the_cpu_beside_another_default_device(
    options: dict[str, Any], tmp_path: Path
) -> None:
    x, y = data()

    def train(found: ClassCenters) -> Tensor:
        for _ in range(3):
            loss = found(x, y)
            loss.backward()
            if found.optimizer is not None:
                found.optimizer.step()
        found.state(), found.state_dict()
        return loss.detach()

    want = train(head(**options))
    storage = dict(storage=tmp_path) if "optimizer" in options else {}
    with torch.device("meta"):
        got = train(head(device="cpu", **options, **storage))
    # a default device is a mode, under which PyTorch's formulas stand for the extension's
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
