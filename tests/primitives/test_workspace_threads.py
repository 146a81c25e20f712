"""What the cpu backend tells of its memory against every allocation, at 1, 2 and 16 threads.

As test_memory.py, of the primitives alone: `workspace_bytes` of a form beside the peak of a call.
"""

from __future__ import annotations

import functools

import pytest
from conftest import require
from counted import COUNTER, MIB, told_by_child

# both tests ask the same children
pytestmark = [
    pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("workspace_threads")
]  # fmt: skip

THREADS = (1, 2, 16)
DTYPES = ("float32", "bfloat16", "float64")
PAIRS = ("pairs", "pairs-columns", "triangle", "attention")
DISTANCES = ("dot", "euclidean", "cityblock", "canberra", "braycurtis", "hamming")
TOPK = ("topk", "topk-self", "topk-codes", "topk-principal")
CASES = [
    *((what, dtype) for what in (*PAIRS, "maxsim", *DISTANCES) for dtype in DTYPES),
    *((what, dtype) for what in TOPK for dtype in ("float32", "bfloat16")),
    ("hamming", "bool"),
    *(("class-rules", dtype) for dtype in DTYPES),
]

CHILD = (
    COUNTER
    + """
from fused_losses import functional as f
from fused_losses.primitives.class_rules import cpu as class_rules
from fused_losses.primitives.class_rules.inputs import ClassInputs, ClassNeeds
from fused_losses.primitives.class_rules.op import class_statistics
from fused_losses.primitives.distances import cpu as distances
from fused_losses.primitives.maxsim import cpu as maxsims
from fused_losses.primitives.maxsim.op import maxsim
from fused_losses.primitives.pairs import cpu as pairs
from fused_losses.primitives.topk import cpu as topk

N, M, D, K = 700, 1500, 96, 24
DISTANCES = ("dot", "euclidean", "cityblock", "canberra", "braycurtis", "hamming")

def made(what, dtype):
    # a call, which returns what it hands out, and what is told of it
    torch.manual_seed(0)
    x, y = ((torch.randn(r, D) / 8).to(dtype) for r in (N, M))
    if dtype.is_floating_point and not what.startswith("topk"):
        x.requires_grad_(what != "pairs-columns"), y.requires_grad_()
    if what in ("pairs", "pairs-columns"):
        call = lambda: f.logsumexp_similarity(x, y, cols=True, backend="cpu")
        return (x, y), call, pairs.workspace_bytes(N, M, D, dtype)
    if what == "triangle":
        call = lambda: f.logsumexp_similarity(y, None, backend="cpu")
        return (y,), call, pairs.workspace_bytes(M, M, D, dtype)
    if what == "attention":
        values = y.detach().clone().requires_grad_()
        call = lambda: f.similarity_attention(x, y, values, backend="cpu")
        told = pairs.workspace_bytes(N, M, D, dtype, width=D)
        # and values about a center, and what comes back of them
        return (x, y, values), call, told + (N + M) * D * dtype.itemsize
    if what == "maxsim":
        tokens = (x.view(-1, 10, D), y.view(-1, 15, D))
        call = lambda: maxsim(*tokens, backend="cpu")
        told = maxsims.workspace_bytes(N, M, D, dtype)
        return (x, y), call, told + 4 * N * (M // 15)  # and the index
    if what in DISTANCES:
        kind, op = what, f.pairwise_similarity if what == "dot" else f.pairwise_distance
        gradient = what != "hamming" and dtype != torch.bool
        call = lambda: op(x, y, kind, backend="cpu")
        told = distances.workspace_bytes(N, M, D, dtype, kind, gradient=gradient)
        # and the rows times a power of two
        told += (kind in ("canberra", "braycurtis")) * (N + M) * D * dtype.itemsize
        return (x, y), call, told
    if what == "class-rules":
        labels = torch.arange(4 * N).view(N, 4) % (M // 3)
        p = ClassInputs(x, y, labels, rule="sface", params=[80.0, 1.2], centers=3)
        call = lambda: class_statistics(p, backend="cpu")
        told = max(class_rules.workspace(p, n) for n in (None, ClassNeeds(False, *[True] * 3)))
        return (x, y), call, told
    own = what == "topk-self"
    other = None if own else fused_losses.quantize_rows(y) if what == "topk-codes" else y
    given, heads = dict(skip_self=own, backend="cpu"), (0, 0, 0)
    if what == "topk-principal":
        given["screen"] = fused_losses.principal_rows(y, coordinates=(16, D))
        heads = (16, 3, D)
    call = lambda: f.pairwise_topk(y if own else x, other, K, "dot", **given)
    n = M if own else N
    return (x, y), call, topk.workspace_bytes(n, D, K, dtype, own, what == "topk-codes", heads)

def run(what, dtype):
    leaves, call, told = made(what, getattr(torch, dtype))
    held = []
    def step():
        result = call()
        held.extend(result if isinstance(result, tuple) else (result,))
        if held[0].requires_grad:
            held[0].backward(torch.ones(()).to(held[0].dtype).expand_as(held[0]))
    peak = extra(step) - sum(t.nbytes for t in held if torch.is_tensor(t))
    return peak - sum(t.grad.nbytes for t in leaves if t.grad is not None), told

threads, cases = json.loads(sys.argv[1])
torch.set_num_threads(threads)
for case in cases:
    run(*case)  # threads, lazy imports and the buffers that MKL keeps are the process's
print(json.dumps({"-".join(case): run(*case) for case in cases}))
"""
)


@functools.cache
def measured(threads: int) -> dict[str, tuple[int, int]]:
    """By case: bytes beyond inputs and what is handed out at the peak, and what was told."""
    return told_by_child(CHILD, [threads, CASES])


@pytest.mark.parametrize("case", CASES, ids="-".join)
@pytest.mark.parametrize("threads", THREADS)
def test_a_call_takes_what_is_told(threads: int, case: tuple[str, str]) -> None:
    require("cpu")
    counted, told = measured(threads)["-".join(case)]
    # Python's own objects, and the vectors of a row or of a column
    assert counted <= told + MIB // 4
    assert told <= 6 * counted + 2 * MIB  # a plan that says anything would hold too


@pytest.mark.parametrize("case", [("pairs", "float32"), ("cityblock", "float32")], ids="-".join)
def test_threads_are_counted(case: tuple[str, str]) -> None:
    require("cpu")
    counted, told = zip(*(measured(t)["-".join(case)] for t in (1, 16)), strict=True)
    assert counted[1] > 1.5 * counted[0]
    assert told[1] > told[0]
