"""A pytest plugin for Triton's interpreter: a launch patches the language once for each module.

Triton does so at every call of a function within a kernel, which is half of what it then spends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter

patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
patched: set[int] = set()  # the modules of this launch


def patch_once(function: Callable[..., Any]) -> Any:
    module = id(function.__globals__)
    if module in patched:
        return None
    patched.add(module)
    return patch(function)


def launch_anew(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    patched.clear()
    launch(self, *args, **kwargs)


interpreter._patch_lang = patch_once
interpreter.GridExecutor.__call__ = launch_anew
