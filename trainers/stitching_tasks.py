"""What is stitched: items that several encoders see, and the encoders that are trained on them, if any.

Every task has the same items in one order for all of its models, so that anchors are chosen once, by number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.dataset import Dataset
from data.graphs import Graph, planted_communities, read_graph
from data.images import image_dataset
from data.latents import Latents, read_latents, rotated_latents, word_spaces
from data.lsa import latent_semantic_words
from data.parallel_texts import ParallelTexts, read_labelled_texts, translated_documents
from data.stream import DataError
from data.text import SPECIAL, Tokenizer
from trainers.errors import UserError
from zoo.nn.bag_of_words import BagOfWords
from zoo.nn.heads import WithHead
from zoo.nn.mlp import MLP
from zoo.nn.stitching_heads import RelativeHead

Items = Mapping[str, np.ndarray]
StitchingData = Dataset | Latents | ParallelTexts | Graph
GENERATED = {
    "rotated": lambda seed: rotated_latents(seed)[0],
    "words": word_spaces,
    "translations": translated_documents,
    # few neighbours and weak features: own accuracy stays below 1
    "communities": lambda seed: planted_communities(seed, 400, degree=5.0, within=0.65, signal=0.5),
}
"""Sets made from the run's seed, by name."""


def stitching_data(name: str, path: str | None, seed: int) -> StitchingData:
    """What ``--data`` names: a generated set, files of the user's own, or an image set.

    A folder with ``nodes.npz`` or ``edges.*`` is a graph, a ``.csv`` file holds texts, ``.npz`` files without images
    hold latents; everything else is for :func:`data.images.image_dataset`.

    Raises:
      DataError: see the readers; an unknown name.
    """
    if path is not None:
        where = Path(path)
        if where.is_dir() and ((where / "nodes.npz").is_file() or any(where.glob("edges.*"))):
            return read_graph(where)
        if where.suffix == ".csv":
            return read_labelled_texts(where)
        if _holds_latents(where):
            return read_latents(where)
    elif name in GENERATED:
        return GENERATED[name](seed)
    try:
        return image_dataset(name, path)
    except DataError as error:
        if not str(error).startswith("unknown TFDS set"):
            raise
        raise DataError(f"{error}; generated sets are {', '.join(GENERATED)}") from None


def _holds_latents(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("*.npz"))
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with np.load(path, allow_pickle=False) as opened:
            return not {"x", "image"} & set(opened.files)
    except Exception as error:
        raise DataError(f"{path}: not a readable .npz file ({str(error).splitlines()[0]})") from None


@dataclasses.dataclass(frozen=True)
class Task:
    """Items seen by several models.

    Attributes:
      names: of the models.
      widths: of their latents.
      train, test: fields of the items, ``label`` among them.
      num_classes: of the labels.
      fingerprint: of the data.
      inputs: the field that each model reads.
      modules: encoder and head of each model that is trained alone on its field, parameters under ``encoder`` and
        ``head``; none if the fields hold latents as they are.
      looked_at: ``() -> [items, d]``, by what anchors are chosen that must lie apart.
      own_anchors: by model, latents of anchors that are none of the items.
      activation: of the heads.
      graph: what the items are nodes of (fields ``node``); its encoders are trained together with their heads.
      tokenizers: by language, what made ids of texts.
    """

    names: tuple[str, ...]
    widths: tuple[int, ...]
    train: Items
    test: Items
    num_classes: int
    fingerprint: str
    inputs: tuple[str, ...]
    modules: tuple[WithHead, ...]
    looked_at: Callable[[], np.ndarray]
    own_anchors: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    activation: str = "tanh"
    graph: Graph | None = None
    tokenizers: Mapping[str, Tokenizer] = dataclasses.field(default_factory=dict)

    @property
    def items(self) -> int:
        """How many training items there are."""
        return len(self.train["label"])

    @property
    def images(self) -> bool:
        """Whether the items are images, which autoencoders could be trained on."""
        return self.inputs[0] == "x"

    @property
    def test_batch(self) -> dict[str, jax.Array]:
        """All test items."""
        return {k: jnp.asarray(v) for k, v in self.test.items()}

    def encoder(self, i: int) -> Callable[[Any, Mapping], jax.Array]:
        """``(params, batch) -> [B, d]`` of model i."""
        field = self.inputs[i]
        if not self.modules:
            return lambda params, batch: batch[field]
        body = self.modules[i].body
        return lambda params, batch: body.apply({"params": params[f"encoder{i}"]["encoder"]}, batch[field])

    def write_tokenizers(self, folder: Path) -> None:
        """Each language's under ``tokenizer/LANGUAGE``; the first one's is the model's tokenizer too."""
        for number, (language, tokenizer) in enumerate(self.tokenizers.items()):
            for place in ("tokenizer", f"tokenizer/{language}")[number > 0 :]:
                where = Path(folder) / place
                where.mkdir(parents=True, exist_ok=True)
                tokenizer.write(where / "tokenizer.json")

    def anchor_batch(self, ids: np.ndarray) -> dict[str, jax.Array]:
        """The anchors as items."""
        rows = ids % self.items  # the user's own anchors are no items; these rows then only give shapes
        return {k: jnp.asarray(v[rows]) for k, v in self.train.items()}


