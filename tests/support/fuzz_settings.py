"""How the drawn tests draw: the same each time, and longer where they are asked to."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings

# calls of a function, over its variants; FUSED_LOSSES_FUZZ=1000 looks longer
EACH = int(os.environ.get("FUSED_LOSSES_FUZZ", "50"))


def drawn(examples: int) -> settings:
    """So many draws, times what was asked for."""
    return settings(
        derandomize=True,
        max_examples=max(3, examples * EACH // 50),
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
