"""Host code of the GPU backends on tensors without values: a mode that hears of launches.

A dispatch mode, and not a context of Python's, because autograd's threads for devices have it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from fused_losses.base.compiled import seen

# a Triton launch: kernel, arguments, constants, options
Heard = Callable[[Any, tuple, dict[str, Any], dict[str, Any]], None]


def heard() -> Heard | None:
    """The `hear_launch` of the innermost mode that has one, or None: launches are made."""
    if not seen():
        return None
    modes = reversed(_get_current_dispatch_mode_stack())
    hearing = (getattr(mode, "hear_launch", None) for mode in modes)
    return next((hear for hear in hearing if hear is not None), None)


def launchable() -> bool:
    """Whether a kernel may stand for PyTorch's operators: no mode looks at these alone."""
    if not seen():
        return True
    modes = _get_current_dispatch_mode_stack()
    return any(getattr(mode, "follows_launches", False) for mode in modes)
