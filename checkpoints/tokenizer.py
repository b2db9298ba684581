"""The tokenizer that lies beside an imported model, by the ``tokenizers`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints.definition import ModelError


def load_tokenizer(directory: Path | str) -> Any:
    """Reads ``DIR/tokenizer``: ``tokenizer.json``, or a WordPiece ``vocab.txt``, or ``vocab.json`` with ``merges.txt``.

    Returns:
      A ``tokenizers.Tokenizer`` (or the like): ``.encode(text).ids``, ``.decode(ids)``.

    Raises:
      ModelError: there is none, or only kinds that need another library (SentencePiece).
    """
    folder = Path(directory) / "tokenizer"
    if not folder.is_dir():
        raise ModelError(f"{directory} holds no tokenizer: none lay beside the weights when they were imported")
    from tokenizers import Tokenizer
    from tokenizers.implementations import BertWordPieceTokenizer, ByteLevelBPETokenizer

    has = lambda name: (folder / name).is_file()  # noqa: E731
    try:
        if has("tokenizer.json"):
            return Tokenizer.from_file(str(folder / "tokenizer.json"))
        if has("vocab.txt"):
            settings = (
                json.loads((folder / "tokenizer_config.json").read_text()) if has("tokenizer_config.json") else {}
            )
            return BertWordPieceTokenizer(str(folder / "vocab.txt"), lowercase=settings.get("do_lower_case", True))
        if has("vocab.json") and has("merges.txt"):
            return ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{folder}: unreadable ({error})") from None
    there = ", ".join(sorted(p.name for p in folder.iterdir()))
    raise ModelError(f"{folder} holds {there}; a tokenizer.json, vocab.txt, or vocab.json and merges.txt is needed")
