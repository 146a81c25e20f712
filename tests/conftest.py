"""What every test shares: the backends by name, a fixed seed, and poisoned uninitialised memory."""

from __future__ import annotations

import gc
import os
import signal
import zlib
from collections import defaultdict

import hypothesis
import pytest
import torch
import torch._functorch.config as functorch_config

import fused_losses
from fused_losses import backends, functional, losses
from fused_losses.base.late import everything

# what is imported while a test plants faults would keep them, and who looks through a module sees
# what is there (tests/base/test_late.py: by itself)
for _module in (fused_losses, functional, losses):
    everything(_module)

# with FUSED_LOSSES_CUDA_ON_HOST=1 the CUDA kernels run on CPU tensors, too
CUDA = ("cuda",) if os.environ.get("FUSED_LOSSES_CUDA_ON_HOST") == "1" else ()
BACKENDS = ("reference", "bounded", "cpu", *CUDA)
STREAMED = ("bounded", "cpu", *CUDA)  # those that must never hold the N x C scores
MEASURED = ("bounded", "cpu")  # whose memory is measured at sizes that take no host minutes

LONG = ("slow", "processes", "mutants", "ptx")  # what --one-row leaves out

# Inductor's own pool of processes would import torch once more beside each of pytest's
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

# a shell has what it starts in the background ignore Ctrl-C, which tests send
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# the same examples in every run: a failure here is a failure everywhere
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, max_examples=40)
hypothesis.settings.load_profile("fixed")

# torch warns of outputs that share memory, and raises where CI is set: here it always does
functorch_config.error_on_custom_op_aliasing = True


def require(name: str) -> str:
    """The backend's name; skips with its own reason where it cannot run.

    `make test` sets FUSED_LOSSES_REQUIRE_CPU=1: there a missing extension is a failure, so that a
    broken build cannot pass as a skipped one.
    """
    why = backends.unavailable(name)
    if why is not None:
        if name == "cpu" and os.environ.get("FUSED_LOSSES_REQUIRE_CPU") == "1":
            pytest.fail(why)
        pytest.skip(why)
    return name


def widest(name: str) -> torch.dtype:
    """The widest dtype that a backend takes."""
    return torch.float32 if name == "cuda" else torch.float64


def _refuses_float64(item: pytest.Item) -> bool:
    """Whether this row gives float64 to the CUDA kernels: by its mark, or by its dtype."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    row = list(item.callspec.params.values())
    if not any(isinstance(value, str) and value == "cuda" for value in row):
        return False
    return item.get_closest_marker("float64") is not None or any(v is torch.float64 for v in row)


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "of each test that is not slow one row, drawn by the test's name: `make check`"
    parser.addoption("--one-row", action="store_true", help=text)


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not _refuses_float64(item)]
    for item in items:
        # processes share a module's tests, but not one test's rows
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_test_of(item)))
    if config.getoption("one_row"):
        rows = defaultdict(list)
        for item in items:
            if not any(item.get_closest_marker(long) for long in LONG):
                rows[_test_of(item)].append(item)
        kept = {table[zlib.crc32(test.encode()) % len(table)] for test, table in rows.items()}
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]
    # what takes long starts first, so that no process waits for it at the end
    slow = {_group(item) for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: _group(item) not in slow)


def pytest_collection_finish() -> None:
    # the items and what was imported stay: no collection of garbage walks them again
    gc.collect()
    gc.freeze()


def _test_of(item: pytest.Item) -> str:
    """The test without its row."""
    return item.nodeid.partition("[")[0]


def _group(item: pytest.Item) -> str:
    mark = item.get_closest_marker("xdist_group")
    assert mark is not None
    return mark.args[0]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(params=STREAMED)
def streamed(request: pytest.FixtureRequest) -> str:
    return require(request.param)


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    # crc32 and not hash(): the same in every process; without the folder and the group that xdist
    # appends, neither of which may change what a test draws
    test = f"tests/{request.path.name}::{request.node.name}"
    # torch.manual_seed notes a stack trace for each kind of device: a third of an empty test's time
    torch.default_generator.manual_seed(zlib.crc32(test.encode()))


@pytest.fixture(autouse=True)
def _poison() -> object:
    """torch.empty, also from C++, comes back full of NaN (integers: of their largest value).

    Torch does that itself in deterministic mode, so reading what was never written fails a test,
    and every test also runs as `torch.use_deterministic_algorithms` asks.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
