"""Definitions as JSON: a frozen dataclass or Linen module, and everything it is made of, rebuilt by import path.

A value that JSON knows stands for itself; the rest is an object with one key that says what it is::

    {"class": "zoo.nn.resnet:ResNet", "fields": {...}}   {"tuple": [...]}   {"dict": {...}}
    {"dtype": "bfloat16"}   {"scalar": "bfloat16"}       {"default": true}

``scalar`` is a type such as ``jnp.float32``; ``default`` is a function that is the field's default.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np


class ModelError(ValueError):
    """A model that cannot be written or rebuilt; the message names the piece."""


TRUSTED = ("zoo",)
"""Packages whose classes are rebuilt without being asked."""


def encode(definition: Any) -> Any:
    """A definition as JSON-able data.

    Raises:
      ModelError: it holds something that cannot be rebuilt from text (an array, a function, a local class).
    """
    if not dataclasses.is_dataclass(definition) or isinstance(definition, type):
        raise ModelError(f"a definition is a dataclass or a Linen module, got {_kind(definition)}")
    return _encode(definition, type(definition).__name__)


def decode(data: Any, trust: tuple[str, ...] = ()) -> Any:
    """The definition that :func:`encode` wrote.

    Args:
      data: its JSON.
      trust: packages besides ``zoo`` whose classes may be imported and made.

    Raises:
      ModelError: a class that is not trusted or not there, a field it does not know or needs.
    """
    definition = _decode(data, (*TRUSTED, *trust))
    if not dataclasses.is_dataclass(definition):
        raise ModelError(f"the definition must name a class, got {data!r}")
    return definition


def path_of(cls: type) -> str:
    """``package.module:Class``."""
    return f"{cls.__module__}:{cls.__qualname__}"


def _fields(cls: type) -> dict[str, dataclasses.Field]:
    # Linen adds `parent` and `name`, which say where a module hangs, not what it is
    linen = hasattr(cls, "bind") and hasattr(cls, "scope")
    return {f.name: f for f in dataclasses.fields(cls) if f.init and not (linen and f.name in ("parent", "name"))}


def _encode(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, (int, float)):
        return value
    if isinstance(value, (np.bool_, np.integer, np.floating)):
        return value.item()
    if isinstance(value, np.dtype):
        return {"dtype": value.name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        cls = type(value)
        if "<locals>" in cls.__qualname__ or cls.__module__ == "__main__":
            raise ModelError(
                f"{where}: class {cls.__name__} cannot be imported again; define it in a module of a package"
            )
        fields = {}
        for name, field in _fields(cls).items():
            item = getattr(value, name)
            same = field.default is not dataclasses.MISSING and item is field.default
            plain = callable(item) and not isinstance(item, type) and not dataclasses.is_dataclass(item)
            fields[name] = {"default": True} if same and plain else _encode(item, f"{where}.{name}")
        return {"class": path_of(cls), "fields": fields}
    if type(value) is tuple:
        return {"tuple": [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]}
    if isinstance(value, list):
        return [_encode(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise ModelError(f"{where}: the keys of a dict must be strings")
        return {"dict": {k: _encode(v, f"{where}[{k!r}]") for k, v in value.items()}}
    if (scalar := _scalar_name(value)) is not None:
        return {"scalar": scalar}
    raise ModelError(
        f"{where}: {_kind(value)} cannot be rebuilt from text; "
        "arrays belong in the variables, and a function in a method (choose it by a string)"
    )


def _decode(data: Any, trusted: tuple[str, ...]) -> Any:
    if isinstance(data, list):
        return [_decode(v, trusted) for v in data]
    if not isinstance(data, Mapping):
        return data
    kind = next(iter(data), None)
    if kind == "tuple":
        return tuple(_decode(v, trusted) for v in data["tuple"])
    if kind == "dict":
        return {k: _decode(v, trusted) for k, v in data["dict"].items()}
    if kind == "dtype":
        return jnp.dtype(data["dtype"])
    if kind == "scalar":
        scalar = getattr(jnp, str(data["scalar"]), None)
        if scalar is None or _scalar_name(scalar) is None:
            raise ModelError(f"jax.numpy has no number type {data['scalar']!r}")
        return scalar
    if kind == "class":
        return _make(data, trusted)
    raise ModelError(f"unknown piece {kind!r} in the definition; this model was written by another version")


def _make(data: Mapping, trusted: tuple[str, ...]) -> Any:
    cls = _import(str(data["class"]), trusted)
    known, given = _fields(cls), data.get("fields", {})
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or sorted(known)
            raise ModelError(f"{data['class']} has no field {name!r} (any more); it has {', '.join(near)}")
    values = {n: _decode(v, trusted) for n, v in given.items() if not (isinstance(v, Mapping) and "default" in v)}
    required = (dataclasses.MISSING, dataclasses.MISSING)
    for name, field in known.items():
        if name not in values and (field.default, field.default_factory) == required:
            raise ModelError(f"{data['class']} needs a field {name!r}, which the model does not give")
    try:
        return cls(**values)
    except Exception as error:
        raise ModelError(f"{data['class']} rejects its fields: {error}") from error


def _import(path: str, trusted: tuple[str, ...]) -> type:
    module, _, name = path.partition(":")
    allowed = lambda m: any(m == p or m.startswith(p + ".") for p in trusted)  # noqa: E731
    if not allowed(module):
        package = module.split(".")[0]
        raise ModelError(
            f"the model names the class {path}, outside {' and '.join(trusted)}; "
            f"load it with trust={package!r} if you trust that code"
        )
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise ModelError(f"the model needs {path}, but {module} cannot be imported: {error}") from error
    for part in name.split("."):
        names = [n for n in vars(found) if not n.startswith("_")]
        found = getattr(found, part, None)
        if found is None:
            near = difflib.get_close_matches(part, names, n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ModelError(f"the model needs {path}, but {module} does not define {part}{hint}")
    # a trusted module may import what is not trusted
    if not isinstance(found, type) or not dataclasses.is_dataclass(found) or not allowed(found.__module__):
        raise ModelError(f"the model names {path}, which is not a dataclass of {' or '.join(trusted)}")
    return found


def _scalar_name(value: Any) -> str | None:
    # jnp.float32 and np.float32, by the name under which jax.numpy has them
    try:
        name = np.dtype(value).name if not isinstance(value, (str, bytes)) and value is not None else None
    except TypeError:
        return None
    is_type = isinstance(value, type) and issubclass(value, np.generic) or type(value).__name__ == "_ScalarMeta"
    return name if is_type and hasattr(jnp, name) else None


def _kind(value: Any) -> str:
    return f"a {type(value).__name__}"
