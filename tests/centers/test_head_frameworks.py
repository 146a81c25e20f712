"""A head in a model that a framework trains, saves and resumes, against a loop of one's own."""

from __future__ import annotations

import os
import pickle
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from fused_losses.centers import ClassCenters
from fused_losses.centers.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.processes]

C, D, ROWS, STEPS, HALF = 23, 6, 8, 20, 10  # shards of 12 and 11 rows; two epochs
SGD = dict(lr=0.3, momentum=0.9, weight_decay=0.01)


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, D)).double()
        given = dict(optimizer="sgd", optimizer_options=SGD, seed=1, scale=16.0, **options)
        self.head = ClassCenters(C, D, dtype=torch.float64, **given)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.net(x), y)


class Rows(Dataset):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(ROWS * HALF, 8, dtype=torch.float64, generator=generator)
        self.y = torch.randint(0, C, (len(self.x),), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i], self.y[i]


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def alone(model: nn.Module | None = None) -> list[float]:
    """The losses of one process in a loop of one's own."""
    model, rows, losses = model or Model(), Rows(), []
    optimizer = sgd(model)
    for step in range(STEPS):
        own = slice(step % HALF * ROWS, (step % HALF + 1) * ROWS)
        optimizer.zero_grad()
        loss = model(rows.x[own], rows.y[own])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# ---- each framework: the losses of a training, and those after it went on from its middle --------


