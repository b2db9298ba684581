"""Recipe: class-incremental fine-tuning with replay while better models, trained elsewhere, replace the one in use."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data.dataset import Dataset
from data.images import image_dataset
from data.open_set import open_set, shuffled_digits
from data.replay import ReplayMemory, half_memory
from data.stream import ArrayStream, DataError, evaluation_stream, training_stream
from data.tasks import rows
from trainers import recipe as base
from trainers.compatibility import matrices_figure
from trainers.phases import Fit, FitResult, Phase, Train
from trainers.protocols import (
    ModelUpdate,
    confusion_evaluation,
    fresh_optimizer,
    model_replacement,
)
from trainers.recipe import Benchmark, Data, Export, Optimizer, Run, UserError
from trainers.trees import to_host
from zoo.metrics.compatibility import average_accuracy, average_compatibility, compatibility_matrix
from zoo.nn.heads import Pick
from zoo.nn.mlp import MLP
from zoo.nn.resnet import ResNet, ResNetConfig
from zoo.ops.lineage import check_comparable, lineage, lineage_text
from zoo.ops.prototypes import l2_normalize
from zoo.ops.simplex import simplex_prototypes
from zoo.optim.lamb import decay_mask
from zoo.representation import stationary
from zoo.representation.stationary import StationaryNetwork

ENCODERS = ("mlp", "wide", "deep", "resnet20", "resnet18")
ARMS = {"hoc": "simplex and HOC", "ce": "simplex, cross-entropy alone", "er": "learned classifier (ER)"}


@dataclass(frozen=True)
class Recipe(base.Recipe):
    """Trains a sequence of models that replace one another, and searches each one's queries in all older galleries.

    The defaults use the bundled digits: a server pre-trains on classes 0-4, first on three of them, then on all with
    a wider backbone; local tasks learn {5, 6}, {7} and {8}; class 9 and quarter-turned copies of all classes are the
    identities that nobody trains on. The paper's setting starts from ImageNet32 models: --data.name cifar100
    --models A B C --replacements 0 2 4 --server 0 --initial 10 --way 15 --held-out 0 --encoders resnet18
    --preallocated 1024 --epochs 70 --batch-size 128 --optimizer.learning-rate 1e-3.
    """

    data: Data = Data("digits")
    """digits (bundled), any TFDS image set, or --data.path with an .npz file or a folder of class folders"""
    optimizer: Optimizer = Optimizer(
        name="momentum", learning_rate=0.03, schedule="cosine", final_fraction=0.01, weight_decay=5e-4
    )
    """of each local task, made anew for each; weight decay spares biases and norms"""
    server_optimizer: Optimizer = Optimizer(name="momentum", learning_rate=0.05, schedule="cosine", weight_decay=5e-4)
    """of the server's models"""
    method: Literal["hoc", "ce", "er"] = "hoc"
    """hoc: fixed simplex and higher-order compatibility; ce: fixed simplex alone; er: learned classifier with replay"""
    baselines: bool = True
    """also train the other two, on the same tasks, for the picture"""
    preallocated: int = 64
    """K, the classes the simplex has room for; the feature size is K - 1"""
    server: int = 5
    """classes 0 .. server - 1 are the server's; 0 if there is no server or --models gives its models"""
    held_out: int = 1
    """the last classes, which nobody trains on: identities of the evaluation"""
    turned: bool = True
    """quarter-turned copies of all classes are identities of the evaluation too; needs square images"""
    initial: int = 2
    """classes of the first local task"""
    way: int = 1
    """classes of every later one"""
    replacements: tuple[int, ...] = (0, 1)
    """tasks at which the model is replaced by a server's, ascending; the first is 0"""
    models: tuple[str, ...] = ()
    """exported stationary models to replace it with, one for each of --replacements; default: trained here"""
    encoders: tuple[str, ...] = ("mlp", "wide")
    """backbone of each replacement (the last is repeated): mlp, wide, deep, resnet20, resnet18"""
    side: Literal["end", "start"] = "end"
    """from which end of the simplex local classes are placed; the server's are placed from the start"""
    epochs: int = 70
    """passes of each local task over its data and the memory"""
    server_epochs: int = 20
    """passes over the server's data"""
    batch_size: int = 64
    """examples per step; from the second task on half of them come from the memory"""
    memory: int = 20
    """exemplars kept of each local class"""
    per_class: int = 0
    """training images of each local class, the first ones; 0 takes all"""
    lam: float = 0.1
    """weight of the cross-entropy against higher-order compatibility"""
    mu: float = 10.0
    """inverse temperature of higher-order compatibility"""
    mask_mode: Literal["zero", "neginf"] = "zero"
    """same-class similarities: set to zero, as released, or left out of the sum"""

    def build(self) -> Run:
        """The server's models, the sequence of each method, and the last classifier's accuracy on local classes."""
        return self.on(image_dataset(self.data.name, self.data.path))

    def on(self, data: Dataset) -> Run:
        """The run on a data set of your own making."""
        classes = self._check(data)
        try:
            queries, gallery, identities = open_set(data, self.held_out, self.turned)
        except DataError as error:
            turned = "--turned" if self.turned else "--no-turned"
            raise UserError(f"--held-out {self.held_out} with {turned}: {error}") from None
        local = classes - self.held_out - self.server
        arms = [a for a in ("er", "ce", "hoc") if self.baselines and a != self.method] + [self.method]
        models = [_given(folder, self.preallocated) for folder in self.models]
        phases: list[Phase] = []
        last: Any = None
        for kind in () if models or not self.server else ("linear", "simplex"):
            if any((a == "er") == (kind == "linear") for a in arms):
                for number in range(len(self.replacements)):
                    made, last = self._pretrain(data, number, kind, last)
                    phases += made
        sequences: dict[str, list[str]] = {}
        for arm in arms:
            updates = self._updates(data, arm, local, models)
            wide = min(256, max(64, self.batch_size))
            phases += model_replacement(
                updates, evaluation_stream(queries, wide), evaluation_stream(gallery, wide), identities,
                refuse=arm != "er", name=f"{arm}_", before=last,
            )  # fmt: skip
            sequences[arm], last = [u.name for u in updates], updates[-1].optimizer
        network = self._network(len(self.tasks(local)) - 1, self._kind(self.method), models)
        phases.append(self._local_accuracy(data, network, local))

        def export(variables, artefacts):
            kept = {c: v for c, v in variables.items() if c in ("params", "batch_stats")}
            constants = {k: v for k, v in variables["constants"].items() if k != "old"}
            record = lineage_text(constants["lineage"])
            facts = {"inputs": "images scaled to [-1, 1]", "lineage": record, "local_classes": local, "side": self.side}
            return Export(network, {**kept, "constants": constants}, facts)

        def summary(metrics):
            parts = [
                f"{ARMS[a]}: AC {metrics[f'{a}_compatibility/average_compatibility']:.2f}, "
                f"AA {100 * metrics[f'{a}_compatibility/average_accuracy']:.1f}"
                for a in reversed(arms)
            ]
            dead = sum(v for k, v in metrics.items() if k.endswith("_gallery/zero_features"))
            warning = f"; {int(dead)} features have no length, the network may be dead" if dead else ""
            return "; ".join(parts) + warning

        return Run(
            phases, export, figures=matrices_figure(sequences, ARMS, self.replacements),
            data_fingerprint=data.fingerprint, summary=summary, steps_per_call=10,
        )  # fmt: skip

    def tasks(self, local: int) -> list[list[int]]:
        """The local classes of each task, counted from 0."""
        edges = [0, *range(self.initial, local, self.way), local] if self.initial < local else [0, local]
        return [list(range(a, b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]

    def _kind(self, arm: str) -> str:
        return "linear" if arm == "er" else "simplex"

    def _replaced(self, task: int) -> int:
        # which replacement is in use at a task; -1 before any
        return sum(at <= task for at in self.replacements) - 1

    def _network(self, task: int, kind: str, models: Sequence = ()) -> StationaryNetwork:
        number = max(self._replaced(task), 0)
        body = models[number][0].encoder if models else self._encoder(number)
        return StationaryNetwork(body, self.preallocated, kind, jnp.dtype(self.dtype))

    def _encoder(self, number: int) -> Any:
        name, dtype = self.encoders[min(number, len(self.encoders) - 1)], jnp.dtype(self.dtype)
        if name.startswith("resnet"):
            return Pick(ResNet(ResNetConfig.of_depth(int(name[6:])), dtype))
        hidden, features = {"mlp": ((128,), 64), "wide": ((256,), 96), "deep": ((128, 128), 64)}[name]
        return MLP(hidden, features, dtype=dtype)

    def _pretrain(self, data: Dataset, number: int, kind: str, last: Any) -> tuple[list[Phase], Any]:
        # the later a server's model, the more of the server's classes it has seen
        known = -(-self.server * (number + 1) // len(self.replacements))
        train = data["train"]
        chosen = rows({k: train[k] for k in ("x", "label")}, np.flatnonzero(train["label"] < known))
        network = StationaryNetwork(self._encoder(number), self.preallocated, kind, jnp.dtype(self.dtype))
        stream = training_stream(chosen, self.batch_size, self.seed)
        steps = self.server_epochs * stream.steps_per_epoch
        optimizer, name = _optimizer(self.server_optimizer, steps), f"server{number}_{kind}"

        def start(variables, artefacts, rng):
            first = _plain(network.init(rng, jnp.asarray(chosen["x"][:1])))
            return FitResult(first, edit=fresh_optimizer(last, first["params"]))

        def keep(variables, artefacts, rng):
            record = lineage(stationary.frame(variables), variables["params"])
            kept = {c: to_host(variables[c]) for c in ("params", "batch_stats") if variables.get(c)}
            return FitResult(artefacts={name: {**kept, "lineage": to_host(record)}}, metrics={"classes": known})

        objective = stationary.classification(network, side="start")
        return [
            Fit(f"{name}_start", start),
            Train(name, steps, objective, optimizer, stream),
            Fit(f"{name}_keep", keep),
        ], optimizer

    def _updates(self, data: Dataset, arm: str, local: int, models: Sequence) -> list[ModelUpdate]:
        kind = self._kind(arm)
        arrays = data["train"]
        label = arrays["label"] - self.server
        stored = {"x": arrays["x"], "label": label}
        memory = ReplayMemory.empty(local, self.memory)
        updates = []
        for t, classes in enumerate(self.tasks(local)):
            new = np.concatenate([_first(label, c, self.per_class) for c in classes])
            order = half_memory(new, memory.ids, self.batch_size, self.seed + t)
            stream = ArrayStream(stored, self.batch_size, order)
            memory = memory.add(new, label[new], classes, self.seed)
            network = self._network(t, kind, models)
            began = bool(models or self.server) or t > 0
            if arm == "hoc" and began:
                objective = stationary.stationary(
                    network, network.clone(classifier="simplex"), {"params": {}}, self.lam, self.mu, self.mask_mode,
                    self.side,
                )  # fmt: skip
            else:
                objective = stationary.classification(network, side=self.side)
            steps = self.epochs * stream.steps_per_epoch
            updates.append(
                ModelUpdate(
                    f"{arm}{t}",
                    objective,
                    stream,
                    steps,
                    _optimizer(self.optimizer, steps),
                    self._starter(arm, t, network, classes[-1] + 1, models, arrays["x"][:1], began),
                    _embed(network),
                    stationary.frame,
                    aligned=arm != "er",
                )  # fmt: skip
            )
        return updates

    def _starter(self, arm, t, network, seen, models, inputs, began):
        number, kind = self._replaced(t), self._kind(arm)

        def start(variables, artefacts, rng):
            fresh = _plain(network.init(rng, jnp.asarray(inputs)))
            parent = None
            if t in self.replacements and began:
                found = models[number][1] if models else artefacts[f"server{number}_{kind}"]
                source, parent = {c: v for c, v in found.items() if c != "lineage"}, found["lineage"]
            elif t > 0:
                source, parent = variables, variables["constants"]["lineage"]
            else:
                source = fresh
            towers = stationary.feature_variables(source)
            params = dict(towers["params"])
            if kind == "linear":  # old columns go on unless the model is another, those of new classes are fresh
                mine = t > 0 and t not in self.replacements
                params["classifier"] = variables["params"]["classifier"] if mine else fresh["params"]["classifier"]
            constants: dict[str, Any] = {k: v for k, v in fresh["constants"].items() if k != "seen"}
            if kind == "linear":
                places = jnp.arange(self.preallocated)
                places = stationary.reversed_targets(places, self.preallocated) if self.side == "end" else places
                constants["seen"] = places < seen
            if arm == "hoc" and began:
                constants["old"] = towers
            if parent is not None:
                constants["lineage"] = parent
            return {**{c: v for c, v in towers.items() if c != "params"}, "params": params, "constants": constants}

        return start

    def _local_accuracy(self, data: Dataset, network: StationaryNetwork, local: int) -> Phase:
        test = data["test"]
        own = np.flatnonzero((test["label"] >= self.server) & (test["label"] < self.server + local))
        arrays = {"x": test["x"][own], "label": test["label"][own] - self.server}

        def predict(variables, batch, context):
            used = {**variables, "constants": {k: v for k, v in variables["constants"].items() if k != "lineage"}}
            logits = network.apply({c: v for c, v in used.items() if v}, batch["x"], False)[0]
            places = jnp.arange(local)
            places = stationary.reversed_targets(places, self.preallocated) if self.side == "end" else places
            return {"classifier": jnp.argmax(logits[:, places], -1)}

        def compute(confusions):
            found = confusions["classifier"]
            return {"accuracy": float(np.diag(found).sum() / max(found.sum(), 1))}

        stream = evaluation_stream(arrays, min(256, max(64, self.batch_size)))
        return confusion_evaluation("local_classes", stream, predict, ("classifier",), local, compute)

    def _check(self, data: Dataset) -> int:
        if "label" not in data["train"]:
            raise UserError(f"{data.name!r} has no field 'label'; stationary needs the class of every image")
        found = int(data["train"]["label"].max()) + 1
        classes = int(data.info.get("num_classes", found))
        sizes = ("initial", "way", "epochs", "server_epochs", "batch_size", "memory")
        for name in sizes:
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")
        for name in ("server", "held_out", "per_class", "mu"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}")
        if not 0.0 <= self.lam <= 1.0:
            raise UserError(f"--lam must lie in [0, 1], got {self.lam}")
        local = classes - self.server - self.held_out
        if local < self.initial:
            raise UserError(
                f"--server {self.server} and --held-out {self.held_out} leave {max(local, 0)} of {classes} classes for "
                f"--initial {self.initial}; lower one of them"
            )
        if self.initial < local and (local - self.initial) % self.way:
            raise UserError(
                f"{local - self.initial} classes after the first task do not divide into tasks of --way {self.way}"
            )
        if self.preallocated < 2:
            raise UserError(f"--preallocated must be at least 2, got {self.preallocated}")
        try:
            stationary.check_capacity(self.server, local, self.preallocated)
            stationary.check_labels(np.arange(local), self.preallocated, self.side)
        except ValueError as error:
            raise UserError(f"--preallocated {self.preallocated}: {error}") from None
        if self.batch_size % 2:
            raise UserError(f"--batch-size {self.batch_size} must be even: half of a batch comes from the memory")
        tasks = len(self.tasks(local))
        at = self.replacements
        if not at or at[0] != 0 or list(at) != sorted(set(at)) or at[-1] >= tasks:
            raise UserError(
                f"--replacements {' '.join(map(str, at))} must ascend from 0 and stay below the {tasks} tasks"
            )
        if not self.encoders or any(e not in ENCODERS for e in self.encoders):
            raise UserError(f"--encoders {' '.join(self.encoders)}: choose from {', '.join(ENCODERS)}")
        if self.models and len(self.models) != len(at):
            raise UserError(f"--models names {len(self.models)} models for {len(at)} --replacements; give one for each")
        if not self.models and not self.server and len(at) > 1:
            raise UserError("--server 0 leaves nothing to replace models with; give --models or --replacements 0")
        if not self.models and 0 < self.server < len(at):
            raise UserError(
                f"--server {self.server} classes are too few for {len(at)} replacements of growing knowledge"
            )
        labels = data["train"]["label"]
        for c in range(classes - self.held_out):
            if not (labels == c).any():
                raise UserError(f"class {c} of {data.name!r} has no training example")
        return classes


def _first(label: np.ndarray, c: int, count: int) -> np.ndarray:
    own = np.flatnonzero(label == c)
    return own[:count] if count else own


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _embed(network: StationaryNetwork):
    def embed(variables, batch, context):
        return network.apply(stationary.feature_variables(variables), batch["x"], False, classify=False)

    return embed


def _optimizer(setting: Optimizer, steps: int) -> optax.GradientTransformation:
    if not (setting.weight_decay and setting.name in ("sgd", "momentum", "nesterov")):
        return setting.build(steps)
    plain = dataclasses.replace(setting, weight_decay=0.0).build(steps)
    return optax.chain(optax.add_decayed_weights(setting.weight_decay, mask=decay_mask), plain)


def _given(folder: str, num_classes: int) -> tuple[StationaryNetwork, dict]:
    """A user's model, refused unless it lives in this simplex."""
    from checkpoints.arrays import one_line
    from checkpoints.model import ModelError, load_model

    where = Path(folder)
    where = where / "model" if (where / "model" / "model.json").exists() else where
    try:
        model = load_model(where)
    except (ModelError, OSError) as error:
        raise UserError(f"--models {folder}: {one_line(error)}") from None
    net = model.definition
    if not isinstance(net, StationaryNetwork):
        raise UserError(
            f"--models {folder} is a {type(net).__name__}; a model exported by zoo train stationary is needed"
        )
    constants = model.variables.get("constants", {})
    try:
        stationary.check_replacement(net.num_classes - 1, num_classes, net.classifier)
        own = lineage(simplex_prototypes(num_classes), {})
        check_comparable(constants["lineage"], own)
    except ValueError as error:
        raise UserError(f"--models {folder}: {error}") from None
    except KeyError:
        raise UserError(f"--models {folder} has no lineage; it was exported by another version") from None
    kept = {c: _plain(v) for c, v in model.variables.items() if c in ("params", "batch_stats")}
    return net, {**kept, "lineage": dict(constants["lineage"])}


def fields() -> dict[str, str]:
    """The data fields this recipe needs."""
    return {
        "x": "float32 [N, H, W, C] in [-1, 1]: images (uint8 images of TFDS sets and files are scaled)",
        "label": "int32 [N]: classes; the server's first, then the local tasks' in order, the held-out ones last",
    }


def arm(arm: str, seed: int) -> dict[str, float]:
    """One arm of the claim; classes, split, initial weights and the order of the data are paired by seed."""
    methods = {"simplex and hoc": "hoc", "simplex": "ce", "replay": "er"}
    data = shuffled_digits(seed)
    if arm == "untrained":
        return _untrained(data, seed)
    if arm not in methods:
        raise UserError(f"unknown arm {arm!r} of stationary's claim")
    from trainers.run import train_in_memory

    method = methods[arm]
    metrics = train_in_memory(Recipe(seed=seed, method=method, baselines=False).on(data), seed=seed).metrics
    found = {k.split("/")[1]: v for k, v in metrics.items() if k.startswith(f"{method}_compatibility/")}
    return {
        "compatibility": found["average_compatibility"],
        "accuracy": found["average_accuracy"],
        "self_accuracy": found["self_accuracy"],
        "cross_accuracy": found["cross_accuracy"],
        "local_accuracy": metrics["local_classes/accuracy"],
    }


def _untrained(data: Dataset, seed: int) -> dict[str, float]:
    setting = Recipe(seed=seed)
    queries, gallery, identities = open_set(data, setting.held_out, setting.turned)
    features: dict[str, list] = {"q": [], "g": []}
    for t in range(3):
        network = setting._network(t, "simplex")
        variables = network.init(jax.random.key(seed * 3 + t), jnp.asarray(queries["x"][:1]))
        for name, part in (("q", queries), ("g", gallery)):
            features[name].append(network.apply(variables, jnp.asarray(part["x"]), classify=False))
    matrix = compatibility_matrix(features["q"], features["g"], queries["label"], gallery["label"], identities)
    cross = float(matrix[np.tril(np.ones(matrix.shape, bool), -1)].mean())
    return {"compatibility": average_compatibility(matrix), "accuracy": average_accuracy(matrix),
            "self_accuracy": float(np.diag(matrix).mean()), "cross_accuracy": cross, "local_accuracy": 0.0}  # fmt: skip


def benchmarks() -> list[Benchmark]:
    """The HOC loss with its gradient at a large batch, and cross-model identification of a whole sequence."""
    b, d = 1024, 1023
    new, old = (l2_normalize(jax.random.normal(jax.random.key(i), (b, d))) for i in range(2))
    labels = jax.random.randint(jax.random.key(2), (b,), 0, 100)

    def step(new, old, labels):
        return jax.value_and_grad(lambda h: jnp.mean(stationary.hoc_loss(h, old, labels)))(new)

    def loop(new, old, labels):
        new, old, labels = map(np.asarray, (new, old, labels))
        s = 10 * old @ new.T
        same = labels[:, None] == labels[None, :]
        z = np.where(same, 0.0, s)
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        weight = np.where(same, 0.0, p) - np.eye(len(new))
        return 10 * weight.T @ old / len(new)

    flops, moved = 2.0 * 2 * b * b * d, 4.0 * (3 * b * d + 2 * b * b)
    return [Benchmark(f"hoc_loss and gradient {b} x {d}", step, (new, old, labels), flops, moved,
                      {"numpy_closed_form": loop})]  # fmt: skip


def example() -> dict:
    """The conformance rows: the method on a tiny network, its classification alone, and the learned classifier."""
    rng = np.random.default_rng(0)
    batch = {
        "x": rng.normal(size=(16, 4, 4, 1)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "index": np.arange(16, dtype=np.int32),
        "mask": np.ones(16, bool),
    }
    network = StationaryNetwork(MLP((16,), 8, normalise=True), 6)
    old = _plain(network.init(jax.random.key(9), jnp.asarray(batch["x"][:1])))
    row = lambda objective: {  # noqa: E731
        "objective": objective, "batch": batch, "optimizer": optax.sgd(0.02, 0.9), "transform": None,
        "num_examples": 16,
    }  # fmt: skip
    return {
        **row(stationary.stationary(network, network, old)),
        "also": {
            "simplex": row(stationary.classification(network)),
            "learned": row(stationary.classification(network.clone(classifier="linear"))),
        },
    }
