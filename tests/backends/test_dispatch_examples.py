"""What test_dispatch.py says of one function, said of every example."""

from __future__ import annotations

import pytest

import fused_losses
from fused_losses import backends
from fused_losses.base.examples import TABLE, Example, ExampleInputs

EXAMPLES = {name: example for name, example in TABLE.items() if example.takes("backend")}
# the first example of each
FUNCTIONS = {example.function: example for example in reversed(EXAMPLES.values())}


def ran(example: Example, **options: object) -> set[str]:
    """Who was chosen, of all the ops that the call is made of."""
    with backends.watched() as choices:
        example(ExampleInputs(12, 19, 8), **options)
    return {name for name, _ in choices}


@pytest.mark.parametrize("name", EXAMPLES)
def test_one_backend_runs_all_of_a_call(name: str) -> None:
    """That of the argument, else that of `use_backend`."""
    for mine, others in (("reference", "bounded"), ("bounded", "reference")):
        with fused_losses.use_backend(others):
            assert ran(EXAMPLES[name], backend=mine) == {mine}
        with fused_losses.use_backend(mine):
            assert ran(EXAMPLES[name]) == {mine}


@pytest.mark.parametrize("example", FUNCTIONS.values(), ids=lambda e: e.name)
def test_a_name_that_is_none_is_refused(example: Example) -> None:
    words = f"^backend: expected auto, {', '.join(backends.NAMES)}, got 'gpu'"
    with pytest.raises(ValueError, match=words):
        ran(example, backend="gpu")


@pytest.mark.parametrize("example", FUNCTIONS.values(), ids=lambda e: e.name)
def test_a_backend_that_cannot_run_is_never_replaced(
    example: Example, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = backends.unavailable
    why = "the C++ extension is not built (a test says so)"
    monkeypatch.setattr(backends, "unavailable", lambda n: why if n == "cpu" else known(n))
    with pytest.raises(RuntimeError, match=r"backend='cpu' cannot run .*is not built \(a test"):
        ran(example, backend="cpu")
    told = r"available\(\) lists what can run here"
    with fused_losses.use_backend("cpu"), pytest.raises(RuntimeError, match=told):
        ran(example)
