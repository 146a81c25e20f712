"""Per-rank files of insightface: into a head on any number of ranks, and back."""

from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fused_losses.base.files import DataError
from fused_losses.centers import ClassCenters
from fused_losses.centers.insightface import (
    InsightFaceTable,
    export_checkpoints,
    import_checkpoints,
    shard,
)
from fused_losses.functions.margin_softmax import margin_softmax

pytestmark = pytest.mark.processes

CLASSES, DIM, STEPS = 11, 3, 2


class PartialFC(nn.Module):
    """The part of insightface's PartialFC_V2 that a checkpoint sees: its rows, as a parameter."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__()
        rows = CLASSES // world + int(rank < CLASSES % world)
        self.weight = nn.Parameter(torch.zeros(rows, DIM))


class TableHead:
    """A sharded table with the part of the head's interface that import and export use."""

    def __init__(self, rank: int = 0, world: int = 1, classes: int = CLASSES) -> None:
        rows = -(-classes // world)
        self.num_classes = classes
        self.class_start = min(classes, rank * rows)
        self.num_local = min(classes, (rank + 1) * rows) - self.class_start
        self.weight = torch.full((self.num_local, DIM), -1.0)
        self.momentum = torch.full((self.num_local, DIM), -1.0)
        self.step = torch.zeros((), dtype=torch.int64)
        self.mesh = init_device_mesh("cpu", (world,)) if dist.is_initialized() else None
        self.loaded = False

    def state(self) -> dict[str, Tensor]:
        tables = {"weight": self.weight, "optimizer.momentum_buffer": self.momentum}
        return {**{key: self._whole(table) for key, table in tables.items()}, "steps": self.step}

    def _whole(self, local: Tensor) -> Tensor:
        if self.mesh is None:
            return local
        shape = torch.Size((self.num_classes, DIM))
        return DTensor.from_local(
            local, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=(DIM, 1)
        )

    def load(self) -> None:
        self.loaded = True


def table(offset: float = 0.0) -> Tensor:
    return torch.arange(CLASSES * DIM, dtype=torch.float32).view(CLASSES, DIM) + offset


def write_run(folder: Path, world: int, optimizer: type[torch.optim.Optimizer]) -> dict:
    """Files as train_v2.py saves them, after steps of one optimiser over backbone and table."""
    states: dict[str, list[Tensor]] = {}
    for rank in range(world):
        begin, end = shard(CLASSES, rank, world)
        net, head = nn.Linear(2, DIM), PartialFC(rank, world)
        head.load_state_dict({"weight": table()[begin:end]})
        groups = [{"params": net.parameters()}, {"params": head.parameters()}]
        options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
        optim = optimizer(groups, lr=0.1, **options)
        schedule = torch.optim.lr_scheduler.StepLR(optim, 5)
        for _ in range(STEPS):
            (net(torch.ones(1, 2)).sum() + (head.weight**2).sum()).backward()
            optim.step()
            schedule.step()
        states.setdefault("weight", []).append(head.weight.detach().clone())
        for name, value in optim.state[head.weight].items():
            states.setdefault(name, []).append(value)
        record = {
            "epoch": 1,
            "global_step": STEPS,
            "state_dict_backbone": net.state_dict(),
            "state_dict_softmax_fc": head.state_dict(),
            "state_optimizer": optim.state_dict(),
            "state_lr_scheduler": schedule.state_dict(),
        }
        torch.save(record, folder / f"checkpoint_gpu_{rank}.pt")
    return {name: torch.cat(parts) for name, parts in states.items() if parts[0].dim() == 2}


def import_then_export(rank: int, world: int, source: str, target: str, files: int) -> list[Tensor]:
    head = TableHead(rank, world)
    import_checkpoints(source, head)
    assert head.loaded and int(head.step) == STEPS
    export_checkpoints(head, target, files)
    return [head.weight, head.momentum]


@pytest.mark.parametrize(("world", "files", "back"), [(1, 2, 3), (2, 3, 1), (3, 4, 5)])
def test_round_trip_over_other_numbers_of_ranks(
    tmp_path: Path, world: int, files: int, back: int
) -> None:
    written = write_run(tmp_path, files, torch.optim.SGD)
    out = tmp_path / "out"
    shards = processes.run(
        world, import_then_export, world, str(tmp_path), str(out), back, seconds=60
    )
    assert torch.equal(torch.cat([weight for weight, _ in shards]), written["weight"])
    assert torch.equal(torch.cat([momentum for _, momentum in shards]), written["momentum_buffer"])
    for rank in range(back):
        head = PartialFC(rank, back)
        saved = torch.load(out / f"checkpoint_gpu_{rank}.pt", weights_only=True)
        head.load_state_dict(saved["state_dict_softmax_fc"])
        begin, end = shard(CLASSES, rank, back)
        assert torch.equal(head.weight.detach(), written["weight"][begin:end])
        assert saved["global_step"] == STEPS
    assert torch.equal(InsightFaceTable(out).rows(0, CLASSES), written["weight"])


def test_without_a_process_group(tmp_path: Path) -> None:
    written = write_run(tmp_path, 2, torch.optim.SGD)
    head = TableHead()
    import_checkpoints(tmp_path, head)
    assert torch.equal(head.weight, written["weight"])
    assert torch.equal(head.momentum, written["momentum_buffer"])
    backbone = {"fc": torch.ones(2)}
    (path,) = export_checkpoints(head, tmp_path / "one", 1, backbone=backbone)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["state_dict_backbone"]["fc"], torch.ones(2))


