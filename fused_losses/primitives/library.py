"""The library in which torch has our ops, and how they are found by names before they are there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch


class OpLibrary(torch.library.Library):
    """Ops are defined by modules that may not have been imported when a name is asked for."""

    def __init__(self) -> None:
        super().__init__("fused_losses", "FRAGMENT")
        self._defining = threading.local()

    def define(self, schema: str, *options: Any, **further: Any) -> Any:
        # torch looks whether there is such a name already
        self._defining.now = True
        try:
            return super().define(schema, *options, **further)
        finally:
            self._defining.now = False

    def late(self, load: Callable[[], object]) -> None:
        """`torch.ops.fused_losses.<name>` of no op of today: load(), which defines all, and again.

        Exported and cached graphs know ops by names, and so need `import fused_losses` alone.
        """
        namespace, defining = torch.ops.fused_losses, self._defining
        plain = type(namespace)

        class LateNamespace(plain):
            __module__ = plain.__module__  # from which an op has its own

            def __getattr__(self, name: str) -> Any:
                try:
                    return super().__getattr__(name)
                except AttributeError:
                    if name.startswith("__") or getattr(defining, "now", False):
                        raise
                load()
                namespace.__class__ = plain
                return getattr(namespace, name)

        namespace.__class__ = LateNamespace


LIBRARY = OpLibrary()
