"""The epilogue kernels by themselves: tiles longer than a block, ties, far offsets, two calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import CUDA, require
from torch import Tensor

from fused_losses import margin_softmax
from fused_losses.backends.cuda.launch import ELEMENTS, launch
from fused_losses.backends.gpu import library_products as cuda_products
from fused_losses.primitives.row_statistics import cuda

pytestmark = pytest.mark.skipif(not CUDA, reason="FUSED_LOSSES_CUDA_ON_HOST=1 executes the kernels")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _built() -> None:
    require("cuda")


def scores_in_tiles(
    z: Tensor, positions: Tensor, bend: Tensor | None, parts: int, chunk: int
) -> dict[str, Tensor]:
    """The merged state of `row_scores` over blocks and chunks of z, [parts, N] each."""
    n, count = z.shape
    state = {
        "high": torch.empty(parts, n),
        "mass": torch.empty(parts, n, dtype=torch.float64),
        "best": torch.empty(parts, n, dtype=torch.int32),
        "moment": torch.empty(parts, n, dtype=torch.float64),
    }
    for first in range(0, count, chunk):
        length = min(chunk, count - first)
        for top in range(0, n, 2):
            rows = slice(top, min(top + 2, n))
            tile = torch.full((2, chunk), torch.nan)
            tile[: rows.stop - top, :length] = z[rows, first : first + length]
            launch(
                "row_scores", products=tile, inverse=None, bias=None, column_weight=None,
                bend=None if bend is None else bend[rows], positions=positions[rows],
                **{k: v[:, rows] for k, v in state.items()}, stride=chunk, rows=rows.stop - top,
                length=length, first=first, parts=parts, state_stride=n,
            )  # fmt: skip
    return state


def bends(n: int) -> Tensor:
    """t, p, q, r [N, 4]; the last two rows' thresholds are beyond all scores."""
    bend = torch.randn(n, 4)
    bend[:, 3] *= 0.01
    bend[-2], bend[-1, 0] = torch.tensor([-torch.inf, 2.0, 0.5, 0.0]), torch.inf
    return bend