def image_task(data: Dataset, widths: tuple[int, ...], hidden: int, dtype: Any) -> Task:
    """Images, and a multi-layer perceptron for each width.

    Raises:
      UserError: images without labels.
    """
    if "label" not in data["train"] or "label" not in data["test"]:
        raise UserError(f"data {data.name!r} has no labels; heads need them")
    classes = int(data.info["num_classes"])
    train, test = ({"x": data[s]["x"], "label": data[s]["label"].astype(np.int32)} for s in ("train", "test"))
    modules = tuple(WithHead(MLP((hidden,), w, dtype=dtype), RelativeHead(classes)) for w in widths)
    names = tuple(f"encoder {i} ({w})" for i, w in enumerate(widths))
    pixels = lambda: train["x"].reshape(len(train["x"]), -1)  # noqa: E731
    fields = ("x",) * len(widths)
    return Task(names, widths, train, test, classes, data.fingerprint, fields, modules, pixels)


def latent_task(data: Latents) -> Task:
    """Latents of the user's own models, as they are."""
    fields = tuple(f"m{i}" for i in range(len(data.models)))
    arrays = {**dict(zip(fields, data.models.values(), strict=True)), "label": data.labels}
    train, test = ({k: v[rows] for k, v in arrays.items()} for rows in (data.train, ~data.train))
    widths, names = tuple(v.shape[1] for v in data.models.values()), tuple(data.models)
    return Task(names, widths, train, test, data.num_classes, data.fingerprint, fields, (), lambda: train["m0"],
                data.anchors)  # fmt: skip


def text_task(
    data: ParallelTexts, widths: tuple[int, ...], hidden: int, length: int, vocab_size: int, dtype: Any
) -> Task:
    """Texts, and an averaging encoder for each width, of the languages in turn; every language has its own tokenizer.

    Anchors are documents, so that models of different languages have translations of each other as anchors.
    """
    languages, classes = list(data.texts), len(data.classes)
    arrays: dict[str, np.ndarray] = {"label": data.labels}
    tokenizers, modules, fields, names = {}, [], [], []
    for number, language in enumerate(languages[: len(widths)]):
        texts = data.texts[language]
        known = [text for text, kept in zip(texts, data.train, strict=True) if kept]
        tokenizers[language] = Tokenizer.train(known, vocab_size)
        arrays[f"ids{number}"] = tokenizers[language].encode(texts, length)
    for i, width in enumerate(widths):
        language = languages[i % len(languages)]
        ids, tokenizer = f"ids{i % len(languages)}", tokenizers[language]
        body = BagOfWords(tokenizer.vocab_size, width, hidden, tokenizer.pad, dtype)
        modules.append(WithHead(body, RelativeHead(classes)))
        fields.append(ids)
        names.append(f"{language} {i} ({width})")
    train, test = ({k: v[rows] for k, v in arrays.items()} for rows in (data.train, ~data.train))

    def semantics() -> np.ndarray:
        size = tokenizers[languages[0]].vocab_size
        vectors, weights = latent_semantic_words(
            train["ids0"], size, min(32, size, len(train["ids0"])), ignored=len(SPECIAL)
        )
        return np.stack([weights[row] @ vectors[row] for row in train["ids0"]])

    return Task(tuple(names), tuple(widths), train, test, classes, data.fingerprint, tuple(fields), tuple(modules),
                semantics, activation="silu", tokenizers=tokenizers)  # fmt: skip


def node_task(data: Graph, widths: tuple[int, ...]) -> Task:
    """Nodes of a graph; anchors are chosen among the training nodes."""
    nodes = {"node": np.arange(len(data.label), dtype=np.int32), "label": data.label}
    train, test = ({k: v[rows] for k, v in nodes.items()} for rows in (data.train, ~data.train))
    names = tuple(f"network {i} ({w})" for i, w in enumerate(widths))
    classes = int(data.label.max()) + 1
    return Task(names, tuple(widths), train, test, classes, data.fingerprint, ("node",) * len(widths), (),
                lambda: data.x[data.train], graph=data)  # fmt: skip
