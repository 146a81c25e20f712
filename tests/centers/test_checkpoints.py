"""Sharded checkpoints: never half of one, and for any number of ranks."""

import gc
import multiprocessing as mp
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fused_losses.centers.checkpoint import CheckpointError, Checkpoints


def save_forever(folder: str, first: int) -> None:
    torch.set_num_threads(1)
    checkpoints = Checkpoints(folder)
    state = {"table": torch.zeros(1 << 16), "small": {"step": 0}}
    for step in range(first, 1 << 30):
        state["table"].fill_(step)
        state["small"]["step"] = step
        checkpoints.save(state, step)


def test_no_kill_leaves_a_half_checkpoint(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    chance, newest, in_the_middle = random.Random(), -1, 0
    for _ in range(6):
        process = context.Process(target=save_forever, args=(str(tmp_path), newest + 1))
        process.start()
        target = tmp_path / f"step-{newest + 3:08d}"
        deadline = time.monotonic() + 60
        while not target.exists():
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.join()
        in_the_middle += any(tmp_path.glob("*.part"))
        with Checkpoints(tmp_path) as checkpoints:
            assert not any(tmp_path.glob("*.part"))
            state = {"table": torch.zeros(1 << 16), "small": {"step": 0}}
            step = checkpoints.load(state)
            assert step == max(checkpoints.steps()) > newest
            assert bool((state["table"] == step).all()) and state["small"]["step"] == step
            newest = step
    assert in_the_middle > 0, "no kill hit a checkpoint that was being written"


class Halt(Exception):
    pass


def test_unpublished_checkpoint_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"x": torch.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, 1)
        checkpoints.wait()
        monkeypatch.setattr(Checkpoints, "_publish", lambda *_: (_ for _ in ()).throw(Halt()))
        monkeypatch.setattr(Checkpoints, "_drop", lambda *_: None)  # as a kill leaves it
        checkpoints.save(state, 2)
        with pytest.raises(CheckpointError, match="Halt"):
            checkpoints.wait()
        assert checkpoints.latest() == 1
    assert any(tmp_path.glob("step-00000002.*.part"))
    with Checkpoints(tmp_path) as checkpoints:
        assert not any(tmp_path.glob("*.part"))


def test_failed_save_raises_at_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(dcp.FileSystemWriter, "write_data", full)
            checkpoints.save({"x": torch.ones(3)}, 1)
            with pytest.raises(CheckpointError, match="rank 0: .*no space left on device"):
                checkpoints.save({"x": torch.ones(3)}, 2)
            with pytest.raises(CheckpointError, match="no space left on device"):
                checkpoints.save({"x": torch.ones(3)}, 2, asynchronous=False)
        assert checkpoints.latest() is None and checkpoints.load({"x": torch.ones(3)}) is None
        checkpoints.save({"x": torch.ones(3)}, 2)
        checkpoints.wait()
        assert checkpoints.latest() == 2
        # what a failed save had written would keep the disk full
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_what_a_read_only_disk_kept_goes_with_the_next_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError("read-only file system")

    with Checkpoints(tmp_path) as checkpoints:
        with monkeypatch.context() as patch:
            patch.setattr(dcp.FileSystemWriter, "finish", refused)
            patch.setattr("shutil.rmtree", lambda *_, **__: None)
            with pytest.raises(CheckpointError, match="read-only"):
                checkpoints.save({"x": torch.ones(3)}, 1, asynchronous=False)
        assert list(tmp_path.glob("*.part"))
        checkpoints.save({"x": torch.ones(3)}, 2, asynchronous=False)
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save({"net": {"w": torch.ones(3, 2)}}, 4, asynchronous=False)
        with pytest.raises(ValueError, match=r"state\['net.b'\]: .*step-00000004 has no such"):
            checkpoints.load({"net": {"b": torch.ones(3)}})
        with pytest.raises(ValueError, match=r"state\['net.w'\]: .*\(3, 2\).* got shape \(3, 3\)"):
            checkpoints.load({"net": {"w": torch.ones(3, 3)}})
        with pytest.raises(CheckpointError, match="step-00000009"):
            checkpoints.load({"net": {"w": torch.ones(3, 2)}}, 9)
        with pytest.raises(ValueError, match="step-00000004 exists"):
            checkpoints.save({}, 4)
        with pytest.raises(ValueError, match="step: expected at least 0, got -1"):
            checkpoints.save({}, -1)
        with pytest.raises(TypeError, match="state: expected a dict of tensors, got Tensor"):
            checkpoints.load(torch.ones(2))
        data = next((tmp_path / "step-00000004").glob("*.distcp"))
        data.write_bytes(data.read_bytes()[:-40])
        with pytest.raises(CheckpointError, match="step-00000004"):
            checkpoints.load({"net": {"w": torch.ones(3, 2)}})
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)


