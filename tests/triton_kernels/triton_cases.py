"""The Triton kernels against float64, in Triton's interpreter; run by `test_interpreted.py`.

Bound: the error of eager torch in the same dtype, plus a few steps of that dtype.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton.language as tl
import triton_oracle as oracle
from far_rows import far_rows
from torch import Tensor
from triton import jit
from triton_oracle import CASES, DTYPE_STEP, LOW, PRECISIONS, Case, call, close

import fused_losses.backends
from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.triton import capability as triton_capability
from fused_losses.backends.triton import launch as triton_launch
from fused_losses.backends.triton.tile_math import narrow
from fused_losses.primitives.row_statistics import triton, triton_chunks
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients
from fused_losses.primitives.row_statistics.op import row_statistics


def yardstick(case: Case) -> tuple[torch.dtype, float]:
    """The dtype of the eager run that is compared, and its step."""
    low = case.precision in ("mixed", "bf16") and case.dtype == torch.float32
    dtype = torch.bfloat16 if low else case.dtype
    return dtype, 2**-11 if case.precision == "tf32" else DTYPE_STEP[dtype]


def backward(args: dict[str, Any], grads: list, lse: Tensor, need: tuple = (True,) * 3) -> tuple:
    """need: of x, weight, bias, and then whether the weight's is compact."""
    return triton.backward(Inputs(**args), lse, RowGradients(*grads), Needs(*need))


def check_forward(case: Case, args: dict[str, Any]) -> tuple:
    got, want = triton.forward(Inputs(**args)), oracle.truth(args)
    # float32 sums of exact products, unless the caller asked for less
    step = {"fp32": 2**-24, "mixed": 2**-24, "tf32": 2**-11, "bf16": 2**-8}[case.precision]
    names = ("lse", "target", "weighted_sum", "hardest", "hardest_score")
    for name, g, w in zip(names, got, want, strict=True):
        if name == "hardest":
            exact = case.precision in ("fp32", "mixed")
            assert not exact or torch.equal(g, w), name
            assert g.dtype == torch.int64
        elif name != "weighted_sum" or args["weighted"]:
            assert g.dtype == torch.float32
            close(g, w, None, step, name)
    return got


def check_backward(case: Case, data: dict[str, Any], lse: Tensor, form: str) -> None:
    dtype, step = yardstick(case)
    args, grads = data["args"], data["grads"]
    got = backward(args, grads, lse)
    want = oracle.gradients(args, grads, torch.float64)
    length = oracle.lengths(case)
    # whose squares are in the range
    near = args | dict(weight=(args["weight"].double() / length).to(case.dtype))
    eager = oracle.gradients(near, grads, dtype)
    names = ("x", "weight", "bias")
    for name, g, w, e in zip(names, got, want, eager, strict=True):
        if w is None:
            assert g is None
            continue
        assert g.dtype == args[name].dtype and g.shape == args[name].shape
        if name == "weight":
            g, w = g.double() * length, w * length
        close(g, w, e, step, f"gradient of {name} ({form})")
    rows = args["classes"]
    if rows is not None:
        compact = backward(args, grads, lse, (True, True, case.bias, True))
        close(
            compact[1].double() * length[rows],
            (want[1] * length)[rows],
            eager[1][rows],
            step,
            f"compact gradient ({form})",
        )
        assert compact[1].shape == (len(rows), case.d) and torch.equal(compact[0], got[0])
        assert not case.bias or torch.equal(compact[2], got[2])


