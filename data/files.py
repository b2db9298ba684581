"""Files of arrays, opened with errors that say what was expected."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.stream import DataError


def open_npy(file: Path, expected: str) -> np.ndarray:
    """A ``.npy`` file, mapped into memory rather than read.

    Args:
      file: where.
      expected: what should be in it, for messages.

    Raises:
      DataError: it is not there, or is no array file.
    """
    if not file.is_file():
        raise DataError(f"{file}: there is no such file; expected {expected}")
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file}: not a NumPy array file ({str(error).splitlines()[0]}); expected {expected}") from None
