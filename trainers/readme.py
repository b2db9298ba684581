"""The generated tables of the README (methods and claims, compositions, layouts): ``python -m trainers.readme``."""

from __future__ import annotations

import json
from pathlib import Path

import zoo

BEGIN, END = "<!-- methods: python -m trainers.readme -->", "<!-- end of methods -->"
COMPOSE, COMPOSE_END = "<!-- compositions: python -m trainers.readme -->", "<!-- end of compositions -->"
LAYOUTS, LAYOUTS_END = "<!-- layouts: python -m trainers.readme -->", "<!-- end of layouts -->"


def table(root: Path) -> str:
    """The table: one row a method, with what its claim came out as."""
    lines = ["| method | family | kind | year | paper | claim |", "| --- | --- | --- | --- | --- | --- |"]
    for card in zoo.cards():
        file = root / "tests" / "claims" / f"{card.name}.json"
        claim = "not run yet"
        if file.exists():
            found = json.loads(file.read_text())
            low, high = found["paired"]["interval"]
            claim = (
                f"**{found['verdict']}**: {card.claim.metric} {found['arms']['method']['mean']:.4g} against "
                f"{found['arms']['baseline']['mean']:.4g} ({card.claim.baseline}), trivial "
                f"{found['arms']['trivial']['mean']:.4g}; improvement {found['paired']['mean']:+.4g} "
                f"[{low:+.4g}, {high:+.4g}], registered effect {card.claim.effect:g}, {found['seeds']} seeds"
                + (f". {card.claim.remark}" if card.claim.remark else "")
            )
        lines.append(f"| `{card.name}` | {card.family} | {card.kind} | {card.year} | {card.title} | {claim} |")
    return "\n".join(lines)


def with_table(text: str, root: Path) -> str:
    """A README with its tables made anew.

    Raises:
      ValueError: the markers are missing.
    """
    from trainers.compose import matrix, tables

    text = _between(text, BEGIN, END, table(root))
    text = _between(text, COMPOSE, COMPOSE_END, tables(matrix()))
    return _between(text, LAYOUTS, LAYOUTS_END, layouts_table())


def _between(text: str, begin: str, end: str, made: str) -> str:
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"README.md needs the markers {begin!r} and {end!r}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def layouts_table() -> str:
    """One row for each layout that ``zoo import`` knows."""
    from checkpoints.importers.recognition import layouts

    rows = [f"| `{x.name}` | {x.title} |" for x in layouts().values()]
    return "\n".join(["| layout | weights |", "| --- | --- |", *rows])


def main() -> None:
    """Rewrites README.md in the current folder."""
    file = Path("README.md")
    file.write_text(with_table(file.read_text(), Path(".")))


if __name__ == "__main__":
    main()
