"""What every op says that it needs, held against what it allocates; and that shapes suffice.

Bytes beyond inputs and outputs, of the forward and of its gradient, each op alone: in a child that
counts its allocations (test_memory.py).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import MEASURED, require
from counted import COUNTER, MIB, told_by_child
from places import search_path
from torch import Tensor

from fused_losses import backends
from fused_losses.primitives.distances.inputs import FLAT
from fused_losses.primitives.divergence.op import DIVERGENCE
from fused_losses.primitives.op import OPS
from fused_losses.primitives.pairs.inputs import PairInputs

SLACK = MIB // 8  # Python's own objects and the library's small buffers


class Case(NamedTuple):
    op: str
    make: Callable[[torch.dtype], tuple]  # of the forward op, by the dtype of its rows
    dtype: str = "float32"
    less: int = 6  # what is told is at most so many times what is needed, and 2 MiB


def rows(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1).to(dtype)


def labels(n: int, each: int = 4) -> Tensor:
    return torch.arange(n, dtype=torch.int32) // each


def statistics(n: int, c: int, d: int, bend: bool = False, sampled: int = 0) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        psi = torch.rand(4, n) if bend else None
        classes = torch.arange(sampled) * 2 if sampled else None
        plain = (rows(dtype, n, d), rows(dtype, c, d), torch.arange(n) % 9 * 2, classes)
        return (*plain, None, None, not bend, not bend, "fp32", psi, 0)

    return make


def pairs(n: int, m: int, d: int, **kinds: Any) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        triangle, width = kinds.get("triangle", False), kinds.get("width", 0)
        apart = kinds.get("apart", False)
        x, scale = rows(dtype, n, d), torch.tensor(8.0, dtype=torch.float64)
        # apart: every pair is near, the most that a form has to hold
        x = 1 + 0.01 * x if apart else x
        y = x if triangle else 1 + 0.01 * rows(dtype, m, d) if apart else rows(dtype, m, d)
        both = (labels(n), None if triangle else labels(m)) if not width else (None, None)
        rule = [1.0, 0.0, float("inf")]
        flat = (x, y, scale, None, None, *both, *(None,) * 7, "linear", rule, rule)
        flat = (*flat, False, triangle, apart, "fp32")
        if width:
            return (rows(dtype, m, width), *flat, False)
        return (*flat, "lse", not triangle, kinds.get("kept", 0))

    return make


def nested(n: int, m: int, widths: list[int], units: bool = True) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        d, count = widths[-1], len(widths)
        own = [torch.rand(count, size) for size in (n, m)] * 2 if units else [None] * 4
        scale = torch.tensor(8.0, dtype=torch.float64)
        plain = (rows(dtype, n, d), rows(dtype, m, d), scale, *own, widths)
        return (*plain, labels(n), labels(m), *(None,) * 5, "fp32", True)

    return make


def distances(n: int, m: int, d: int, kind: str) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        w = {"canberra": (d,), "scaled": (m, d)}.get(kind)
        x, y = rows(dtype, n, d).abs(), rows(dtype, m, d).abs()
        return (x, y, None if w is None else torch.rand(w), kind, 3.0, "fp32")

    return make


def late(queries: int, tokens: int, documents: int, length: int, d: int) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        offsets = torch.arange(queries + 1) * tokens, torch.arange(documents + 1) * length
        flat = rows(dtype, queries * tokens, d), rows(dtype, documents * length, d)
        return (*flat, *offsets, "fp32")

    return make


def topk(n: int, m: int, d: int, k: int, kind: str = "dot", own: bool = False) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        x = rows(dtype, n, d)
        y = x if own else rows(dtype, m, d)
        flags = (kind, k, kind != "sqeuclidean", "any", own, own, "fp32")
        return (x, y, *(None,) * 10, *flags, *(None,) * 4, 0.0)

    return make


def listed(n: int, m: int, d: int, k: int, kind: str) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        return (rows(dtype, n, d), rows(dtype, m, d), None, torch.randint(0, m, (n, k)), kind)

    return make


def scored_list(n: int, m: int, d: int, count: int, apart: bool) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        at = (torch.randint(size, (count,)) for size in (n, m))
        return (rows(dtype, n, d), rows(dtype, m, d), *at, apart)

    return make


def folded(
    n: int, m: int, d: int, rule: str, *params: float, each: int = 4, wide: int = 0, second: int = 0
) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        values = torch.ones(n, wide, dtype=torch.float64) if wide else None
        of_second = [rows(dtype, count, second).abs() if second else None for count in (n, m)]
        sides = (rows(dtype, n, d), rows(dtype, m, d), labels(n, each), labels(m, each))
        score = "dot" if rule in ("histogram", "tuplet") else "euclidean"
        return (*sides, None, None, values, rule, list(params), score, False, "fp32", *of_second)

    return make


def classes(
    n: int,
    c: int,
    d: int,
    rule: str,
    *params: float,
    centers: int = 1,
    slots: int = 1,
    sampled: int = 0,
    kept: int = 0,
) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        values = torch.zeros(1, n) if rule == "sphereface2" else None
        part = torch.arange(0, c, max(1, c // sampled)) if sampled else torch.arange(c)
        ids = part[torch.arange(n * slots).reshape(n, slots) % len(part)]
        rest = (rule, list(params), centers, 0.0, True, "fp32")
        weight = rows(dtype, c * centers, d)
        return (rows(dtype, n, d), weight, ids, part if sampled else None, values, *rest, kept)

    return make


def of_labels(n: int, c: int, d: int) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        ids = (torch.arange(n) % c)[:, None]
        return (rows(dtype, n, d), rows(dtype, c, d), ids, 1, 0.0, True)

    return make


def shared(n: int, d: int) -> Callable:
    def make(dtype: torch.dtype) -> tuple:
        valid = torch.ones(n, dtype=torch.bool)
        scale = torch.tensor(16.0, dtype=torch.float64)
        return (rows(dtype, n, d), labels(n).long(), valid, scale, 1.5)

    return make


def two_sided(
    n: int, c: int, d: int, kind: str, *params: float, dense: bool = False, unit: bool = False,
    near: bool = False,
) -> Callable:  # fmt: skip
    def make(dtype: torch.dtype) -> tuple:
        teacher = rows(dtype, n, c if dense else d), None if dense else rows(dtype, c, d)
        student = rows(dtype, n, d), rows(dtype, c, d)
        if near:
            teacher = tuple(t * (1 + 1e-3 * torch.rand_like(t)) for t in student)
        ids = torch.arange(n) % c
        rest = (unit, unit and not dense, kind, list(params), "fp32", 0)
        return (*student, *teacher, ids, None, None, None, None, *rest)

    return make


SPHERE = (8.0, 0.1, 3.0, 0.0)

CASES = {
    "statistics": Case("row_statistics", statistics(256, 20_000, 64)),
    "statistics-few-rows": Case("row_statistics", statistics(32, 20_000, 384)),
    "statistics-many-rows": Case("row_statistics", statistics(4_000, 1_000, 32)),
    "statistics-half": Case("row_statistics", statistics(256, 20_000, 64), "bfloat16"),
    "statistics-bend": Case("row_statistics", statistics(256, 20_000, 64, bend=True)),
    "statistics-sampled": Case("row_statistics", statistics(256, 20_000, 64, sampled=8_000)),
    "statistics-float64": Case("row_statistics", statistics(256, 9_000, 64), "float64"),
    "pairs": Case("pair_statistics", pairs(1_500, 1_200, 64)),
    "pairs-long": Case("pair_statistics", pairs(64, 20_000, 128)),
    "pairs-half": Case("pair_statistics", pairs(1_500, 1_200, 64), "bfloat16"),
    "pairs-triangle": Case("pair_statistics", pairs(1_500, 1_500, 64, triangle=True)),
    # on the CPU its forward says what the backward needs
    "pairs-apart": Case("pair_statistics", pairs(700, 600, 64, apart=True)),
    "pairs-apart-triangle": Case("pair_statistics", pairs(700, 700, 64, triangle=True, apart=True)),
    "pairs-kept": Case("pair_statistics", pairs(1_500, 1_200, 64, kept=900_000)),
    "pairs-kept-triangle": Case(
        "pair_statistics", pairs(1_500, 1_500, 64, triangle=True, kept=900_000)
    ),
    "pairs-kept-apart": Case("pair_statistics", pairs(700, 600, 64, apart=True, kept=500_000)),
    "attention-apart": Case("pair_attention", pairs(600, 700, 64, width=96, apart=True), less=9),
    "attention": Case("pair_attention", pairs(1_200, 1_500, 64, width=96), less=9),
    "attention-half": Case("pair_attention", pairs(1_200, 1_500, 64, width=96), "bfloat16"),
    "nested": Case("nested_statistics", nested(900, 1_100, [16, 32, 64])),
    "nested-plain": Case("nested_statistics", nested(900, 1_100, [64, 256], units=False)),
    "nested-many": Case("nested_statistics", nested(600, 500, list(range(4, 49, 4)))),
    "nested-half": Case("nested_statistics", nested(900, 1_100, [16, 256]), "bfloat16"),
    "dot": Case("distance_matrix", distances(900, 1_100, 64, "dot")),
    "dot-half": Case("distance_matrix", distances(900, 1_100, 256, "dot"), "bfloat16"),
    "euclidean": Case("distance_matrix", distances(1_500, 1_400, 64, "euclidean")),
    "euclidean-half": Case("distance_matrix", distances(1_500, 1_400, 64, "euclidean"), "float16"),
    "sqeuclidean-long": Case("distance_matrix", distances(200, 300, 4_000, "sqeuclidean")),
    "cityblock": Case("distance_matrix", distances(400, 500, 40, "cityblock")),
    "minkowski": Case("distance_matrix", distances(400, 500, 40, "minkowski")),
    "chebyshev": Case("distance_matrix", distances(400, 500, 40, "chebyshev")),
    "canberra": Case("distance_matrix", distances(400, 500, 40, "canberra")),
    "braycurtis": Case("distance_matrix", distances(400, 500, 40, "braycurtis")),
    "jensenshannon": Case("distance_matrix", distances(400, 500, 40, "jensenshannon")),
    "kl": Case("distance_matrix", distances(400, 500, 40, "kl")),
    "hamming": Case("distance_matrix", distances(400, 500, 40, "hamming")),
    "jaccard": Case("distance_matrix", distances(400, 500, 40, "jaccard")),
    "scaled": Case("distance_matrix", distances(400, 500, 40, "scaled")),
    "maxsim": Case("maxsim", late(8, 32, 200, 60, 64)),
    "maxsim-long": Case("maxsim", late(16, 32, 3, 6_000, 64)),
    "maxsim-half": Case("maxsim", late(8, 32, 200, 60, 64), "bfloat16"),
    "topk": Case("pair_topk", topk(800, 3_000, 64, 16)),
    "topk-self": Case("pair_topk", topk(1_500, 1_500, 64, 16, "cosine", own=True)),
    "topk-many": Case("pair_topk", topk(200, 3_000, 64, 300, "sqeuclidean")),
    "topk-half": Case("pair_topk", topk(800, 3_000, 64, 16), "bfloat16"),
    "listed": Case("listed_pairs", listed(1_500, 2_000, 64, 30, "cosine")),
    "pair-list": Case("listed_scores", scored_list(900, 1_500, 64, 40_000, True)),
    "pair-list-half": Case("listed_scores", scored_list(900, 1_500, 256, 9_000, False), "bfloat16"),
    "pair-list-few": Case("listed_scores", scored_list(900, 1_500, 64, 50, True)),
    "listed-half": Case("listed_pairs", listed(1_500, 2_000, 64, 30, "sqeuclidean"), "bfloat16"),
    "triplets": Case("row_losses", folded(900, 1_500, 64, "triplets", 0.2, 0, 0)),
    "triplets-sorted": Case("row_losses", folded(900, 1_500, 64, "triplets", 0.2, 2, 0, each=200)),
    "triplets-smooth": Case("row_losses", folded(900, 1_500, 64, "triplets", 0.2, 0, 1)),
    "chosen": Case("row_losses", folded(900, 1_500, 64, "chosen", 0, 2)),
    "nearest": Case("row_losses", folded(900, 1_500, 64, "nearest", 5)),
    "histogram": Case("row_losses", folded(900, 1_500, 64, "histogram", -1.0, 0.02, 101)),
    "hinges": Case("row_losses", folded(900, 1_500, 64, "hinges", 2, wide=3)),
    "hinges-half": Case("row_losses", folded(900, 1_500, 64, "hinges", 2, wide=3), "bfloat16"),
    "ranked-list": Case("row_losses", folded(900, 1_500, 64, "ranked_list", 1.0, 1.0, 0.8, 1.2)),
    "tuplet": Case("row_losses", folded(900, 1_500, 64, "tuplet", 0.1, 8.0)),
    "hardest": Case("row_losses", folded(900, 1_500, 64, "hardest", 0.5, wide=1)),
    "guided": Case("row_losses", folded(900, 1_500, 64, "guided", 0.1, 0.2, wide=1, second=48)),
    "ratio": Case("row_losses", folded(900, 1_500, 64, "ratio", wide=1, second=48)),
    "ratio-half": Case(
        "row_losses", folded(900, 1_500, 64, "ratio", wide=1, second=48), "bfloat16"
    ),
    "tempered": Case("row_losses", folded(900, 1_500, 64, "tempered", 50, 0.1, 2.0, second=48)),
    "weighted": Case("row_losses", folded(900, 1_500, 64, "weighted", wide=1, second=48)),
    "softmax": Case("class_rules", classes(256, 9_000, 64, "softmax", 8.0)),
    "softmax-half": Case("class_rules", classes(256, 9_000, 64, "softmax", 8.0), "bfloat16"),
    "sub-centres": Case("class_rules", classes(256, 3_000, 64, "softmax", 8.0, centers=3)),
    "sphereface2": Case("class_rules", classes(256, 9_000, 64, "sphereface2", *SPHERE)),
    "several-labels": Case("class_rules", classes(256, 9_000, 64, "summed_softmax", 8.0, slots=20)),
    "sub-centres-sampled": Case(
        "class_rules", classes(256, 9_000, 64, "sface", 80.0, 1.2, centers=3, sampled=3_000)
    ),
    "softmax-kept": Case("class_rules", classes(256, 9_000, 64, "softmax", 8.0, kept=4_000)),
    "class-targets": Case("class_targets", of_labels(9_000, 500, 64)),
    "divergence": Case(DIVERGENCE.name, two_sided(256, 9_000, 64, "forward")),
    "divergence-dense": Case(DIVERGENCE.name, two_sided(256, 9_000, 64, "reverse", dense=True)),
    "divergence-twice": Case(DIVERGENCE.name, two_sided(256, 9_000, 64, "jensen_shannon", 0.5)),
    "divergence-many-rows": Case(DIVERGENCE.name, two_sided(4_000, 1_000, 32, "power", 2.0)),
    "divergence-near": Case(
        DIVERGENCE.name, two_sided(256, 9_000, 64, "forward", unit=True, near=True)
    ),
    "divergence-near-few": Case(
        DIVERGENCE.name, two_sided(8, 9_000, 256, "forward", unit=True, near=True)
    ),
    "divergence-half": Case(
        DIVERGENCE.name, two_sided(64, 9_000, 256, "forward", unit=True), "bfloat16"
    ),
    "divergence-float64": Case(
        "divergence", two_sided(256, 9_000, 64, "bernoulli", 9.0), "float64"
    ),
    "shared": Case("shared_negatives", shared(1_600, 64)),
    "shared-few": Case("shared_negatives", shared(200, 64)),
}


def of_backward(case: Case, given: tuple, output: Any) -> tuple | None:
    """The backward op's arguments, everything differentiable asked for; None: it has none."""
    outputs = output if isinstance(output, (tuple, list)) else (output,)
    ones = [torch.ones_like(o) for o in outputs]
    if case.op == "row_statistics":
        lse, kept, weighted = outputs[0], outputs[-1], given[7]
        x_to_weights, settings = given[:6], given[6:10]
        grads = (*ones[:2], ones[2] if weighted else None)
        return (*grads, *x_to_weights, lse, kept, *settings, False, True, True, False)
    if case.op == "pair_statistics":
        triangle = given[PairInputs._fields.index("triangle")]
        needs = (True, not triangle, True, False, False)
        return (*(o[:2].contiguous() for o in ones[:2]), *outputs, *given[:-1], *needs)
    if case.op == "nested_statistics":
        asked = (True, True, True, *(given[3] is not None,) * 2)
        return (*(o[:, :2].contiguous() for o in ones), *outputs, *given, *asked)
    if case.op == "pair_attention":
        return (*ones, *outputs, *given, True, True, True, True, False, False)
    if case.op == "distance_matrix":
        needs = (True, True, given[2] is not None)
        return None if given[3] in FLAT else (*ones, *outputs, *given, *needs)
    if case.op == "maxsim":
        return (ones[0], outputs[1], *given[:4], True, True)
    if case.op in ("listed_pairs", "listed_scores"):
        return (*ones, *given, True, True)
    if case.op == "row_losses":
        choice = given[7] in ("chosen", "nearest")
        second = (given[-1] is not None,) * 2
        return None if choice else (*ones, *given, True, True, given[6] is not None, *second)
    if case.op == "class_rules":
        made = outputs[0], outputs[-1]
        return (*ones[:2], *made, *given[:-1], False, True, True, given[4] is not None)
    if case.op == "divergence":
        factored = given[3] is not None
        needs = (False, True, True, True, factored, False, False, False)
        saved = outputs[0], outputs[1], outputs[4], outputs[5]
        return (*ones[:5], *given[:-1], *saved, *needs)
    if case.op == "shared_negatives":
        return (ones[0], *given[:4], *outputs, True, True)
    return None


