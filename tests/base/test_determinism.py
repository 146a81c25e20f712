"""The same bits again, and on any number of threads, OpenMP's or ours: values and gradients.

FUSED_LOSSES_RUNS=all asks every example, else one a function.
"""

from __future__ import annotations

import os
import warnings

import pytest
import torch
from calls import Call, first_of_each, runs_on, same
from conftest import require

from fused_losses.base import compiled
from fused_losses.base.examples import TABLE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("determinism")]

# several blocks of rows and of columns, neither a multiple of a tile
SHAPE = (301, 1303, 40)
THREADS = (1, 2, 7)
ALL = [name for name in TABLE if runs_on(name, "cpu")]
FIRST = first_of_each(ALL)
NAMES = ALL if os.environ.get("FUSED_LOSSES_RUNS") == "all" else FIRST
CLASSES = "each thread owns a run of classes, whose sums are merged"
PRODUCTS = "PyTorch's own products and sums are split by the number of threads"
# whose bits another number of threads changes, and why: their docstrings say so
BY_THREADS = {
    "GCE": CLASSES,
    "adaptive_margin_softmax": CLASSES,
    "distillation": CLASSES,
    "linear_cross_entropy": CLASSES,
    "margin_softmax": CLASSES,
    "nested_info_nce": PRODUCTS,
    "nested_margin_softmax": PRODUCTS,
    "pnp, ref": PRODUCTS,
    "shared_negatives": PRODUCTS,
    "smooth_ap": PRODUCTS,
    "softmax_outputs": CLASSES,
    "trilinear_attention": PRODUCTS,
    "unpg_margin_softmax": CLASSES,
}
FUNCTIONS = {TABLE[name].function for name in BY_THREADS}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_on_any_number_of_threads(name: str) -> None:
    require("cpu")
    before, found = torch.get_num_threads(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for threads in (*THREADS, 1):
                torch.set_num_threads(threads)
                found.append(Call(name, "cpu", SHAPE).bits())
            torch.set_num_threads(THREADS[-1])
            compiled.extension().own_threads(600)
            own = Call(name, "cpu", SHAPE).bits()
        finally:
            torch.set_num_threads(before)
            compiled.extension().own_threads(0)
    assert same(found[0], found[-1]), "another run"
    assert same(found[-2], own), "threads that may not come"
    alike = all(same(found[0], bits) for bits in found[1:-1])
    # PyTorch's products split so on some CPUs and not on others
    ours = BY_THREADS.get(name) != PRODUCTS
    if ours and (name in FIRST or TABLE[name].function not in FUNCTIONS):
        assert alike == (name not in BY_THREADS)
