"""Tokenizers of texts into arrays of ids, trained on the fly or read from a file (the ``tokenizers`` library)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.stream import DataError

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
"""The first ids of a tokenizer trained here, in this order; further special tokens follow."""


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to padded ids, ``[CLS] text [SEP]`` or ``[CLS] text [SEP] pair [SEP]``.

    Attributes:
      core: the library's tokenizer.
      pad, cls, sep: ids.
    """

    core: Any
    pad: int
    cls: int
    sep: int

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int = 4096, kind: str = "wordpiece", special: Sequence[str] = ()
    ) -> Tokenizer:
        """Learns a vocabulary from texts.

        Args:
          texts: to learn from.
          vocab_size: at most so many ids, special ones included.
          kind: ``"wordpiece"`` (lower case, accents stripped, as BERT's) or ``"byte"`` (byte-level BPE, no unknowns).
          special: further special tokens, after :data:`SPECIAL`; they are never split.

        Raises:
          DataError: an unknown kind, no texts, or a vocabulary smaller than its special tokens.
        """
        from tokenizers import Tokenizer as Core
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

        names = [*SPECIAL, *special]
        texts = list(texts)
        if kind not in ("wordpiece", "byte"):
            raise DataError(f"kind of tokenizer must be 'wordpiece' or 'byte', got {kind!r}")
        if not any(t.strip() for t in texts):
            raise DataError("a tokenizer cannot be trained without any text")
        least = len(names) + (256 if kind == "byte" else 1)
        if vocab_size < least:
            raise DataError(f"vocab_size must be at least {least} for this kind of tokenizer, got {vocab_size}")
        if kind == "wordpiece":
            core = Core(models.WordPiece(unk_token="[UNK]"))
            core.normalizer = normalizers.BertNormalizer(lowercase=True)
            core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            core.decoder = decoders.WordPiece()
            trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=names, show_progress=False)
        else:
            core = Core(models.BPE())
            core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
            core.decoder = decoders.ByteLevel()
            trainer = trainers.BpeTrainer(
                vocab_size=vocab_size, special_tokens=names, show_progress=False,
                initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            )  # fmt: skip
        core.train_from_iterator(texts, trainer)
        return cls.of(core)

    @classmethod
    def of(cls, core: Any, where: str = "the tokenizer") -> Tokenizer:
        """A tokenizer of the library, with BERT's or RoBERTa's names of special tokens.

        Raises:
          DataError: it lacks a padding, a first or a separating token.
        """
        found = []
        for what, names in (("padding", ("[PAD]", "<pad>")), ("first", ("[CLS]", "<s>")), ("last", ("[SEP]", "</s>"))):
            ids = [core.token_to_id(n) for n in names if core.token_to_id(n) is not None]
            if not ids:
                raise DataError(f"{where} has no {what} token; expected {' or '.join(names)}")
            found.append(ids[0])
        return cls(core, *found)

    @classmethod
    def read(cls, file: str | Path) -> Tokenizer:
        """A ``tokenizer.json``.

        Raises:
          DataError: it cannot be read as one.
        """
        from tokenizers import Tokenizer as Core

        try:
            core = Core.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise DataError(f"{file}: cannot be read as a tokenizer.json ({error})") from None
        return cls.of(core, str(file))

    def write(self, file: str | Path) -> None:
        """Writes a ``tokenizer.json``, which ``read`` and other libraries read."""
        self.core.save(str(file))

    @property
    def vocab_size(self) -> int:
        """Ids there are."""
        return self.core.get_vocab_size()

    def id_of(self, token: str) -> int:
        """The id of a token.

        Raises:
          DataError: there is none.
        """
        found = self.core.token_to_id(token)
        if found is None:
            raise DataError(f"the tokenizer has no token {token!r}; train it with special=({token!r},)")
        return found

    def ids(self, text: str) -> list[int]:
        """The ids of a text alone, without special tokens."""
        return self.core.encode(text, add_special_tokens=False).ids

    def texts(self, rows: Iterable[Sequence[int]]) -> list[str]:
        """Rows of ids as texts again, special tokens left out."""
        return [self.core.decode([int(i) for i in row], skip_special_tokens=True) for row in rows]

    def encode(self, texts: Sequence[str], length: int, start: str | None = None) -> np.ndarray:
        """``[CLS] text [SEP]``, cut to ``length`` tokens and padded: int32 ``[N, length]``.

        Args:
          texts: to encode.
          length: of a row, special tokens included; at least 3.
          start: a token in the place of ``[CLS]``.

        Raises:
          DataError: a length below 3.
        """
        if length < 3:
            raise DataError(f"a row needs at least 3 tokens, got length {length}")
        first = self.cls if start is None else self.id_of(start)
        out = np.full((len(texts), length), self.pad, np.int32)
        for row, found in zip(out, self._batch(texts), strict=True):
            own = [first, *found[: length - 2], self.sep]
            row[: len(own)] = own
        return out

    def encode_pairs(
        self, first: Sequence[str], second: Sequence[str], first_length: int, second_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """``[CLS] first [SEP] second [SEP]``: ids int32 and token types int32 (0 and 1), ``[N, L]`` both.

        L is ``first_length + second_length``; the first part is cut to ``first_length`` tokens with its ``[CLS]`` and
        ``[SEP]``, the second to ``second_length`` with its ``[SEP]``; padding is at the end.
        """
        if first_length < 3 or second_length < 2:
            raise DataError(f"lengths must be at least 3 and 2, got {first_length} and {second_length}")
        length = first_length + second_length
        ids, types = np.full((len(first), length), self.pad, np.int32), np.zeros((len(first), length), np.int32)
        for n, (a, b) in enumerate(zip(self._batch(first), self._batch(second), strict=True)):
            left = [self.cls, *a[: first_length - 2], self.sep]
            right = [*b[: second_length - 1], self.sep]
            ids[n, : len(left) + len(right)] = left + right
            types[n, len(left) : len(left) + len(right)] = 1
        return ids, types

    def _batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in self.core.encode_batch(list(texts), add_special_tokens=False)]
