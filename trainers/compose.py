"""Which loss transformation goes on which host, decided from what each says of itself: ``zoo compose``.

The hosts are tiny instances of ``zoo/hosts.py`` and ``zoo/objectives.py`` and the objectives of every method's
``example()``; the transformations are the zoo's own and those of every ``example()``, and a method that wraps whole
objectives gives a ``wrapper``.  A pair either runs or has the reason why not, that with which a run would be refused.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoo
from trainers.errors import UserError
from zoo import base, hosts
from zoo.base import CompositionError, Loss, LossTransformation, Objective
from zoo.losses import pairs
from zoo.nn.mlp import MLP
from zoo.nn.pair_temperature import AdaptiveHeads
from zoo.nn.siamese import Siamese
from zoo.objectives import ema_teacher, frozen_tower, memory_bank, supervised, weighted_sum

ROWS = 16
"""Rows of a tiny host's batch."""


@dataclasses.dataclass(frozen=True)
class Host:
    """A host of the matrix.

    Attributes:
      name: in the matrix.
      objective: a tiny instance.
      batch: fields of a batch of 16, without ``row``.
      artefacts: what earlier phases of its method would have left.
      shared: whether it is a host of the zoo rather than one method's own objective.
    """

    name: str
    objective: Objective
    batch: Mapping[str, Any]
    artefacts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shared: bool = True


