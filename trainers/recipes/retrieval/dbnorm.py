"""Recipe: similarities of two modalities, calibrated by banks of training samples and measured before and after."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.retrieval_pairs import hub_pairs, retrieval_pairs
from trainers import recipe as base
from trainers.phases import Fit, FitResult
from trainers.recipe import Benchmark, Data, Export, Run, UserError
from zoo.base import suggest
from zoo.metrics.hubness import hubness, k_occurrence
from zoo.metrics.matching import match_metrics, match_ranks
from zoo.ops.banks import bank_activation, bank_log_normalizer, products
from zoo.ops.blocks import in_blocks
from zoo.ops.prototypes import l2_normalize
from zoo.ops.topk import top_k
from zoo.retrieval import dbnorm

COMPARED = ("identity", "is", "dis", "dualis", "dualdis", "csls", "sinkhorn")
"""Normalisers that are drawn beside each other."""


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Fits the gallery's shifts to a query bank and a gallery bank, and measures retrieval and hubs with and without.

    The default is a generated joint space with hubs: 500 pairs, and banks of 1000 (--query-bank-size 50 or --shifted
    0.5 spoil the query bank, where the gallery bank helps). QB-Norm is --normaliser dis; logits near 100 need
    --no-cosine --beta1 0.5 --beta2 3.
    """

    data: Data = Data("hubs")
    """hubs (generated), or --data.path with a folder: queries.npy, gallery.npy, query_bank.npy and gallery_bank.npy, or
    S.npy, S_bq.npy and S_bg.npy; caption_item.npy where captions and items differ in number"""
    normaliser: Literal["identity", "is", "dis", "dualis", "dualdis", "csls", "gc", "sinkhorn"] = "dualis"
    """the normaliser: is and dis use the query bank, dualis and dualdis both, csls, gc and sinkhorn are others'"""
    beta1: float = 20.0
    """inverse temperature of the query bank; it must match the scale of the similarities (20 suits cosines)"""
    beta2: float = 5.0
    """inverse temperature of the gallery bank"""
    k: int = 1
    """items that each bank sample activates (dis and dualdis)"""
    neighbours: int = 10
    """nearest bank samples of csls"""
    steps: int = 10
    """steps of sinkhorn"""
    direction: Literal["forward", "reverse"] = "forward"
    """reverse asks with the gallery's items for the queries, the banks exchanged (embeddings only)"""
    query_bank_size: int = 0
    """how many samples of the query bank to use, drawn by the seed; 0 uses all"""
    shifted: float = 0.0
    """share of the generated query bank that is off-distribution"""
    cosine: bool = True
    """scale embeddings to unit length; --no-cosine takes inner products as they are"""
    depth: int = 10
    """k of the hubness measures: how deep a query's list counts"""
    chunk: int = 1024
    """bank samples multiplied at a time"""
    compare: bool = True
    """measure and draw the other normalisers too"""

    def build(self) -> Run:
        """A calibrator, then its measurement."""
        data = self._data()
        side = self._sides(data)
        self._check(side)
        # where a mode cannot be fitted (no gallery bank), it is not compared
        modes = [m for m in COMPARED if "dual" not in m or side["gallery_bank"] is not None] if self.compare else []
        modes = list(dict.fromkeys(["identity", self.normaliser, *modes]))
        n = len(side["gallery_item"])

        def fit_calibrator(variables, artefacts, rng):
            made = jax.jit(functools.partial(self.fit, mode=self.normaliser))(
                *(None if side[x] is None else jnp.asarray(side[x]) for x in ("query_bank", "gallery_bank", "gallery"))
            )
            arrays = dbnorm.to_arrays(made)
            metrics = {"items": n, "query_bank": len(side["query_bank"])}
            metrics["gallery_bank"] = 0 if side["gallery_bank"] is None else len(side["gallery_bank"])
            metrics["bytes_per_item"] = sum(x.nbytes for x in arrays.values() if x.ndim and len(x) == n) / n
            for bank in "qg":
                if f"active_{bank}" in arrays:
                    metrics[f"active_{bank}"] = float(jnp.mean(arrays[f"active_{bank}"]))
            return FitResult({}, {"calibrator": arrays}, metrics)

        def measure_modes(variables, artefacts, rng):
            arrays = {k: None if v is None else jnp.asarray(v) for k, v in side.items()}
            run = jax.jit(functools.partial(self.measure, mode="given"))
            config = dbnorm.CalibratorConfig(self.normaliser, n, self.neighbours)
            fitted = dbnorm.calibrator_from_arrays(config, artefacts["calibrator"])
            if fitted.fingerprint is not None:
                dbnorm.check_gallery(fitted, arrays["gallery"])
            found = {}
            for mode in modes:
                if mode == self.normaliser:
                    found[mode] = jax.device_get(run(arrays, fitted))
                else:
                    found[mode] = jax.device_get(jax.jit(functools.partial(self.measure, mode=mode))(arrays, None))
            metrics = {}
            for mode, (values, _) in found.items():
                prefix = {"identity": "raw_", self.normaliser: ""}.get(mode, f"{mode}_")
                kept = (
                    values
                    if mode in ("identity", self.normaliser)
                    else {k: values[k] for k in ("recall_at_1", "skewness")}
                )
                metrics |= {f"{prefix}{name}": float(value) for name, value in kept.items()}
            if self.normaliser == "identity":
                metrics |= {f"raw_{k}": float(v) for k, v in found["identity"][0].items()}
            names = np.frombuffer("\n".join(found).encode(), np.uint8).copy()
            table = np.array([[v["recall_at_1"], v["skewness"]] for v, _ in found.values()], np.float32)
            curves = np.stack([counts for _, counts in found.values()])
            return FitResult({}, {"hubs": {"names": names, "counts": curves, "table": table}}, metrics)

        def export(variables: Mapping, artefacts: Mapping) -> Export:
            facts = {"similarities": "cosines" if self.cosine else "inner products", "data": data.name, "items": n}
            config = dbnorm.CalibratorConfig(self.normaliser, n, self.neighbours)
            return Export(config, {"calibrator": artefacts["calibrator"]}, facts)

        def summary(m: Mapping[str, float]) -> str:
            return (
                f"R@1 {m['measure/raw_recall_at_1']:.3f} -> {m['measure/recall_at_1']:.3f} by {self.normaliser}, "
                f"skewness {m['measure/raw_skewness']:.2f} -> {m['measure/skewness']:.2f}; see hubs.png"
            )

        phases = [Fit("fit", fit_calibrator), Fit("measure", measure_modes)]
        figures = functools.partial(_figures, mode=self.normaliser, depth=self.depth)
        return Run(phases, export, lambda rng: {"params": {}}, figures, data.fingerprint, summary)

    def fit(self, query_bank, gallery_bank, gallery, mode: str) -> dbnorm.HubnessCalibrator:
        """A calibrator of any mode, from embeddings, or from similarities if ``gallery`` is ``None``."""
        rest = {"k": self.k, "neighbours": self.neighbours, "steps": self.steps}
        if gallery is None:
            return dbnorm.from_similarities(query_bank, gallery_bank, mode, self.beta1, self.beta2, **rest)
        return dbnorm.fit(query_bank, gallery_bank, gallery, mode, self.beta1, self.beta2, chunk=self.chunk, **rest)

    def measure(self, arrays: Mapping[str, Any], fitted: Any, mode: str) -> tuple[dict[str, Any], Any]:
        """Retrieval metrics, hubness and k-occurrences of one mode; blocks of queries, so memory stays bounded."""
        if fitted is None:
            fitted = self.fit(arrays["query_bank"], arrays["gallery_bank"], arrays["gallery"], mode)
        items = arrays["gallery_item"]
        depth = min(self.depth, len(items))

        def block(rows):
            asked, item = rows
            s = asked if arrays["gallery"] is None else products(asked, arrays["gallery"])
            scores = dbnorm.apply(fitted, s)
            return match_ranks(scores, item, items), top_k(scores, depth)[1].astype(jnp.int32)

        ranks, ids = in_blocks(block, (arrays["queries"], arrays["query_item"]), 256)
        values = {name.replace("r@", "recall_at_"): value for name, value in match_metrics(ranks).items()}
        return values | hubness(ids, len(items)), k_occurrence(ids, len(items))

    def _data(self) -> Dataset:
        if self.data.path is not None:
            return retrieval_pairs(self.data.path)
        if self.data.name != "hubs":
            raise UserError(f"--data.name {self.data.name!r} is unknown; use hubs, or --data.path DIR with queries.npy")
        if not 0 <= self.shifted <= 1:
            raise UserError(f"--shifted must be in [0, 1], a share of the query bank; got {self.shifted:g}")
        return hub_pairs(self.seed, shifted=self.shifted)

    def _sides(self, data: Dataset) -> dict[str, Any]:
        """The arrays of this direction: queries, gallery (``None`` for matrices), banks and item numbers."""
        whole = "sim" in data["queries"]
        if whole and self.direction == "reverse":
            raise UserError("--direction reverse needs embeddings: S_bq.npy and S_bg.npy say nothing of the queries")
        field = "sim" if whole else "emb"
        take = lambda split: data[split][field] if split in data.splits and field in data[split] else None  # noqa: E731
        side = {name: take(name) for name in ("queries", "gallery", "query_bank", "gallery_bank")}
        side |= {"query_item": data["queries"]["item"], "gallery_item": data["gallery"]["item"]}
        if self.direction == "reverse":
            swap = {"queries": "gallery", "query_bank": "gallery_bank", "query_item": "gallery_item"}
            swap |= {v: k for k, v in swap.items()}
            side = {name: side[swap[name]] for name in side}
            if side["query_bank"] is None:
                raise UserError("--direction reverse asks with gallery items: it needs gallery_bank.npy as their bank")
        if not 0 <= self.query_bank_size <= len(side["query_bank"]):
            raise UserError(
                f"--query-bank-size must be in [0, {len(side['query_bank'])}] (0 for all), got {self.query_bank_size}"
            )
        if self.query_bank_size:
            rows = np.random.default_rng(self.seed).permutation(len(side["query_bank"]))[: self.query_bank_size]
            side["query_bank"] = side["query_bank"][rows]
        if not whole and self.cosine:
            names = ("queries", "gallery", "query_bank", "gallery_bank")
            unit = lambda x: np.asarray(l2_normalize(jnp.asarray(x)))  # noqa: E731
            side |= {name: unit(side[name]) for name in names if side[name] is not None}
        return side

    def _check(self, side: Mapping[str, Any]) -> None:
        n = len(side["gallery_item"])
        try:
            if side["gallery"] is None:
                dbnorm.check_similarities(side["queries"], side["query_bank"], side["gallery_bank"])
            else:
                dbnorm.check_vectors(side["queries"], side["gallery"], side["query_bank"], side["gallery_bank"])
            dbnorm.check_settings(self.normaliser, self.beta1, self.beta2, self.k, n)
        except ValueError as error:
            text = str(error)
            for name in ("beta1", "beta2", "k"):
                text = f"--{text}" if text.startswith(f"{name} ") else text
            raise UserError(text) from None
        if "dual" in self.normaliser and side["gallery_bank"] is None:
            raise UserError(
                f"--normaliser {self.normaliser} needs a gallery bank (gallery_bank.npy or S_bg.npy); is and dis do not"
            )
        if not 1 <= self.neighbours <= len(side["query_bank"]):
            raise UserError(
                f"--neighbours must be in [1, {len(side['query_bank'])}], the query bank; got {self.neighbours}"
            )
        for flag, value in (("steps", self.steps), ("depth", self.depth), ("chunk", self.chunk)):
            if value < 1:
                raise UserError(f"--{flag} must be at least 1, got {value}")


