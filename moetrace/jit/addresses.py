"""Records by their address: an array would cost each call the count of its references."""

import ctypes
from typing import Any

import numpy as np


def record_at(address: int, dtype: np.dtype) -> Any:
    """Return the record that lies at an address; the caller that passes it on keeps the record's array alive.

    `read_only` says what Numba makes of it.
    """
    memory: Any = (ctypes.c_char * dtype.itemsize).from_address(int(address))
    return np.frombuffer(memory, dtype).view(np.recarray)[0]
