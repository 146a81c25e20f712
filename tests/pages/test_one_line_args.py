"""Arguments in one paragraph of a docstring become the list that the site shows."""

from __future__ import annotations

import inspect

from fused_losses import losses
from tools.one_line_args import PARAGRAPH, itemised


def test_a_paragraph_is_cut_at_its_names() -> None:
    told = """A loss.

    Args: margin: 5, Euclidean; of rows
    of any length. a, Tn: two (b: none). gamma > 0. Others: as in `Loss`. Time O(N).

    Paper: none."""
    assert itemised(told).splitlines() == [
        "A loss.",
        "",
        "    Args:",
        "        margin: 5, Euclidean; of rows of any length.",
        "        a, Tn: two (b: none).",
        "        gamma: > 0.",
        "",
        "    Others: as in `Loss`. Time O(N).",
        "",
        "    Paper: none.",
    ]


def test_other_paragraphs_stay() -> None:
    for told in ("Args: as in `Loss`.", "Args:\n    x: [N, D].", "No arguments: none."):
        assert itemised(told) == told


def test_of_the_catalogue_nothing_is_lost_and_nearly_all_is_listed() -> None:
    docs = [inspect.getdoc(getattr(losses, name)) or "" for name in losses.__all__]
    found = [doc for doc in docs if PARAGRAPH.search(doc)]
    cut = [doc for doc in found if itemised(doc) != doc]
    assert len(found) > 80 and len(cut) > 0.85 * len(found)
    for doc in cut:
        # but for colons after names that have a bound
        made = itemised(doc).replace(":", "").split()
        assert made == doc.replace(":", "").split()
