"""Cards and claims, and the catalogue that finds them without importing jax.

Every method file ends with ``CARD = Card(...)`` written in literals.  The catalogue reads that last statement from the
module's source, so that listing 77 methods costs milliseconds and imports nothing.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import pkgutil
from typing import Any

FAMILIES = (
    "timeseries", "recommendation", "retrieval", "representation", "continual", "compression",
    "diffusion", "language", "multimodal", "vision", "mri", "evaluation",
)  # fmt: skip
KINDS = (
    "loss transform", "gradient transform", "weights", "objective", "optimiser",
    "sampler", "search", "closed form", "benchmark",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a paper says it improves, as a falsifiable statement about small data, written before the first run.

    Attributes:
      statement: one sentence.
      metric: the metric every arm returns.
      effect: smallest difference (method minus baseline, or baseline minus method if lower is better) of interest.
      method, baseline, trivial: names of the arms; ``trivial`` needs no learning.
      higher_is_better: direction of the metric.
      seeds: default number of paired seeds.
      remark: written after a run: why it came out as it did, where that needs saying.
      budget: what every arm gets (steps, tuning trials), in words.
    """

    statement: str
    metric: str
    effect: float
    method: str
    baseline: str
    trivial: str
    higher_is_better: bool = True
    seeds: int = 5
    remark: str = ""
    budget: str = "the same steps, data and settings; no tuning in any arm"


@dataclasses.dataclass(frozen=True)
class Card:
    """What one method is.

    Attributes:
      name, family, title, year: identity; ``name`` is the module's name, ``family`` its folder.
      kind: one of ``KINDS``.
      idea: a short paragraph.
      citation: authors, venue, identifier.
      plugs_into: what it composes with.
      pieces: its public functions, ``"name"`` in the method's module or ``"package.module:name"`` elsewhere.
      claim: the registered claim.
      cost: time and memory of the hot operation.
      official_code: repository, or why there is none.
      departures: where the default differs from the released code.
    """

    name: str
    family: str
    title: str
    year: int
    kind: str
    idea: str
    citation: str
    plugs_into: tuple[str, ...]
    pieces: tuple[str, ...]
    claim: Claim
    cost: str
    official_code: str
    departures: tuple[str, ...] = ()

    @property
    def module(self) -> str:
        """The import path of the method."""
        return f"zoo.{self.family}.{self.name}"

    @property
    def recipe(self) -> str:
        """The import path of its recipe."""
        return f"trainers.recipes.{self.family}.{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """The card as plain JSON-able data."""
        return {**dataclasses.asdict(self), "module": self.module, "recipe": self.recipe}


def cards(family: str | None = None) -> tuple[Card, ...]:
    """All cards, by family and name.

    Raises:
      ValueError: an unknown family; the nearest are named.
    """
    if family is not None and family not in FAMILIES:
        near = difflib.get_close_matches(family, FAMILIES, n=3, cutoff=0.4)
        raise ValueError(f"unknown family {family!r}; " + _hint(near, FAMILIES))
    return tuple(c for c in _all_cards() if family in (None, c.family))


def card(name: str) -> Card:
    """The card of one method.

    Raises:
      ValueError: an unknown name; the nearest are named.
    """
    found = {c.name: c for c in _all_cards()}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3, cutoff=0.4)
        raise ValueError(f"unknown method {name!r}; " + _hint(near, tuple(found)))
    return found[name]


def search(text: str) -> tuple[Card, ...]:
    """Cards whose name, title, idea, kind or connections contain every word of ``text``, best match first."""
    words = text.lower().split()
    scored = []
    for c in _all_cards():
        fields = (c.name, c.title, c.kind, " ".join(c.plugs_into), c.idea, c.citation)
        lowered = [f.lower() for f in fields]
        if all(any(w in f for f in lowered) for w in words):
            rank = sum(min(i for i, f in enumerate(lowered) if w in f) for w in words)
            scored.append((rank, c.family, c.name, c))
    return tuple(s[-1] for s in sorted(scored, key=lambda s: s[:3]))


def piece_signature(c: Card, piece: str) -> tuple[str, str]:
    """The signature and first docstring line of one of a card's pieces, read from source without importing it."""
    module, _, name = piece.rpartition(":")
    tree = ast.parse(_source(module or c.module))
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            first = (ast.get_docstring(node) or "").split("\n")[0]
            if isinstance(node, ast.FunctionDef):
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                return f"{name}({ast.unparse(node.args)}){returns}", first
            fields = [ast.unparse(n) for n in node.body if isinstance(n, ast.AnnAssign)]
            return f"{name}({', '.join(fields)})", first
    raise ValueError(f"card {c.name!r} names the piece {piece!r}, which {module or c.module} does not define")


def _hint(near: list[str], known: tuple[str, ...]) -> str:
    return f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(sorted(known))}"


@functools.cache
def _all_cards() -> tuple[Card, ...]:
    found = []
    for family in FAMILIES:
        spec = importlib.util.find_spec(f"zoo.{family}")
        if spec is None or spec.submodule_search_locations is None:
            continue
        for info in pkgutil.iter_modules(spec.submodule_search_locations):
            source = _source(f"zoo.{family}.{info.name}")
            if (at := source.rfind("\nCARD = Card(")) >= 0:
                found.append(_read_card(source[at + 1 :], f"zoo.{family}.{info.name}"))
    return tuple(sorted(found, key=lambda c: (c.family, c.name)))


def _source(module: str) -> str:
    # the loader's text of a module, without running it
    spec = importlib.util.find_spec(module)
    return (spec.loader.get_source(module) if spec and spec.loader else None) or ""


def _read_card(source: str, module: str) -> Card:
    def value(node):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Card", "Claim"):
            kind = Card if node.func.id == "Card" else Claim
            return kind(**{k.arg: value(k.value) for k in node.keywords})
        return ast.literal_eval(node)

    try:
        c = value(ast.parse(source).body[0].value)
    except (TypeError, ValueError, SyntaxError) as error:
        raise ValueError(f"{module}: CARD must be the last statement, written in literals ({error})") from None
    if c.kind not in KINDS:
        raise ValueError(f"{module}: kind must be one of {', '.join(KINDS)}; got {c.kind!r}")
    if c.module != module:
        raise ValueError(f"{module}: its card says {c.module}")
    return c
