"""Lazy row optimisers touch the rows that take part, and make nothing of the table's size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import row_optimizer_cases as cases
import torch
from counted import COUNTER, MIB, told_by_child
from row_optimizer_cases import (
    FP32,
    RULES,
    rules,
    take_step,
)
from torch import Tensor

from fused_losses.centers.optimizers import make_row_optimizer
from fused_losses.primitives.row_update import bounded

backend, _small_blocks = cases.backend, cases._small_blocks  # fixtures


def resident(path: Path) -> int:
    """Bytes of a mapped file that this process has touched."""
    found, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            found = line.endswith(str(path))
        elif found and line.startswith("Rss:"):
            total += int(line.split()[1]) << 10
    return total


@rules
def test_mapped_rows_that_take_no_part_are_not_touched(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounded, "BLOCK_BYTES", 1 << 20)
    count, width = 4096, 1024

    def mapped(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = shape[0] * shape[1]
        file = str(tmp_path / name)
        return torch.from_file(file, shared=True, size=size, dtype=dtype).view(shape)

    weight = mapped("weight", (count, width), FP32)
    ours = make_row_optimizer(rule, weight, allocate=mapped, **RULES[rule])
    rows = torch.tensor([5, 900, 4000])
    for _ in range(3):
        take_step(ours, rows, torch.ones(3, width), {})
    ours.catch_up(torch.tensor([7]))
    assert weight[rows].count_nonzero() == rows.numel() * width
    for name in ("weight", *ours.states):
        assert 0 < resident(tmp_path / name) < count * width * 4 // 8


CHILD = (
    COUNTER
    + """
from fused_losses.primitives.row_update import bounded
from fused_losses.centers.optimizers import make_row_optimizer
bounded.BLOCK_BYTES = 1 << 17

def run(rule, options, count):
    weight = torch.randn(count, 64)
    ours = make_row_optimizer(rule, weight, weight_decay=0.1, state_dtype=torch.bfloat16, **options)
    rows, grad = torch.arange(1000), torch.randn(1000, 64)
    def step():
        for shift in (0, count // 2):
            ours.catch_up(rows + shift)
            ours.begin({})
            ours.update(rows + shift, grad)
            ours.end()
        ours.settle(block_rows=count // 8)
    return extra(step), weight.nbytes

rules = {"sgd": dict(momentum=0.9), "adamw": {}, "adagrad": {}}
with fused_losses.use_backend(json.loads(sys.argv[1])):
    for rule, options in rules.items():
        run(rule, options, 3000)
    print(json.dumps({rule: run(rule, options, 60_000) for rule, options in rules.items()}))
"""
)


@pytest.mark.processes
def test_no_memory_of_the_tables_size(backend: str) -> None:
    """Neither in a step nor to settle; the reference, whose blocks are the caller's, is control."""
    for rule, (extra, table) in told_by_child(CHILD, backend).items():
        bound = 3 * MIB
        assert table > 4 * bound, rule
        assert (extra < bound) == (backend != "reference"), rule
