"""Patterns of names with numbers in braces: ``layer{s}.{b}.conv1.weight``, ``stage{s+1}/block{b}``."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping

_PLACE = re.compile(r"\{(\w+)([+-]\d+)?\}")


@functools.cache
def _compiled(pattern: str) -> tuple[re.Pattern, tuple[tuple[str, int], ...]]:
    parts, places, at = [], [], 0
    for hit in _PLACE.finditer(pattern):
        parts += [re.escape(pattern[at : hit.start()]), r"(\d+)"]
        places.append((hit.group(1), int(hit.group(2) or 0)))
        at = hit.end()
    text = "".join([*parts, re.escape(pattern[at:])])
    return re.compile(text.replace(r"\*", ".*")), tuple(places)


def match(pattern: str, name: str) -> dict[str, int] | None:
    """The numbers for which the pattern is the name (``*`` stands for anything), or ``None``.

    A number written with leading zeros, or two places of one name with different numbers, do not match.
    """
    regex, places = _compiled(pattern)
    hit = regex.fullmatch(name)
    if hit is None:
        return None
    found: dict[str, int] = {}
    for (place, shift), text in zip(places, hit.groups(), strict=True):
        value = int(text) - shift
        if str(int(text)) != text or value < 0 or found.setdefault(place, value) != value:
            return None
    return found


def substitute(pattern: str, numbers: Mapping[str, int]) -> str:
    """The name that a pattern is for these numbers."""
    return _PLACE.sub(lambda hit: str(numbers[hit.group(1)] + int(hit.group(2) or 0)), pattern)


def has_match(pattern: str, names: Iterable[str]) -> bool:
    """Whether any of the names fits."""
    return any(match(pattern, name) is not None for name in names)
