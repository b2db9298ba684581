"""Which layout a file is in: by its config, by the names of its weights, and never by a guess."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from checkpoints.importers import layouts as folder
from checkpoints.importers.layout import ImporterError, Layout
from checkpoints.importers.patterns import has_match

ALWAYS = ("", "module.", "model.", "_orig_mod.")
"""Prefixes that trainers put before any model's names."""


@functools.lru_cache(maxsize=1)
def layouts() -> dict[str, Layout]:
    """Every layout by name: one per file of :mod:`checkpoints.importers.layouts`."""
    found = {}
    for info in pkgutil.iter_modules(folder.__path__):
        module = importlib.import_module(f"{folder.__name__}.{info.name}")
        if not info.name.startswith("_"):
            found[module.LAYOUT.name] = module.LAYOUT
    return dict(sorted(found.items()))


def split_prefix(layout: Layout, names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """The prefix that the layout's signature asks to take off, and short name -> name."""
    names = list(names)
    candidates = sorted({*ALWAYS, *layout.prefixes}, key=len, reverse=True)
    for prefix in candidates:
        short = {n.removeprefix(prefix): n for n in names}
        applies = prefix == "" or any(n.startswith(prefix) for n in names)
        if applies and len(short) == len(names) and fits(layout, short):
            return prefix, short
    return "", {n: n for n in names}


def fits(layout: Layout, names: Iterable[str]) -> bool:
    """Whether all of a layout's signature and nothing that must be absent is among the names."""
    names = list(names)
    return all(has_match(p, names) for p in layout.signature) and not any(has_match(p, names) for p in layout.absent)


def recognise(config: Mapping[str, Any] | None, tensors: Mapping[str, Any]) -> Layout:
    """The one layout that config and names agree on.

    Raises:
      ImporterError: none, several, or a config and weights that contradict each other; the choices are named.
    """
    if not tensors:
        raise ImporterError("the source holds no weights")
    by_names = [x for x in layouts().values() if x.signature and fits(x, split_prefix(x, tensors)[1])]
    by_config = [x for x in layouts().values() if config and _speaks_of(config, x)]
    if by_config:
        both = [x for x in by_config if x in by_names or not x.signature]
        if not both:
            looks = f"look like {' or '.join(x.name for x in by_names)}" if by_names else "do not"
            said = _kind(config)
            raise ImporterError(
                f"the config is for {by_config[0].name} ({said}), but the weights {looks}; "
                "give the right config.json with --config FILE, or the layout with --as NAME"
            )
        by_names = both
    elif config and _kind(config) and by_names:
        # a config that no layout speaks for, such as a fine-tune's own: the names decide, configure() refuses the rest
        pass
    if not by_names:
        said = f" (its config says {_kind(config)})" if config and _kind(config) else ""
        first = ", ".join(list(tensors)[:3])
        raise ImporterError(f"no known layout{said}: the first names are {first}; zoo import --list names the layouts")
    most = max(len(x.signature) for x in by_names)
    best = [x for x in by_names if len(x.signature) == most]
    if len(best) > 1:
        raise ImporterError(f"the weights fit {' and '.join(x.name for x in best)} alike; choose one with --as NAME")
    return best[0]


def _speaks_of(config: Mapping[str, Any], layout: Layout) -> bool:
    exact = {config.get("model_type"), config.get("_class_name")} - {None}
    architecture = config.get("architecture")
    return bool(exact & set(layout.model_types)) or (
        isinstance(architecture, str) and any(architecture.startswith(t) for t in layout.model_types)
    )


def _kind(config: Mapping[str, Any]) -> str | None:
    named = [(k, config[k]) for k in ("model_type", "_class_name", "architecture") if config.get(k)]
    return f"{named[0][0]} {named[0][1]!r}" if named else None