def _figures(result: Any, workdir: Path, mode: str, depth: int) -> None:
    from trainers import plots

    kept = {k: np.asarray(v) for k, v in result.artefacts["hubs"].items()}
    names = bytes(kept["names"]).decode().split("\n")
    label = {"identity": "raw", "is": "IS", "dis": "DIS", "dualis": "DualIS", "dualdis": "DualDIS", "csls": "CSLS"}
    fig, axes = plots.figure(2, 1, (4.6, 3.6))
    bars, curves = axes.ravel()
    order = np.argsort(kept["table"][:, 0], kind="stable")
    colours = ["#2a78d6" if names[i] == mode else "0.45" if names[i] == "identity" else "0.75" for i in order]
    bars.barh([label.get(names[i], names[i]) for i in order], kept["table"][order, 0], color=colours)
    for place, i in enumerate(order):
        bars.text(kept["table"][i, 0], place, f" {kept['table'][i, 0]:.3f}", va="center", fontsize=7)
    bars.set_xlim(0, min(1.0, 1.15 * kept["table"][:, 0].max() + 1e-3))
    bars.set_title("right item first (R@1)", fontsize=9)
    for name in dict.fromkeys(("identity", "is", mode)):
        if name in names:
            counts = np.sort(kept["counts"][names.index(name)])[::-1]
            text = f"{label.get(name, name)}: skewness {kept['table'][names.index(name), 1]:.2f}"
            style = {"identity": {"color": "0.35", "linestyle": "--"}, mode: {"color": "#2a78d6"}}.get(
                name, {"color": "0.6"}
            )
            curves.plot(np.arange(1, len(counts) + 1), counts, label=text, linewidth=1.5, **style)
    curves.set_xscale("log")
    curves.set_xlabel("gallery items, most returned first")
    curves.set_ylabel(f"queries that have it in their top {depth}")
    curves.set_title("hubs", fontsize=9)
    curves.legend(fontsize=7)
    curves.grid(alpha=0.25)
    plots.save(fig, workdir / "hubs.png")


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "queries/emb": "float32 [N_q, d] (queries.npy), or queries/sim float32 [N_q, N_g] (S.npy)",
        "gallery/emb": "float32 [N_g, d] (gallery.npy); none with matrices",
        "query_bank/emb": "float32 [M_q, d] (query_bank.npy), or query_bank/sim float32 [M_q, N_g] (S_bq.npy)",
        "gallery_bank/emb": "float32 [M_g, d] (gallery_bank.npy), or gallery_bank/sim float32 [M_g, N_g] (S_bg.npy)",
        "queries/item": "int32 [N_q]: the gallery item of each query (caption_item.npy; in order without it)",
    }


