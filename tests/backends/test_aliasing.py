"""No op gives back what it was given, or one tensor twice: compiled code would write over both."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.base.examples import TABLE, ExampleInputs
from fused_losses.verify.table import outcome


class Outputs(TorchDispatchMode):
    """Names the ops of ours whose outputs share memory with an argument or with each other."""

    def __init__(self) -> None:
        super().__init__()
        self.shared: set[str] = set()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "fused_losses" and not func._schema.is_mutable:
            self.seen.add(str(func))
            results = out if isinstance(out, tuple) else (out,)
            if torch._C._any_output_is_alias_to_input_or_output(args, kwargs or {}, results):
                self.shared.add(str(func))
        return out


def test_outputs_share_no_memory(streamed: str) -> None:
    with Outputs() as outputs:
        for example in TABLE.values():
            if example.takes("backend") and streamed not in example.not_on:
                for size in (6, 9):
                    outcome(example, ExampleInputs(size, 9, 8), streamed)
    assert len(outputs.seen) > 10
    assert outputs.shared == set()
