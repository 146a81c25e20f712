"""The instruction sets of the cpu backend: chosen at run time, all with the same results."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import fused_losses
from fused_losses import backends
from fused_losses.backends.cpu import capability as cpu

CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16", "amx_bf16")

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=str(backends.unavailable("cpu"))
)


@pytest.fixture(params=CAPABILITIES)
def capability(request):
    built = cpu.extension()
    try:
        built.force_capability(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    built.force_capability(None)


def loss_and_gradients(dtype: torch.dtype, backend: str, source: torch.dtype, **options):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 65, generator=generator, dtype=torch.float64).to(source)
    w = torch.randn(453, 65, generator=generator, dtype=torch.float64).to(source)
    x, w = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
    y = torch.randint(0, 453, (300,), generator=generator)
    y[3] = -100
    if options.pop("sampled", False):
        options["classes"] = torch.unique(torch.cat([y[y >= 0], torch.arange(0, 453, 3)]))
    loss = fused_losses.margin_softmax(x, w, y, backend=backend, **options)
    loss.backward()
    return loss.detach().double(), x.grad.double(), w.grad.double()


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 1e-13), (torch.float32, 3e-6), (torch.bfloat16, 4e-3), (torch.float16, 5e-4)],
    ids=str,
)
@pytest.mark.parametrize(
    "options",
    [{}, {"label_smoothing": 0.1}, {"memory_budget": 300_000}, {"sampled": True}],
    ids=["plain", "smoothed", "kept", "sampled"],
)
def test_every_instruction_set_agrees_with_truth(capability, dtype, bound, options):
    got = loss_and_gradients(dtype, "cpu", dtype, **options)
    truth = loss_and_gradients(torch.float64, "reference", dtype, **options)
    for name, a, b in zip(("loss", "dx", "dw"), got, truth, strict=True):
        assert float((a - b).norm() / b.norm()) < bound, name


@pytest.mark.parametrize(("wanted", "allowed"), [("avx2", ("avx2", "default")), ("default", ())])
@pytest.mark.processes
def test_aten_cpu_capability_caps_the_choice(wanted, allowed):
    code = "import fused_losses._C as c; print(c.capability(), c.has_bf16())"
    env = {**os.environ, "ATEN_CPU_CAPABILITY": wanted}
    out = subprocess.run(
        [sys.executable, "-c", "import torch;" + code], env=env, capture_output=True, text=True
    )
    name, bf16 = out.stdout.split()
    assert name in (allowed or ("default",)), out.stderr
    assert bf16 == "False"
