"""The README's table of methods, generated from the cards and the kept claims: ``python -m trainers.readme``."""

from __future__ import annotations

import json
from pathlib import Path

import zoo

BEGIN, END = "<!-- methods: python -m trainers.readme -->", "<!-- end of methods -->"


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
    """A README with its table made anew.

    Raises:
      ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the markers {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n{table(root)}\n{END}{after}"


def main() -> None:
    """Rewrites README.md in the current folder."""
    file = Path("README.md")
    file.write_text(with_table(file.read_text(), Path(".")))


if __name__ == "__main__":
    main()
