"""A small head and its batches, for every test of `ClassCenters` in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_losses.centers import ClassCenters
from fused_losses.centers.sampling import sample
from fused_losses.functions.margin_softmax import margin_softmax

N, C, D = 13, 57, 6


def data(dtype: torch.dtype = torch.float64, labels: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(N, D, dtype=dtype, requires_grad=True)
    y = torch.randint(0, C, (N, labels) if labels else (N,))
    y[3] = -100
    return x, y


def head(**options: Any) -> ClassCenters:
    defaults = dict(dtype=torch.float64, scale=16.0, chunk_bytes=10 * D * 8)
    return ClassCenters(C, D, **{**defaults, **options})


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(found, expected, strict=True):
        a = a.to_dense() if a.is_sparse else a
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(N, D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), torch.randint(0, C, (N,), generator=generator)


class Twin:
    """A head whose rows SGD steps, and beside it torch.optim.SGD on the whole table."""

    def __init__(self, *, rate: float = 1.0, update: str = "backward", momentum: float = 0.9):
        options = dict(lr=0.3, momentum=momentum, weight_decay=0.01)
        self.rate, self.done = rate, 0
        self.head = head(
            optimizer="sgd", optimizer_options=options, sample_rate=rate, update=update, seed=3
        )
        self.weight = self.head.weight.clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.weight], **options)

    @property
    def buffer(self) -> Tensor:
        return self.optimizer.state[self.weight]["momentum_buffer"]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What the head's forward gives, from the whole table."""
        part = None
        if self.rate < 1:
            part = torch.cat([sample(0, C, self.rate, seed=3, step=self.done), y]).unique()
        return margin_softmax(x, self.weight, y, scale=16.0, classes=part, backend="reference")

    def steps(self, count: int) -> None:
        for _ in range(count):
            x, y = batch(self.done)
            found, expected = self.head(x, y), self.loss(x, y)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
            found.backward()
            self.head.optimizer.step()
            self.optimizer.zero_grad()
            expected.backward()
            self.optimizer.step()
            self.done += 1

    def check(self) -> None:
        found = self.head.row_states()["momentum_buffer"]
        torch.testing.assert_close(self.head.weight, self.weight.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found, self.buffer, rtol=1e-10, atol=1e-10)
