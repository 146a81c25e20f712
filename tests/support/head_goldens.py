"""The authors' numbers of heads, and how exactly a backend holds them."""

from __future__ import annotations

import json

import numpy as np
import torch
from places import GOLDEN
from torch import Tensor

FOLDER = GOLDEN / "heads"
INDEX = json.loads((FOLDER / "index.json").read_text())["entries"]


def golden(name: str, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz") as stored:
        data = {key: torch.from_numpy(stored[key]) for key in stored.files}
    return {
        k: v.to(dtype) if v.is_floating_point() and k == "logits" else v for k, v in data.items()
    }


def exactness(backend: str) -> tuple[torch.dtype, float]:
    return (torch.float32, 1e-5) if backend == "cuda" else (torch.float64, 1e-12)