def backend_of(case: Case, name: str) -> str:
    """Ops that are the same code everywhere have one backend."""
    only = OPS[case.op].python_backends
    return only[0] if len(only) == 1 else name


CHILD = (
    COUNTER
    + """
from test_workspace import CASES, OPS, backend_of, of_backward

def measured(op, backend, direction, arguments):
    # threads, lazy imports and the buffers that MKL keeps are the process's, not the op's
    given = op.op(backend, direction)(*arguments)
    held = []
    def step():
        out = op.op(backend, direction)(*arguments)
        held.extend(out if isinstance(out, (tuple, list)) else (out,))
    peak = extra(step) - sum(t.nbytes for t in held)
    return given, (peak, op.workspace(backend, direction, arguments))

def run(name, backend):
    torch.manual_seed(0)
    case = CASES[name]
    op, backend = OPS[case.op], backend_of(case, backend)
    given = case.make(getattr(torch, case.dtype))
    output, said = measured(op, backend, "", given)
    told = {name: said}
    further = of_backward(case, given, output)
    if further is not None:
        told[f"{name} backward"] = measured(op, backend, "_backward", further)[1]
    return told

backend, names = json.loads(sys.argv[1])
print(json.dumps({k: v for name in names for k, v in run(name, backend).items()}))
"""
)


