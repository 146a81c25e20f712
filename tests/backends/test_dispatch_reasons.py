"""What each backend has against a call, on machines that stubs stand for; and plain calls' helpers.

What a fault in a reason changes is seen here first: `dispatch_mutants.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import require
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_losses.backends.bounded import capability as bounded
from fused_losses.backends.cpu import capability as cpu
from fused_losses.backends.cuda import capability as cuda
from fused_losses.backends.cuda import launch
from fused_losses.backends.reference import capability as reference
from fused_losses.backends.triton import capability as triton
from fused_losses.base import compiled

CPU, GPU, ELSEWHERE = torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")
PRECISIONS = ("fp32", "tf32", "mixed", "bf16")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("path", [reference, bounded], ids=["reference", "bounded"])
def test_pure_pytorch_runs_anything_in_its_own_precision(path: Any) -> None:
    assert path.unavailable() is None
    for device in (CPU, GPU, ELSEWHERE):
        for dtype in DTYPES:
            assert path.reasons_against(device, dtype, "fp32") == []
            for precision in PRECISIONS[1:]:
                (why,) = path.reasons_against(device, dtype, precision)
                assert why.startswith(f"precision='{precision}': the ")


# ---- cpu ----------------------------------------------------------------------------------------


def test_the_extension_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: ModuleNotFoundError("no module"))
    told = str(cpu.unavailable())
    assert told.startswith("the C++ extension is not built: run `pip") and "(no module)" in told
    monkeypatch.setattr(cpu, "load", lambda: ImportError("for another PyTorch"))
    assert cpu.unavailable() == "the C++ extension is not used: for another PyTorch"
    monkeypatch.setattr(cpu, "load", lambda: compiled)
    assert cpu.unavailable() is None


@pytest.mark.parametrize("spec", [None, SimpleNamespace(origin=None)], ids=["none", "no file"])
def test_an_extension_that_is_nowhere(spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleNotFoundError("no module")

    def missing(name: str) -> None:
        assert name == "fused_losses._C"
        raise absent

    monkeypatch.setattr(compiled, "find_spec", lambda name: spec)
    monkeypatch.setattr(compiled.importlib, "import_module", missing)
    assert compiled.load.__wrapped__() is absent


@pytest.mark.parametrize(
    "version", ["2.13.1", "2.13.0+cpu", "2.1.0", "3.13.0", "2.14.0", ""], ids=lambda v: v or "none"
)
def test_an_extension_of_another_minor_release(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_C.so"
    told = compiled.BUILT_FOR + version.encode() + b"\0" if version else b""
    file.write_bytes(b"code" + told + b"more\0")
    monkeypatch.setattr(compiled.torch, "__version__", "2.13.0+cu130")
    if version.startswith("2.13."):
        return compiled.check_torch(file)
    with pytest.raises(ImportError) as refused:
        compiled.check_torch(file)
    assert str(refused.value).startswith(
        f"_C.so was built for torch {version or 'an unknown version'}, this is torch 2.13.0+cu130: "
    )
    # it is not loaded, and `load` tells why
    monkeypatch.setattr(compiled, "find_spec", lambda name: SimpleNamespace(origin=str(file)))
    assert str(compiled.load.__wrapped__()) == str(refused.value)
    return None


@pytest.mark.parametrize("narrow", [True, False])
def test_what_the_cpu_kernels_take(narrow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built = SimpleNamespace(has_bf16=lambda: narrow, capability=lambda: "avx9")
    monkeypatch.setattr(cpu, "extension", lambda: built)
    for dtype in DTYPES:
        assert cpu.reasons_against(CPU, dtype, "fp32") == []
        (why,) = cpu.reasons_against(CPU, dtype, "tf32")
        assert why == "precision='tf32': a CPU has no tf32 products; use 'fp32' or 'bf16'"
        for precision in ("bf16", "mixed"):
            found = cpu.reasons_against(CPU, dtype, precision)
            if dtype == torch.float64:
                told = f"precision='{precision}': float64 inputs are multiplied in float64"
                assert found == [told]
            elif narrow:
                assert found == []
            else:
                assert [why.startswith(f"precision='{precision}': this CPU") for why in found] == [
                    True
                ]
                assert "(capability avx9)" in found[0]
    (why,) = cpu.reasons_against(GPU, torch.float32, "fp32")
    assert why == "tensors are on cuda:1, the cpu kernels need them on the CPU"
    assert len(cpu.reasons_against(GPU, torch.float64, "bf16")) == 2


# ---- triton -------------------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with such a GPU, or none; interpreted: TRITON_INTERPRET=1."""

    def has(
        capability: tuple[int, int] | None, *, interpreted: bool = False, hip: str | None = None
    ) -> None:
        def of(device: torch.device) -> tuple[int, int]:
            assert device == GPU and capability is not None
            return capability

        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpreted else "0")
        monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", of)
        monkeypatch.setattr(torch.version, "hip", hip)

    return has


