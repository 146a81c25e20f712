"""A catalogue's loss and a peer's accelerated one in other people's training loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from fused_losses import integrations
from fused_losses.losses import ProxyAnchorLoss

pytestmark = [pytest.mark.slow]

PEER = "pytorch_metric_learning"
C, D, ROWS, STEPS = 4, 6, 8, 5


class Rows(Dataset):
    """Pictures of a few classes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS * STEPS, 5, dtype=torch.float64, generator=generator)
        self.y = torch.arange(len(self.x)) % C

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


class Model(nn.Module):
    """A net and a loss with centres of its own, which train together."""

    def __init__(self, build: Callable[[], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, D))
        self.loss = build()
        self.double()

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": self.loss(self.net(x), y)}


def of_peer() -> nn.Module:
    losses = pytest.importorskip(f"{PEER}.losses")
    return losses.ProxyAnchorLoss(C, D)


LOSSES = {"catalogue": lambda: ProxyAnchorLoss(C, D), "peer": of_peer}


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=0.05)


def plain(build: Callable[[], nn.Module]) -> list[float]:
    """A loop of one's own, without any acceleration."""
    model, rows, losses = Model(build), Rows(), []
    optimizer = adam(model)
    for own in torch.arange(len(rows)).split(ROWS):
        optimizer.zero_grad()
        loss = model(rows.x[own], rows.y[own])["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def accelerate(build: Callable[[], nn.Module], _: Path) -> list[float]:
    from accelerate import Accelerator  # noqa: PLC0415

    made, losses = Accelerator(cpu=True), []
    model = Model(build)
    model, optimizer, loader = made.prepare(model, adam(model), DataLoader(Rows(), ROWS))
    for x, y in loader:
        optimizer.zero_grad()
        loss = model(x, y)["loss"]
        made.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def pytorch_lightning(build: Callable[[], nn.Module], folder: Path) -> list[float]:
    """A callback may begin and end the acceleration."""
    import pytorch_lightning as lightning  # noqa: PLC0415

    losses: list[float] = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model(build)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            return self.model(*batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self)

    class Accelerated(lightning.Callback):
        def on_fit_start(self, *_: Any) -> None:
            self.acceleration = integrations.accelerate(PEER, strict=True)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            losses.append(outputs["loss"].item())

        def on_fit_end(self, *_: Any) -> None:
            self.acceleration.undo()

    callback = Accelerated()
    lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[callback],
    ).fit(Module(), DataLoader(Rows(), ROWS))  # fmt: skip
    assert not callback.acceleration.active
    return losses


def transformers(build: Callable[[], nn.Module], folder: Path) -> list[float]:
    from transformers import Trainer, TrainingArguments, trainer  # noqa: PLC0415

    # the folder tests/datasets looks like a package of that name
    trainer.is_datasets_available = lambda: False
    losses: list[float] = []

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def compute_loss(self, *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(*args, **options)
            losses.append(loss.item())
            return loss

    def batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        x, y = zip(*rows, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    model = Model(build)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=ROWS, num_train_epochs=1, use_cpu=True,
        save_strategy="no", report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
        max_grad_norm=0, remove_unused_columns=False,
    )  # fmt: skip
    InOrder(
        model, arguments, train_dataset=Rows(), data_collator=batch,
        optimizers=(adam(model), None),  # pyright: ignore[reportArgumentType]
    ).train()  # fmt: skip
    return losses


LOOPS: dict[str, Callable[[Callable[[], nn.Module], Path], list[float]]] = {
    "accelerate": accelerate,
    "pytorch_lightning": pytorch_lightning,
    "transformers": transformers,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_as_ones_own(name: str, loss: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    pytest.importorskip(PEER)
    with integrations.accelerate(PEER, strict=True) as acceleration:
        got = LOOPS[name](LOSSES[loss], tmp_path)
        ran = [(each.name, each.accelerated) for each in acceleration.report()]
    assert ran == ([("ProxyAnchorLoss", STEPS)] if loss == "peer" else [])
    torch.testing.assert_close(got, plain(LOSSES[loss]), rtol=1e-9, atol=1e-9)
