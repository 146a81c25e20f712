"""A dead, stopped, hanging or failing rank ends the others with its name, in the stated time."""

import json
import multiprocessing as mp
import os
import signal
import time
from dataclasses import asdict
from pathlib import Path

import processes
import pytest
import torch
import torch.distributed as dist

from fused_losses.centers.watch import EXIT_CODE, Mark, RankFailure, RankWatch

pytestmark = pytest.mark.processes

INTERVAL, TIMEOUT, HANG = 0.1, 1.5, 2.0
BOUND = 4 * INTERVAL
SLACK = 4.0  # for a machine that others use, too
STEPS = 3
CULPRIT = 2


def rank_main(rank: int, world: int, folder: str, deed: str) -> None:
    """Steps of one all-reduce each; the culprit does its deed in the second one."""
    torch.set_num_threads(1)
    log = os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    flushed = Path(folder, f"{rank}.flushed")
    options = {"interval": INTERVAL, "timeout": TIMEOUT, "hang_timeout": HANG}
    if deed == "starts late" and rank == CULPRIT:
        time.sleep(TIMEOUT + 1.0)
    watch = RankWatch(
        dist.PrefixStore("watch", store),
        rank,
        world,
        start_timeout=60.0,
        on_failure=flushed.write_text,
        **options,
    )
    try:
        with watch:
            for step in range(STEPS):
                watch.progress(step)
                dist.all_reduce(torch.ones(1))
                if step == 1 and rank == CULPRIT:
                    Path(folder, "deed").write_text(str(os.getpid()))
                    commit(deed)
    except RankFailure as failure:
        Path(folder, f"{rank}.raised").write_text(str(failure))
        os._exit(3)
    except ArithmeticError:
        os._exit(4)


def commit(deed: str) -> None:
    if deed == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif deed == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif deed == "sleeps":
        time.sleep(600)
    elif deed == "raises":
        raise ArithmeticError("no such number")


class Run:
    """What became of three ranks."""

    def __init__(self, folder: Path, deed: str, limit: float) -> None:
        # ranks fork from a process that has torch: starting Python thrice would take the time
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(processes.PRELOAD)
        ranks = [
            context.Process(target=rank_main, args=(rank, 3, str(folder), deed))
            for rank in range(3)
        ]
        for process in ranks:
            process.start()
        try:
            others = [process for rank, process in enumerate(ranks) if rank != CULPRIT]
            deadline = time.monotonic() + 120
            while deed != "starts late" and not (folder / "deed").exists():
                assert time.monotonic() < deadline, "the ranks did not start"
                time.sleep(0.01)
            start = time.monotonic()
            for process in others:
                process.join(limit if deed != "starts late" else 60)
            self.seconds = time.monotonic() - start
            self.codes = [process.exitcode for process in ranks]
            self.pid = ranks[CULPRIT].pid
            self.told = [(folder / f"{rank}.err").read_text() for rank in range(3)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def named(run: Run, text: str) -> bool:
    return f"rank {CULPRIT} (host " in text and f"pid {run.pid})" in text


def told_by(run: Run, folder: Path, rank: int) -> str:
    """What a rank ended with: its main thread's error, or its watch's line."""
    assert run.codes[rank] in (3, EXIT_CODE)
    return (folder / f"{rank}.raised").read_text() if run.codes[rank] == 3 else run.told[rank]


def test_killed_rank_is_named_in_the_error_of_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path, "killed", TIMEOUT + BOUND + SLACK)
    for rank in (0, 1):
        text = told_by(run, tmp_path, rank)
        assert named(run, text) and "died: no heartbeat for" in text
    # a rank that talked to the dead one has gloo's error, which the named one replaces
    assert 3 in run.codes
    assert run.codes[CULPRIT] == -signal.SIGKILL


def test_stopped_rank_ends_the_others(tmp_path: Path) -> None:
    run = Run(tmp_path, "stopped", TIMEOUT + BOUND + SLACK)
    for rank in (0, 1):
        text = told_by(run, tmp_path, rank)
        assert named(run, text) and "is stopped: no heartbeat for" in text
    assert run.codes[CULPRIT] is None  # still stopped: no one else's to end
    assert run.seconds > TIMEOUT - 2 * INTERVAL


