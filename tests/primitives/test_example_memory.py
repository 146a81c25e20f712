"""The memory of every example of the table, as `explain` tells it: a new loss is among them.

A child counts its allocations (counted.py), forward and backward; what the sizes of one function
promise, and what no example says, is in test_memory.py and its like.
"""

from __future__ import annotations

import functools

import pytest
from conftest import require
from counted import COUNTER, MIB, told_by_child

from fused_losses.base.examples import TABLE

pytestmark = [pytest.mark.slow, pytest.mark.processes, pytest.mark.xdist_group("example_memory")]

# what is left untold of an operator's inside (test_explain_operators.py): one runs at the peak
WITHIN = 39_000
# what is told is for rows all of whose pairs are near; here few are
OF_THE_WORST_DATA = ("pairwise_distance, mahalanobis",)
NAMES = [name for name, example in TABLE.items() if example.takes("backend")]

CHILD = (
    COUNTER
    + """
import warnings
from torch.utils._pytree import tree_leaves, tree_map_only
from fused_losses.base import plans
from fused_losses.base.examples import TABLE, ExampleInputs

N, M, D = 384, 900, 64

def run(name):
    example, inputs = TABLE[name], ExampleInputs(N, M, D)
    vars(inputs).update({k: getattr(inputs, k).requires_grad_() for k in example.leaves})
    leaves = {}

    def leaf(given):
        # what an example makes of a field is an argument, too, and no part of the call
        if id(given) not in leaves:
            leaves[id(given)] = (given, given.detach().requires_grad_(given.requires_grad))
        return leaves[id(given)][1]

    args, options = tree_map_only(torch.Tensor, leaf, example.arguments(inputs))
    options["backend"] = "bounded" if backend in example.not_on else backend
    leaves = [new for _, new in leaves.values()]
    held, ours = [], plans.is_handed_out(example.function)

    def ends(result):
        return [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]

    slopes = []

    def step():
        found = ends(example.function(*args, **options))
        held.extend(t.detach() for t in found if ours)
        moving = [t for t in found if t.requires_grad]
        # made in a first run, with the threads and buffers of the process: they are the caller's
        slopes.extend(map(torch.rand_like, moving[len(slopes):]))
        if moving:
            torch.autograd.backward(moving, slopes)

    step()
    held.clear()
    for given in leaves:
        given.grad = None
    peak = extra(step) - sum(t.grad.nbytes for t in leaves if t.grad is not None)
    # lists are made of parts, which are there until they are joined
    peak -= sum(t.nbytes for t in held) * (2 if name.startswith("mine_") else 1)
    for given in leaves:
        given.grad = None
    return peak, fused_losses.explain(example.function, *args, **options).peak_extra_bytes

backend, names = json.loads(sys.argv[1])
warnings.simplefilter("ignore")
print(json.dumps({name: run(name) for name in names}))
"""
)


@functools.cache
def measured(backend: str) -> dict[str, tuple[int, int]]:
    """By example: bytes beyond inputs and gradients at the peak, and what `explain` had said."""
    return told_by_child(CHILD, [backend, NAMES])


@pytest.mark.parametrize("name", NAMES)
def test_peak_is_within_what_explain_says(name: str) -> None:
    extra, told = measured(require("cpu"))[name]
    assert extra <= told + WITHIN
    # a plan that says anything would hold too; calls of half a MiB are mostly fixed costs
    assert told <= (6 if name in OF_THE_WORST_DATA else 4) * extra + 2 * MIB