@pytest.mark.parametrize("case", CASES + LOW + PRECISIONS, ids=lambda c: c.name)
def test_row_statistics(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    data = call(case)
    lse = check_forward(case, data["args"])[0]
    for form, processors in (("stored G", 10**6), ("owners", 0)):
        monkeypatch.setattr(gpu_device, "processors", lambda device, p=processors: p)
        check_backward(case, data, lse, form)


def test_more_partial_results_than_a_merge_reads_at_once() -> None:
    case = Case(n=5, c=2100, d=16, scale=16.0)
    args = call(case)["args"]
    # the last classes are the first row's best: what was summed before is scaled again
    order = oracle.product_of(args["x"], args["weight"], True)[0].argsort()
    check_forward(case, args | dict(weight=args["weight"][order]))


def test_ties_go_to_the_lowest_class() -> None:
    """Within a tile, across tiles, and across the partial results that a merge reads at once."""
    # integers: their sums are exact in any order
    x, weight = torch.randint(1, 9, (5, 16)).float(), torch.ones(2100, 16)
    labels = torch.tensor([0, 5, -1, 2099, 1])
    for normalize in (False, True):
        args = Inputs(x, weight, labels, None, None, None, normalize, False, "fp32", None)
        assert triton.forward(args)[3].tolist() == [1, 0, 0, 0, 0]
    # the best of row 2, twice, tiles apart
    weight[[70, 2098]] = 2.0
    args = Inputs(x, weight, labels, None, None, None, False, False, "fp32", None)
    assert triton.forward(args)[3][2] == 70


@jit
def narrow_kernel(given, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, narrow(tl.load(given + at), out.dtype.element_ty))


def test_float16_saturates() -> None:
    given = torch.tensor([65504.0, 65519.0, 1e30, -1e30, torch.inf, -torch.inf, torch.nan, 3.0])
    out = torch.empty(8, dtype=torch.float16)
    narrow_kernel[(1,)](given, out, N=8)
    top = 65504.0
    assert out[:6].tolist() == [top, top, top, -top, top, -top]
    assert out[6].isnan() and out[7] == 3
    wide = torch.empty(8)
    narrow_kernel[(1,)](given, wide, N=8)
    assert torch.equal(wide[:6], given[:6])


MANY = dict(n=75, c=203, d=40, scale=2.0, weighted=True, bias=True, column_weight=True)


@pytest.mark.parametrize("classes, bend", ((0, ""), (131, "jump")))
def test_segments_chunks_and_row_blocks(
    classes: int, bend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that is one piece at these sizes, cut into several ragged ones."""
    monkeypatch.setattr(triton, "PARTIAL_BYTES", 4 * 4 * 75 * 5)
    monkeypatch.setattr(triton_chunks, "ROW_BLOCK", 32)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    case = Case(**MANY, classes=classes, no_target=0.1, bend=bend)
    data = call(case)
    lse = check_forward(case, data["args"])[0]
    check_backward(case, data, lse, "stored G")


@pytest.mark.parametrize("classes", (0, 131))
def test_split_products(classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """dx summed over several pieces of a chunk, the last chunk ragged; no bias, no norm."""
    monkeypatch.setattr(triton_chunks, "SPLIT_ROWS", 64)
    monkeypatch.setattr(triton_chunks, "MAX_CHUNK", 64)
    case = Case(n=20, c=203, d=40, normalize=False, classes=classes)
    data = call(case)
    lse = check_forward(case, data["args"])[0]
    check_backward(case, data, lse, "stored G")


RESIDENT = [
    Case(n=60, c=53, d=64, name="four pieces"),
    Case(n=64, c=90, d=48, classes=71, no_target=0.1, name="classes"),
    Case(n=61, c=203, d=32, normalize=False, edit="duplicates", name="ties"),
    Case(n=60, c=7, d=16, edit="zero row", name="less than a tile"),
]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("case", RESIDENT, ids=lambda c: c.name)
def test_resident_rows(case: Case, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(case, dtype=dtype)
    ran: set[str] = set()
    launch = triton_launch.launch

    def noting(kernel: Any, *args: Any) -> None:
        ran.add(kernel.fn.__name__)
        launch(kernel, *args)

    monkeypatch.setattr(triton_launch, "launch", noting)
    check_forward(case, call(case)["args"])
    assert "forward_resident" in ran and "forward_tiles" not in ran
    # several segments of several spans
    monkeypatch.setattr(triton, "PARTIAL_BYTES", 3 * 4 * 64 * 2)
    monkeypatch.setattr(gpu_device, "processors", lambda device: 12)
    check_forward(case, call(case)["args"])
    assert "merge_tiles" in ran or case.c < 50


def test_a_score_that_is_nan_or_infinite_stays_in_its_row_of_resident_ones() -> None:
    case = Case(n=64, c=53, d=32, dtype=torch.bfloat16)
    args = call(case)["args"]
    clean = triton.forward(Inputs(**args))
    bad = torch.zeros(64, dtype=torch.bool)
    for row, value in ((3, torch.nan), (40, torch.inf)):
        args["x"][row, 5], bad[row] = value, True
    for index, (got, want) in enumerate(zip(triton.forward(Inputs(**args)), clean, strict=True)):
        if index != 2:
            assert torch.equal(got[~bad], want[~bad])
        if index in (0, 1, 4):
            assert not got[bad].isfinite().any()


def test_splits_fill_the_processors() -> None:
    for tiles, row_tiles in ((768, 4), (768, 70), (31250, 133), (1, 4), (3, 1)):
        splits = triton._splits(tiles, row_tiles, 132)
        assert 1 <= splits <= tiles
        if tiles >= 132:
            rounds = gpu_device.ceil_div(row_tiles * splits, 132)
            assert row_tiles * splits >= 0.75 * rounds * 132


@pytest.mark.parametrize("bend", ("", "jump"))
def test_nan_in_a_row_stays_in_that_row(bend: str) -> None:
    case = Case(edit="nan row", weighted=True, bias=True, bend=bend)
    args = call(case)["args"]
    clean = call(replace(case, edit=""))["args"]
    args["bend"] = clean["bend"]
    bad = torch.arange(case.n) == case.n // 3
    for index, (got, want) in enumerate(
        zip(triton.forward(Inputs(**args)), triton.forward(Inputs(**clean)), strict=True)
    ):
        assert torch.equal(got[~bad], want[~bad])
        if index == 3:
            assert -1 <= int(got[bad]) < case.c
        else:
            assert got[bad].isnan().all()


def test_a_zero_class_beside_a_nan_row_has_gradient_zero() -> None:
    data = call(Case(edit="nan row"))
    args = data["args"]
    args["weight"][4] = 0
    _, dweight, _ = backward(args, data["grads"], triton.forward(Inputs(**args))[0])
    assert (dweight[4] == 0).all() and dweight[5].isnan().all()


def test_only_what_is_needed_is_computed() -> None:
    data = call(Case(bias=True))
    args, grads = data["args"], data["grads"]
    lse = triton.forward(Inputs(**args))[0]
    whole = backward(args, grads, lse)
    for i in range(3):
        need = tuple(k == i for k in range(3))
        part = backward(args, grads, lse, need)
        assert [p is not None for p in part] == list(need)
        assert torch.equal(part[i], whole[i])


def test_classes_that_take_no_part_get_zero_gradient() -> None:
    data = call(Case(c=90, classes=17, bias=True))
    args = data["args"]
    _, dweight, dbias = backward(args, data["grads"], triton.forward(Inputs(**args))[0])
    out = torch.ones(90, dtype=torch.bool)
    out[args["classes"]] = False
    assert not dweight[out].any() and not dbias[out].any()


def test_empty_batch() -> None:
    args = call(Case(n=4, bias=True))["args"]
    args["x"], args["labels"] = args["x"][:0], args["labels"][:0]
    out = triton.forward(Inputs(**args))
    assert [t.numel() for t in out] == [0] * 5
    dx, dweight, dbias = backward(args, [out[0], out[0], None], out[0])
    assert dx.shape == (0, 24) and not dweight.any() and not dbias.any()


def test_label_out_of_range() -> None:
    args = call(Case())["args"]
    args["labels"][3] = 53
    with pytest.raises(IndexError, match=r"labels: expected class ids in \[0, 53\)"):
        triton.forward(Inputs(**args))


def test_offsets_past_two_to_the_31() -> None:
    near = torch.randn(3, 16).half()
    far = far_rows(near)
    shared = dict(classes=None, bias=None, column_weight=None, normalize=True, weighted=False)
    shared |= dict(labels=torch.tensor([0, 2, 1]), precision="fp32")
    want = triton.forward(Inputs(x=near, weight=near, **shared))
    got = triton.forward(Inputs(x=far, weight=far, **shared))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    grads = [torch.randn(3), torch.randn(3), None]
    for processors in (10**6, 0):
        gpu_device.processors, saved = lambda device, p=processors: p, gpu_device.processors
        try:
            results = [backward(dict(x=t, weight=t, **shared), grads, got[0]) for t in (near, far)]
        finally:
            gpu_device.processors = saved
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)


def test_wired_as_a_backend() -> None:
    assert fused_losses.backends.unavailable("triton") is None
    data = call(Case(classes=20, bias=True, weighted=True, bend="jump"))
    args = data["args"]
    leaves = [args[k].requires_grad_() for k in ("x", "weight", "bias")]
    out = row_statistics(**args, backend="triton")
    total = (out.lse * data["grads"][0]).sum() + (out.target * data["grads"][1]).sum()
    total = total + (out.weighted_sum * data["grads"][2]).sum()
    got = torch.autograd.grad(total, leaves)
    want = oracle.gradients(args, data["grads"], torch.float64)
    for g, w in zip(got, want, strict=True):
        close(g, w, None, 2**-20, "gradient")


def test_reasons_are_sentences() -> None:
    cpu = torch.device("cpu")
    assert triton_capability.reasons_against(cpu, torch.float32, "fp32") == []
    assert "float64" in triton_capability.reasons_against(cpu, torch.float64, "fp32")[0]
    assert (
        "CPU" in triton_capability.reasons_against(torch.device("cuda"), torch.float32, "fp32")[0]
    )
