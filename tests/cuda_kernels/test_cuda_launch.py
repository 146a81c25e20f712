"""The way from Python to the CUDA kernels: reasons, argument structs, bounds on the host."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest
import torch

from fused_losses import backends
from fused_losses.backends.cuda import capability as cuda_capability
from fused_losses.backends.cuda import launch as cuda_launch

CPU = torch.device("cpu")
on_host = pytest.mark.skipif(
    not cuda_launch.on_host() or backends.unavailable("cuda") is not None,
    reason="FUSED_LOSSES_CUDA_ON_HOST is not 1, or the host build is missing",
)


def test_extent_reaches_from_the_first_to_the_last_element() -> None:
    t = torch.zeros(6, 8, dtype=torch.float16)
    assert cuda_launch.extent(t) == 6 * 8 * 2
    assert cuda_launch.extent(t[1:3, 2:5]) == (8 + 3) * 2
    assert cuda_launch.extent(t.T) == 6 * 8 * 2
    assert cuda_launch.extent(t[:0]) == 0
    assert cuda_launch.extent(torch.zeros(1).expand(5)) == 4


def test_what_it_cannot_take_has_a_reason() -> None:
    assert "float64" in cuda_capability.reasons_against(CPU, torch.float64, "fp32")[-1]
    elsewhere = torch.device("meta")
    assert "device meta" in cuda_capability.reasons_against(elsewhere, torch.float32, "fp32")[0]


@pytest.mark.parametrize("host", ["0", "1"])
@pytest.mark.processes
def test_a_missing_library_says_what_to_do(host: str) -> None:
    code = "import fused_losses.backends as b; print(b.unavailable('cuda'))"
    env = {"FUSED_LOSSES_CUDA_ON_HOST": host, "FUSED_LOSSES_CUDA_LIBRARY": "no/such/library.so"}
    run = [sys.executable, "-c", code]
    told = subprocess.run(run, env=os.environ | env, capture_output=True, text=True, check=True)
    assert ("make cuda-host" if host == "1" else "not built") in told.stdout


def gather(rows: torch.Tensor, ids: torch.Tensor, to: torch.Tensor, **changed: object) -> None:
    given = dict(rows=rows, classes=ids, out=to, inverse=None, stride=rows.stride(0), type=0)
    given |= dict(count=len(ids), d=rows.shape[1], out_type=0)
    cuda_launch.launch("gather", **(given | changed))


@on_host
def test_arguments_are_the_structs_fields() -> None:
    with pytest.raises(TypeError, match=r"missing \['classes'.*unknown \['colour'\]"):
        cuda_launch.launch("gather", colour=torch.zeros(2))
    with pytest.raises(AttributeError):
        cuda_launch.launch("no_such_function")


@on_host
def test_a_bad_address_is_an_error_that_names_kernel_and_offset() -> None:
    rows, ids, out = torch.randn(6, 8), torch.tensor([0, 5]), torch.empty(2, 8)
    gather(rows, ids, out)
    assert torch.equal(out, rows[ids])
    for bad in (dict(classes=ids + 1), dict(out=out[:1]), dict(count=3)):
        with pytest.raises(RuntimeError, match="gather: kernel .*gather_rows.*out of bounds"):
            gather(rows, ids, out, **bad)
    gather(rows, ids, out)  # a fault leaves nothing behind
    with pytest.raises(RuntimeError, match="in no buffer|out of bounds"):
        gather(rows, ids, out, out=out.data_ptr())


@on_host
def test_traffic_is_counted_by_buffer() -> None:
    rows, ids, out = torch.randn(6, 8), torch.tensor([0, 5]), torch.empty(2, 8)
    gather(rows, ids, out)
    loaded, stored = (ctypes.c_uint64 * 3)(), (ctypes.c_uint64 * 3)()
    cuda_launch.library().fused_losses_traffic(loaded, stored)
    # every lane of a warp reads its row's index; rows are read once and written once
    assert loaded[0] == stored[2] == 2 * 8 * 4
    assert loaded[2] == stored[0] == stored[1] == 0