@functools.cache
def measured(backend: str) -> dict[str, tuple[int, int]]:
    """By case and direction: bytes beyond inputs and outputs, and what the op had said of them."""
    quiet = dict(OMP_WAIT_POLICY="passive", PYTHONPATH=search_path(Path(__file__).parent))
    return told_by_child(CHILD, [backend, list(CASES)], **quiet)


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", MEASURED)
def test_an_op_needs_no_more_than_it_says(name: str, case: str) -> None:
    require(name)
    found = {k: v for k, v in measured(name).items() if k.removesuffix(" backward") == case}
    assert found
    for direction, (extra, told) in found.items():
        assert extra <= told + SLACK, direction
        # what says anything would hold too
        assert told <= CASES[case].less * extra + 2 * MIB, direction


def test_every_op_is_measured() -> None:
    assert {case.op for case in CASES.values()} == set(OPS)


@pytest.mark.parametrize("case", CASES)
def test_shapes_alone_are_read(case: str) -> None:
    c = CASES[case]
    op = OPS[c.op]
    given = c.make(getattr(torch, c.dtype))

    def shapes(arguments: tuple) -> tuple:
        return tuple(a.to("meta") if isinstance(a, Tensor) else a for a in arguments)

    meta = shapes(given)
    output = op.fake_forward(*meta)
    further = of_backward(c, meta, output)
    for name in op.python_backends if len(op.python_backends) == 1 else backends.NAMES[1:]:
        if name == "cpu" and backends.unavailable(name):
            continue
        told = op.workspace(name, "", given)
        assert op.workspace(name, "", meta) == told >= 0
        if further is not None:
            assert op.workspace(name, "_backward", further) >= 0
