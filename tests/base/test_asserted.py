"""What a GPU judges without the host: the same asserted on the CPU, where it raises at once."""

from __future__ import annotations

import pytest
import torch

import fused_losses
from fused_losses.base import validation


@pytest.fixture(autouse=True)
def _asserts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "asserted", lambda values: True)


def test_classes() -> None:
    for sound in ([0, 4, 9], [3]):
        validation.check_classes(torch.tensor(sound), 10)
    for bad in ([-1, 4], [4, 10], [4, 4], [4, 3]):
        with pytest.raises(RuntimeError, match=r"distinct class ids in \[0, 10\)"):
            validation.check_classes(torch.tensor(bad), 10)


def test_labels_in_classes() -> None:
    classes = torch.tensor([1, 4, 9])
    validation.check_labels_in_classes(torch.tensor([4, validation.NO_TARGET, 1]), classes)
    for bad in (0, 5, 11):
        with pytest.raises(RuntimeError, match="every label among the classes"):
            validation.check_labels_in_classes(torch.tensor([4, bad]), classes)


@pytest.mark.parametrize("ragged", (False, True))
def test_lengths(ragged: bool) -> None:
    documents = torch.randn(5, 4) if ragged else torch.randn(2, 4, 4)
    queries = torch.randn(3, 2, 4)
    found = fused_losses.maxsim(queries, documents, lengths=torch.tensor([2, 3]))
    assert found.shape == (3, 2)
    for bad in ([-1, 6], [2, 5]):
        with pytest.raises(RuntimeError, match="values >= 0 that fit"):
            fused_losses.maxsim(queries, documents, lengths=torch.tensor(bad))
