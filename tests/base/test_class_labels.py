"""Labels over classes are one thing wherever they are taken: a loss, a head, an exact head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fused_losses.centers import ClassCenters, SphericalHead
from fused_losses.class_losses import Softmax, class_loss

C, D = 5, 3
WEIGHT = torch.randn(C, D, generator=torch.Generator().manual_seed(0))
FRONTS: dict[str, Callable[..., Tensor]] = {
    "class_loss": lambda x, y: class_loss(x, WEIGHT, y, Softmax()),
    "ClassCenters": lambda x, y: ClassCenters(C, D, margin=None)(x, y),
    "SphericalHead": lambda x, y: SphericalHead(C, D, lr=0.1)(x, y),
}
X = torch.randn(6, D, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 3, 4, -100])


@pytest.mark.parametrize("front", FRONTS)
def test_rows_of_any_shape_are_rows(front: str) -> None:
    take = FRONTS[front]
    expected = take(X, Y)
    for shape in ((2, 3), (2, 3, 1), (1, 6), (6, 1, 1)):
        assert take(X.view(*shape, D), Y.view(shape)) == expected
    several = torch.stack([Y, torch.full_like(Y, -100)], dim=1)
    assert take(X.view(2, 3, D), several.view(2, 3, 2)) == take(X, several)


@pytest.mark.parametrize("front", FRONTS)
def test_what_fits_no_rows_is_refused(front: str) -> None:
    for x, y, error, told in (
        (X.view(2, 3, D), Y, ValueError, r"labels: expected shape \(2, 3\) or \(2, 3\) and more"),
        (X.view(2, 3, D), Y.view(3, 2), ValueError, r"labels: expected shape \(2, 3\)"),
        (X.view(2, 3, D), Y.tolist(), ValueError, r"labels: expected shape \(2, 3\) .* got list"),
        (X, Y[:5], ValueError, r"labels: expected shape \(6,\)"),
        (X, Y.view(2, 3), ValueError, r"labels: expected shape \(6,\)"),
        (X, Y.tolist(), TypeError, "labels: expected an int64 tensor, got list"),
        (X, Y.double(), TypeError, "labels: expected int64 class ids"),
        (X, Y + 1, IndexError, r"labels: expected class ids in \[0, 5\) or ignore_index=-100"),
        (X, Y - 1, IndexError, r"labels: expected class ids in \[0, 5\).* from -101 to -1"),
        (X[:5], torch.eye(5).long(), ValueError, r"labels: expected class ids.*labels.argmax"),
    ):
        with pytest.raises(error, match=told):
            FRONTS[front](x, y)
