"""Faults in dispatch that none of its tests notices, and why: kind, a part of the line, reason."""

from __future__ import annotations

from mutants import Survivor

SURVIVORS: list[Survivor] = [
    ("order", "ON_GPU = (", "of those that fit the widest counts"),
    ("number", "def order(operation: str, device: str, width: int = 0", "no order begins at 1"),
    ("number", "width: int = 0,", "no order begins at 1"),
    ("order", 'if precision in ("bf16", "mixed"):', "either is one of them"),
    ("order", "DTYPES = (torch.float32,", "any is one of them"),
    ("order", "DTYPES = (torch.float32,", "any is one of them"),
    ("order", "if dtype not in (*DTYPES, torch.bool, torch.int8):", "any is one of them"),
    (
        "shorter",
        "get_device_capability(device) < (8, 0):",
        "(8,) is below (8, 0), and (7, 5) below it",
    ),
    ("shorter", "OLDEST = (8, 0)", "(8,) is below (8, 0), and (7, 5) below it"),
    ("order", "except (OSError, AttributeError) as error:", "either is caught"),
    ("order", 'if name not in ("auto", *POWERS):', "any is one of them"),
    ("order", 'if inputs.k > MOST and name in ("triton", "cuda"):', "either is one of them"),
    ("order", 'requested(backend) in ("auto", "cpu") and not refused', "either is one of them"),
    ("order", "for backend in (*in_python, *compiled):", "each is registered"),
    ("order", "for direction, schema, run in (", "each is registered"),
    (
        "dropped",
        "getattr(torch.ops.fused_losses, f",
        "no row moves: the tests of row updates see it",
    ),
]
