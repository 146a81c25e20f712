"""Drawn calls of the Triton kernels, in Triton's interpreter, which TRITON_INTERPRET=1 starts.

It takes a third of a second a call: few draws, of small shapes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import planted
import torch
from draws import CASES, Call, Draw, Verdict, calls, judge, unjudged

HERE = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
if HERE:
    import triton_patched_once as triton_patched_once

LARGEST = 17
# made of differences: Triton has distances that are made of products
REFUSED = [
    name
    for name in CASES
    if name.startswith("pairwise_")
    and name.removeprefix("pairwise_").removeprefix("weighted_")
    in "canberra kl cityblock braycurtis chebyshev hamming jaccard jensenshannon scaled".split()
]
REFUSED += ["pairwise_minkowski", "pairwise_minkowski_below_1", "similarity_laplacian"]
REFUSED += ["pairwise_topk_minkowski", "pairwise_distance_base"]
REFUSED += ["gaussian_scores_variance", "gaussian_cross_entropy_variance"]
NAMES = [name for name in CASES if name not in REFUSED]
# of each function one
ONE_EACH = list({CASES[name].function: name for name in reversed(NAMES)}.values())


def small(draw: Draw) -> Draw:
    """Its kernels take no float64."""
    n, m, d = (min(side, LARGEST) for side in draw.shape)
    dtype = torch.float32 if draw.dtype == torch.float64 else draw.dtype
    return replace(draw, shape=(n, m, d), dtype=dtype)


def judged(name: str, draw: Draw) -> Iterator[Verdict]:
    """Of the calls that `draws` would make, one: plain, in another layout, or narrower."""
    draw = small(draw)
    every = calls(CASES[name], draw, ("triton",))
    if every and not unjudged(CASES[name], draw):
        yield from judge(CASES[name], draw, [random.Random(draw.seed).choice(every)])


def of_planted(name: str, draw: Draw) -> Iterator[tuple[Call, list[str]]]:
    for backend, faults in planted.judge(CASES[name], small(draw), ("triton",)):
        yield Call(backend), faults
