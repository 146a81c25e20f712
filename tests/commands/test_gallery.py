"""The pages of the catalogue: what is committed is what the registry says, a picture a loss."""

from __future__ import annotations

import pytest
import torch

from fused_losses import losses
from tools import catalogue
from tools.gallery import page
from tools.gallery.measures import GOAL, TICKS, _four, embedding, weights
from tools.gallery.problems import problem

NAMES = [e.name for e in losses.catalogue()]
ENTRIES = {e.name: e for e in losses.catalogue()}


def test_the_catalogue_is_what_the_registry_says() -> None:
    assert catalogue.PAGE.read_text(encoding="utf-8") == catalogue.text(), (
        "run python -m tools.catalogue"
    )


def test_the_gallery_is_what_the_registry_says() -> None:
    written = (page.DOCS / "gallery.md").read_text(encoding="utf-8")
    assert written == page.text(), "run make gallery"


def test_pictures_are_small_and_none_is_left_over() -> None:
    assert {p.stem for p in page.FOLDER.glob("*.png")} <= set(NAMES)
    for picture in page.FOLDER.glob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG", picture.name
        assert picture.stat().st_size < 25 * 1024, picture.name


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_can_be_called(name: str) -> None:
    assert problem(ENTRIES[name]).values


def test_the_anchor_has_the_cosines_that_the_surface_is_drawn_over() -> None:
    rows, labels, _ = _four(problem(ENTRIES["InfoNCELoss"]), *GOAL)
    assert labels.tolist() == [0, 0, 1, 1]
    assert torch.allclose(rows.norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.allclose(rows[0] @ rows[1:3].T, torch.tensor(GOAL, dtype=torch.float64))
    assert len(TICKS) > 2


def test_weights_are_the_slopes_by_the_similarities() -> None:
    """InfoNCE: its own key draws a row by (1 - p) / (t N), the others drive it by p_j / (t N)."""
    found = weights(problem(ENTRIES["InfoNCELoss"]))
    assert found.missed < 1e-9
    n = len(found.matrix) // 2
    w = found.matrix[:n, n:]
    own = w.diagonal()
    assert (own > 0).all() and (w - own.diag() <= 0).all()
    assert torch.allclose(w.sum(dim=1), torch.zeros(n, dtype=w.dtype), atol=1e-9)


def test_the_embedding_is_that_of_a_training() -> None:
    found = embedding(problem(ENTRIES["MultiSimilarityLoss"]))
    assert found.losses[1] < found.losses[0]
    assert torch.allclose(found.after.norm(dim=1), torch.ones_like(found.after[:, 0]))
