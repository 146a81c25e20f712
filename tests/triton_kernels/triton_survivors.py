"""Faults in the Triton kernels that no case notices, and why: kind, line, reason."""

from __future__ import annotations

from mutants import Survivor

SURVIVORS: dict[str, list[Survivor]] = {}