def tiny_batch() -> dict[str, np.ndarray]:
    """Small images of four classes, float32 in [0, 1]."""
    rng = np.random.default_rng(0)
    label = np.repeat(np.arange(4), ROWS // 4).astype(np.int32)
    centres = rng.uniform(size=(4, 6, 6, 1))
    x = np.clip(centres[label] + 0.1 * rng.normal(size=(ROWS, 6, 6, 1)), 0, 1)
    return {
        "x": x.astype(np.float32),
        "label": label,
        "index": np.arange(ROWS, dtype=np.int32),
        "mask": np.ones(ROWS, bool),
    }


def _two(key, x):
    first, second = jax.random.split(key)
    noisy = lambda k: x + 0.1 * jax.random.normal(k, x.shape)  # noqa: E731
    return noisy(first), noisy(second)


@functools.cache
def shared_hosts() -> tuple[Host, ...]:
    """Every host of ``zoo/hosts.py`` and every combinator of ``zoo/objectives.py``, as tiny instances."""
    net = MLP((8,), 4)
    siamese = Siamese(net, MLP((), 4), MLP((32,), 4))  # wide: a row whose units all die has no direction
    heads = functools.partial(AdaptiveHeads, MLP((8,), 8), 2, 8, 4, temperature_hidden=8)
    simplex = np.eye(4, dtype=np.float32) - 0.25
    plain = supervised(MLP((8,), 4))
    agree = lambda s, t, b, c: Loss(  # noqa: E731
        base.example_elements(jnp.sum((s["logits"] - t["logits"]) ** 2 + s["logits"] ** 2, -1), b)
    )
    remember = lambda out, bank, b, c: Loss(  # noqa: E731
        base.example_elements(jnp.mean(jax.nn.softplus(out["embedding"] @ bank["values"].T), 1), b)
    )
    close = lambda s, p, n: jnp.sum(jnp.where(p, 1.0 - s, 0.0), 1)  # noqa: E731
    learned = lambda loss, **settings: hosts.metric_learning(net, functools.partial(loss, **settings))  # noqa: E731
    found: dict[str, Objective] = {
        "supervised": plain,
        "softmax, linear": hosts.softmax_classifier(net, 4),
        "softmax, cosine": hosts.softmax_classifier(net, 4, "cosine"),
        "softmax, fixed": hosts.softmax_classifier(net, 4, "fixed", prototypes=simplex),
        "cosface": hosts.softmax_classifier(net, 4, "cosface"),
        "arcface": hosts.softmax_classifier(net, 4, "arcface"),
        "proxy nca": hosts.proxies(net, 4, "proxy_nca"),
        "proxy anchor": hosts.proxies(net, 4),
        "contrastive pairs": learned(pairs.contrastive_pairs),
        "triplet, batch hard": learned(pairs.triplet, mining="batch_hard"),
        "triplet, batch all": learned(pairs.triplet, mining="batch_all"),
        "triplet, semi-hard": learned(pairs.triplet, mining="semi_hard"),
        "multi-similarity": learned(pairs.multi_similarity),
        "margin": hosts.metric_learning(net, pairs.margin_pairs, "distance"),
        "smooth-AP": learned(pairs.smooth_ap, max_positives=3),
        "recall@k surrogate": learned(pairs.recall_surrogate, max_positives=3),
        "supervised contrastive": hosts.supervised_contrast(net, _two),
        "ordinal contrastive": hosts.ordinal_contrast(net, _two),
        "simclr": hosts.simclr(net, _two),
        "moco": hosts.moco(net, _two, queue=32),
        "simsiam": hosts.simsiam(siamese, _two),
        "barlow twins": hosts.barlow_twins(net, _two),
        "simclr, several heads": hosts.simclr(heads(), _two),
        "moco, several heads": hosts.moco(heads(), _two, queue=32),
        "simsiam, several heads": hosts.simsiam(heads(normalise=True, predictor=32), _two),
        "barlow twins, several heads": hosts.barlow_twins(heads(normalise=True, temperature="table"), _two),
        "supervised contrastive, several heads": hosts.supervised_contrast(heads(), _two),
        "weighted sum": weighted_sum({"a": (1.0, plain), "b": (0.5, plain)}),
        "ema teacher": ema_teacher(plain, agree),
        "memory bank": memory_bank(hosts.metric_learning(net, close), remember, 24),
        "frozen tower": frozen_tower(
            plain, lambda v, b: b["x"].reshape(len(b["x"]), -1) @ v, jnp.ones((36, 3)) / 36, "teacher"
        ),
    }
    batch = tiny_batch()
    return tuple(Host(name, objective, batch) for name, objective in found.items())


@functools.cache
def _examples() -> dict[str, Mapping[str, Any]]:
    found: dict[str, Mapping[str, Any]] = {}
    for card in zoo.cards():
        own = importlib.import_module(card.recipe).example()
        found[card.name] = own
        found |= {f"{card.name}/{k}": v for k, v in own.get("also", {}).items()}
    return found


@functools.cache
def all_hosts() -> tuple[Host, ...]:
    """The shared hosts, then the methods' own objectives."""
    own = [
        Host(name, row["objective"], row["batch"], row.get("artefacts", {}), shared=False)
        for name, row in _examples().items()
        if row["objective"] is not None and not row.get("sharded")
    ]
    return (*shared_hosts(), *own)


@functools.cache
def transformations() -> dict[str, LossTransformation]:
    """Every loss transformation by name: the methods', and the combinators on one of them."""
    found = {"identity": base.identity(), "examples": base.examples()}
    for row in _examples().values():
        t = row.get("transform")
        if t is not None:
            found.setdefault(t.name, t)
    return found


@functools.cache
def wrappers() -> dict[str, Callable[[Objective], Objective]]:
    """Methods that wrap whole objectives: ``objective -> objective``, refusing with CompositionError."""
    return {name: row["wrapper"] for name, row in _examples().items() if "wrapper" in row}


def reason(part: LossTransformation | Callable[[Objective], Objective], host: Objective) -> str | None:
    """Why a transformation or wrapper does not go on a host; ``None`` if it does."""
    if isinstance(part, LossTransformation):
        return base.misfit(part, host)
    try:
        part(host)
    except CompositionError as error:
        return str(error)
    return None


def matrix() -> list[dict[str, Any]]:
    """Every pair: ``transformation``, ``host``, ``shared``, ``runs`` and, if it does not, the ``reason``."""
    rows = []
    for host in all_hosts():
        for name, part in {**transformations(), **wrappers()}.items():
            why = reason(part, host.objective)
            if why is not None:  # by the matrix's own name of the host, where many share one objective's
                why = why.replace(f"which {host.objective.name} does", f"which {host.name} does")
                why = why.replace(f"but {host.objective.name} yields", f"but {host.name} yields")
            rows.append(
                {"transformation": name, "host": host.name, "shared": host.shared, "runs": why is None, "reason": why}
            )
    return rows


def tables(rows: list[dict[str, Any]]) -> str:
    """The shared hosts' part as a Markdown table; reasons are numbered below it."""
    names = list(dict.fromkeys(r["transformation"] for r in rows))
    reasons: dict[str, int] = {}
    short_names = [n.split(" over ")[0] for n in names]
    lines = ["| host | " + " | ".join(short_names) + " |", "| --- |" + " :-: |" * len(names)]
    for host in dict.fromkeys(r["host"] for r in rows if r["shared"]):
        cells = []
        for r in (r for r in rows if r["host"] == host):
            short = r["reason"] and _short(r["reason"], host)
            cells.append("runs" if r["runs"] else f"[{reasons.setdefault(short, len(reasons) + 1)}]")
        lines.append(f"| {host} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"{n}. {why}" for why, n in reasons.items())])


def _short(why: str, host: str) -> str:
    # one line a kind of misfit: what the host provides instead is told by zoo compose
    short = why.split(" (it provides")[0].split("; reduce first")[0]
    return short.replace(f"which {host} does", "which the host does").replace(
        f"but {host} yields", "but the host yields"
    )


def report(transformation: str | None = None, host: str | None = None) -> list[dict[str, Any]]:
    """The matrix, or the part of it about one transformation or one host.

    Raises:
      UserError: a name that is not in the matrix; the nearest are named.
    """
    rows = matrix()
    for key, wanted in (("transformation", transformation), ("host", host)):
        known = list(dict.fromkeys(r[key] for r in rows))
        if wanted is not None and wanted not in known:
            raise UserError(base.suggest(wanted, known, key))
        rows = [r for r in rows if wanted in (None, r[key])]
    return rows


def describe(rows: list[dict[str, Any]]) -> str:
    """One line a pair, for people."""
    wide = max(len(r["transformation"]) for r in rows), max(len(r["host"]) for r in rows)
    line = lambda r: f"{r['transformation']:{wide[0]}}  {r['host']:{wide[1]}}  {r['reason'] or 'runs'}"  # noqa: E731
    return "\n".join(map(line, rows))