def test_sleeping_rank_hangs_and_is_told_from_those_that_wait_for_it(tmp_path: Path) -> None:
    run = Run(tmp_path, "sleeps", HANG + BOUND + SLACK)
    for rank in (0, 1):
        text = told_by(run, tmp_path, rank).rpartition("ends: ")[2]
        assert named(run, text) and "hangs in step 1: no progress for" in text
        assert "test_watch.py" in text and "in commit" in text
        assert "rank 0 (host" not in text and "rank 1 (host" not in text
    ended = run.codes.index(EXIT_CODE)
    assert f"rank {ended} (host" in run.told[ended]
    # the hook has the verdict
    assert named(run, (tmp_path / f"{ended}.flushed").read_text())
    assert run.seconds > HANG - 2 * INTERVAL


def test_failing_rank_tells_the_others_its_error(tmp_path: Path) -> None:
    run = Run(tmp_path, "raises", TIMEOUT + BOUND + SLACK)
    assert run.codes[CULPRIT] == 4
    for rank in (0, 1):
        text = told_by(run, tmp_path, rank)
        assert named(run, text) and "raised ArithmeticError: no such number" in text


def serve(folder: str) -> None:
    """The ranks' store, in a process that then stands still."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    Path(folder, "port.part").write_text(str(store.port))
    Path(folder, "port.part").rename(Path(folder, "port"))
    while not store.check(["False", "True"]):
        time.sleep(0.01)
    commit("stopped")


def wait_or_raise(folder: str, raises: bool) -> None:
    log = os.open(f"{folder}/{raises}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 2)
    store = dist.TCPStore("localhost", int(Path(folder, "port").read_text()), is_master=False)
    watch = RankWatch(store, 0, 1, interval=INTERVAL, timeout=TIMEOUT)
    with watch:
        watch.store.set(f"{raises}", "")
        time.sleep(4 * INTERVAL)
        if raises:
            raise ArithmeticError("no such number")
        time.sleep(60)


def test_a_store_that_stands_still_ends_its_ranks(tmp_path: Path) -> None:
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOAD)
    server = context.Process(target=serve, args=(str(tmp_path),))
    server.start()
    while not (tmp_path / "port").exists():
        assert server.is_alive()
        time.sleep(0.01)
    ranks = [
        context.Process(target=wait_or_raise, args=(str(tmp_path), raises))
        for raises in (False, True)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT + BOUND + SLACK)
        assert [process.exitcode for process in ranks] == [EXIT_CODE, 1]
    finally:
        for process in (server, *ranks):
            process.kill()
            process.join()
    assert "the ranks' store has not answered for" in (tmp_path / "False.err").read_text()
    assert "ArithmeticError: no such number" in (tmp_path / "True.err").read_text()


def test_slow_start_trips_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, "starts late", 60.0)
    assert run.codes[:2] == [0, 0]
    assert not any("ends:" in text for text in run.told)


def hash_store_watch(**options: float) -> RankWatch:
    given = {"interval": 0.02, "timeout": 0.5, "hang_timeout": 60.0, "start_timeout": 60.0}
    return RankWatch(dist.HashStore(), 0, 2, **{**given, **options})


def test_everyone_waiting_in_one_place_is_told_as_such() -> None:
    watch = hash_store_watch()
    watch.progress(7)
    watch._send()
    watch.store.set("1", watch.store.get("0").replace(b'"rank": 0', b'"rank": 1'))
    told = watch._who_hangs(3.0)
    assert told.startswith("no rank made progress in step 7 for 3.0 s: rank 0 (host ")
    assert "; rank 1 (host " in told


def test_first_verdict_stays() -> None:
    watch = hash_store_watch()
    assert watch._judge("first") == "first"
    assert watch._judge("second") == "first"


def test_rank_that_ended_well_is_not_missed() -> None:
    watch = hash_store_watch(timeout=0.1)
    other = Mark(1, "elsewhere", 1, "", done=True)
    watch.store.set("1", json.dumps(asdict(other)))
    with watch:
        time.sleep(0.5)
    assert watch.verdict is None
    assert b'"done": true' in watch.store.get("0")


def test_error_that_is_no_peers_fault_is_left_alone() -> None:
    watch = hash_store_watch()
    with pytest.raises(KeyError, match="mine"), watch:
        raise KeyError("mine")
    assert b"raised KeyError" in watch.store.get("verdict")


@pytest.mark.parametrize(
    "options",
    [
        {"interval": 0.0},
        {"interval": 0.3},
        {"hang_timeout": 0.01},
        {"start_timeout": 0.1},
    ],
)
def test_times_that_cannot_work_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        hash_store_watch(**options)
    with pytest.raises(ValueError, match="rank: expected 0 to 1"):
        RankWatch(dist.HashStore(), 2, 2)
