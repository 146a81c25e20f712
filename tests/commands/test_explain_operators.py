"""What `explain` says of PyTorch's own operators: what each allocates within itself, counted."""

from __future__ import annotations

import pytest
from conftest import require
from counted import COUNTER, told_by_child

pytestmark = [pytest.mark.slow, pytest.mark.processes]

# matrices of 100 x 200 in float32 are 80 KB: less than half of one is left to small change
SMALL = 39_000

CHILD = (
    COUNTER
    + """
import importlib
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from fused_losses import functional
from fused_losses.base.examples import TABLE, ExampleInputs
from fused_losses.verify.table import outcome

explain = importlib.import_module("fused_losses.explain")
class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = counter.counted_live()
        counter.counted_reset()
        out = func(*args, **(kwargs or {}))
        peak = counter.counted_peak()
        inside = peak - max(before, counter.counted_live())
        if func.namespace == "aten":
            made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
            shapes = [(*t.shape, str(t.dtype)) for t in tree_leaves(args) if hasattr(t, "shape")]
            told = explain._within(func, args, made)
            most = max(seen.get(str(func), (0, 0, "")), (inside - told, inside, str(shapes)))
            seen[str(func)] = most
        return out

backend, dtype, small = json.loads(sys.argv[1])
found = {}
dtype = getattr(torch, dtype)
torch.set_num_threads(1)
for example in TABLE.values():
    if not example.takes("backend"):
        continue
    for _ in range(2):  # what is set up once is not the operator's
        seen = {}
        inputs = ExampleInputs(100, 100 if example.alone else 200, 24, dtype)
        with Operators():
            outcome(example, inputs, backend)
        if all(most[0] <= small for most in seen.values()):
            break
    found |= {op: max(most, found.get(op, most)) for op, most in seen.items()}
print(json.dumps(found))
"""
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["reference", "bounded"])
def test_what_operators_allocate_within_themselves_is_foreseen(name: str, dtype: str) -> None:
    require(name)
    found = told_by_child(CHILD, [name, dtype, SMALL])
    assert len(found) > 20
    assert {op: most for op, most in found.items() if most[0] > SMALL} == {}
