"""Trees of dataclasses as nested dicts of arrays, which checkpoints and files keep, and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


def to_arrays(tree: Any) -> dict[str, Any]:
    """A dataclass of arrays (and of such dataclasses) as nested dicts; bf16 arrays as their bits, ``NAME_bits``.

    Fields that hold no array (``None``, numbers, strings) are left out: they belong to the configuration.
    """
    found = {}
    for field in dataclasses.fields(tree):
        value = getattr(tree, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = to_arrays(value)
        elif getattr(value, "dtype", None) == jnp.bfloat16:
            found[f"{field.name}_bits"] = jax.lax.bitcast_convert_type(value, jnp.uint16)
        elif hasattr(value, "dtype"):
            found[field.name] = value
    return found


def from_arrays(like: Any, arrays: Mapping[str, Any]) -> Any:
    """Undoes :func:`to_arrays`.

    Args:
      like: a dataclass of the same structure, whose arrays (or shapes of arrays) are replaced whatever their sizes.
      arrays: what :func:`to_arrays` gave, perhaps as NumPy arrays.

    Raises:
      KeyError: an array that ``like`` has and ``arrays`` has not.
    """
    found = {}
    for field in dataclasses.fields(like):
        value = getattr(like, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = from_arrays(value, arrays[field.name])
        elif f"{field.name}_bits" in arrays:
            bits = jnp.asarray(arrays[f"{field.name}_bits"])
            found[field.name] = jax.lax.bitcast_convert_type(bits, jnp.bfloat16)
        elif hasattr(value, "dtype"):
            found[field.name] = jnp.asarray(arrays[field.name])
    return dataclasses.replace(like, **found)
