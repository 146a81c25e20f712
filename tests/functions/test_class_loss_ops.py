"""The sweep of class losses: shards that merge, derivatives, transforms, graphs."""

from __future__ import annotations

import pytest
import torch
from class_loss_formulas import (  # noqa: F401
    BIAS,
    LOSSES,
    RULE_PARAMS,
    C,
    D,
    K,
    _small_tiles,
    curricular,
    inputs,
    op_inputs,
)
from conftest import widest
from torch import Tensor

from fused_losses import margins
from fused_losses.class_losses import MLCD, SFace, Softmax, SoftTriple, SphereFace2
from fused_losses.functions.class_loss import class_loss
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import (
    CLASS_RULES,
    CLASS_TARGETS,
    class_gradients,
    class_statistics,
    class_targets,
)
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, merge_statistics


def shard(p: ClassInputs, start: int, stop: int) -> ClassInputs:
    """The classes from start up to stop, as their own table, numbered from 0."""
    classes = torch.arange(C) if p.classes is None else p.classes
    inside = (classes >= start) & (classes < stop)
    here = (p.labels >= start) & (p.labels < stop)
    return p._replace(
        weight=p.weight.detach()[start * K : stop * K],
        x=p.x.detach(),
        labels=torch.where(here, p.labels - start, -1),
        classes=classes[inside] - start,
    )


@pytest.mark.float64
@pytest.mark.parametrize("softness", [0.0, 0.2])
@pytest.mark.parametrize("rule", RULE_PARAMS)
def test_shards_merge_to_the_whole(rule: str, softness: float, streamed: str) -> None:
    p = op_inputs(rule, softness=softness)
    kinds = CLASS_FOLDS[p.rule].kinds
    whole = class_statistics(p, backend=streamed)
    up = torch.rand_like(whole.statistics), torch.rand_like(whole.targets)
    value = (whole.statistics * up[0]).sum() + (whole.targets * up[1]).sum()
    dx, dw = torch.autograd.grad(value, (p.x, p.weight))
    # uneven ones, and one without classes
    parts = [shard(p, *cut) for cut in ((0, 8), (8, 8), (8, 18), (18, C))]
    found = [class_statistics(part, backend=streamed) for part in parts]
    merged = found[0].statistics
    for each in found[1:]:
        merged = merge_statistics(kinds, merged, each.statistics)
    torch.testing.assert_close(merged, whole.statistics, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum(f.targets for f in found), whole.targets, rtol=1e-12, atol=1e-12)
    best = torch.stack([f.hardest_score for f in found]).max(dim=0).values
    torch.testing.assert_close(best, whole.hardest_score, rtol=1e-12, atol=1e-12)
    given = [class_gradients(part, merged, *up, compact=True, backend=streamed) for part in parts]
    torch.testing.assert_close(sum(g[0] for g in given), dx, rtol=1e-11, atol=1e-12)
    compact = torch.cat([g[1] for g in given])
    rows = (p.classes[:, None] * K + torch.arange(K)).flatten()
    torch.testing.assert_close(compact, dw[rows], rtol=1e-11, atol=1e-12)
    assert compact.shape[0] == len(p.classes) * K < C * K
    assert torch.equal(dw.index_fill(0, rows, 0), torch.zeros_like(dw))


def test_compact_without_classes_changes_nothing(streamed: str) -> None:
    p = op_inputs("softmax", torch.float32, sampled=False)
    p = p._replace(x=p.x.detach(), weight=p.weight.detach())
    found = class_statistics(p, backend=streamed)
    up = torch.ones_like(found.statistics), torch.ones_like(found.targets)
    one, other = (
        class_gradients(p, found.statistics, *up, compact=compact, backend=streamed)
        for compact in (False, True)
    )
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    assert one[1].shape == p.weight.shape
    part = class_gradients(p, found.statistics, *up, need_x=False, backend=streamed)
    assert part[0].numel() == 0 and torch.equal(part[1], one[1])


@pytest.mark.parametrize("rule", RULE_PARAMS)
def test_op_is_its_reference(rule: str, streamed: str) -> None:
    p = op_inputs(rule, widest(streamed))
    loose = {"rtol": 1e-4, "atol": 1e-4} if streamed == "cuda" else {"rtol": 1e-11, "atol": 1e-12}
    answers = []
    for name in ("reference", streamed):
        out = class_statistics(p, backend=name)
        slope = torch.linspace(1, 2, out.statistics.numel(), dtype=torch.float64)
        value = (out.statistics * slope.view_as(out.statistics)).sum() + out.targets.square().sum()
        answers.append((*out, *torch.autograd.grad(value, (p.x, p.weight))))
    for a, b in zip(*answers, strict=True):
        torch.testing.assert_close(a, b, **loose)
    torch.testing.assert_close(class_targets(p), answers[0][1].detach(), **loose)