def test_training_goes_on_where_insightface_stopped(tmp_path: Path) -> None:
    written = write_run(tmp_path, 3, torch.optim.SGD)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}
    head = ClassCenters(
        CLASSES, DIM, margin=None, scale=8.0, optimizer="sgd", optimizer_options=options
    )
    import_checkpoints(tmp_path, head)
    assert head.step_count == STEPS
    embeddings, labels = torch.randn(6, DIM), torch.arange(6)
    head(embeddings, labels).backward()
    head.settle()

    table = nn.Parameter(written["weight"].clone())
    dense = torch.optim.SGD([table], **options)
    dense.state[table]["momentum_buffer"] = written["momentum_buffer"].clone()
    margin_softmax(
        embeddings, table, labels, margin=None, scale=8.0, backend="reference"
    ).backward()
    dense.step()
    torch.testing.assert_close(head.weight, table.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("classes", [4, CLASSES, 17])
def test_a_head_of_another_number_of_classes(tmp_path: Path, classes: int) -> None:
    """On 3 ranks of which the last may have no row that the files have."""
    written = write_run(tmp_path, 2, torch.optim.SGD)
    shards = processes.run(3, import_resized, classes, str(tmp_path), seconds=60)
    both = min(classes, CLASSES)
    for kind, name in enumerate(("weight", "momentum_buffer")):
        found = torch.cat([tables[kind] for tables in shards])
        assert len(found) == classes and torch.equal(found[:both], written[name][:both])
        assert bool((found[both:] == -1).all())


def import_resized(rank: int, classes: int, source: str) -> list[Tensor]:
    head = TableHead(rank, 3, classes)
    one_rank_fails(head, rank, source)
    if classes != CLASSES:
        with pytest.raises(ValueError, match=rf"expected a weight of shape \({CLASSES}, 3\)"):
            import_checkpoints(source, head)
    import_checkpoints(source, head, resize=True)
    return [head.weight, head.momentum]


def one_rank_fails(head: TableHead, rank: int, source: str) -> None:
    """The others hear of it, and no rank's head is written; a folder that cannot be made, too."""
    told = "expected a folder or a list" if rank == 1 else "^rank 1: ValueError: .*a folder or a"
    with pytest.raises(ValueError, match=told):
        import_checkpoints(source if rank != 1 else source + "/nowhere", head, resize=True)
    assert not head.loaded and bool((head.weight == -1).all())
    file = Path(source, "a file")
    file.touch()
    error, told = (OSError, "") if rank == 1 else (DataError, r"^rank 1: \w+Error: ")
    with pytest.raises(error, match=told):
        export_checkpoints(head, file if rank == 1 else Path(source, "out"), 4)


def test_states_of_adamw_and_rows_across_files(tmp_path: Path) -> None:
    written = write_run(tmp_path, 4, torch.optim.AdamW)
    read = InsightFaceTable([tmp_path / f"checkpoint_gpu_{rank}.pt" for rank in (3, 1, 0, 2)])
    assert read.names == ("weight", "exp_avg", "exp_avg_sq")
    assert (read.num_classes, read.dim, read.step) == (CLASSES, DIM, STEPS)
    for name in read.names:
        assert torch.equal(read.rows(2, 9, name), written[name][2:9])
    assert read.rows(4, 4).shape == (0, DIM)
    with pytest.raises(IndexError, match=r"rows of \[0, 11\)"):
        read.rows(0, 12)
    with pytest.raises(ValueError, match="expected one of weight, exp_avg, exp_avg_sq"):
        read.rows(0, 1, "momentum_buffer")


def test_files_of_the_first_partial_fc(tmp_path: Path) -> None:
    for rank in range(2):
        begin, end = shard(CLASSES, rank, 2)
        torch.save(table()[begin:end].clone(), tmp_path / f"rank_{rank}_softmax_weight.pt")
        torch.save(table(100)[begin:end].clone(), tmp_path / f"rank_{rank}_softmax_weight_mom.pt")
    read = InsightFaceTable(tmp_path)
    assert torch.equal(read.rows(0, CLASSES), table())
    assert torch.equal(read.rows(3, 8, "momentum_buffer"), table(100)[3:8])
    assert read.step == 0


def change(path: Path, **changes: object) -> None:
    torch.save({**torch.load(path, weights_only=True), **changes}, path)


def test_errors_name_file_key_and_shape(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected checkpoint_gpu_0.pt .* got none"):
        InsightFaceTable(tmp_path)
    with pytest.raises(ValueError, match="expected a folder or a list"):
        InsightFaceTable(tmp_path / "nowhere")
    write_run(tmp_path, 3, torch.optim.SGD)
    files = [tmp_path / f"checkpoint_gpu_{rank}.pt" for rank in range(3)]
    whole = files[1].read_bytes()

    with pytest.raises(ValueError, match="got checkpoint_gpu_0.pt, checkpoint_gpu_2.pt"):
        InsightFaceTable([files[0], files[2]])
    # a rank's file of a run on fewer ranks
    rows = {"weight": torch.zeros(6, DIM)}
    change(files[1], state_dict_softmax_fc=rows)
    with pytest.raises(ValueError, match=r"gpu_0.pt: weight: expected shape \(5, 3\).*\(4, 3\)"):
        InsightFaceTable(tmp_path)
    change(files[1], state_dict_softmax_fc={"weight": torch.zeros(4)})
    with pytest.raises(ValueError, match=r"gpu_1.pt: state_dict_softmax_fc\['weight'\].*\(4,\)"):
        InsightFaceTable(tmp_path)
    change(files[1], state_dict_softmax_fc={"bias": rows})
    with pytest.raises(ValueError, match=r"gpu_1.pt: state_dict_softmax_fc: expected a key"):
        InsightFaceTable(tmp_path)
    files[1].write_bytes(whole)
    change(files[1], global_step=9)
    with pytest.raises(ValueError, match="gpu_1.pt: global_step: expected 2 .* got 9"):
        InsightFaceTable(tmp_path)
    torch.save({"model": 1}, files[1])
    with pytest.raises(ValueError, match="gpu_1.pt: expected a dict .* got model"):
        InsightFaceTable(tmp_path)
    for broken in (whole[: len(whole) // 2], b"", b"not a pickle at all"):
        files[1].write_bytes(broken)
        with pytest.raises(ValueError, match="gpu_1.pt: not a file of tensors"):
            InsightFaceTable(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "was here",)

    torch.save({"state_dict_softmax_fc": Hostile()}, tmp_path / "checkpoint_gpu_0.pt")
    with pytest.raises(ValueError, match="gpu_0.pt: not a file of tensors"):
        InsightFaceTable(tmp_path)
    assert not (tmp_path / "was here").exists()


def test_head_of_another_size_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, 1, torch.optim.SGD)
    with pytest.raises(ValueError, match=r"head: expected a weight of shape \(11, 3\).*\(12, 3\)"):
        import_checkpoints(tmp_path, TableHead(classes=12))
    with pytest.raises(ValueError, match="world: expected at least 1"):
        export_checkpoints(TableHead(), tmp_path, 0)
