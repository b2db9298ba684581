"""Recipe: encoders that never met, heads and decoders swapped between them, with relative and with absolute latents."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.dataset import Dataset
from data.graphs import Graph
from data.images import digits
from data.latents import Latents
from data.parallel_texts import ParallelTexts
from data.stream import training_stream
from data.text import SPECIAL
from trainers import recipe as base
from trainers.phases import Alternate, Fit, FitResult, Train, Update
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.run import train_in_memory
from trainers.stitching import (
    KINDS,
    checked_anchors,
    heads_objective,
    likeness,
    stitching_figures,
    stitching_metrics,
    stitching_summary,
    under,
)
from trainers.stitching_nodes import node_run
from trainers.stitching_tasks import (
    StitchingData,
    Task,
    image_task,
    latent_task,
    node_task,
    stitching_data,
    text_task,
)
from zoo.base import Objective
from zoo.metrics.latents import topk_jaccard
from zoo.nn.conv_autoencoder import ConvDecoder, ConvEncoder, VariationalDecoder
from zoo.nn.gcnii import GCNII
from zoo.nn.mlp import MLP
from zoo.objectives import supervised
from zoo.ops.anchors import AnchorSet, select_anchors
from zoo.ops.blocks import in_blocks
from zoo.ops.stitching import Stitchable, stitch, stitching_matrix
from zoo.representation import relative_representations as relative
from zoo.representation.relative_hosts import relative_autoencoder, relative_classifier, relative_nodes


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains encoders with different seeds and widths, one head per encoder on relative and one on absolute latents,
    and measures every encoder with every head; then swaps the decoders of autoencoders.

    Your own encoders: --data.path FILE.npz with one array [N, d] per model and labels [N]: their heads are trained and
    the stitching table is printed. A folder of images, or --data.name of a TFDS image set, trains encoders on those.
    Texts: --data.path FILE.csv with columns text, label and perhaps split; translations of the same documents in
    columns text_EN, text_FR, ... stitch encoders across languages, the anchors being documents in every one of them.
    Graphs: --data.path FOLDER with edges.csv and nodes.npz (features, labels) trains graph networks end to end.
    """

    data: Data = Data("digits")
    """digits; generated: rotated, words (latents), translations (texts in two languages), communities (a graph);
    any TFDS image set; or --data.path: images, latents of models, texts, a graph"""
    widths: tuple[int, ...] = (64, 64, 96)
    """images, texts, graphs: one encoder for each, its latents of this width; texts: of the languages in turn"""
    hidden: int = 128
    """images, texts: hidden units of an encoder, and the width of its word vectors"""
    text_length: int = 64
    """texts: tokens of a text, longer ones are cut"""
    vocab_size: int = 4096
    """texts: ids of each language's tokenizer, at most"""
    layers: int = 4
    """graphs: convolutions of an encoder"""
    dropout: float = 0.5
    """graphs: before every convolution, in training"""
    anchors: int = 64
    """k: samples that all models share, the width of relative representations"""
    anchor_method: Literal["uniform", "stratified", "top_m", "farthest", "kmeans"] = "uniform"
    """how they are chosen among the training items; farthest and kmeans look at pixels, the first model, the first
    language's latent semantics, or features of nodes"""
    top_m: int = 0
    """top_m: among how many first items; 0 for twice the anchors"""
    similarity: Literal["cosine", "inner", "basis"] = "cosine"
    """to an anchor: cosine, inner product over sqrt(d), or coefficients in the anchors' frame"""
    subspaces: int = 1
    """blocks of a latent that are projected each by itself"""
    bin_size: float = 0.0
    """round similarities to multiples of it; 0 does not"""
    standardise: Literal["layer", "batch"] = "layer"
    """second normalisation of the head; batch is the released code's: predictions depend on the test batch"""
    encoder_steps: int = 400
    """images, texts: steps of each encoder; graphs: of each encoder with its head"""
    head_steps: int = 400
    """steps of the heads, on frozen encoders; graph networks have theirs already"""
    ae_steps: int = 300
    """images: steps of each autoencoder; 0 leaves them out"""
    ae_widths: tuple[int, ...] = (16, 32)
    """channels of the autoencoders' layers"""
    variational: bool = False
    """variational autoencoders"""
    batch_size: int = 64
    """examples per step"""
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, schedule="cosine")
    """optimiser of everything but graph networks"""
    graph_optimizer: Optimizer = Optimizer(learning_rate=0.02, schedule="cosine")
    """graphs: of the networks, at the paper's rate"""

    def build(self) -> Run:
        """Encoders (of images and texts), anchors, heads, the table, autoencoders and their pictures; or networks."""
        return self.run_on(stitching_data(self.data.name, self.data.path, self.seed))

    def run_on(self, data: StitchingData) -> Run:
        """The phases over given data."""
        self._check_settings(encoders=not isinstance(data, Latents))
        task = self._task(data)
        self._check_items(task)
        ids = self._anchor_ids(task)
        spaces = {name: task.encoder(i) for i, name in enumerate(task.names)}
        layer = relative.RelativeLayer(
            self.similarity, self.subspaces, quantise="round" if self.bin_size else "none",
            bin_size=self.bin_size or 1.0, norm="none",
        )  # fmt: skip
        dtype = jnp.dtype(self.dtype)
        if task.graph is not None:
            network = lambda width: GCNII(width, self.layers, rate=self.dropout, dtype=dtype)  # noqa: E731
            own = relative.RelativeHead(task.num_classes, dtype=dtype)
            return node_run(
                task, ids, layer.clone(norm="l2"), own, network, self.encoder_steps, self.graph_optimizer.build,
                self.batch_size, self.seed,
            )  # fmt: skip
        head = relative.StitchingHead(task.num_classes, self.standardise, task.activation, dtype)
        represent = jax.jit(lambda z, own: layer.apply({}, z, own))
        logits = jax.jit(head.apply)
        anchor_batch = task.anchor_batch(ids)
        heads = heads_objective(head, spaces, represent)
        stream = training_stream(task.train, self.batch_size, self.seed)
        tx = self.optimizer.build
        autoencoders = self._autoencoders(task, ids) if task.images and self.ae_steps else {}

        def init(rng):
            keys = iter(jax.random.split(rng, 3 * len(spaces) + len(autoencoders)))
            made: dict[str, dict] = {"params": {}, "constants": {"anchor_ids": ids, "hash": AnchorSet.of(ids).hash}}
            for i, module in enumerate(task.modules):
                started = module.init(next(keys), jnp.asarray(task.train[task.inputs[i]][:1]))
                made["params"][f"encoder{i}"] = started["params"]
            own = {}
            for i, encode in enumerate(spaces.values()):
                z = jax.eval_shape(encode, made["params"], anchor_batch)
                zeros = jnp.zeros((1, z.shape[1]))
                own |= {f"relative{i}": head.init(next(keys), represent(zeros, jnp.ones(z.shape)))["params"],
                        f"absolute{i}": head.init(next(keys), zeros)["params"]}  # fmt: skip
            made["params"]["heads"] = own
            for name, objective in autoencoders.items():
                batch = {"x": jnp.asarray(task.train["x"][:2])}
                for collection, value in objective[1].init(next(keys), batch).items():
                    made.setdefault(collection, {})[name] = value
            return made

        def find_anchors(variables, artefacts, rng):
            found = {}
            for i, (name, encode) in enumerate(spaces.items()):
                latents = task.own_anchors.get(name)
                latents = encode(variables["params"], anchor_batch) if latents is None else latents
                found[f"m{i}"] = np.asarray(checked_anchors(name, ids, latents).latents)
            return FitResult({}, {"anchors": found}, {"anchors": len(ids)})

        def measure(variables, artefacts, rng):
            latents, tables = {}, {}
            for name, encode in spaces.items():
                latents[name] = in_blocks(lambda b, e=encode: e(variables["params"], b), task.test_batch, 1024)
            for kind in KINDS:
                models = {}
                for i, (name, z) in enumerate(latents.items()):
                    own = AnchorSet.of(ids, jnp.asarray(artefacts["anchors"][f"m{i}"]))
                    params = {"params": variables["params"]["heads"][f"{kind}{i}"]}
                    decode = functools.partial(logits, params)
                    how = represent if kind == "relative" else None
                    models[name] = Stitchable(lambda z: z, decode, how, own, z.shape[1])
                hit = lambda logits: jnp.mean(jnp.argmax(logits, -1) == task.test["label"])  # noqa: E731
                tables[kind] = stitching_matrix(models, latents, hit)
            metrics = stitching_metrics(tables)
            metrics |= likeness(latents, artefacts["anchors"], represent)
            return FitResult({}, {"tables": {k: v.astype(np.float32) for k, v in tables.items()}}, metrics)

        phases: list[Any] = []
        if task.modules:
            updates = {
                f"encoder{i}": Update(
                    under(f"encoder{i}", supervised(module, inputs=task.inputs[i])), tx(self.encoder_steps),
                    training_stream(task.train, self.batch_size, 1000 * self.seed + i + 1),
                    trainable=(f"encoder{i}/.*",),
                )
                for i, module in enumerate(task.modules)
            }  # fmt: skip
            phases.append(Alternate("encoders", self.encoder_steps, updates))
        phases += [
            Fit("anchors", find_anchors),
            Train("heads", self.head_steps, heads, tx(self.head_steps), stream, trainable=("heads/.*",)),
            Fit("stitching", measure),
        ]
        if autoencoders:
            updates = {
                name: Update(
                    under(name, objective), tx(self.ae_steps),
                    training_stream(task.train, self.batch_size, 1000 * self.seed + int(name[-1]) + 1),
                    trainable=(f"{name}/.*",),
                )
                for name, (_, objective) in autoencoders.items()
            }  # fmt: skip
            phases += [
                Alternate("autoencoders", self.ae_steps, updates),
                Fit("pictures", _pictures(task, autoencoders)),
            ]

        def export(variables, artefacts):
            own = variables["params"]["heads"]
            kept = {"anchor_ids": ids, "hash": variables["constants"]["hash"], "anchors": artefacts["anchors"]}
            kept |= {"heads": own} | {k: v for k, v in variables["params"].items() if k.startswith("encoder")}
            facts = {
                "inputs": f"relative representations [B, {len(ids)}]; params is the head of {task.names[0]}",
                "models": list(task.names),
                "similarity": self.similarity,
            }
            beside = task.write_tokenizers if task.tokenizers else None
            return Export(head, {"params": own["relative0"], "constants": kept}, facts, beside)

        summary = lambda metrics: stitching_summary(metrics, task.names)  # noqa: E731
        figures = lambda result, workdir: stitching_figures(result, workdir, task.names)  # noqa: E731
        return Run(phases, export, init, figures, task.fingerprint, summary, steps_per_call=10)

    # --- settings -----------------------------------------------------------------------------------------------------

    def _task(self, data: StitchingData) -> Task:
        dtype = jnp.dtype(self.dtype)
        if isinstance(data, Latents):
            return latent_task(data)
        if isinstance(data, Graph):
            return node_task(data, self.widths)
        if isinstance(data, ParallelTexts):
            return text_task(data, self.widths, self.hidden, self.text_length, self.vocab_size, dtype)
        return image_task(data, self.widths, self.hidden, dtype)

    def _check_settings(self, encoders: bool) -> None:
        for name in ("hidden", "anchors", "encoder_steps", "head_steps", "batch_size", "subspaces", "layers"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        if self.ae_steps < 0 or self.bin_size < 0 or self.top_m < 0:
            raise UserError(
                f"--ae-steps, --bin-size and --top-m must not be negative; got {self.ae_steps}, {self.bin_size} and "
                f"{self.top_m}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout must be in [0, 1), got {self.dropout}")
        if self.text_length < 3:
            raise UserError(f"--text-length must be at least 3 with the first and last token, got {self.text_length}")
        if self.vocab_size <= len(SPECIAL):
            raise UserError(f"--vocab-size must be above the {len(SPECIAL)} special tokens, got {self.vocab_size}")
        if encoders and (len(self.widths) < 2 or min(self.widths) < 1):
            raise UserError(f"--widths needs two encoders or more, each of width 1 or more; got {self.widths}")
        if not self.ae_widths or min(self.ae_widths) < 1:
            raise UserError(f"--ae-widths needs one layer or more of 1 channel or more; got {self.ae_widths}")

    def _check_items(self, task: Task) -> None:
        bad = [w for w in task.widths if w % self.subspaces]
        if bad:
            raise UserError(f"--subspaces {self.subspaces} must divide every model's width; one has {bad[0]}")
        if not task.own_anchors and self.anchors > task.items:
            items = "items" if task.graph is None else "nodes"
            raise UserError(f"--anchors {self.anchors} are more than the {task.items} training {items}")
        if self.anchor_method == "top_m" and not self.anchors <= (self.top_m or 2 * self.anchors) <= task.items:
            raise UserError(
                f"--top-m {self.top_m or 2 * self.anchors} must be in [{self.anchors}, {task.items}]: at least the "
                "anchors, at most the training items"
            )

    def _anchor_ids(self, task: Task) -> np.ndarray:
        if task.own_anchors:
            return np.arange(len(next(iter(task.own_anchors.values()))), dtype=np.int32)
        key = jax.random.key(self.seed)
        looked_at = jnp.asarray(task.looked_at()) if self.anchor_method in ("farthest", "kmeans") else None
        chosen = select_anchors(
            key, self.anchors, self.anchor_method, n=task.items, labels=jnp.asarray(task.train["label"]),
            latents=looked_at, top_m=self.top_m or 2 * self.anchors,
        )  # fmt: skip
        return np.asarray(chosen)

    def _autoencoders(self, task: Task, ids: np.ndarray) -> dict[str, tuple[Any, Objective]]:
        shape, dtype = tuple(task.train["x"].shape[1:]), jnp.dtype(self.dtype)
        if len(shape) != 3:
            raise UserError(f"autoencoders need images, not points of shape {shape}; set --ae-steps 0")
        decoder = ConvDecoder(shape, self.ae_widths, "tanh", dtype)
        if self.variational:
            decoder = VariationalDecoder(self.ae_widths[-1], shape, self.ae_widths, "tanh", dtype)
        anchors, found = AnchorSet.of(ids, inputs=jnp.asarray(task.train["x"][ids])), {}
        for kind in KINDS:
            layer = relative.RelativeLayer() if kind == "relative" else None
            model = relative.RelativeModel(ConvEncoder(self.ae_widths, dtype=dtype), decoder, layer)
            found |= {f"ae_{kind}{i}": (model, relative_autoencoder(model, anchors)) for i in range(2)}
        return found


def _pictures(task: Task, autoencoders: Mapping[str, tuple[Any, Objective]]):
    def fit(variables, artefacts, rng):
        x, metrics, pictures = jnp.asarray(task.test["x"]), {}, {}
        for kind in KINDS:
            cut = []
            for i in range(2):
                name, model = f"ae_{kind}{i}", autoencoders[f"ae_{kind}{i}"][0]
                own = {c: v[name] for c, v in variables.items() if name in v}
                held = own["constants"]
                cut.append(relative.stitchable(model, own, AnchorSet.of(held["anchor_ids"], inputs=held["anchors"])))
            both = {"own": [(a, a) for a in cut], "stitched": [(cut[0], cut[1]), (cut[1], cut[0])]}
            for how, pairs in both.items():
                images = [stitch(*pair)(x) for pair in pairs]
                images = [v["reconstruction"] if isinstance(v, Mapping) else v for v in images]
                metrics[f"{kind}_{how}_mse"] = float(np.mean([jnp.mean(jnp.square(v - x)) for v in images]))
                pictures[f"{kind}_{how}"] = np.asarray(images[0][:10])
        return FitResult({}, {"pictures": {**pictures, "images": np.asarray(x[:10])}}, metrics)

    return fit


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "images, float32 [N, H, W, C] in [-1, 1] (image, uint8, is scaled); encoders are trained on them",
        "label": "int32 [N]: classes",
        "NAME": "or latents: float [N, d] under each model's name (or NAME/encoding), and labels [N]",
        "NAME/anchors_latents": "optional float [k, d]: latents of the same anchors in every model, in one order",
        "train": "optional bool [N]: items to train heads on",
        "text, label, split": "or columns of a .csv: texts and their classes; split (train, test) is optional",
        "text_LANGUAGE": "instead of text: translations of the same documents, one column per language",
        "edges.csv, nodes.npz": "or a folder with a graph: two node numbers a line; features [N, d], labels [N] and "
        "perhaps train, bool [N]",
    }


