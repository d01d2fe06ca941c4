"""Element types of buffers, with their numpy counterparts (ml_dtypes for the types numpy lacks)."""

from __future__ import annotations

from enum import IntEnum

import ml_dtypes
import numpy as np


class DType(IntEnum):
    """Element type; the value is what the binary program and the generated headers hold."""

    F32 = 0
    BF16 = 1
    F16 = 2
    F8E4M3 = 3
    I32 = 4
    U8 = 5  # bytes of several types, which an op packs and takes apart

    @property
    def numpy(self) -> np.dtype:
        """The numpy dtype of one element."""
        return _NUMPY[self]

    @property
    def bytes(self) -> int:
        """Size of one element in bytes."""
        return _NUMPY[self].itemsize

    @classmethod
    def of(cls, array: np.ndarray) -> DType:
        """The DType of an array; KeyError when there is none."""
        return _OF_NUMPY[array.dtype]


_NUMPY = {
    DType.F32: np.dtype(np.float32),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.F16: np.dtype(np.float16),
    DType.F8E4M3: np.dtype(ml_dtypes.float8_e4m3fn),
    DType.I32: np.dtype(np.int32),
    DType.U8: np.dtype(np.uint8),
}
_OF_NUMPY = {value: key for key, value in _NUMPY.items()}
