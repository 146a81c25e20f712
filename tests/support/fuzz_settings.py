"""How the drawn tests draw: the same each time, and longer where they are asked to."""

from __future__ import annotations

import os
import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

from draws import CASES, Draw, any_draw
from hypothesis import HealthCheck, Phase, settings

# calls of a function, over its variants; FUSED_LOSSES_FUZZ=1000 looks longer
EACH = int(os.environ.get("FUSED_LOSSES_FUZZ", "50"))
VARIANTS = Counter(case.function for case in CASES.values())
TRIES = 20  # for each draw that is judged


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


def of_function(name: str, draws: int) -> int:
    """How many of a function's draws are this variant's, at least one."""
    return -(-draws // VARIANTS[CASES[name].function])


def draws_of(
    name: str, draws: int, judged: Callable[[Draw], bool] = lambda draw: True
) -> Iterator[Draw]:
    """Draws from a seed that is the name's, as the recorded run has them; those that are judged."""
    choice = random.Random(zlib.crc32(name.encode()))
    wanted = max(1, draws * EACH // 50)
    tried = (any_draw(choice) for _ in range(TRIES * wanted))
    return islice(filter(judged, tried), wanted)