def resplit_digits(seed: int) -> Dataset:
    """Digits with a test split that depends on the seed."""
    data = digits()
    x, label = (np.concatenate([data[s][k] for s in ("train", "test")]) for k in ("x", "label"))
    order = np.random.default_rng(seed).permutation(len(x))
    rows = {"train": order[360:], "test": order[:360]}
    return Dataset("digits", {s: {"x": x[r], "label": label[r]} for s, r in rows.items()}, data.info)


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim: three encoders of 64 dimensions, their heads and two autoencoders; split paired by seed."""
    if arm not in ("relative", "absolute", "most frequent class"):
        raise UserError(f"unknown arm {arm!r} of relative_representations' claim")
    if arm == "most frequent class":
        data = resplit_digits(seed)
        share = float(np.mean(data["test"]["label"] == np.bincount(data["train"]["label"]).argmax()))
        return {"stitched_accuracy": share, "own_accuracy": share}
    found = _run_of_seed(seed)
    return {
        "stitched_accuracy": found[f"stitching/{arm}_stitched"],
        "own_accuracy": found[f"stitching/{arm}_own"],
        "autoencoder_own_mse": found[f"pictures/{arm}_own_mse"],
        "autoencoder_stitched_mse": found[f"pictures/{arm}_stitched_mse"],
    }


@functools.lru_cache(4)
def _run_of_seed(seed: int) -> Mapping[str, float]:
    # one run trains both arms' heads on the same encoders
    return train_in_memory(Recipe(seed=seed, widths=(64, 64, 64)).run_on(resplit_digits(seed)), 10, seed).metrics


def benchmarks() -> list[Benchmark]:
    """The projection at the stitching experiments' size, and the neighbourhood measures on 4,000 words."""
    x, anchors = (jax.random.normal(jax.random.key(i), (n, 768)) for i, n in enumerate((4096, 768)))

    def loop(x, anchors):
        x, anchors, out = np.asarray(x), np.asarray(anchors), []
        for row in x:
            out.append([row @ a / (np.linalg.norm(row) * np.linalg.norm(a)) for a in anchors])
        return np.array(out)

    def numpy(x, anchors):
        x, anchors = np.asarray(x), np.asarray(anchors)
        unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
        return unit(x) @ unit(anchors).T

    words = [jax.random.normal(jax.random.key(i), (4000, 300)) for i in (2, 3)]
    return [
        Benchmark("relative_projection 4096 x 768 on 768 anchors", relative.relative_projection, (x, anchors),
                  2.0 * 4096 * 768 * 768, 4.0 * (4096 * 768 * 2 + 768 * 768), {"numpy": numpy}),
        Benchmark("relative_projection 32 x 768 on 768 anchors", relative.relative_projection, (x[:32], anchors),
                  2.0 * 32 * 768 * 768, 4.0 * (32 * 768 * 2 + 768 * 768), {"numpy_loop": loop}),
        Benchmark("topk_jaccard, 4000 x 300, k = 10", topk_jaccard, tuple(words), 4.0 * 4000**2 * 300,
                  4.0 * 2 * 4000 * 300),
    ]  # fmt: skip


