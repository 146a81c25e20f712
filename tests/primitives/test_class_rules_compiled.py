"""The class rules on the CPU: rules beside Python's, hard data against float64, threads."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from class_rule_truth import (
    DATA,
    RULES,
    SHAPES,
    TILE,
    Shape,
    held_to_float64,
    made,
    values_of,
)
from conftest import require
from torch import Tensor

from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.class_rules.inputs import ClassInputs
from fused_losses.primitives.class_rules.op import CLASS_RULES, class_gradients, class_statistics
from fused_losses.primitives.class_rules.rules import CLASS_FOLDS, KERNEL_RULES


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require("cpu")


# ---- the rules alone: one class of one coordinate, whose cosine is x ----------------------------


def cosines(dtype: torch.dtype) -> Tensor:
    eps = torch.finfo(dtype).eps
    edges = [0.0, -0.0, 1.0, -1.0, 1 + eps, -1 - eps, 1 - eps, 0.5, -0.5, eps, 1.5, -1.5]
    inner = torch.linspace(-1, 1, 501, dtype=torch.float64)
    return torch.cat([inner, torch.tensor(edges, dtype=torch.float64)]).to(dtype)


def test_every_rule_in_kernels_is_held_to_python() -> None:
    assert {ruled.rule for ruled in RULES.values()} == KERNEL_RULES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", RULES)
def test_rules_are_those_of_python(name: str, dtype: torch.dtype) -> None:
    ruled, c = RULES[name], cosines(dtype)
    n, fold, eps = len(c), CLASS_FOLDS[ruled.rule], torch.finfo(dtype).eps
    values = values_of(ruled, n, dtype)
    p = ClassInputs(
        c[:, None],
        torch.ones(1, 1, dtype=dtype),
        torch.full((n, 1), -1),
        None,
        values,
        ruled.rule,
        ruled.params,
        normalize=False,
    )
    found = class_statistics(p, backend="cpu").statistics
    wide = c.double()[:, None]
    rows = None if values is None else values.double()[:, :, None]
    terms = fold.terms(wide, rows, list(ruled.params))
    slopes = fold.slopes(wide, rows, list(ruled.params))
    scale = max(1.0, abs(ruled.params[0]))
    assert len(found) == len(fold.kinds) == len(terms)
    for s, (term, slope) in enumerate(zip(terms, slopes, strict=True)):
        term = term[:, 0]
        room = ruled.own * eps * (1 + term.abs())
        assert ((found[s] - term).abs() <= room).all(), fold.kinds[s]
        up = torch.zeros_like(found)
        up[s] = 1
        dx, _ = class_gradients(p, found, up, torch.zeros(n, 1), backend="cpu", need_weight=False)
        wanted = torch.as_tensor(slope, dtype=torch.float64).expand(n, 1)
        room = ruled.own * eps * (scale + wanted.abs())
        assert ((dx.double() - wanted).abs() <= room).all(), fold.kinds[s]
    nan = p._replace(x=torch.full_like(p.x, torch.nan))
    assert class_statistics(nan, backend="cpu").statistics.isnan().all()


# ---- whole calls against float64 ----------------------------------------------------------------


def cases() -> Iterator[tuple[str, str, str]]:
    """Every rule on every data with one centre and several, and every shape once."""
    for name in RULES:
        for data in DATA:
            yield name, "one centre" if data in ("drawn", "peaked") else "centres", data
    for shape in SHAPES:
        for name in ("softmax", "sphereface2"):
            yield name, shape, "drawn"
    for data in ("peaked", "zeros"):
        yield "summed", "soft", data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "shape", "data"), sorted(set(cases())))
def test_hard_data_against_float64(name: str, shape: str, data: str, dtype: torch.dtype) -> None:
    ruled = RULES[name]
    p = made(ruled, SHAPES[shape], data, dtype)
    held_to_float64(ruled, p)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["softmax", "sface", "sphereface2"])
def test_weights_of_16_bits_in_place(name: str, dtype: torch.dtype) -> None:
    held_to_float64(RULES[name], made(RULES[name], SHAPES["soft"], "drawn", dtype))


def test_a_nan_is_its_rows_alone_and_a_zero_centre_has_gradient_zero() -> None:
    for name, ruled in RULES.items():
        p = made(ruled, SHAPES["centres"], "zeros", torch.float32)
        p.x[7] = torch.nan
        found = class_statistics(p, backend="cpu")
        rows = found.statistics.isnan().any(dim=0)
        assert rows.nonzero().flatten().tolist() == [7], name
        up = torch.ones_like(found.statistics)
        dx, dw = class_gradients(p, found.statistics, up, found.targets, backend="cpu")
        assert dx.isnan().any(dim=1).nonzero().flatten().tolist() == [7], name
        assert torch.equal(dw[::4], torch.zeros_like(dw[::4])), name


def test_an_infinite_score_is_that() -> None:
    x = torch.tensor([[torch.inf], [-torch.inf], [1.0]])
    p = ClassInputs(x, torch.ones(3, 1), torch.full((3, 1), -1), params=(2.0,), normalize=False)
    found = class_statistics(p, backend="cpu").statistics[0].tolist()
    assert found[:2] == [math.inf, -math.inf] and abs(found[2] - 2 - math.log(3)) < 1e-6


def test_a_class_with_more_centres_than_a_tile_has_rows() -> None:
    ruled = RULES["softmax"]
    held_to_float64(
        ruled, made(ruled, Shape(TILE + 9, 0.2, n=5, classes=3), "drawn", torch.float32)
    )


def test_hardest_is_no_label_and_the_first_of_equal_ones() -> None:
    w = torch.zeros(900, 2)
    w[:, 1] = 1
    w[[3, 400, 402, 899]] = torch.tensor([1.0, 0.0])  # in three tiles
    labels = torch.tensor([[-1, -1], [3, -1], [3, 400], [402, 3]])
    x = torch.tensor([[1.0, 0.0]]).expand(4, 2).contiguous()
    found = class_statistics(ClassInputs(x, w, labels, params=(4.0,)), backend="cpu")
    assert found.hardest.tolist() == [3, 400, 402, 400]
    assert found.hardest_score.tolist() == [1.0] * 4
    every = torch.arange(900).expand(1, 900)
    alone = class_statistics(ClassInputs(x[:1], w, every, params=(4.0,)), backend="cpu")
    assert alone.hardest.tolist() == [-1] and alone.statistics.tolist() == [[-math.inf]]
    subset = torch.tensor([2, 3, 402, 899])
    some = ClassInputs(x[:1], w, torch.tensor([[3]]), subset, params=(4.0,))
    assert class_statistics(some, backend="cpu").hardest.tolist() == [402]


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
def test_instruction_sets_agree(capability: str) -> None:
    ruled = RULES["sphereface2-power"]
    p = made(ruled, SHAPES["centres"], "drawn", torch.float32)
    try:
        extension().force_capability(capability)
    except ValueError:
        pytest.skip(f"this CPU cannot run {capability}")
    try:
        held_to_float64(ruled, p)
    finally:
        extension().force_capability(None)


def test_the_same_bits_again_on_any_number_of_threads() -> None:
    ruled = RULES["summed-bent"]
    p = made(ruled, Shape(1, 0.0, n=20, classes=5 * TILE), "drawn", torch.float32)
    up = torch.ones(2, 20), torch.ones(p.labels.shape)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            held_to_float64(ruled, p)
            answers = []
            for _ in range(2):
                found = class_statistics(p, backend="cpu")
                answers.append((*found, *class_gradients(p, found[0], *up, backend="cpu")))
            for a, b in zip(*answers, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["mixed", "bf16"])
def test_products_in_bfloat16(precision: str) -> None:
    if not extension().has_bf16():
        pytest.skip("no AVX512_BF16 products")
    for name in ("softmax-bent", "sphereface2"):
        exact = made(RULES[name], SHAPES["soft"], "drawn", torch.float32)
        p = exact._replace(precision=precision)
        found, wanted = (class_statistics(q, backend="cpu") for q in (p, exact))
        # operands of 8 bits, cosines of at most 1, terms at most 40 as steep
        room = 1e-6 if precision == "mixed" else 2**-8 * 2 * 40 * len(exact.weight)
        torch.testing.assert_close(found.statistics, wanted.statistics, rtol=0, atol=room)
        up = torch.ones_like(found.statistics), torch.ones_like(found.targets)
        narrow, wide = (
            class_gradients(q, wanted.statistics, *up, backend="cpu") for q in (p, exact)
        )
        for a, b in zip(narrow, wide, strict=True):
            assert (a - b).norm() <= 0.1 * b.norm()
            assert not torch.equal(a, b)


def test_opcheck_and_compile_of_several_labels() -> None:
    ruled = RULES["sphereface2"]
    p = made(ruled, Shape(3, 0.0, n=6, classes=11), "drawn", torch.float32)
    p = p._replace(params=list(p.params), weight=p.weight.requires_grad_())
    torch.library.opcheck(CLASS_RULES.op("cpu"), (*p, 0))

    def value(x: Tensor, weight: Tensor) -> Tensor:
        found = class_statistics(p._replace(x=x, weight=weight), backend="cpu")
        return found.statistics.sum() + found.targets.sum()

    compiled = torch.compile(value, backend="aot_eager", fullgraph=True)
    wanted = torch.autograd.grad(value(p.x, p.weight), p.weight)[0]
    assert torch.equal(torch.autograd.grad(compiled(p.x, p.weight), p.weight)[0], wanted)


def test_no_rows_and_nothing_asked_for() -> None:
    p = made(RULES["softmax"], Shape(3, 0.0, n=4, classes=5), "drawn", torch.float32)
    none = p._replace(x=p.x[:0], labels=p.labels[:0])
    found = class_statistics(none, backend="cpu")
    assert found.statistics.shape == (1, 0) and found.targets.shape == (0, 3)
    up = torch.zeros(1, 0, dtype=torch.float64), torch.zeros(0, 3, dtype=torch.float64)
    dx, dw = class_gradients(none, found.statistics, *up, backend="cpu")
    assert dx.shape == (0, 9) and torch.equal(dw, torch.zeros_like(p.weight))
    empty = p._replace(classes=torch.zeros(0, dtype=torch.int64), labels=torch.full((4, 3), -1))
    found = class_statistics(empty, backend="cpu")
    assert (found.statistics == -math.inf).all() and (found.hardest == -1).all()
    up = torch.ones_like(found.statistics), torch.ones_like(found.targets)
    dx, dw = class_gradients(empty, found.statistics, *up, backend="cpu", compact=True)
    assert torch.equal(dx, torch.zeros_like(dx)) and dw.shape == (0, 9)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"up": torch.zeros(2, 4)},
            ValueError,
            r"grad_statistics: expected \[1, 4\], got \[2, 4\]",
        ),
        ({"statistics": torch.zeros(4)}, ValueError, r"statistics: expected \[1, 4\], got \[4\]"),
        ({"targets": torch.zeros(4)}, ValueError, r"grad_targets: expected \[4, 3\], got \[4\]"),
        (
            {"values": torch.zeros(3, 4)},
            ValueError,
            "values: expected 0 or 4 rows with softmax, got 3",
        ),
        ({"values": torch.zeros(4, 5)}, ValueError, r"values: expected \[4, 4\], got \[4, 5\]"),
        ({"params": (1.0, 2.0)}, ValueError, "params: expected 1 of softmax, got 2"),
        ({"labels": torch.full((4, 3), 5)}, IndexError, r"labels: expected class ids in \[0, 5\)"),
        ({"classes": torch.tensor([0, 5])}, IndexError, r"classes: expected class ids in \[0, 5\)"),
    ],
)
def test_gradients_by_hand_are_checked(
    changed: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    p = made(RULES["softmax"], Shape(3, 0.0, n=4, classes=5), "drawn", torch.float32)
    given = {"statistics": torch.zeros(1, 4), "up": torch.zeros(1, 4), "targets": torch.zeros(4, 3)}
    inputs = {k: v for k, v in changed.items() if k not in given}
    given |= {k: v for k, v in changed.items() if k in given}
    p = p._replace(labels=torch.full((4, 3), -1))._replace(**inputs)
    with pytest.raises(error, match=message):
        class_gradients(p, given["statistics"], given["up"], given["targets"], backend="cpu")
