"""Cases of the CUDA kernels that share data and truth with the Triton tests.

Of row statistics, pairs and late interaction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import apart_cases
import torch
import triton_oracle as oracle
from cuda_case import CudaCase, near
from triton_oracle import DTYPE_STEP

from fused_losses import backends
from fused_losses.primitives.maxsim.inputs import MaxsimInputs, MaxsimNeeds
from fused_losses.primitives.pairs.inputs import PairNeeds, Rule
from fused_losses.primitives.row_statistics.inputs import Inputs, Needs, RowGradients

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ---- row statistics ----------------------------------------------------------------------------

EVERYTHING = dict(weighted=True, bias=True, column_weight=True, no_target=0.2)
BENT = dict(**EVERYTHING, bend="jump")  # and where there are classes a compact gradient


def rows(case: oracle.Case) -> Callable[[], None]:
    def check() -> None:
        backend = backends.module("row_statistics", "cuda")
        data = oracle.call(case)
        args, grads = data["args"], data["grads"]
        out = backend.forward(Inputs(**args))
        step = 2**-8 if case.precision == "bf16" else 2**-20
        names = ("lse", "target", "weighted_sum", "hardest", "hardest_score")
        for name, got, want in zip(names, out, oracle.truth(args), strict=True):
            if name == "hardest":
                assert case.precision != "fp32" or torch.equal(got, want)
            elif name != "weighted_sum" or case.weighted:
                near(got, want, step, name)
        needs = Needs(True, True, case.bias, compact=bool(case.bend))
        found = backend.backward(Inputs(**args), out[0], RowGradients(*grads), needs)
        step = 2**-6 if case.precision == "bf16" else 16 * DTYPE_STEP[case.dtype]
        want = oracle.gradients(args, grads, torch.float64)
        if needs.compact and case.classes:
            want[1] = want[1][args["classes"]]
        for name, got, w in zip(("dx", "dweight", "dbias"), found, want, strict=True):
            if w is not None:
                near(got, w, max(step, 2**-18), name)

    return check


# more than one tile each way where the host's tiles are small, both ragged
ROWS = [
    oracle.Case(n=70, c=303, d=24, **EVERYTHING, name="everything"),
    oracle.Case(n=9, c=48, d=27, normalize=False, bias=True, name="linear-unaligned"),
    oracle.Case(n=9, c=45, d=27, classes=31, no_target=0.3, name="classes-unaligned"),
    oracle.Case(n=9, c=70, d=40, dtype=BF16, classes=50, **BENT, name="classes-bf16"),
    oracle.Case(n=9, c=70, d=27, dtype=BF16, classes=41, name="unaligned-bf16"),
    oracle.Case(n=9, c=45, d=40, dtype=FP16, classes=40, **BENT, name="classes-fp16"),
    oracle.Case(n=9, c=45, d=27, dtype=FP16, classes=41, name="unaligned-fp16"),
    oracle.Case(n=9, c=45, d=40, dtype=BF16, wide=True, no_target=0.3, name="wide-bf16"),
    oracle.Case(n=9, c=45, d=27, dtype=FP16, wide=True, name="wide-fp16"),
    oracle.Case(n=9, c=45, d=44, precision="bf16", bias=True, name="rounded"),
    oracle.Case(n=70, c=303, d=24, **BENT, name="bent"),
    oracle.Case(n=9, c=45, d=27, classes=31, normalize=False, bend="jump", name="bent-linear"),
    oracle.Case(n=9, c=45, d=27, bend="flat", edit="duplicates", name="bent-ties"),
]

# ---- pairs -------------------------------------------------------------------------------------


@contextmanager
def narrow_tiles(backend: ModuleType) -> Iterator[None]:
    """Tiles of the least width, so that few columns make several."""
    before, backend.HOST_BYTES = backend.HOST_BYTES, 1
    try:
        yield
    finally:
        backend.HOST_BYTES = before


def pairs(case: object) -> Callable[[], None]:
    def check() -> None:
        import triton_pair_checks as cases

        backend, truth = backends.module("pairs", "cuda"), cases.truth
        with narrow_tiles(backend):
            run(backend, truth, cases)

    def run(backend: ModuleType, truth: ModuleType, cases: ModuleType) -> None:
        p, values = cases.inputs(case)
        exact = cases.leaves_of(p, torch.float64)[0]
        needs = PairNeeds(True, not case.triangle, True, p.x_bias is not None, p.y_bias is not None)
        low = BF16 if case.precision == "bf16" else case.dtype
        step = {FP32: 2**-21, BF16: 2**-8, FP16: 2**-11}[low]
        if case.values:
            got = backend.attention(values, p, case.positives)
            want = truth.attention(values.double(), exact, case.positives)
        else:
            got = backend.statistics(p, case.reduction, case.cols)
            want = truth.statistics(exact, case.reduction, case.cols)
        want = [t.detach() for t in want]
        exact_sums = case.precision != "bf16" and not case.values
        for a, b in zip(got, want, strict=True):
            cases.close(a, b, None, 2**-20 if exact_sums else step, "forward")
        g = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=g, dtype=torch.float64).float() for t in want]
        if case.values:
            options = (*grads, *got, values, p, case.positives, True, needs)
            found = backend.attention_backward(*options)
        else:
            grads = [t[:2].double() for t in grads]
            options = (*grads, *got, p, case.reduction, case.cols, needs)
            found = backend.statistics_backward(*options)
        grads = [t.double() for t in grads]
        _, want = cases.gradients(case, p, values, grads, torch.float64)
        _, eager = cases.gradients(case, p, values, grads, low)
        for a, b, e in zip(found, want, eager, strict=True):
            if b is not None:
                cases.close(a, b, e, step, "gradient")

    return check


MANY = dict(labels=5, biases=True, ids=30, groups=3, windows=True, cols=True, exclude=2)
CIRCLE = dict(positive=Rule(-1.0, 0.5, 9.0), negative=Rule(1.0, -0.2, 3.0))


def pair_cases() -> list[CudaCase]:
    from triton_pair_checks import Case

    found = [
        Case(n=70, m=90, d=24, **MANY, name="everything"),
        Case(n=21, m=35, d=24, dtype=BF16, **MANY, name="everything-bf16"),
        Case(n=35, d=24, dtype=FP16, triangle=True, labels=7, biases=True, name="triangle-fp16"),
        Case(
            n=21,
            m=35,
            d=27,
            root=True,
            labels=4,
            reduction="softplus",
            cols=True,
            **CIRCLE,
            name="root",
        ),
        Case(n=21, m=35, d=24, reduction="relu", cols=True, skip_self=True, name="relu"),
        Case(n=21, m=35, d=24, precision="bf16", labels=3, name="rounded"),
        Case(n=21, m=130, d=24, values=24, biases=True, name="attention"),
        Case(
            n=21, m=35, d=24, dtype=BF16, values=17, labels=3, positives=True, name="attention-bf16"
        ),
        Case(n=21, m=35, d=24, dtype=FP16, values=24, name="attention-fp16"),
    ]
    return [CudaCase(f"pairs-{c.name}", "pairs", pairs(c)) for c in found]


def pairs_apart(case: apart_cases.Apart) -> Callable[[], None]:
    def check() -> None:
        backend = backends.module("pairs", "cuda")
        with narrow_tiles(backend):
            apart_cases.check(case, backend)

    return check


APART = [CudaCase(f"apart-{c.name}", "pairs", pairs_apart(c)) for c in apart_cases.CASES]


# ---- late interaction --------------------------------------------------------------------------


@contextmanager
def changed(backend: object, **values: int) -> Iterator[None]:
    """The module with other sizes of its tiles."""
    before = {name: getattr(backend, name) for name in values}
    try:
        for name, value in values.items():
            setattr(backend, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(backend, name, value)


def maxsim(case: object, **sizes: int) -> Callable[[], None]:
    def check() -> None:
        import triton_maxsim_cases as cases

        backend = backends.module("maxsim", "cuda")
        texts = cases.inputs(case)
        with changed(backend, **sizes):
            scores, index = backend.forward(MaxsimInputs(*texts, case.precision))
        cases.check_forward(case, scores, index, *texts)
        grad = torch.randn(scores.shape)
        found = backend.backward(grad, index, MaxsimInputs(*texts), MaxsimNeeds(True, True))
        for a, b in zip(found, cases.backward_truth(case, grad, index, *texts[:2]), strict=True):
            cases.close(a, b, cases.BACKWARD[case.dtype], "gradient")

    return check


def maxsim_cases() -> list[CudaCase]:
    from triton_maxsim_cases import Case

    few = [
        Case((3, 2), (5, 0, 19), d, dtype)
        for d, dtype in ((40, FP32), (43, FP32), (40, BF16), (43, BF16), (40, FP16), (43, FP16))
    ]
    found = [CudaCase(f"maxsim-{str(c.dtype)[6:]}-{c.d}", "maxsim", maxsim(c)) for c in few]
    # documents that begin in one tile and end in another, or a third
    ragged = maxsim(Case((3, 0, 15), (5, 0, 70, 1, 40, 150, 3), 24), HOST_BYTES=4 * 18 * 64)
    many = maxsim(Case((300, 290), (5, 40), 3))
    return [
        *found,
        CudaCase("maxsim-tiles", "maxsim", ragged),
        CudaCase("maxsim-many-queries", "maxsim", many),
    ]


TRITON_CASES: list[CudaCase] = [
    *(CudaCase(f"rows-{c.name}", "row_statistics", rows(c)) for c in ROWS),
    *pair_cases(),
    *APART,
    *maxsim_cases(),
]