# --- the claim --------------------------------------------------------------------------------------------------------

ARMS = {"DualIS (20, 5)": "dualis", "IS (20)": "is", "raw similarity": "identity"}
SMALL_BANK = 50


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim on the generated pairs, the same for the same seed.

    Returns:
      ``recall_at_1`` and ``skewness`` with the first 50 samples of the query bank; also with a query bank whose first
      half is off-distribution (``shifted_``) and with the whole of it (``full_``).
    """
    if arm not in ARMS:
        raise UserError(suggest(arm, tuple(ARMS), "arm"))
    recipe = Recipe(normaliser=ARMS[arm])
    run = jax.jit(functools.partial(recipe.measure, mode=ARMS[arm]))
    found = {}
    for prefix, shifted, size in (("", 0.0, SMALL_BANK), ("shifted_", 0.5, None), ("full_", 0.0, None)):
        side = replace(recipe, seed=seed)._sides(hub_pairs(seed, shifted=shifted))
        side["query_bank"] = side["query_bank"][:size]
        values = run({k: jnp.asarray(v) for k, v in side.items()}, None)[0]
        found |= {f"{prefix}{name}": float(values[name]) for name in ("recall_at_1", "skewness")}
    return found


# --- benchmarks and the conformance row -------------------------------------------------------------------------------


def benchmarks() -> list[Benchmark]:
    """A bank of 60,000 streamed over a gallery of 10,000, with its temporary memory; calibrated search."""
    unit = lambda key, *shape: l2_normalize(jax.random.normal(jax.random.key(key), shape))  # noqa: E731
    bank, gallery, queries = unit(0, 60_000, 256), unit(1, 10_000, 256), unit(2, 256, 256)
    m, n, d = len(bank), len(gallery), bank.shape[1]
    rows = []
    for name, streamed in (
        ("normaliser", lambda b, g: bank_log_normalizer(b, g, 20.0)),
        ("activation set", lambda b, g: bank_activation(b, g, 1)),
    ):
        temporary = jax.jit(streamed).lower(bank, gallery).compile().memory_analysis().temp_size_in_bytes
        note = f"temporary memory {temporary / 2**20:.0f} MiB; [M, N_g] would be {4 * m * n / 2**20:.0f} MiB"
        rows.append(
            Benchmark(
                f"{name}, bank {m} x {d}, gallery {n}",
                streamed,
                (bank, gallery),
                2.0 * m * n * d,
                4.0 * (bank.size + gallery.size + n),
                note=note,
            )  # fmt: skip
        )
    log_norm = bank_log_normalizer(bank[:2048], gallery, 20.0)
    fitted = dbnorm.HubnessCalibrator(jnp.float32(20), jnp.float32(5), log_norm, log_norm, num_items=n)
    plain = jax.jit(lambda c, q, g: dbnorm.mips_topk(q, g, 10))
    rows.append(
        Benchmark(
            "calibrated top 10 of 10000, 256 queries",
            lambda c, q, g: dbnorm.calibrated_topk(c, q, g, 10),
            (fitted, queries, gallery),
            2.0 * len(queries) * n * (d + 1),
            4.0 * (gallery.size + queries.size),
            {"uncalibrated_topk": plain},
        )  # fmt: skip
    )
    return rows


def example() -> dict:
    """The conformance row: fitting and applying every part as pure functions."""
    rng = np.random.default_rng(0)
    unit = lambda *s: (lambda x: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32))(rng.normal(size=s))  # noqa: E731
    gallery, bank_q, bank_g = (jnp.asarray(unit(n, 5)) for n in (7, 6, 8))

    def function(queries):
        found = {"topk": dbnorm.calibrated_topk(dbnorm.fit(bank_q, bank_g, gallery), queries, gallery, 3)[0]}
        for mode in dbnorm.MODES:
            fitted = dbnorm.fit(bank_q, bank_g, gallery, mode, 2.0, 1.0, neighbours=3)
            found[mode] = dbnorm.apply(fitted, products(queries, gallery))
        return found

    return {"objective": None, "function": function, "args": (unit(4, 5),), "num_examples": 4}
