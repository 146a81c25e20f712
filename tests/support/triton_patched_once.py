"""A pytest plugin for Triton's interpreter, which spends most of its time on bookkeeping.

A launch patches the language once for each module: Triton does so at every call of a function
within a kernel. What the type of a block and the shape of its tensors are is worked out once for
each type, and the type of a tuple when it is asked for. What is computed stays Triton's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from triton.language import core
from triton.runtime import interpreter

patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
patched: set[int] = set()  # the modules of this launch


def patch_once(function: Callable[..., Any]) -> Any:
    module = id(function.__globals__)
    if module in patched:
        return None
    patched.add(module)
    return patch(function)


def launch_anew(self: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    patched.clear()
    launch(self, *args, **kwargs)


min_max = interpreter.ReduceOps.min_max


def min_max_of_nan(
    self: interpreter.ReduceOps, input: Any, val_reduce_op: Any, idx_reduce_op: Any = None
) -> Any:
    """Also of a line that is all NaN, at which the interpreter of Triton 3.9 raises: place 0."""
    if idx_reduce_op not in (np.nanargmax, np.nanargmin):
        return min_max(self, input, val_reduce_op, idx_reduce_op)

    def place(data: np.ndarray, **along: Any) -> Any:
        return np.where(np.isnan(data).all(**along), 0, idx_reduce_op(some(data, **along), **along))

    def some(data: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
        return np.where(np.isnan(data).all(axis=axis, keepdims=True), 0, data)

    return min_max(self, input, val_reduce_op, place)


interpreter.ReduceOps.min_max = min_max_of_nan
interpreter._patch_lang = patch_once
interpreter.GridExecutor.__call__ = launch_anew

block, tensor, np_dtype = core.block_type.__init__, core.tensor.__init__, interpreter._get_np_dtype
blocks: dict[tuple[Any, ...], dict[str, Any]] = {}  # what types have, by element and shape
np_dtypes: dict[str, np.dtype] = {}
SCALAR = {"shape": core.tuple([]), "numel": core.constexpr(1)}


def block_once(self: core.block_type, element_ty: core.dtype, shape: Iterable[Any]) -> None:
    sizes = [s.value if isinstance(s, core.constexpr) else s for s in shape]
    key = (element_ty.name, *sizes)
    if key not in blocks:
        block(self, element_ty, shape)
        shared = core.tensor.__new__(core.tensor)
        tensor(shared, None, self)
        blocks[key] = {**vars(self), "of_tensor": {"shape": shared.shape, "numel": shared.numel}}
    vars(self).update(blocks[key], element_ty=element_ty)


def tensor_once(self: core.tensor, handle: Any, type: core.dtype) -> None:
    of_tensor = type.of_tensor if isinstance(type, core.block_type) else SCALAR
    vars(self).update(of_tensor, handle=handle, type=type, dtype=type.scalar)


def tuple_of(self: core.tuple, args: Iterable[Any], type: Any = None) -> None:
    self.values = list(args)
    if type is not None:
        self.type = type if isinstance(type, core.tuple_type) else core.tuple_type(type)


def tuple_type(self: core.tuple) -> core.tuple_type:
    if "_type" not in vars(self):
        self._type = core._type_for_tuple_values(self.values)
    return vars(self)["_type"]


def np_dtype_once(tt_dtype: core.dtype) -> np.dtype:
    scalar = tt_dtype.scalar
    if scalar.name not in np_dtypes:
        np_dtypes[scalar.name] = np_dtype(scalar)
    return np_dtypes[scalar.name]


core.block_type.__init__ = block_once
core.tensor.__init__ = tensor_once
core.tuple.__init__ = tuple_of
core.tuple.type = property(tuple_type, lambda self, made: vars(self).update(_type=made))
interpreter._get_np_dtype = np_dtype_once
