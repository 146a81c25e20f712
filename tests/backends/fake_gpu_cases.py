"""Every example on CUDA tensors without values: where it launches, where it waits, what it holds.

The current device is cuda:0 and the tensors are on cuda:1. `test_fake_gpu.py` runs this file in a
process that has such devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fake_gpu
import pytest
import torch
from fake_gpu import FIRST_STREAM, Noted
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fused_losses import primitives
from fused_losses.base.examples import EXACT, TABLE, Example, ExampleInputs
from fused_losses.centers import ClassCenters
from fused_losses.primitives.op import OPS
from fused_losses.verify.forms import KernelForm, forms, within

SIZES = (37, 173, 72)
DEVICE = 1
BOTH, ONE = ("triton", "cuda", "bounded"), ("cuda", "bounded")

# the functions that wait for values on the device, or bring some there, and why; by the function of
# the package in which they do, "outside" is autograd's own
LIST = "a list of what is near or mined is as long as the values say"
PASSES = "as many sweeps as the largest class has rows"
SIZES_READ = "rows are padded to the most positives"
CHECKED = "a matrix that has no square root is an error of the caller's"
STOPS = "an iteration ends by its values"
NEAR = "pairs too near for their products' digits are listed"
ALLOWED = {
    "centers.sampling.groups": "the classes of a sample are those of the batch and those drawn",
    "centers.sampling.sample": "as many as are drawn",
    "functions.angular._angular": PASSES,
    "functions.angular._runs": PASSES,
    "functions.lifted._lifted_by_pass": PASSES,
    "functions.gated_pairs._gated": PASSES,
    "functions.kmeans._check": STOPS,
    "functions.kmeans._moved": STOPS,
    "functions.kmeans.kmeans": STOPS,
    "functions.listed_triplets._positive_pairs": LIST,
    "mining.lists.gathered_pairs": LIST,
    "mining.triplets._one_each": LIST,
    "outside": LIST,
    "pairwise.class_covariance.class_roots": CHECKED,
    "pairwise.differences._run": NEAR,
    "pairwise.lengths.factor": "whether a row is so long or short that the bank is scaled: one bit",
    "pairwise.radius._by_products": LIST,
    "pairwise.radius._in_pieces": LIST,
    "pairwise.whitening._cholesky": CHECKED,
    "pairwise.whitening._covariance": CHECKED,
    "primitives.maxsim.op._flatten": "a mask's tokens are laid end to end",
    "primitives.row_rules.triplets.padded_columns": SIZES_READ,
    "primitives.topk.within.gathered": LIST,
    "primitives.topk.within.taken": LIST,
    "similarity.bandwidth._ranked": "a median is found by counts of the distances below it",
    "similarity.grams.coding_rate": "a determinant for each class that there is",
    "similarity.leanvec.leanvec": STOPS,
}

ran: set[str] = set()  # ops with backend and direction
waited: set[str] = set()


def noted(example: Example, able: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> Noted:
    """What a call and its backward ask of the GPU."""
    leaves = example.leaves
    with fake_gpu.gpu(monkeypatch, able) as found:
        inputs = ExampleInputs(*SIZES, device=f"cuda:{DEVICE}")
        example.arguments(inputs)  # made once, here
        for name in leaves:
            setattr(inputs, name, getattr(inputs, name).detach().requires_grad_())
        args, options = example.arguments(inputs)
        found.waits.clear()
        out = [t for t in tree_leaves(example.function(*args, **options)) if isinstance(t, Tensor)]
        ends = [t for t in out if t.requires_grad]
        if ends:
            torch.autograd.backward(ends, [torch.empty_like(t) for t in ends])
    ran.update(found.chosen)
    waited.update(place for _, place in found.waits)
    return found


def judge(found: Noted) -> None:
    for launched in found.launches:
        assert launched.current == DEVICE, launched
        assert launched.devices == {DEVICE}, launched
        assert launched.stream in (None, FIRST_STREAM + DEVICE), launched
    assert all(found.without_tf32)  # every example is of precision fp32
    for op, held, told in found.memory:
        assert held <= told, (op, held, told)
    assert [wait for wait in found.waits if wait[1] not in ALLOWED] == []


# whose lengths no two answers to what is read agree on
NOT_FOLLOWED = ("mine_pairs, drawn", "mine_triplets, semihard")


@pytest.mark.parametrize("name", [name for name in TABLE if name not in NOT_FOLLOWED])
def test_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(noted(TABLE[name], BOTH, monkeypatch))


def of_each_function() -> Iterator[str]:
    seen = set()
    for name, example in TABLE.items():
        if example.function not in seen:
            seen.add(example.function)
            yield name


@pytest.mark.parametrize("name", [*of_each_function()])
def test_function_without_triton(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    judge(noted(TABLE[name], ONE, monkeypatch))


PROCESSORS = 132  # of `fake_gpu`


@pytest.mark.parametrize("form", forms(PROCESSORS), ids=lambda f: f"{f.kernel}-{f.example}")
@pytest.mark.parametrize("arch", ("sm_80", "sm_90", "sm_100"))
def test_shapes_of_verify_reach_the_kernels_that_they_name(
    arch: str, form: KernelForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    if form.kernel == "forward_resident" and arch != "sm_90":
        pytest.skip("sm_90 alone has it")
    example = TABLE[form.example]
    # fakes have no baddbmm of 16 bits with float32 sums, which the forms with stored scores ask for
    owned = form.kernel.startswith("owner")
    precision = "bf16" if owned and form.dtype == torch.float32 else "fp32"
    with fake_gpu.gpu(monkeypatch, (form.backend,), arch) as found, within(form.room):
        inputs = ExampleInputs(*form.shape, form.dtype, device="cuda:0")
        options = {"precision": precision} if example.takes("precision") else {}
        for name in example.leaves:
            setattr(inputs, name, getattr(inputs, name).detach().requires_grad_())
        out = example(inputs, backend=form.backend, **options)
        if example.bound != EXACT and (owned or form.dtype == torch.float32):
            torch.autograd.backward(out, torch.empty_like(out))
    assert sum(launch.kernel == form.kernel for launch in found.launches) >= form.launches


@pytest.mark.parametrize("rate", (1.0, 0.2))
def test_class_centers(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    n, classes, d = SIZES[0], 1000, SIZES[2]
    with fake_gpu.gpu(monkeypatch, BOTH) as found:
        head = ClassCenters(classes, d, sample_rate=rate, device=f"cuda:{DEVICE}")
        new = dict(device=f"cuda:{DEVICE}")
        x, labels = torch.empty(n, d, requires_grad=True, **new), torch.zeros(n, **new).long()
        found.waits.clear()
        head(x, labels).backward()
    waited.update(place for _, place in found.waits)
    judge(found)
    assert found.launches and bool(found.waits) == (rate < 1)


# ops whose GPU forms are PyTorch's operators: the function, and whether it takes a precision
IN_PYTORCH = {
    "nested_info_nce": True,
    "shared_negatives": False,
}


@pytest.mark.parametrize("backend", ("triton", "cuda"))
@pytest.mark.parametrize("name", IN_PYTORCH)
def test_products_of_pytorch_are_as_precise_as_asked(
    name: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for precision in ("fp32", "tf32") if IN_PYTORCH[name] else ("fp32",):
        with fake_gpu.gpu(monkeypatch, (backend,)) as found:
            example = next(e for each, e in TABLE.items() if each.split(",")[0] == name)
            inputs = ExampleInputs(*SIZES, device=f"cuda:{DEVICE}")
            for leaf in example.leaves:
                setattr(inputs, leaf, getattr(inputs, leaf).detach().requires_grad_())
            options = {"precision": precision} if IN_PYTORCH[name] else {}
            out = example(inputs, backend=backend, **options)
            torch.autograd.backward(out, torch.empty_like(out))
        assert set(found.without_tf32) == {precision == "fp32"}
        assert len(found.without_tf32) >= 3  # a score, and two of its gradient


def test_every_op_ran() -> None:
    """Forward and backward, of each form that launches kernels."""
    expected = set()
    for name, op in OPS.items():
        for backend in {"triton", "cuda"} & set(op.python_backends):
            if not (Path(primitives.__file__).parent / op.primitive / f"{backend}.py").is_file():
                continue
            expected |= {f"{name}_{backend}"}
            if op.backward_schema is not None:
                expected |= {f"{name}_{backend}_backward"}
    assert expected - ran == set()


def test_every_wait_that_is_allowed_is_met() -> None:
    assert set(ALLOWED) - waited == set()
