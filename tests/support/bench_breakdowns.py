"""What every breakdown promises."""

from __future__ import annotations

from typing import Any

import pytest


def shares(found: dict[str, Any]) -> dict[str, float]:
    """By part; they make the whole, and each says how it was got."""
    assert sum(part["share"] for part in found["parts"]) == pytest.approx(1)
    assert all(part["share"] >= 0 and part["how"] for part in found["parts"])
    return {part["name"]: part["share"] for part in found["parts"]}
