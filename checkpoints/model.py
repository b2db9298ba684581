"""Exported models that say what they are: weights, the definition that reads them, the card, and where they come from.

    save_model("runs/ict/model", definition, variables, card, info)
    model = load_model("runs/ict/model")
    model.apply(x)                              # if the definition is a Linen module
    model.variables, model.definition, model.card, model.info

On disk: ``weights/`` (an Orbax PyTree checkpoint of the flat variables) and ``model.json`` (plain text).  Nothing else
is needed to load one: neither the recipe nor its data.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import subprocess
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from checkpoints.arrays import json_text, one_line, place_of
from checkpoints.definition import ModelError, decode, encode
from checkpoints.model_folder import read_document, read_flat, write_folder
from zoo.nn.partitioning import abstract_variables, shardings, unbox

__all__ = ["Model", "ModelError", "load_model", "save_model"]


@dataclasses.dataclass(frozen=True)
class Model:
    """An exported model.

    Attributes:
      definition: a Linen module, or a configuration that the method's functions take.
      variables: nested dicts of arrays.
      info: recipe, data fingerprint, git revision, versions, claim, constants' fingerprint, as far as they were given.
      card: the method's card.
      folder: where it was read from, if it was.
    """

    definition: Any
    variables: Mapping[str, Any]
    info: Mapping[str, Any]
    card: Mapping[str, Any]
    folder: str | None = None

    def apply(self, *args, **kwargs) -> Any:
        """``definition.apply(variables, ...)`` of a Linen module.

        Raises:
          ModelError: the definition is a configuration; call the method's functions with it and the variables.
        """
        if not hasattr(self.definition, "apply"):
            name = type(self.definition).__name__
            raise ModelError(
                f"{name} is a configuration without apply(); hand it and .variables to the method's functions"
            )
        return self.definition.apply(self.variables, *args, **kwargs)

    def preprocess(self, images: Any) -> np.ndarray:
        """Images as the model was trained to see them: see :func:`checkpoints.preprocessing.prepare_images`.

        Raises:
          ModelError: nothing is recorded of how this model's images were prepared.
        """
        from checkpoints.preprocessing import prepare_images

        facts = self.info.get("preprocessing") or {}
        if "mean" not in facts and "size" not in facts:
            raise ModelError("this model does not say how its images are prepared (info['preprocessing'])")
        return prepare_images(images, **facts)

    def tokenizer(self) -> Any:
        """The tokenizer that came with the weights (a ``tokenizers.Tokenizer``).

        Raises:
          ModelError: none came with them, or none that the ``tokenizers`` package reads.
        """
        from checkpoints.tokenizer import load_tokenizer

        if self.folder is None:
            raise ModelError("this model was not read from a folder, so no tokenizer lies beside it")
        return load_tokenizer(self.folder)


def save_model(
    directory: Path | str,
    definition: Any,
    variables: Mapping[str, Any],
    card: Mapping[str, Any],
    info: Mapping[str, Any],
    beside: Callable[[epath.Path], None] | None = None,
) -> None:
    """Writes a model at once: under a temporary name beside ``directory``, then renamed; an older model is replaced.

    With several processes the first one writes and nobody waits; the others may call it or not.  Only where an array is
    spread over several processes must all of them call it: each then writes its own shards.

    Args:
      directory: where to.
      definition: a frozen dataclass or Linen module of an importable package; see :mod:`checkpoints.definition`.
      variables: nested dicts of arrays (64-bit ones become 32-bit unless jax's x64 is on).
      card, info: plain facts; versions, git revision and the fingerprint of ``variables["constants"]`` are added to
        ``info`` where it lacks them.
      beside: called with the folder before it gets its name, to put more files into it.

    Raises:
      ModelError: a definition or variables that cannot be written.
      StoreError: the place cannot be written, or holds something that is not a model.
    """
    flat, empty = _flatten(unbox(variables))
    together = any(not _is_here(x) for x in flat.values())
    if jax.process_index() != 0 and not together:
        return
    constants = {p: x for p, x in flat.items() if p.startswith("constants/")}
    document = describe_model(definition, card, info, empty, fingerprint(constants))
    write_folder(place_of(directory), document, [flat], beside, together=together)


def describe_model(
    definition: Any, card: Mapping[str, Any], info: Mapping[str, Any], empty: list[str], constants: str | None = None
) -> dict[str, Any]:
    """``model.json`` but for its arrays; arguments as :func:`save_model`, paths of empty dicts, a fingerprint."""
    info = {**info}
    info.setdefault("versions", versions())
    info.setdefault("git_revision", git_revision())
    info.setdefault("constants_fingerprint", constants)
    document = {"format": 1, "definition": encode(definition), "card": dict(card), "info": info, "empty": empty}
    try:
        json_text(document)
    except (TypeError, ValueError) as error:
        raise ModelError(f"card and info must be JSON: {one_line(error)}") from None
    return document


def load_model(directory: Path | str, trust: str | tuple[str, ...] = (), sharding: Any = None) -> Model:
    """Reads a model; needs neither its recipe nor its data.

    Args:
      directory: what :func:`save_model` wrote.
      trust: packages besides ``zoo`` whose classes may be imported and made.
      sharding: where the variables go: a sharding for all of them, a function of (path, shape), or a mesh, over which
        the axes that the definition names are spread (:mod:`zoo.nn.partitioning`); default: the first device.

    Raises:
      ModelError: not a model, or pieces of it are unknown, missing or not trusted.
      DamagedError: truncated, unreadable or altered.
    """
    place = place_of(directory)
    document = read_document(place)
    definition = decode(document["definition"], (trust,) if isinstance(trust, str) else tuple(trust))
    if isinstance(sharding, jax.sharding.Mesh):
        sharding = _by_names(definition, sharding)
    flat = read_flat(place, document, sharding)
    for path in document["empty"]:
        flat[path] = traverse_util.empty_node
    variables = traverse_util.unflatten_dict(flat, sep="/")
    return Model(definition, variables, document["info"], document["card"], str(place))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that weights depend on."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "kindred-zoo"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision(folder: Path | None = None) -> str | None:
    """The revision of the source tree, ``+`` behind it if there were changes; ``None`` outside a repository."""
    folder = folder or Path(__file__).resolve().parent

    def git(*command: str) -> str:
        command = ("git", "-C", str(folder), *command)
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def fingerprint(flat: Mapping[str, Any]) -> str | None:
    """A short checksum of names, shapes, dtypes and contents of arrays; ``None`` for none, or arrays of other hosts."""
    if not flat or not all(map(_is_here, flat.values())):
        return None
    digest = hashlib.sha256()
    for path in sorted(flat):
        array = np.ascontiguousarray(jax.device_get(flat[path]))
        digest.update(f"{path}{array.shape}{array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()[:16]


def _flatten(variables: Mapping[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    # flat arrays, and the paths of empty dicts, which a flat tree cannot hold
    flat, empty = {}, []

    def walk(node: Any, path: tuple[str, ...]) -> None:
        where = "/".join(path) or "variables"
        if isinstance(node, Mapping):
            for name, child in node.items():
                if not isinstance(name, str) or "/" in name or not name:
                    raise ModelError(f"{where}: names must be strings without '/', got {name!r}")
                walk(child, (*path, name))
            if not node and path:
                empty.append(where)
        elif isinstance(node, (jax.Array, np.ndarray, np.generic, int, float)) and path:
            array = node if isinstance(node, jax.Array) else np.asarray(node)
            if array.dtype.kind in "OSU":
                raise ModelError(f"{where}: arrays of {array.dtype} cannot be saved")
            # on the host as it is, for a large model is not copied: but in the number types that jax would give it
            flat[where] = array if isinstance(array, jax.Array) else array.astype(_canonical(array.dtype), copy=False)
        else:
            raise ModelError(f"{where}: variables must be nested dicts of arrays, got a {type(node).__name__}")

    walk(variables, ())
    return flat, empty


def _canonical(dtype: Any) -> Any:
    return jax.dtypes.canonicalize_dtype(dtype)


def _is_here(x: Any) -> bool:
    return not isinstance(x, jax.Array) or x.is_fully_addressable


def _by_names(definition: Any, mesh: jax.sharding.Mesh) -> Callable:
    if not hasattr(definition, "example_inputs"):
        kind = type(definition).__name__
        raise ModelError(f"{kind} does not name its axes (it has no example_inputs); give a sharding instead of a mesh")
    found = shardings(abstract_variables(definition), mesh)
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return lambda path, shape: found.get(path, replicated)
