"""The CUDA C++ kernels from Python: one function, `launch`, and the library behind it.

The library has plain functions (csrc/cuda/, FL_EXPORT), each with one struct of arguments whose
fields it describes itself. On a GPU the library is the one that nvcc built. With
FUSED_LOSSES_CUDA_ON_HOST=1 it is the same sources built for the host (`make cuda-host`): they
run on CPU tensors, checked and slowly (csrc/cuda/host/simulator.h).
"""

from __future__ import annotations

import ctypes
import os
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from fused_losses.backends.gpu import device as gpu_device
from fused_losses.backends.gpu import rehearsal

FOLDER = Path(__file__).parents[2]
ON_DEVICE, ON_HOST = "libfused_losses_cuda.so", "libfused_losses_cuda_host.so"
WITHOUT = "no_cuda_library.txt"  # setup.py leaves it where it builds no library
ALONE = threading.Lock()
# as csrc/cuda/platform.h numbers the element types
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
CODES = {
    "P": ctypes.c_void_p,
    "p": ctypes.c_void_p,  # what it points to is only read
    "?": ctypes.c_bool,
    "i": ctypes.c_int32,
    "q": ctypes.c_int64,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}


def on_host() -> bool:
    return os.environ.get("FUSED_LOSSES_CUDA_ON_HOST") == "1"


def path() -> Path:
    """The library's file; FUSED_LOSSES_CUDA_LIBRARY names another one (a build with sanitizers)."""
    named = os.environ.get("FUSED_LOSSES_CUDA_LIBRARY")
    return Path(named) if named else FOLDER / (ON_HOST if on_host() else ON_DEVICE)


def absent() -> str:
    """Why there is no library, as the build that made none left it beside the package."""
    note = FOLDER / WITHOUT
    if note.is_file():
        return f"the CUDA C++ kernels are not built: {note.read_text().strip()}"
    return "the CUDA C++ kernels are not built: no install has made them"


def built() -> str:
    """What the library that would be loaded was built for."""
    if not path().is_file():
        return "not built"
    if on_host():
        return "built for the host"
    try:
        return architectures()
    except (OSError, AttributeError) as error:
        return f"does not load ({error})"


def architectures() -> str:
    tell = library().fused_losses_architectures
    tell.restype = ctypes.c_char_p
    return ", ".join(f"sm_{a}" for a in tell().decode().split())


@cache
def unusable() -> str | None:
    """Why the library that was found cannot run on any device of this machine, or None."""
    try:
        driver, runtime = library().fused_losses_driver(), library().fused_losses_runtime()
    except OSError as error:
        return f"the CUDA C++ kernels do not load: {error}"
    except AttributeError as error:
        return f"the CUDA C++ kernels are not this version's, install again: {error}"
    if driver == 0:
        return "the CUDA C++ kernels find no driver"
    # of one major version, an older driver runs machine code of a newer one
    if driver // 1000 < runtime // 1000:
        return (
            f"the driver knows CUDA up to {_version(driver)}, the CUDA C++ kernels are built with "
            f"{_version(runtime)}: update the driver, or build them with an older nvcc"
        )
    return None


@cache
def no_code_on(device: int) -> str | None:
    """Why the library has nothing that this device can run, or None."""
    code = library().fused_losses_kernels_on(device)
    if code == 0:
        return None
    told = library().fused_losses_error(code).decode()
    return f"device cuda:{device}: {told}; the CUDA C++ kernels are built for {architectures()}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def library() -> ctypes.CDLL:
    out = ctypes.CDLL(str(path()))
    out.fused_losses_error.restype = ctypes.c_char_p
    return out


@cache
def _function(name: str) -> tuple:
    """The function, its struct, and its fields' names and codes."""
    function = getattr(library(), f"fused_losses_{name}")
    describe = getattr(library(), f"fused_losses_{name}_fields")
    describe.restype = ctypes.c_char_p
    fields = [(text[1:], text[0]) for text in describe().decode().split()]
    members = [(field, CODES[code]) for field, code in fields]
    struct = type(name, (ctypes.Structure,), {"_fields_": members})
    return function, struct, dict(fields)


def launch(name: str, **arguments: Tensor | float | int | bool | None) -> None:
    """Runs an exported function on the device of its tensors, on the current stream of that.

    Tensors give their addresses, None null. Nothing is copied or made contiguous, and nothing waits
    for the device. Raises TypeError unless the arguments are the struct's fields, RuntimeError when
    a launch fails.
    """
    if rehearsal.heard() is not None:
        return
    function, struct, fields = _function(name)
    if arguments.keys() != fields.keys():
        missing, unknown = fields.keys() - arguments.keys(), arguments.keys() - fields.keys()
        raise TypeError(f"{name}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    tensors = {name: t for name, t in arguments.items() if isinstance(t, Tensor)}
    values = {
        field: value.data_ptr() if isinstance(value, Tensor) else value
        for field, value in arguments.items()
    }
    if on_host():
        with ALONE:  # the library knows one launch's buffers at a time
            announce(list(tensors.values()), [fields[name] == "p" for name in tensors])
            code = function(ctypes.byref(struct(**values)), None)
    else:
        with gpu_device.current(tensors.values()):
            stream = torch.cuda.current_stream().cuda_stream
            code = function(ctypes.byref(struct(**values)), ctypes.c_void_p(stream))
    if code:
        raise RuntimeError(f"{name}: {library().fused_losses_error(code).decode()}")


def extent(t: Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last."""
    if t.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size()


def announce(tensors: list[Tensor], readonly: list[bool]) -> None:
    """Tells the host build which memory the kernels may touch, and which of it only read."""
    count = len(tensors)
    begin = (ctypes.c_void_p * count)(*(t.data_ptr() for t in tensors))
    size = (ctypes.c_size_t * count)(*(extent(t) for t in tensors))
    library().fused_losses_buffers(count, begin, size, (ctypes.c_bool * count)(*readonly))