CLASSES, DIM = 7, 3


def sharded(rank: int, world: int, offset: float) -> tuple[Tensor, dict]:
    """This rank's rows of a table, and a state that holds it beside what all ranks share."""
    table = torch.arange(CLASSES * DIM, dtype=torch.float64).view(CLASSES, DIM) + offset
    rows = -(-CLASSES // world)
    local = table[rank * rows : (rank + 1) * rows].clone()
    whole = DTensor.from_local(
        local,
        init_device_mesh("cpu", (world,)),
        [Shard(0)],
        run_check=False,
        shape=table.shape,
        stride=table.stride(),
    )
    shared = {"w": torch.full((2,), offset), "lr": offset}
    return local, {"head": {"weight": whole}, "net": shared}


def save_sharded(rank: int, world: int, folder: str) -> None:
    local, state = sharded(rank, world, 100.0)
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in range(3):
            checkpoints.save(state, step)
            # training goes on at once: the checkpoint keeps the values at the call
            local.add_(1)
            state["net"]["w"].add_(1)
    if world == 1:
        return
    fall_back(rank, world, folder)
    ask_while_writing(rank, world, folder)
    with Checkpoints(f"{folder}/failing") as checkpoints:
        if rank == 1:
            dcp.FileSystemWriter.write_data = lambda *_: (_ for _ in ()).throw(OSError("full"))
        checkpoints.save(state, 0)
        with pytest.raises(CheckpointError, match="rank 1: .*full"):
            checkpoints.wait()
        assert checkpoints.latest() is None


def load_sharded(rank: int, world: int, folder: str) -> None:
    local, state = sharded(rank, world, 0.0)
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.steps() == [2] and checkpoints.load(state) == 2
    expected, _ = sharded(rank, world, 102.0)
    assert torch.equal(local, expected)
    assert state["net"]["w"].tolist() == [102.0, 102.0] and state["net"]["lr"] == 100.0
    assert not dist.is_initialized() or dist.get_world_size() == world


def fall_back(rank: int, world: int, folder: str) -> None:
    """One rank's damaged file is seen by all: each reads the older checkpoint."""
    local, state = sharded(rank, world, 1.0)
    with Checkpoints(f"{folder}/damaged") as checkpoints:
        for step in (1, 2):
            checkpoints.save(state, step, asynchronous=False)
            local.add_(1)
        if rank == 0:
            flip(Path(folder, "damaged", "step-00000002", "__1_0.distcp"), 700)
        with pytest.warns(UserWarning, match="__1_0.distcp: not as it was written.*00000001 is"):
            assert checkpoints.load(state) == 1
        assert torch.equal(local, sharded(rank, world, 1.0)[0])
        # a state that does not fit one rank alone: an error on all
        with pytest.raises(ValueError, match=r"x.* has no such entry"):
            checkpoints.load({**state, **({"x": 0} if rank else {})})


def ask_while_writing(rank: int, world: int, folder: str) -> None:
    """What ranks ask each other goes apart from what their writing threads do."""
    real = dcp.FileSystemWriter.write_data

    def slow(*given: object) -> object:
        time.sleep(0.4 * rank)
        return real(*given)

    dcp.FileSystemWriter.write_data = slow
    _, state = sharded(rank, world, 1.0)
    with Checkpoints(f"{folder}/asked") as checkpoints:
        checkpoints.save(state, 7, asynchronous=False)
        checkpoints.save(state, 8)
        seen = [checkpoints.latest() for _ in range(200)]
        assert set(seen) <= {7, 8} and seen[0] == 7
        checkpoints.wait()
        assert checkpoints.latest() == 8
    dcp.FileSystemWriter.write_data = real


def test_tables_are_read_by_any_number_of_ranks(tmp_path: Path) -> None:
    processes.run(2, save_sharded, 2, str(tmp_path))
    # of five ranks with two rows each the last has none
    for world in (1, 3, 5):
        processes.run(world, load_sharded, world, str(tmp_path))


# ---- damage -------------------------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def state_of(step: int) -> dict:
    return {"net": {"w": torch.full((500,), float(step)), "name": str(step)}}


def test_a_damaged_newest_checkpoint_falls_back_to_the_whole_one(tmp_path: Path) -> None:
    def damages() -> Iterator[tuple[str, Callable[[Path], object]]]:
        yield "__0_0.distcp: not as it was written", lambda path: flip(path / "__0_0.distcp", 900)
        yield "__0_0.distcp: missing", lambda path: (path / "__0_0.distcp").unlink()
        yield ".metadata: not as it was written", lambda path: flip(path / ".metadata", 50)
        yield ".metadata: missing", lambda path: (path / ".metadata").unlink()
        yield "no table of checksums", lambda path: (path / "checksums.json").write_text("[}")
        # as an earlier version wrote it: damage that reading finds
        yield (
            "step-00000002",
            lambda path: [(path / name).unlink() for name in ("checksums.json", "__0_0.distcp")],
        )

    for number, (told, harm) in enumerate(damages()):
        folder = tmp_path / str(number)
        with Checkpoints(folder) as checkpoints:
            for step in (1, 2):
                checkpoints.save(state_of(step), step, asynchronous=step == 2)
            checkpoints.wait()
            harm(folder / "step-00000002")
            with pytest.raises(CheckpointError, match=told):
                checkpoints.load(state_of(0), 2)
            state = state_of(0)
            with pytest.warns(UserWarning, match=told) as warned:
                assert checkpoints.load(state) == 1
            text = str(warned[0].message)
            assert "step-00000002" in text and str(folder / "step-00000001") in text
            assert state["net"]["w"].eq(1).all() and state["net"]["name"] == "1"
            # the run that goes on comes to step 2 again
            assert checkpoints.steps() == [1] and (folder / "step-00000002.damaged").is_dir()
            checkpoints.save(state_of(2), 2, asynchronous=False)
            assert checkpoints.load(state) == 2 and state["net"]["name"] == "2"


def test_no_flipped_bit_is_loaded(tmp_path: Path) -> None:
    chance = random.Random(0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(state_of(3), 3, asynchronous=False)
        path = tmp_path / "step-00000003"
        for name in ("__0_0.distcp", ".metadata", "checksums.json"):
            whole = (path / name).read_bytes()
            for at in chance.sample(range(len(whole)), 40):
                flip(path / name, at)
                state = state_of(0)
                with pytest.raises(CheckpointError, match=r"no checkpoint is whole: .*step-0*3"):
                    checkpoints.load(state)
                assert state["net"]["w"].eq(0).all()
                (path / name).write_bytes(whole)
        assert checkpoints.load(state) == 3


def test_a_folder_that_is_not_one_is_found_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "step-00000007").write_text("")
    with pytest.raises(CheckpointError, match="step-00000007: expected a checkpoint's folder"):
        Checkpoints(tmp_path)
    (tmp_path / "step-00000007").unlink()
    with Checkpoints(tmp_path / "c") as checkpoints:
        (tmp_path / "c").rmdir()
        with pytest.raises(CheckpointError, match="folder of the checkpoints was removed"):
            checkpoints.save(state_of(1), 1)


def usage() -> tuple[int, int]:
    """Files and threads of this process."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def many(rank: int, folder: str) -> None:
    part = dist.new_group([0, 1])
    held = []
    for number in range(5):
        _, state = sharded(rank, 2, float(number))
        with Checkpoints(f"{folder}/{number}") as checkpoints:
            for step in range(2):
                checkpoints.save(state, step)
            assert checkpoints.load(state) == 1
            with Checkpoints(f"{folder}/{number}/inner", process_group=part) as inner:
                assert inner.latest() is None
        held.append(usage())
    assert all(now <= then for now, then in zip(held[-1], held[1], strict=True)), held
    checkpoints.close()
    for after in (
        checkpoints.latest,
        lambda: checkpoints.load(state),
        lambda: checkpoints.save(state, 2),
    ):
        with pytest.raises(RuntimeError, match="4: these checkpoints were closed"):
            after()


def test_closed_checkpoints_leave_nothing_open(tmp_path: Path) -> None:
    processes.run(2, many, str(tmp_path))
