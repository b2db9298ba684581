"""What a source layout is: how it is recognised, which module it configures, and the table that maps its weights.

One file per layout in :mod:`checkpoints.importers.layouts`, each ending in ``LAYOUT = Layout(...)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from checkpoints.importers.rules import Rule

Shapes = Mapping[str, jax.ShapeDtypeStruct]
"""Source name (prefix taken off) -> shape and dtype."""


class ImporterError(ValueError):
    """A source that cannot be imported, or a model that cannot be exported; the message says what to change."""


def _none(*_: Any) -> None:
    return None


def _nothing(*_: Any) -> Mapping[str, Any]:
    return {}


def _same_name(_: Any, name: str) -> str:
    return name


@dataclasses.dataclass(frozen=True)
class Layout:
    """One way in which a library writes one family of models.

    Attributes:
      name: what ``--as`` takes, ``library-family``: ``hub-bert``, ``torchvision-resnet``.
      title: one line for ``zoo import --list``.
      configure: ``(config, shapes) -> module``.  ``config`` is config.json's content or ``None``.  Every entry of a
        config that changes the forward pass is either honoured or refused (:class:`ImporterError` naming entry,
        value and what is supported); what neither config nor shapes tell is refused too, asking for ``--config``.
      rules: ``(module) -> table``; each source name must fit exactly one rule.  Rules whose weights a configuration
        lacks (biases, optional heads) may stand in the table: they are not missed.
      model_types: values of config.json's ``model_type`` (or ``_class_name``, or ``architecture``'s beginning).
      signature: patterns (``{i}`` a number) that all occur among the names of such a file, to recognise it without
        a config; the layout with most matched signature patterns wins, ties are refused.
      absent: patterns of which none may occur, to tell siblings apart.
      prefixes: what may stand before all names (``"bert."``); the longest that makes the signature match is taken off
        those names that have it, and put back by an export.
      buffers: patterns of tensors that are no weights (position ids, batch counters, causal masks): kept verbatim
        beside the model, so that an export is complete.
      new_buffers: ``(module, names) -> {name: array}``: those of them that the library wants to find beside the weights
        of these names, for an export of a model that was never imported; see :func:`batch_counters`.
      duplicates: ``(copy, original)`` patterns: a tied weight that some files store twice; the copy must equal the
        original, or the import is refused.
      to_config: ``(module) -> config.json`` content for an export that the reference library can load; ``None`` if the
        source has none of its own.
      full_name: ``(module, name) -> name`` in a file written for a model that was never imported: puts the prefix
        before the names that have it there (``bert.`` before all but the head's).
      preprocessing: ``(config, preprocessor_config) -> dict`` with any of ``size`` (H, W), ``mean``, ``std``,
        ``interpolation``, ``crop``, or ``None``: what is recorded with the model for images.
    """

    name: str
    title: str
    configure: Callable[[Mapping[str, Any] | None, Shapes], Any]
    rules: Callable[[Any], Sequence[Rule]]
    model_types: tuple[str, ...] = ()
    signature: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()
    new_buffers: Callable[[Any, Sequence[str]], Mapping[str, Any]] = _nothing
    duplicates: tuple[tuple[str, str], ...] = ()
    to_config: Callable[[Any], Mapping[str, Any] | None] = _none
    full_name: Callable[[Any, str], str] = _same_name
    preprocessing: Callable[[Mapping[str, Any] | None, Mapping[str, Any] | None], Mapping[str, Any] | None] = _none


def batch_counters(_: Any, names: Sequence[str]) -> dict[str, np.ndarray]:
    """How many batches each of torch's batch norms has seen (its ``num_batches_tracked``): none."""
    norms = [n.removesuffix("running_mean") for n in names if n.endswith(".running_mean")]
    return {f"{norm}num_batches_tracked": np.zeros((), np.int64) for norm in norms}


def depth(shapes: Shapes, pattern: str) -> int:
    """How many layers there are: one more than the largest ``{i}`` among the names beginning with ``pattern``.

    ``depth(shapes, "encoder.layer.{i}.")`` counts BERT's layers; 0 if there are none.
    """
    before, _, after = pattern.partition("{i}")
    numbers = [
        name[len(before) :].split(after or ".", 1)[0]
        for name in shapes
        if name.startswith(before) and (not after or after in name[len(before) :])
    ]
    return max((int(n) + 1 for n in numbers if n.isdigit()), default=0)


def choose(config: Mapping[str, Any], key: str, allowed: Mapping[Any, Any], default: Any) -> Any:
    """``allowed[config.get(key, default)]``; an unknown value is refused with its name and those that are supported."""
    value = config.get(key, default)
    if value not in allowed:
        raise ImporterError(f"config {key} = {value!r} is not supported; supported: {', '.join(map(repr, allowed))}")
    return allowed[value]


def refuse(config: Mapping[str, Any], **expected: Any) -> None:
    """Refuses a config where an entry that this zoo does not implement differs from the one value that it does.

    Entries that are missing count as expected.
    """
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ImporterError(f"config {key} = {config[key]!r} is not supported; only {value!r} is")
