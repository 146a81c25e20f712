"""Calls at once: threads, processes and gradients elsewhere give the bits of a call alone."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from calls import Call, first_of_each, runs_on, same
from conftest import require
from hostile_readers import all_readers
from places import search_path
from torch import Tensor

import fused_losses
from fused_losses import backends
from fused_losses.base import compiled
from fused_losses.base.examples import TABLE

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("concurrency")]

THREADS = 8
SEVERAL = (200, 230, 24)  # rows and classes of more than one block
OPENS = int(os.environ.get("FUSED_LOSSES_OPENS", "200"))


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    # entered once: within threads the filters would be each other's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_threads(run: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(run, index) for index in range(THREADS)]:
            done.result(timeout=300)


def names(backend: str) -> list[str]:
    return [name for name in TABLE if runs_on(name, backend)]


@pytest.fixture
def own_threads() -> Iterator[None]:
    """Kernels run on threads of ours, as on a busy machine."""
    require("cpu")
    compiled.extension().own_threads(600)
    yield
    compiled.extension().own_threads(0)


def test_eight_threads_share_our_workers(own_threads: None) -> None:
    some = first_of_each(names("cpu"))
    alone = {name: Call(name, "cpu", SEVERAL).bits() for name in some}

    def run(index: int) -> None:
        for name in some[index % 2 :: 2]:
            assert same(Call(name, "cpu", SEVERAL).bits(), alone[name]), name

    in_threads(run)
    assert compiled.extension().started_workers() >= 1


@pytest.mark.parametrize("backend", ["cpu", "bounded"])
def test_eight_threads_call_different_losses(backend: str) -> None:
    require(backend)
    some = names(backend) if backend == "cpu" else first_of_each(names(backend))
    alone = {name: Call(name, backend).bits() for name in some}

    def run(index: int) -> None:
        mine = list(alone)
        random.Random(index).shuffle(mine)
        for name in mine:
            assert same(Call(name, backend).bits(), alone[name]), name

    in_threads(run)


def test_gradients_of_another_thread() -> None:
    require("cpu")
    # forward here, backward in eight threads, each of its share of the graphs
    calls = {name: Call(name, "cpu") for name in names("cpu")}
    found = {name: call.forward() for name, call in calls.items()}
    shares = [list(found)[index::THREADS] for index in range(THREADS)]
    gradients: dict[str, list[Tensor]] = {}

    def run(index: int) -> None:
        for name in shares[index]:
            gradients[name] = calls[name].backward(found[name])

    in_threads(run)
    for name in found:
        again = Call(name, "cpu")
        assert same(gradients[name], again.backward(again.forward())), name


class Interrupted(Exception):
    """What a user's own function raises."""


class Margin(torch.nn.Module):
    """A margin whose value, or whose derivative, raises."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, cosine: Tensor) -> Tensor:
        if self.where == "forward":
            raise Interrupted
        if cosine.requires_grad:
            cosine.register_hook(self._interrupt)
        return cosine * 1.0

    def _interrupt(self, grad: Tensor) -> None:
        raise Interrupted


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_exception_of_a_users_function_leaves_the_others_alone(where: str) -> None:
    require("cpu")
    x, w = torch.randn(24, 16), torch.randn(40, 16)
    labels = torch.arange(24)
    some = first_of_each(names("cpu"))
    alone = {name: Call(name, "cpu").bits() for name in some}

    def interrupted() -> None:
        leaf = x.clone().requires_grad_()
        with backends.use_backend("cpu"):
            loss = fused_losses.margin_softmax(leaf, w, labels, margin=Margin(where))
            loss.backward()

    def run(index: int) -> None:
        for name in some[index::THREADS]:
            if index % 2:
                with pytest.raises(Interrupted):
                    interrupted()
                # what was forced for the block is free again
                assert backends.requested(None) == "auto"
            assert same(Call(name, "cpu").bits(), alone[name]), name

    in_threads(run)


# ---- processes ----------------------------------------------------------------------------------

PROCESSES = """
import multiprocessing, os, signal, sys, warnings
import torch
import fused_losses
from fused_losses.base import compiled
from calls import Call, first_of_each, runs_on, same
from fused_losses.base.examples import TABLE

SHAPE = (96, 160, 48)
SOME = first_of_each(n for n in TABLE if runs_on(n, "cpu"))[::6]

def bits(names):
    warnings.simplefilter("ignore")
    return [[t.numpy() for t in Call(name, "cpu", SHAPE).bits()] for name in names]

ROWS = torch.linspace(-1, 1, 300 * 32).sin().view(300, 32)
OTHERS = ROWS.flip(1)

def of_several_blocks():
    x = ROWS.clone().requires_grad_()
    loss = fused_losses.info_nce(x, OTHERS, backend="cpu")
    loss.backward()
    return [loss.detach(), x.grad]

if __name__ == "__main__":
    torch.set_num_threads(2)
    here = bits(SOME)
    blocks = of_several_blocks()
    # a product of PyTorch's own has threads, too
    wide = torch.ones(600, 600)
    product = (wide @ wide).exp().sum().item()
    context = multiprocessing.get_context(sys.argv[1])
    with context.Pool(1) as pool:
        for found in pool.map(bits, [SOME]):
            for name, one, other in zip(SOME, here, found, strict=True):
                one, other = [[torch.from_numpy(t) for t in ts] for ts in (one, other)]
                assert same(one, other), name
    if sys.argv[1] == "fork":
        child = os.fork()
        if child == 0:
            signal.alarm(100)
            fine = torch.get_num_threads() == 1 and (wide @ wide).exp().sum().item() == product
            # in kernels it may have threads of its own
            fine = fine and compiled.extension().started_workers() == 0
            torch.set_num_threads(2)
            fine = fine and same(of_several_blocks(), blocks)
            fine = fine and compiled.extension().started_workers() == 1
            os._exit(0 if fine else 1)
        assert os.waitpid(child, 0)[1] == 0
    print("alike")
"""

QUIET = """
import os
import torch
import fused_losses
from fused_losses.base import compiled

assert compiled.extension() is not None
torch.set_num_threads(2)
child = os.fork()
if child == 0:
    # no kernel has run here: nothing is lost, and nothing is changed
    os._exit(0 if torch.get_num_threads() == 2 else 1)
assert os.waitpid(child, 0)[1] == 0
print("alike")
"""


def told(program: str, *arguments: str, folder: Path) -> str:
    path = folder / "program.py"
    path.write_text(program)
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, str(path), *arguments],
        env={**environment, "PYTHONPATH": search_path()},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.processes
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_process_that_has_called(start: str, tmp_path: Path) -> None:
    require("cpu")
    assert "alike" in told(PROCESSES, start, folder=tmp_path)


@pytest.mark.processes
def test_a_fork_of_a_process_that_has_not_called_keeps_its_threads(tmp_path: Path) -> None:
    require("cpu")
    assert "alike" in told(QUIET, folder=tmp_path)


# ---- what stays ---------------------------------------------------------------------------------


def test_readers_leave_no_descriptor_open(tmp_path: Path) -> None:
    readers = all_readers(tmp_path)
    for reader in readers.values():
        reader.read()
    opened = len(os.listdir("/proc/self/fd"))
    for count, reader in enumerate(list(readers.values()) * -(-OPENS // len(readers))):
        reader.read()
        assert len(os.listdir("/proc/self/fd")) <= opened, count