def bent(z: Tensor, bend: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scores and their slopes, in float64."""
    z = z.double()
    if bend is None:
        return z, torch.ones_like(z)
    t, p, q, r = bend.double().T[:, :, None]
    return torch.where(z > t, p + q * z + r * z**2, z), torch.where(z > t, q + 2 * r * z, 1)


@pytest.mark.parametrize("is_bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("parts", [1, 3, 7])
def test_state_is_that_of_all_columns(parts: int, is_bent: bool) -> None:
    z = 30 * torch.randn(5, 403)
    z[1] = z[1, 0]  # every score a tie
    z[2, 17], z[3, 400] = torch.nan, torch.inf
    z[4, :390] = -torch.inf
    positions = torch.tensor([3, 0, -1, 5, 402], dtype=torch.int32)
    bend = bends(5) if is_bent else None
    state = scores_in_tiles(z, positions, bend, parts, 160)
    out = {
        "lse": torch.empty(5, dtype=torch.float64),
        "target": torch.empty(5, dtype=torch.float64),
        "weighted": torch.empty(5),
        "hardest": torch.empty(5, dtype=torch.int64),
        "hardest_score": torch.empty(5),
    }
    x = torch.randn(5, 3)
    launch(
        "row_finish", x=x, weight=torch.randn(403, 3), positions=positions, classes=None, **state,
        **out, stride_x=3, stride_w=3, n=5, d=3, parts=parts, type=ELEMENTS[x.dtype],
        type_x=ELEMENTS[x.dtype], normalize=False,
    )  # fmt: skip
    others = bent(z, bend)[0]
    for row, position in enumerate(positions.tolist()):
        if position >= 0:
            others[row, position] = -torch.inf
    wanted = torch.logsumexp(others, 1)
    assert torch.isnan(out["lse"][2]) and not torch.isfinite(out["lse"][3])
    clean = [0, 1, 4]
    torch.testing.assert_close(out["lse"][clean], wanted[clean], rtol=1e-7, atol=1e-6)
    assert out["hardest"][clean].tolist() == others.argmax(1)[clean].tolist()
    assert out["hardest"][1] == 1  # the lowest of the ties, the target being 0
    highest = others.max(1).values[clean].float()
    torch.testing.assert_close(out["hardest_score"][clean], highest, rtol=1e-6 * is_bent, atol=0)
    sums = torch.where(others == -torch.inf, 0, others).sum(1)
    torch.testing.assert_close(out["weighted"][:2], sums[:2].float(), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("is_bent", [False, True], ids=["plain", "bent"])
@pytest.mark.parametrize("low", FLOATS, ids=str)
@pytest.mark.parametrize("length", [5, 1029, 5000])
def test_gradient_replaces_a_row_longer_than_a_block(
    length: int, low: torch.dtype, is_bent: bool
) -> None:
    # 256 threads take 1024 or 2048 columns at a time, and a 16-bit row moves to its first half
    stride = -(-length // 16) * 16
    tile = torch.full((3, stride), torch.nan)
    z = tile[:, :length].copy_(torch.randn(3, length))
    inverse, bias, v = torch.rand(length), torch.randn(length), torch.rand(length)
    lse, *grads = torch.randn(4, 3).unbind()
    lse[1] = -torch.inf
    positions = torch.tensor([10 + length - 1, -1, 12], dtype=torch.int32)
    sums = torch.empty(2, stride)
    bend = bends(3) if is_bent else None
    score, slope = bent(z * inverse, bend)
    below = score + bias - torch.where(lse.isinf(), 0, lse)[:, None]
    if bend is not None:  # no part of a sum is above the sum
        below = below.clamp_max(0)
    g = grads[0][:, None] * torch.exp(below) + grads[2][:, None] * v
    g[0, length - 1] = g[2, 2] = 0
    wanted_sums = torch.stack([g[:2].sum(0), g[2]])
    g *= slope
    g[0, length - 1], g[2, 2] = grads[1][0], grads[1][2]
    launch(
        "row_gradient", products=tile, inverse=inverse, bias=bias, column_weight=v, bend=bend,
        positions=positions, lse=lse, grad_lse=grads[0], grad_target=grads[1],
        grad_weighted=grads[2], sums=sums, stride=stride, rows=3, length=length, first=10,
        rows_a_sum=2, out_type=ELEMENTS[low],
    )  # fmt: skip
    got = tile.view(low)[:, :length].float()
    torch.testing.assert_close(got, (g * inverse).float(), rtol=torch.finfo(low).eps * 8, atol=1e-6)
    torch.testing.assert_close(sums[:, :length], wanted_sums.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype, out", [*((d, d) for d in FLOATS), (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("d", [3, 64, 70])
def test_gather_casts_and_measures(d: int, dtype: torch.dtype, out: torch.dtype) -> None:
    rows = torch.randn(9, d).to(dtype)
    rows[4] = 0
    ids = torch.tensor([8, 4, 0, 4])
    copied, inverse = torch.empty(4, d, dtype=out), torch.empty(4)
    launch(
        "gather", rows=rows, classes=ids, out=copied, inverse=inverse, stride=d, count=4, d=d,
        type=ELEMENTS[dtype], out_type=ELEMENTS[out],
    )  # fmt: skip
    assert torch.equal(copied, rows[ids].to(out))
    wanted = 1 / rows[ids].double().norm(dim=1)
    torch.testing.assert_close(inverse, torch.where(wanted.isinf(), 0, wanted).float())


def test_offsets_beyond_32_bits() -> None:
    # row 1 starts 2^31 elements in; what is never touched costs no memory
    far = 1 << 31
    memory = torch.from_numpy(np.zeros(far + 8, dtype=np.int16)).view(torch.bfloat16)
    memory[far:] = torch.arange(8)
    copied = torch.empty(1, 8, dtype=torch.bfloat16)
    launch(
        "gather", rows=memory, classes=torch.tensor([1]), out=copied, inverse=None, stride=far,
        count=1, d=8, type=ELEMENTS[torch.bfloat16], out_type=ELEMENTS[torch.bfloat16],
    )  # fmt: skip
    assert copied[0].tolist() == list(range(8))


@pytest.mark.parametrize("precision", ["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_round_what_they_say(dtype: torch.dtype, precision: str) -> None:
    a, b = torch.randn(5, 40).to(dtype), torch.randn(40, 7).to(dtype)
    low = dtype
    if dtype == torch.float32 and precision != "fp32":
        low = torch.bfloat16
    wanted = a.to(low).double() @ b.to(low).double()
    out = torch.empty(5, 16)[:, :7]
    cuda_products.product(a, b, precision, out=out)
    for got in (out, cuda_products.product(a, b, precision)):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    cuda_products.add_product(out, a, b, precision, beta=2.0)
    torch.testing.assert_close(out.double(), 3 * wanted, rtol=1e-5, atol=1e-5)
    out.fill_(math.nan)
    cuda_products.add_product(out, a, b, precision, beta=0.0)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_tile_is_within_its_bytes_whatever_the_batch() -> None:
    for name, sizes in cuda.SIZES.items():
        for n in (1, 7, 300, 1024, 32768):
            block = min(n, sizes.rows)
            for each in (0, 2048):
                chunk = sizes.chunk(block, 1_000_000, each, torch.device("cpu"))
                within = (4 * block + each) * chunk <= max(
                    sizes.tile_bytes, (4 * block + each) * 16
                )
                assert chunk % cuda.STEP == 0 and within, (name, n)


@pytest.mark.parametrize("length", [3e4, 1.0, 1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("sampled", [False, True])
def test_float16_gradients_of_a_short_and_of_a_long_class(length: float, sampled: bool) -> None:
    # G over |w| leaves float16 on both sides; the rows themselves are inside of it
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(70, 32, generator=generator).half()
    w = torch.nn.functional.normalize(torch.randn(300, 32, generator=generator), dim=1)
    w[5] *= length
    w = w.half()
    labels = torch.arange(70) * 4
    labels[0] = 5
    classes = torch.cat([labels, torch.arange(1, 300, 8)]).unique() if sampled else None
    found = []
    for dtype, backend in ((torch.float16, "cuda"), (torch.float64, "reference")):
        leaves = [t.to(dtype).clone().requires_grad_() for t in (x, w)]
        loss = margin_softmax(
            *leaves, labels, margin=None, scale=16.0, classes=classes, backend=backend
        )
        assert isinstance(loss, Tensor)
        found.append([g.double() for g in torch.autograd.grad(loss, leaves)])
    short = torch.arange(300) == 5
    of_classes = [(found[0][1][at], found[1][1][at]) for at in (short, ~short)]
    for got, want in ((found[0][0], found[1][0]), *of_classes):
        # G, rows and the gradient are rounded to float16, 2^-11 each; its smallest step is 2^-24
        assert (got - want).abs().max() <= 4 * 2**-11 * want.abs().max() + 2**-25
