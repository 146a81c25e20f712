"""`warm_up` where nothing can be compiled; what it compiles: warm_up_cases.py."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses import backends, info_nce, warm_up
from fused_losses.backends.cuda import launch as cuda_launch
from fused_losses.backends.gpu import rehearsal
from fused_losses.backends.gpu.tiles import Tile
from fused_losses.backends.triton import launch as triton_launch


def test_it_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(3, 4)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: True)
    with pytest.raises(RuntimeError, match=r"ahead here: TRITON_INTERPRET=1 interprets the kern"):
        warm_up(info_nce, x, x)
    monkeypatch.setattr(triton_launch, "interpreted", lambda: False)
    monkeypatch.setattr(backends, "unavailable", lambda name: f"no GPU for {name}")
    with pytest.raises(
        RuntimeError, match="warm_up: nothing can be compiled ahead here: no GPU fo"
    ):
        warm_up(info_nce, x, x)


class Hearing(TorchDispatchMode):
    """A mode that hears of launches."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))

    def hear_launch(self, kernel: str, *launch: object) -> None:
        self.kernels.append(kernel)


def test_the_innermost_mode_hears_of_launches() -> None:
    tile, given = Tile(1, 1, 1), (torch.ones(1),)
    with Hearing() as outer:
        with Hearing() as inner:
            triton_launch.launch("kernel", 1, given, {}, tile)
            assert not rehearsal.launchable()
        triton_launch.launch("other", 1, given, {}, tile)
        cuda_launch.launch("nothing", x=given[0])
    assert (outer.kernels, inner.kernels) == (["other"], ["kernel"])
    assert rehearsal.heard() is None and rehearsal.launchable()