def example() -> dict:
    """The conformance rows: a classifier end to end, with gradients through a joint anchor pass, RelVAE and nodes."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 4, 4, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    anchors = AnchorSet.of(np.arange(6), inputs=rng.normal(size=(6, 4, 4, 1)).astype(np.float32))
    # sgd: a bias before a batch normalisation has gradients of rounding errors, which Adam would blow up
    row = lambda objective, rate=0.005, b=batch: {  # noqa: E731
        "objective": objective, "batch": b, "optimizer": optax.sgd(rate, 0.9), "transform": None, "num_examples": 16,
    }  # fmt: skip
    model = relative.RelativeModel(MLP((8,), 5, normalise=True, activation="tanh"), relative.RelativeHead(3))
    vae = relative.RelativeModel(ConvEncoder((4, 6)), VariationalDecoder(3, (8, 8, 1), (4, 6), "tanh"))
    large = {**batch, "x": rng.normal(size=(16, 8, 8, 1)).astype(np.float32)}
    seen = AnchorSet.of(np.arange(6), inputs=1.1 * large["x"][:6])
    graph = {"x": rng.normal(size=(10, 3)).astype(np.float32), "src": rng.integers(0, 10, 12).astype(np.int32),
             "dst": rng.integers(0, 10, 12).astype(np.int32), "mask": np.arange(12) < 10}  # fmt: skip
    nodes = {"node": rng.integers(0, 10, 16).astype(np.int32), **{k: batch[k] for k in ("label", "index", "mask")}}
    gcn = relative.RelativeModel(GCNII(6, 3), relative.RelativeHead(3), relative.RelativeLayer(norm="l2"))
    joint = relative_classifier(model, anchors, stop_gradient=False, anchor_pass="joint")
    return {
        **row(relative_classifier(model, anchors, refresh=3)),
        "also": {
            "joint": row(joint),
            "vae": row(relative_autoencoder(vae, seen, variant="official"), 1e-4, large),
            "nodes": row(relative_nodes(gcn, graph, np.array([1, 4, 7])), 0.02, nodes),
        },
    }