def test_whether_triton_can_run_at_all(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton, "find_spec", lambda name: name == "triton" or None)
    gpu(None)
    assert "no CUDA GPU (TRITON_INTERPRET=1" in str(triton.unavailable())
    gpu(None, interpreted=True)
    assert triton.unavailable() is None
    gpu((9, 0))
    assert triton.unavailable() is None
    monkeypatch.setattr(triton, "find_spec", lambda _: None)
    for interpreted in (False, True):
        gpu((9, 0), interpreted=interpreted)
        assert triton.unavailable() == "triton is not installed"


def test_what_the_triton_kernels_take(gpu: Callable[..., None]) -> None:
    def against(device: torch.device, dtype: torch.dtype, precision: str = "fp32") -> list[str]:
        return triton.reasons_against(device, dtype, precision)

    for interpreted, device in ((False, GPU), (True, CPU)):
        gpu((8, 0), interpreted=interpreted)
        for precision in PRECISIONS:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                assert against(device, dtype, precision) == []
            (why,) = against(device, torch.float64, precision)
            assert why.startswith("dtype torch.float64: the kernels take")
    (why,) = against(GPU, torch.float32)
    assert why == "device cuda:1: TRITON_INTERPRET=1 runs on CPU tensors only"
    gpu((7, 5))
    for precision in ("fp32", "tf32"):
        (why,) = against(GPU, torch.float32, precision)
        assert "8.0 or newer" in why
    (why,) = against(CPU, torch.float32)
    assert why == "device cpu: the kernels run on a GPU (or TRITON_INTERPRET=1)"
    gpu((7, 5), hip="6.4")
    assert against(GPU, torch.float32) == against(GPU, torch.float32, "bf16") == []
    (why,) = against(GPU, torch.float32, "tf32")
    assert why == "precision='tf32': not on this GPU; use fp32, mixed or bf16"


# ---- cuda ---------------------------------------------------------------------------------------


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A file in the place of the kernels' library."""
    file = tmp_path / "library.so"
    file.write_bytes(b"")
    monkeypatch.setenv("FUSED_LOSSES_CUDA_LIBRARY", str(file))
    monkeypatch.setattr(cuda, "unusable", lambda: "what the driver says")
    monkeypatch.setattr(cuda, "no_code_on", lambda index: f"no code {index}" if index else None)
    monkeypatch.setattr(launch, "architectures", lambda: "sm_80")
    yield file


def test_whether_the_cuda_kernels_can_run_at_all(
    library: Path, gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu((9, 0))
    assert cuda.unavailable() == "what the driver says"
    monkeypatch.setattr(cuda, "unusable", lambda: None)
    assert cuda.unavailable() is None
    assert launch.built() == "sm_80"
    for error in (OSError, AttributeError):
        monkeypatch.setattr(launch, "architectures", _raises(error("of another version")))
        assert launch.built() == "does not load (of another version)"
    gpu(None)
    assert str(cuda.unavailable()).startswith("no GPU; FUSED_LOSSES_CUDA_ON_HOST=1")
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "1")
    assert cuda.unavailable() is None
    assert launch.built() == "built for the host"
    library.unlink()
    assert "`make cuda-host` builds it" in str(cuda.unavailable())
    assert launch.built() == "not built"
    gpu((9, 0))
    assert str(cuda.unavailable()).startswith("the CUDA C++ kernels are not built: ")
    assert launch.built() == "not built"


def test_where_the_library_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(compiled.__file__).parents[1]
    monkeypatch.delenv("FUSED_LOSSES_CUDA_LIBRARY", raising=False)
    for host, name in (("1", "libfused_losses_cuda_host.so"), ("0", "libfused_losses_cuda.so")):
        monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", host)
        assert launch.on_host() == (host == "1") and launch.path() == package / name


