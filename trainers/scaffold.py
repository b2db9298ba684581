"""``zoo new``: the three files of a new method, which run, and fail honestly where the author must write."""

from __future__ import annotations

import contextlib
import keyword
import re
from pathlib import Path

from trainers.errors import UserError, nearest
from zoo.catalogue import FAMILIES, cards

METHOD = '''"""TITLE.

Authors, venue, identifier.

The idea in a paragraph: what the paper noticed, what it does about it, and what that buys.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from zoo.catalogue import Card, Claim


@dataclasses.dataclass(frozen=True)
class Definition:
    """What an exported model is rebuilt from; often a Linen module of zoo.nn takes its place."""

    width: int = 8


def NAME_score(x: Float[Array, "b d"], y: Float[Array, "b d"]) -> Float[Array, "b"]:
    """One sentence, with the paper's equation number.

    Args:
      x, y: what they are, and in which units.

    Returns:
      One value per example.

    Raises:
      ValueError: what cannot be, naming the argument, the value and the fix.
    """
    if x.shape[-1] == 0:
        raise ValueError("x and y need at least one feature, got 0; check how they were made")
    return jnp.sum(x * y, axis=-1)


CARD = Card(
    name="NAME",
    family="FAMILY",
    title="TITLE",
    year=2024,
    kind="objective",
    idea="The idea in a paragraph.",
    citation="Authors, venue, identifier",
    plugs_into=("what it composes with",),
    pieces=("NAME_score",),
    claim=Claim(
        statement="What the paper says it improves, against what, on which data.",
        metric="score",
        effect=0.01,
        method="NAME",
        baseline="baseline",
        trivial="trivial",
    ),
    cost="Time and memory of the hot operation.",
    official_code="owner/repository",
)
'''

RECIPE = '''"""Recipe of NAME: what it trains on by default, and the arms of its claim."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from trainers import recipe
from trainers.phases import Fit, FitResult
from trainers.recipe import Data, Export, Run
from zoo.FAMILY import NAME as method


@dataclasses.dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """TITLE."""

    data: Data = Data("generated")
    width: int = 8
    """Width of the generated vectors."""

    def build(self) -> Run:
        """Replace the phase by the method's own."""
        if self.width < 1:
            raise recipe.UserError(f"--width must be at least 1, got {self.width}")
        x = np.random.default_rng(self.seed).normal(size=(32, self.width)).astype(np.float32)

        def fit(variables, artefacts, rng):
            score = method.NAME_score(jnp.asarray(x), jnp.asarray(x))
            return FitResult({"params": {"mean": jnp.mean(jnp.asarray(x), 0)}}, {}, {"score": float(score.mean())})

        return Run(
            [Fit("fit", fit)],
            export=lambda variables, artefacts: Export(method.Definition(self.width), variables),
            data_fingerprint="generated",
        )


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {"x": "float32 [N, width]: what it is"}


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on one seed."""
    raise recipe.UserError(f"NAME: arm({arm!r}, {seed}) of the claim is not written yet")


def benchmarks() -> list[recipe.Benchmark]:
    """The hot operation."""
    x = jnp.ones((1024, 64), jnp.float32)
    flops, moved = 2.0 * x.size, 2.0 * x.nbytes
    return [recipe.Benchmark("score", method.NAME_score, (x, x), flops, moved)]


def example() -> dict:
    """The row of the conformance table: nothing is trained yet."""
    return {"objective": None}
'''

TEST = '''"""NAME against its definition."""

import jax.numpy as jnp
import numpy as np
import pytest

from zoo.FAMILY import NAME as method


def reference(x, y):
    """A NumPy loop written from the paper, not from the JAX code."""
    return np.array([sum(a * b for a, b in zip(u, v, strict=True)) for u, v in zip(x, y, strict=True)], np.float32)


def test_NAME_score_equals_the_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 3)).astype(np.float32)
    found = method.NAME_score(jnp.asarray(x), jnp.asarray(y))
    np.testing.assert_allclose(found, reference(x, y), rtol=1e-5, atol=1e-6)


def test_NAME_score_refuses_vectors_without_features():
    with pytest.raises(ValueError, match="at least one feature"):
        method.NAME_score(jnp.zeros((2, 0)), jnp.zeros((2, 0)))


def test_NAME_is_written():
    pytest.fail("write the method: its equations, its checks and its claim, then delete this test")
'''


def write_method(name: str, family: str | None, root: Path) -> list[Path]:
    """Writes the method file, the recipe and the test of a new method.

    Raises:
      UserError: a name or family that cannot be, or files that are already there.
    """
    if family is None:
        raise UserError(f"zoo new {name} needs --family F, one of {', '.join(FAMILIES)}")
    if family not in FAMILIES:
        raise UserError(f"unknown family {family!r}; {nearest(family, FAMILIES)}")
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,29}", name) or keyword.iskeyword(name):
        raise UserError(
            f"{name!r} cannot be a method's name: at most 30 lower-case letters, digits and _, a letter first"
        )
    if name in {c.name for c in cards()}:
        raise UserError(f"the zoo has a method named {name!r} already; zoo show {name}")
    if not (root / "zoo" / "base.py").exists():
        raise UserError(f"{root.resolve()} is not a checkout of the zoo; run it there or name it by --root")
    files = {
        root / "zoo" / family / f"{name}.py": METHOD,
        root / "trainers" / "recipes" / family / f"{name}.py": RECIPE,
        root / "tests" / "zoo" / family / f"test_{name}.py": TEST,
    }
    for file in files:
        if file.exists():
            raise UserError(f"{file} exists already; nothing was written")
    title = name.replace("_", " ").capitalize()
    texts = {f: t.replace("NAME", name).replace("FAMILY", family).replace("TITLE", title) for f, t in files.items()}
    for file in list(files)[:2]:
        if not (package := file.parent / "__init__.py").exists():
            texts[package] = f'"""{family.capitalize()} methods."""\n'
    written: list[Path] = []
    try:
        for file, text in texts.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            written.append(file)
            file.write_text(text)
    except OSError as error:
        for file in written:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        raise UserError(f"{error.filename or root}: {error.strerror or error}; nothing was written") from None
    return list(files)
