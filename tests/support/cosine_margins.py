"""Cosines, and a margin's values on them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

COSINES = np.concatenate([np.linspace(-0.9999, 0.9999, 401), [0.0, 1e-9, -1e-9, math.cos(2.5)]])


def value_and_slope(margin: Callable, cosine: np.ndarray | list) -> tuple[Tensor, Tensor]:
    t = torch.tensor(cosine, dtype=torch.float64, requires_grad=True)
    value = margin(t)
    return value.detach(), torch.autograd.grad(value.sum(), t)[0]