@pytest.mark.usefixtures("library")
def test_what_the_cuda_kernels_take(
    gpu: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = (torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int8)
    first = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for capability in ((8, 0), (9, 0)):
        gpu(capability)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for dtype in taken:
            for precision in PRECISIONS:
                assert cuda.reasons_against(first, dtype, precision) == []
        assert cuda.reasons_against(GPU, torch.float32, "fp32") == ["no code 1"]
        # the device that is current
        unnamed = torch.device("cuda")
        assert cuda.reasons_against(unnamed, torch.float32, "fp32") == ["no code 3"]
        (why,) = cuda.reasons_against(first, torch.float64, "fp32")
        assert why == "torch.float64: expected float32, bfloat16 or float16"
        (why,) = cuda.reasons_against(CPU, torch.float32, "fp32")
        assert why == "device cpu: the kernels run on cuda tensors here"
    gpu((7, 5))
    (why,) = cuda.reasons_against(GPU, torch.float32, "fp32")
    assert why == "device cuda:1: the kernels are built for sm_80 and later"
    monkeypatch.setenv("FUSED_LOSSES_CUDA_ON_HOST", "1")
    for dtype in taken:
        for precision in PRECISIONS:
            against = cuda.reasons_against(CPU, dtype, precision)
            told = ["precision='tf32': the host has no tf32 products"]
            assert against == (told if precision == "tf32" else [])
    (why,) = cuda.reasons_against(GPU, torch.float32, "fp32")
    assert why == "device cuda:1: the kernels run on cpu tensors here"


# ---- the extension's helpers --------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An extension that says which tensors it was asked of."""

    class Extension:
        def __init__(self) -> None:
            self.plain, self.asked = True, []

        def all_plain(self, *tensors: torch.Tensor) -> bool:
            self.asked.append(tensors)
            return self.plain

        def rows_meet(self) -> None: ...

    out = Extension()
    monkeypatch.setattr(compiled, "load", lambda: out)
    compiled._with_helpers.cache_clear()
    yield out
    monkeypatch.undo()
    compiled._with_helpers.cache_clear()


def test_plain_eager_calls_have_helpers(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(2, 3)
    assert compiled.extension() is built
    assert compiled.helpers(rows, rows) is built and len(built.asked[0]) == 2
    built.plain = False
    assert compiled.helpers(rows) is None
    built.plain, built.asked = True, []
    with monkeypatch.context() as traced:
        traced.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
        assert compiled.helpers(rows) is None and compiled.offered() is None
    assert not built.asked and compiled.helpers() is compiled.offered() is built


class _Look(TorchDispatchMode):
    """A mode that looks at every operation."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_a_transform_has_no_helpers() -> None:
    require("cpu")
    rows = torch.zeros(2, 3)
    own = compiled.offered()

    def found() -> list[bool]:
        return [compiled.helpers() is None, not own.rows_meet(rows, rows)]

    with forward_ad.dual_level():
        assert compiled.transformed() and found() == [True, True]
    assert not compiled.transformed() and found() == [False, False]
    within = []
    for transform in (torch.func.grad, torch.func.vmap):
        transform(lambda x: within.extend(found()) or x.sum())(rows)
    torch.func.jvp(lambda x: within.extend(found()) or x, (rows,), (rows,))
    assert within == [True] * 6 and found() == [False, False]
    with _Look():
        assert found() == [True, True]


def test_rows_that_meet() -> None:
    require("cpu")
    own, rows = compiled.offered(), torch.zeros(2, 3)
    for other in (rows, torch.zeros(5, 3), torch.nn.Parameter(torch.zeros(1, 3))):
        assert own.rows_meet(rows, other)
    strange = torch.zeros(2, 3).as_subclass(type("Strange", (torch.Tensor,), {}))
    for other in (None, [[0.0]], rows[0], rows[:, :2], rows.double(), rows.to("meta"), strange):
        assert not own.rows_meet(rows, other) and not own.rows_meet(other, rows)
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        assert not own.rows_meet(rows.to(dtype), rows.to(dtype))


def test_an_older_extension_has_no_helpers(built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "load", lambda: SimpleNamespace(all_plain=lambda *_: True))
    assert compiled.helpers(torch.zeros(2)) is None
    monkeypatch.setattr(compiled, "load", lambda: ImportError("no module"))
    compiled._with_helpers.cache_clear()
    assert compiled.extension() is None and compiled.helpers(torch.zeros(2)) is None


def test_modes_are_seen() -> None:
    class Dispatch(TorchDispatchMode):
        pass

    class Function(TorchFunctionMode):
        pass

    assert not compiled.seen()
    with Dispatch():
        assert compiled.seen()
        with Dispatch():
            assert compiled.seen()
    with Function():
        assert compiled.seen()
    assert not compiled.seen()


def test_rows_that_are_dense() -> None:
    rows = torch.zeros(6, 8)
    one = rows.T[:, :1]  # whose stride is that of no column
    for dense in (rows, rows[::2], rows[:, 2:5], one, rows[:, :0], rows[:1]):
        assert compiled.dense_rows(dense, rows)
    for apart in (rows.T, rows[:, ::4], rows[0], rows[None]):
        assert not compiled.dense_rows(apart) and not compiled.dense_rows(rows, apart)


@pytest.mark.parametrize("threads", [False, True])
def test_a_forked_child_is_set_to_one_thread_only_where_there_were_several(
    threads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    for loaded in (SimpleNamespace(has_threads=lambda: threads), ImportError("no module")):
        monkeypatch.setattr(compiled, "load", lambda loaded=loaded: loaded)
        compiled._on_one_thread()
    assert asked == [1] * threads


def test_the_extension_is_loaded_once_and_follows_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    require("cpu")
    asked: list[Any] = []
    monkeypatch.setattr(compiled.os, "register_at_fork", lambda **given: asked.append(given))
    loaded = compiled.load.__wrapped__()
    assert loaded.__name__ == "fused_losses._C" and loaded is compiled.extension()
    assert asked == [{"after_in_child": compiled._on_one_thread}]
    monkeypatch.setattr(compiled.importlib, "import_module", _raises(ImportError("no module")))
    assert isinstance(compiled.load.__wrapped__(), ImportError) and len(asked) == 1


def _raises(error: Exception) -> Callable[..., Any]:
    def function(*_: Any) -> Any:
        raise error

    return function
