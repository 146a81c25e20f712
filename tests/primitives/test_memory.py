"""The bound on memory, held against every allocation that the process makes, in torch or not.

A child process runs with count_allocations.c preloaded. What is judged is the peak of live bytes
in forward and backward, beyond what lived before and the gradients that are handed out.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import pytest
from conftest import CUDA, MEASURED, require
from counted import COUNTER, MIB, told_by_child

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("memory")]

BOUND = 16 * MIB


@dataclass(frozen=True)
class Case:
    """One call; a matrix of scores [n, c or sampled] would be far above the bound."""

    id: str
    n: int = 256
    d: int = 64
    c: int = 40_000
    dtype: str = "float32"
    sampled: int = 0
    smoothing: float = 0.0
    budget: int = 0
    what: str = "margin_softmax"

    @property
    def scores(self) -> int:
        return self.n * (self.sampled or self.c) * 4


CASES = [
    Case("many-classes"),
    Case("wide", d=384, c=26_000),
    Case("bf16", d=128, dtype="bfloat16"),
    Case("sampled-without-a-copy", d=128, c=60_000, sampled=40_000, smoothing=0.1),
    Case("linear-cross-entropy", what="linear_cross_entropy"),
    Case("budget", budget=8 * MIB),
    Case("distillation", what="distillation"),
    Case("distillation-budget", budget=8 * MIB, what="distillation"),
]

# the CUDA kernels on the host, whose tiles are as much smaller
HOST_BOUND = BOUND // 8
HOST_CASES = [
    replace(case, c=case.c // 8, sampled=case.sampled // 8)
    for case in CASES
    if case.id in ("many-classes", "bf16", "sampled-without-a-copy")
]


CHILD = (
    COUNTER
    + """
def run(case, backend, asked=True):
    torch.manual_seed(0)
    dtype = getattr(torch, case["dtype"])
    x = torch.randn(case["n"], case["d"]).to(dtype).requires_grad_()
    w = torch.randn(case["c"], case["d"]).to(dtype).requires_grad_()
    ids = torch.randperm(case["c"])[: case["sampled"]].sort().values if case["sampled"] else None
    y = torch.randint(0, case["c"], (case["n"],))
    y = ids[y % len(ids)] if ids is not None else y
    t, wt = (2 * part.detach() for part in (x, w)) if case["what"] == "distillation" else (y, None)
    def step():
        if case["what"] == "margin_softmax":
            loss = fused_losses.margin_softmax(
                x, w, y, classes=ids, label_smoothing=case["smoothing"],
                memory_budget=case["budget"], backend=backend)
        elif case["what"] == "distillation":
            loss = fused_losses.distillation(
                x, w, t, wt, memory_budget=case["budget"], backend=backend)
        else:
            loss = fused_losses.linear_cross_entropy(x, w, y, backend=backend)
        loss.backward()
    peak = extra(step) - x.grad.nbytes - w.grad.nbytes
    function = getattr(fused_losses, case["what"])
    options = {"memory_budget": case["budget"]} | ({} if ids is None else {"classes": ids})
    if not asked:
        return peak, 0
    given = (x, w, y) if wt is None else (x, w, t, wt)
    plan = fused_losses.explain(function, *given, backend=backend, **options)
    return peak, plan.peak_extra_bytes

backend, cases = json.loads(sys.argv[1])
if backend == "cuda":  # many small products between kernels that one thread executes
    torch.set_num_threads(1)
# threads, lazy imports and the buffers that MKL keeps, by the products' sizes, are the process's
for case in cases:
    run(case, backend, asked=False)
print(json.dumps({case["id"]: run(case, backend) for case in cases}))
"""
)


@functools.cache
def measured(backend: str, capability: str | None = None) -> dict[str, tuple[int, int]]:
    """By case: bytes beyond inputs and gradients at the peak, and what `explain` had said of it.

    One child for all the cases.
    """
    cases = CASES[:1] if backend == "reference" or capability else CASES
    cases = HOST_CASES if backend == "cuda" else cases
    capped = {"ATEN_CPU_CAPABILITY": capability} if capability else {}
    return told_by_child(CHILD, [backend, [asdict(c) for c in cases]], **capped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", MEASURED)
def test_peak_is_bounded_whatever_the_number_of_classes(name: str, case: Case) -> None:
    require(name)
    assert case.scores > 1.5 * (BOUND + case.budget)  # or the bound would say nothing
    assert measured(name)[case.id][0] <= BOUND + case.budget


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", MEASURED)
def test_peak_is_within_what_explain_says(name: str, case: Case) -> None:
    require(name)
    extra, told = measured(name)[case.id]
    # Python's own objects, and the labels and class ids that are made int64 and sorted
    assert extra <= told + MIB // 4 + 24 * (case.n + case.sampled)
    assert told <= 16 * extra  # a plan that says anything would hold too


@pytest.mark.parametrize("case", HOST_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", CUDA)
def test_peak_of_the_cuda_kernels_is_bounded_and_told(name: str, case: Case) -> None:
    require(name)
    assert case.scores > 1.5 * HOST_BOUND
    extra, told = measured(name)[case.id]
    assert extra <= HOST_BOUND
    assert extra <= told + MIB // 4 + 24 * (case.n + case.sampled)
    assert told <= 16 * extra


@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_peak_is_bounded_without_wide_vectors(capability: str) -> None:
    require("cpu")
    assert measured("cpu", capability)[CASES[0].id][0] <= BOUND


@pytest.mark.parametrize(
    "plain, kept", [("many-classes", "budget"), ("distillation", "distillation-budget")]
)
def test_a_budget_is_used(plain: str, kept: str) -> None:
    require("cpu")
    spent = measured("cpu")[kept][0] - measured("cpu")[plain][0]
    assert 4 * MIB < spent <= 8 * MIB + MIB


def test_the_reference_breaks_the_bound() -> None:
    # the control: a harness that saw no allocations would pass everything above
    case = CASES[0]
    extra, told = measured("reference")[case.id]
    assert extra > case.scores > BOUND
    assert extra <= told
