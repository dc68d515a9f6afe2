"""Number formats without torch: stored elements to float32, and back with one rounding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

F32Array = npt.NDArray[np.float32]
Array = npt.NDArray[np.generic]
BaseDtype = Literal["float32", "bfloat16", "float16"]

# safetensors' names; bytes of one element
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}
# What an adapter's tensors may be stored in: safetensors' name of each base dtype.
STORED_AS: dict[BaseDtype, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_NUMPY: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BF16_INFINITE = 0x7F80
_BF16_MAGNITUDE = np.uint16(0x7FFF)


def numpy_dtype(stored: str) -> np.dtype[Any]:
    """The numpy dtype that holds elements of F32, F16 or BF16 (as raw uint16: numpy has no bfloat16)."""
    return _NUMPY[stored]


def widen(raw: npt.ArrayLike, stored: str) -> F32Array:
    """Elements of F32, F16 or BF16 (in `numpy_dtype`) as float32; exact."""
    array = np.asarray(raw)
    if stored == "BF16":
        wide = array.astype(np.uint32)
        wide <<= np.uint32(16)
        return wide.view(np.float32)
    return array.astype(np.float32, copy=False)


def narrow(values: F32Array, stored: str) -> Array:
    """float32 as F32, F16 or BF16, rounded once, to nearest even. Finite values too large become infinite."""
    if stored == "F32":
        return np.ascontiguousarray(values)
    if stored == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = bits >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)  # half of the last bit kept, less one when that bit is even
    rounded += bits
    rounded >>= np.uint32(16)
    if values.size and np.isnan(values.min()):  # which any NaN makes one
        rounded[np.isnan(values)] = 0x7FC0
    return rounded.astype(np.uint16)


def is_finite(array: Array, stored: str) -> bool:
    """Whether no element is NaN or infinite."""
    if stored == "BF16":
        magnitudes = array & _BF16_MAGNITUDE  # type: ignore[operator]
        return not magnitudes.size or int(magnitudes.max()) < _BF16_INFINITE
    return bool(np.isfinite(array).all())
