"""Every row of the table of functions over pairs (`pair_cases`) on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from conftest import CUDA
from pair_cases import (
    BACKENDS,
    BY_NAME,
    EXACT,
    FLOORS,
    LOSSES,
    SIMILARITIES,
    SMALL,
    Case,
    as_function,
    check_budget,
    check_formula,
    require_pairs,
    small_blocks,
)

# weights, choices or plans that the papers hold fixed: no derivative to compare with differences
DETACHED = ("circle", *(f"sinkhorn_{each}" for each in ("cosine", "dot", "sqeuclidean", "unbal")))
TWICE = (
    "info_nce",
    "info_nce_learned_temperature",
    "info_nce_labels_symmetric",
    "info_nce_hardness_banks",
    "info_nce_ids",
    "nested_info_nce_learned_temperature",
    "supervised_contrastive_out",
    "sigmoid_contrastive",
    "logsumexp",
    "logsumexp_rbf",
    "logsumexp_both",
    "logsumexp_zero",
    "attention",
    "attention_cosine_same",
    "attention_rbf_different",
)
cases = partial(
    pytest.mark.parametrize, "case", [*LOSSES, *SIMILARITIES], ids=lambda case: case.name
)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with small_blocks(monkeypatch):
        yield


# each on every backend: the formula is asked once


@cases()
@pytest.mark.parametrize("shape", SMALL)
def test_is_its_formula(case: Case, shape: str) -> None:
    check_formula(case, shape, map(require_pairs, EXACT))


@cases()
def test_is_its_formula_over_many_tiles(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    check_formula(case, "tiles", map(require_pairs, EXACT[1:]))


@cases()
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_errs_no_more_than_eager(case: Case, dtype: torch.dtype) -> None:
    check_budget(case, dtype, map(require_pairs, BACKENDS))


@cases()
@pytest.mark.parametrize("gpu", CUDA)
def test_errs_no_more_than_eager_over_many_tiles(case: Case, gpu: str) -> None:
    check_budget(case, torch.float32, (require_pairs(gpu),), "tiles")


@cases()
@pytest.mark.parametrize("streamed", EXACT[1:])
def test_gradcheck(case: Case, streamed: str) -> None:
    if case.name.startswith(DETACHED):
        pytest.skip("weights that are held fixed")
    f, leaves = as_function(case, (5, 6, 3), require_pairs(streamed))
    assert torch.autograd.gradcheck(f, leaves, fast_mode=True)


@pytest.mark.parametrize("name", TWICE)
@pytest.mark.parametrize("exact", EXACT)
def test_gradgradcheck(name: str, exact: str) -> None:
    f, leaves = as_function(BY_NAME[name], (4, 5, 3), require_pairs(exact))
    assert torch.autograd.gradgradcheck(f, leaves, fast_mode=True)
