"""The rotation of int8 codes: what it keeps, how far it rounds, and where it is taken."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor

from fused_losses import QuantizedRows, pairwise_topk, quantize_rows
from fused_losses.backends.cpu.capability import extension
from fused_losses.primitives.topk.rotation import drawn, rotated, rotated_back, rounding

WIDTHS = (1, 2, 3, 5, 8, 24, 96, 128, 200)


def decaying(n: int, d: int) -> Tensor:
    """Rows whose first entries hold most of their length, as embeddings have them."""
    return torch.randn(n, d) * torch.arange(1, d + 1) ** -0.7


def literal(d: int, signs: Tensor) -> np.ndarray:
    """The rotation as a matrix, in long double, by the parity of shared bits."""
    size = 1 << (d.bit_length() - 1)
    at = np.arange(size)
    parity = np.array([[(i & j).bit_count() % 2 for j in at] for i in at])
    hadamard = (1 - 2 * parity) / np.sqrt(np.longdouble(size))
    out = np.eye(d, dtype=np.longdouble)
    for turn, sign in enumerate(signs.numpy()):
        first = d - size if turn % 2 else 0
        step = np.eye(d, dtype=np.longdouble)
        step[first : first + size, first : first + size] = hadamard
        out = (out * sign) @ step
    return out


@pytest.mark.parametrize("d", WIDTHS)
def test_it_is_orthogonal_and_rounds_no_farther_than_told(d: int) -> None:
    signs = drawn(d, 3)
    matrix = literal(d, signs)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(d), atol=1e-17)
    same, along = torch.full((4, d), 1 / 3), torch.randn(20, d)
    # what adds up with one sign: the entries of a first round's signs
    for x in (same, along, signs[:1] * same, decaying(20, d)):
        for dtype in (torch.float32, torch.float64):
            rows = x.to(dtype)
            real = rows.double().numpy().astype(np.longdouble) @ matrix
            found = rotated(rows, signs).double().numpy()
            apart = np.linalg.norm((found - real).astype(np.float64), axis=1)
            bound = rounding(d, len(signs), dtype)
            assert (apart <= bound * rows.double().norm(dim=1).numpy()).all()
            back = rotated_back(rotated(rows, signs), signs)
            assert bool(((back - rows).norm(dim=1) <= 3 * bound * rows.norm(dim=1)).all())


@pytest.mark.parametrize("d", WIDTHS)
def test_compiled_queries_are_rotated_alike(d: int) -> None:
    require("cpu")
    signs, x = drawn(d, 5), torch.randn(7, d, dtype=torch.float64)
    unit = torch.eye(d, dtype=torch.int8)
    codes = (unit, torch.ones(d), torch.zeros(d), signs)
    scores = extension().topk_scores(x, unit.double(), "dot", True, "fp32", *codes)[0]
    torch.testing.assert_close(scores.double(), rotated(x, signs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("d", [3, 40, 64, 200])
def test_codes_of_rotated_rows_are_within_their_error(d: int) -> None:
    y = torch.cat([decaying(60, d), torch.zeros(2, d), 1e-20 * torch.randn(3, d)])
    codes = quantize_rows(y, rotate=True, rows=7)
    assert codes.signs is not None
    stored = codes.codes.double() * codes.scale[:, None].double()
    apart = (rotated(y.double(), codes.signs) - stored).norm(dim=1)
    assert bool((apart <= codes.error.double()).all())
    assert bool((codes.error.double() <= apart * (1 + 1e-5) + 1e-11 * y.norm(dim=1) + 1e-30).all())


@pytest.mark.parametrize("metric", ["dot", "cosine", "euclidean"])
@pytest.mark.parametrize("d", [7, 64, 96])
def test_the_screen_of_a_decaying_spectrum_is_exact(d: int, metric: str) -> None:
    require("cpu")
    x, y = decaying(30, d), decaying(2_000, d)
    y[1_000:1_040] = y[:40]
    want = pairwise_topk(x, y, 9, metric, backend="reference")
    for dtype in (torch.float32, torch.float64):
        for rotate in (None, True, False):
            codes = quantize_rows(y.to(dtype), rotate=rotate)
            found = pairwise_topk(x.to(dtype), y.to(dtype), 9, metric, screen=codes, backend="cpu")
            assert torch.equal(found[1], want[1])


def test_it_is_taken_where_it_helps() -> None:
    plain, turned = (quantize_rows(decaying(500, 128), rotate=r) for r in (False, None))
    assert turned.signs is not None and plain.signs is None
    assert float(turned.error.sum()) < 0.5 * float(plain.error.sum())
    whole = torch.randint(-127, 128, (400, 64)).float()
    whole[:, 0] = 127
    assert quantize_rows(whole).signs is None
    assert torch.equal(quantize_rows(whole).dequantize(), whole)
    for empty in (torch.zeros(0, 4), torch.zeros(4, 0)):
        assert quantize_rows(empty).signs is None
        assert quantize_rows(empty, rotate=True).dequantize().shape == empty.shape


def test_a_seed_is_one_rotation_and_stays_with_the_codes() -> None:
    y = decaying(80, 48)
    codes = quantize_rows(y, seed=11)
    again, other = quantize_rows(y, seed=11, rows=9), quantize_rows(y, seed=12)
    kept = io.BytesIO()
    torch.save(tuple(codes), kept)
    kept.seek(0)
    for copy in (again, pickle.loads(pickle.dumps(codes)), QuantizedRows(*torch.load(kept))):
        assert all(torch.equal(a, b) for a, b in zip(codes, copy, strict=True))
    assert not torch.equal(codes.signs, other.signs)
    state = torch.get_rng_state()
    quantize_rows(y)
    assert torch.equal(state, torch.get_rng_state())
