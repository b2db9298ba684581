"""A card as text, for ``zoo show``; imports nothing heavy."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from zoo.catalogue import Card


def show(c: Card, pieces: Sequence[tuple[str, str, str]]) -> None:
    """Prints a card, at most 100 columns wide where words allow it.

    Args:
      c: the card.
      pieces: name, signature and summary of each.
    """

    def fill(text: str, indent: str = "  ", after: str | None = None) -> str:
        rest = indent if after is None else after
        return textwrap.fill(
            text, 100, initial_indent=indent, subsequent_indent=rest, break_on_hyphens=False, break_long_words=False
        )

    row = lambda label, text: print(fill(text, f"{label:15}", " " * 15))  # noqa: E731
    print(f"{c.name}: {c.title} ({c.year})\n{c.family}, {c.kind}\n")
    print(fill(c.idea, ""), "\n")
    for label, text in (
        ("citation", c.citation),
        ("official code", c.official_code),
        ("plugs into", ", ".join(c.plugs_into)),
        ("cost", c.cost),
    ):
        row(label, text)
    print(f"import         from {c.module.rpartition('.')[0]} import {c.name}\nrecipe         zoo train {c.name}")
    if c.departures:
        print("departures")
        for d in c.departures:
            print(fill(d, "  - ", "    "))
    print("pieces")
    for _, signature, summary in pieces:
        print(fill(signature, "  ", "      "))
        print(fill(summary, "      "))
    claim = c.claim
    print(f"claim\n{fill(claim.statement)}")
    better = "higher" if claim.higher_is_better else "lower"
    print(fill(f"{claim.metric} ({better} is better): {claim.method} against {claim.baseline}, effect of interest "
               f"{claim.effect:g}, trivial arm {claim.trivial}"))  # fmt: skip
    print(f"  zoo claim {c.name}")
    if claim.remark:
        print(fill(claim.remark))