@pytest.mark.float64
@pytest.mark.parametrize("softness", [0.0, 0.2])
@pytest.mark.parametrize("rule", [r for r in RULE_PARAMS if r != "sface"])  # it holds its weights
def test_gradcheck(rule: str, softness: float, backend: str) -> None:
    p = op_inputs(rule, softness=softness)

    def statistics(x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return class_statistics(p._replace(x=x, weight=weight), backend=backend)[:2]

    assert torch.autograd.gradcheck(statistics, (p.x, p.weight), fast_mode=True)


def test_second_derivatives() -> None:
    x, w, labels = inputs(True, K, torch.float64)
    x = torch.where(x.isnan(), 1, x).detach().requires_grad_()
    for loss in (Softmax(margins.CosFace(0.2), 3.0), SphereFace2(0.1, 4.0), SoftTriple(3.0)):
        assert torch.autograd.gradgradcheck(
            lambda x, w, loss=loss: class_loss(x, w, labels, loss, backend="reference"),
            (x, w),
            fast_mode=True,
        )


def test_second_derivative_is_refused_by_the_tiles(streamed: str) -> None:
    x, w, labels = inputs(False, K, widest(streamed))
    loss = class_loss(x, w, labels, SFace(), backend=streamed)
    dx, _ = torch.autograd.grad(loss, (x, w), create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative.*backend='reference'"):
        dx.square().sum().backward()


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        ("softmax-bent", torch.float32),
        ("sphereface2", torch.float32),
        ("softmax", torch.bfloat16),
    ],
)
def test_opcheck(rule: str, dtype: torch.dtype, streamed: str) -> None:
    p = op_inputs(rule, dtype)
    torch.library.opcheck(CLASS_RULES.op(streamed), (*p, 0))
    # what is kept has rows of padding, whose values nobody writes
    shapes = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(CLASS_RULES.op(streamed), (*p, 7), test_utils=shapes)
    still = [t.detach() if isinstance(t, Tensor) else t for t in p]
    found = CLASS_RULES.op(streamed)(*still, 7)
    own = CLASS_FOLDS[p.rule].own_slope
    for needs in ((False, True, True, own), (True, False, True, False)):
        up = torch.rand_like(found[0]), torch.rand_like(found[1]), found[0], found[-1]
        arguments = (*up, *still, *needs)
        torch.library.opcheck(CLASS_RULES.op(streamed, "_backward"), arguments)
    targets = CLASS_TARGETS.op("bounded")
    torch.library.opcheck(targets, (*still[:3], K, 0.0, True))


@pytest.fixture
def fresh_compiler() -> object:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_compile_without_breaks_for_any_batch_size() -> None:
    bent = Softmax(curricular(0.3).eval())
    binary = SphereFace2(torch.tensor(BIAS))

    def run(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        several = class_loss(x, w, labels, binary, backend="bounded")
        return several + class_loss(x, w, labels[:, 0], bent, backend="bounded")

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    w = torch.randn(C, K, D, requires_grad=True)
    for n in (12, 31):
        x = torch.randn(n, D, requires_grad=True)
        labels = torch.randint(0, C, (n, 2))
        labels[3] = -100
        got, wanted = compiled(x, w, labels), run(x, w, labels)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(
            torch.autograd.grad(got, (x, w)), torch.autograd.grad(wanted, (x, w)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_func_grad(name: str, backend: str) -> None:
    x, w, labels = inputs(True, K, widest(backend))
    bias = torch.tensor(BIAS, dtype=x.dtype, requires_grad=True)

    def value(x: Tensor, w: Tensor) -> Tensor:
        return class_loss(x, w, labels, LOSSES[name].loss(bias.detach()), backend=backend)

    wanted = torch.autograd.grad(value(x, w), (x, w))
    for a, b in zip(torch.func.grad(value, (0, 1))(x, w), wanted, strict=True):
        torch.testing.assert_close(a.detach(), b)


def test_autocast_takes_the_weights_dtype(backend: str) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = class_loss(low, w, labels, SFace(), backend=backend)
    loss.backward()
    wide = low.detach().float().requires_grad_()
    wanted = class_loss(wide, w.detach(), labels, SFace(), backend="reference")
    assert loss.dtype == w.grad.dtype == torch.float32 and low.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)


def test_weight_that_is_not_contiguous(backend: str) -> None:
    x, w, labels = inputs(True, K, torch.float32)
    turned = w.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    wanted = class_loss(x, w, labels, MLCD(8.0), backend=backend)
    got = class_loss(x, turned, labels, MLCD(8.0), backend=backend)
    torch.testing.assert_close(got, wanted)
    a, b = torch.autograd.grad(got, turned)[0], torch.autograd.grad(wanted, w)[0]
    torch.testing.assert_close(a, b)


def test_gradients_by_hand_are_not_the_references() -> None:
    p = op_inputs("softmax")
    found = class_statistics(p, backend="reference")
    with pytest.raises(ValueError, match="backend: expected a streamed one"):
        class_gradients(p, found.statistics, found.statistics, found.targets, backend="reference")
