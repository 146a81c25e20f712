"""The table of the catalogue: a row a module, gathered from the files `catalogue_<idea>_cases.py`.

A row says how the module is built, what it is called with and what it must give: a literal formula
in plain PyTorch, in the dtype of its inputs, that imports nothing of the package.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Call(NamedTuple):
    """What a module is called with; tensors of floating point ask for a gradient."""

    arguments: tuple[Any, ...]
    options: Mapping[str, Any] = MappingProxyType({})


def labelled(n: int, d: int, labels: Tensor, generator: torch.Generator) -> Call:
    """A batch [n, d] float64 with labels [n]."""
    return Call((torch.randn(n, d, generator=generator, dtype=torch.float64), labels))


class Case(NamedTuple):
    """One module.

    formula(module, *arguments, **options): of the module it reads parameters and buffers alone.
    call(n, d, labels, generator): what it is called with, n rows whose labels are given.
    """

    build: Callable[[int], nn.Module]  # of d
    formula: Callable[..., Tensor]
    call: Callable[[int, int, Tensor, torch.Generator], Call] = labelled
    ordered: bool = False  # whether the order of rows tells something: no permutation is asked
    float64: float = 1e-9  # how closely it is held in float64
    gradcheck: bool = True  # False: weights that are not differentiated; the formula detaches them
    compiles: bool = True
    explains: bool = True  # False: what it does depends on the values of a tensor
    refuses: tuple[str, ...] = ()  # of DEGENERATE: refused with a sentence
    wide: int | None = None  # the memory test's number of rows, None: 1024


def _found() -> dict[str, Case]:
    here = Path(__file__).parent
    names = sorted(m.name for m in pkgutil.iter_modules([str(here)]))
    rows: dict[str, Case] = {}
    for name in names:
        if name.startswith("catalogue_") and name.endswith("_cases"):
            found = importlib.import_module(name).CASES
            twice = rows.keys() & found.keys()
            assert not twice, f"two rows a name: {twice}"
            rows |= found
    return rows


CASES = _found()

# labels of six rows: what a formula must take, or the module refuse
DEGENERATE = {
    "one row": [0],
    "one class": [0] * 6,
    "all distinct": list(range(6)),
    "no positive but of one row": [0, 0, 1, 2, 3, 4],
}


def drawn(name: str, n: int, d: int, labels: Tensor | None = None, seed: int = 0) -> Call:
    """The call of a row: n rows of d coordinates; labels None: about four rows a class."""
    generator = torch.Generator().manual_seed(seed)
    if labels is None:
        labels = torch.randint(max(2, n // 4), (n,), generator=generator)
    return CASES[name].call(n, d, labels, generator)


def built(name: str, d: int, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    """The module of a row, from seed 0."""
    torch.manual_seed(0)
    module = CASES[name].build(d)
    for option, value in options.items():
        setattr(module, option, value)
    return module.to(dtype)


def leaves(module: nn.Module, call: Call, dtype: torch.dtype) -> tuple[Call, dict[str, Tensor]]:
    """The call with fresh leaves of a dtype, and all that has a gradient, by its name."""
    held: dict[str, Tensor] = {}

    def leaf(name: str, given: Any) -> Any:
        if not (isinstance(given, Tensor) and given.is_floating_point()):
            return given
        held[name] = given.detach().to(dtype).requires_grad_()
        return held[name]

    arguments = tuple(leaf(f"argument {i}", a) for i, a in enumerate(call.arguments))
    options = {name: leaf(name, value) for name, value in call.options.items()}
    held |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    return Call(arguments, options), held


def answered(
    function: Callable[..., Tensor], call: Call, held: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients of a call; what a loss does not know has the gradient 0.

    What it draws, it draws from seed 0.
    """
    torch.manual_seed(0)
    loss = function(*call.arguments, **call.options)
    found = torch.autograd.grad(loss, list(held.values()), allow_unused=True)
    given = zip(held.items(), found, strict=True)
    return loss.detach(), {k: torch.zeros_like(v) if g is None else g for (k, v), g in given}