def accelerate(folder: Path, world: int) -> tuple[list[float], list[float]]:
    from accelerate import Accelerator  # noqa: PLC0415

    made = Accelerator(cpu=True)
    inner = Model()
    loader = DataLoader(Rows(), batch_size=ROWS // world)
    model, optimizer, loader = made.prepare(inner, sgd(inner), loader)

    def epoch() -> Iterator[float]:
        for x, y in loader:
            optimizer.zero_grad()
            loss = model(x, y)
            made.backward(loss)
            made.clip_grad_norm_(model.parameters(), 1e9)
            optimizer.step()
            yield loss.item()

    losses = list(epoch())
    if world > 1:
        return losses + list(epoch()), shards(inner, folder)
    made.save_state(str(folder / "state"))
    losses += epoch()
    made.save_model(made.unwrap_model(model), str(folder / "model"))
    assert list((folder / "model").glob("*.safetensors"))
    made.load_state(str(folder / "state"))
    assert inner.head.step_count == HALF
    return losses, list(epoch())


def lightning(folder: Path, world: int) -> tuple[list[float], list[float]]:
    import pytorch_lightning  # noqa: PLC0415

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def configure_model(self) -> None:
            self.model = Model()

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            loss = self.model(*batch)
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self.model)

    def fit(epochs: int, **given: Any) -> tuple[Any, Any]:
        module = Module()
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu", devices=world, strategy="auto" if world == 1 else "ddp",
            max_epochs=epochs, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            default_root_dir=folder, use_distributed_sampler=False,
        )  # fmt: skip
        rows = Rows()
        # its own shuffles
        sampler = DistributedSampler(rows, shuffle=False) if world > 1 else None
        trainer.fit(module, DataLoader(rows, batch_size=ROWS // world, sampler=sampler), **given)
        return module, trainer

    module, _ = fit(2)
    if world > 1:
        return module.losses, shards(module.model, folder)
    _, trainer = fit(1)
    trainer.save_checkpoint(folder / "half.ckpt")
    return module.losses, fit(2, ckpt_path=folder / "half.ckpt")[0].losses


class Told(Model):
    """As the Trainer of transformers wants it."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return {"loss": super().forward(x, y)}


def transformers(folder: Path, world: int) -> tuple[list[float], list[float]]:
    from transformers import Trainer, TrainingArguments, trainer  # noqa: PLC0415

    # the folder tests/datasets looks like a package of that name
    trainer.is_datasets_available = lambda: False

    def trained(**given: Any) -> tuple[Told, list[float]]:
        model, losses = Told(), []

        class InOrder(Trainer):
            def _get_train_sampler(self, *_: Any) -> Any:
                return SequentialSampler(self.train_dataset)

            def compute_loss(self, *args: Any, **options: Any) -> Any:
                loss = super().compute_loss(*args, **options)
                losses.append(loss.item())
                return loss

        arguments = TrainingArguments(
            str(folder), per_device_train_batch_size=ROWS // world, max_steps=STEPS, use_cpu=True,
            save_steps=HALF, report_to=[], disable_tqdm=True, lr_scheduler_type="constant",
            max_grad_norm=0, remove_unused_columns=False,
        )  # fmt: skip

        def batch(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
            x, y = zip(*rows, strict=True)
            return {"x": torch.stack(x), "y": torch.stack(y)}

        InOrder(
            model, arguments, train_dataset=Rows(), data_collator=batch,
            optimizers=(sgd(model), None),  # pyright: ignore[reportArgumentType]
        ).train(**given)  # fmt: skip
        return model, losses

    model, losses = trained()
    middle = folder / f"checkpoint-{HALF}"
    assert (middle / "model.safetensors").exists()
    if world > 1:
        return losses, shards(model, folder)
    return losses, trained(resume_from_checkpoint=str(middle))[1]


# ---- one process --------------------------------------------------------------------------------


FRAMEWORKS: dict[str, Callable[[Path, int], tuple[list[float], list[float]]]] = {
    "accelerate": accelerate,
    "pytorch_lightning": lightning,
    "transformers": transformers,
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_framework_trains_and_goes_on(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name)
    losses, rest = FRAMEWORKS[name](tmp_path, 1)
    assert losses == alone() and rest == losses[HALF:]


@pytest.mark.parametrize("options", [{}, {"sample_rate": 0.4}, {"update": "step"}], ids=str)
def test_safetensors(options: dict[str, Any], tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model, other = Model(**options), Model(**options)
    for step in range(3):
        x, y = Rows().x[step * ROWS :][:ROWS], Rows().y[step * ROWS :][:ROWS]
        model(x, y).backward()
        model.head.optimizer.step()
    safetensors.save_model(model, tmp_path / "model")
    assert safetensors.load_model(other, tmp_path / "model") == (set(), [])
    safetensors.save_file(model.state_dict(), tmp_path / "state")
    for way in (other, Model(**options)):
        way.load_state_dict(safetensors.load_file(tmp_path / "state"))
        assert torch.equal(way.head.weight, model.head.weight) and way.head.step_count == 3
        for key, state in model.head.row_states().items():
            assert torch.equal(way.head.row_states()[key], state)


# ---- two ranks ----------------------------------------------------------------------------------


def shards(model: Model, folder: Path) -> list[float]:
    """Saved by all ranks and loaded again; a file of one rank is nobody else's."""
    other = Model()
    with Checkpoints(folder / "shards") as checkpoints:
        checkpoints.save({"head": model.head.state()}, STEPS, asynchronous=False)
        assert checkpoints.load({"head": other.head.state()}) == STEPS
    other.head.load()
    assert torch.equal(other.head.weight, model.head.weight) and other.head.step_count == STEPS
    equal = ClassCenters(24, D, optimizer="sgd")  # 12 rows on each rank
    told: list[Any] = [equal.state_dict()]
    dist.broadcast_object_list(told)
    before = equal.weight.clone()
    if dist.get_rank() == 1:
        with pytest.raises(RuntimeError, match="shard of rank 1 of 2, classes 12 to 23, got one"):
            equal.load_state_dict(told[0])
    else:
        equal.load_state_dict(told[0])
    assert torch.equal(equal.weight, before)
    return []


def ranks(rank: int, names: list[str], folder: str, made_before: bytes, port: int) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # made in one process: each rank would train a table of its own
    before = pickle.loads(made_before)
    x, y = Rows().x[:3], Rows().y[:3]
    with pytest.raises(RuntimeError, match="process_group: expected a head that is made after"):
        before(x, y)
    before.eval()(x, y)
    return [FRAMEWORKS[name](Path(folder, name), 2)[0] for name in names]


def test_frameworks_on_two_ranks(tmp_path: Path) -> None:
    names = []
    for name in FRAMEWORKS:
        try:
            pytest.importorskip(name)
        except pytest.skip.Exception:
            continue
        names.append(name)
    if not names:
        pytest.skip(f"none of {', '.join(FRAMEWORKS)} is installed")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    expected = torch.tensor(alone(), dtype=torch.float64)
    for told in processes.run(2, ranks, names, str(tmp_path), pickle.dumps(Model()), port):
        for name, losses in zip(names, told, strict=True):
            assert len(losses) == STEPS, name
            found = torch.tensor(losses, dtype=torch.float64)
            torch.testing.assert_close(
                found, expected, rtol=1e-9, atol=1e-9, msg=lambda told, name=name: f"{name}: {told}"
            )
