"""Metrics of generated text, on the host and on lists of tokens: exact match, token F1, ROUGE-1 and ROUGE-L.

Tokens may be anything that compares (strings, ids).  For answers to questions, :func:`squad_tokens` normalises a text
as SQuAD's evaluation does (Rajpurkar et al., 2016); ROUGE is that of Lin, 2004, as an F-score without stemming.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

Tokens = Sequence[Hashable]


def squad_tokens(text: str) -> list[str]:
    """Lower case, no punctuation, no English articles, split at white space."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(predicted: Tokens, target: Tokens) -> float:
    """1 if the tokens are the same in the same order, else 0."""
    return float(list(predicted) == list(target))


def token_f1(predicted: Tokens, target: Tokens) -> float:
    """Harmonic mean of precision and recall of tokens, each counted as often as it occurs in both (ROUGE-1).

    1 if both are empty, 0 if one is.
    """
    common = collections.Counter(predicted) & collections.Counter(target)
    return _f1(sum(common.values()), len(predicted), len(target))


rouge_1 = token_f1


def rouge_l(predicted: Tokens, target: Tokens) -> float:
    """Harmonic mean of precision and recall of the longest common subsequence."""
    row = [0] * (len(target) + 1)
    for p in predicted:
        before = 0
        for j, t in enumerate(target, 1):
            # before: the longest of both prefixes less their last tokens
            before, row[j] = row[j], before + 1 if p == t else max(row[j], row[j - 1])
    return _f1(row[-1], len(predicted), len(target))


def _f1(common: int, predicted: int, target: int) -> float:
    if not predicted or not target:
        return float(predicted == target)
    return 2.0 * common / (predicted + target)


def best_of(metric: Callable[[Tokens, Tokens], float], predicted: Tokens, targets: Sequence[Tokens]) -> float:
    """The metric against the target that suits the prediction best (questions with several accepted answers).

    Raises:
      ValueError: no target.
    """
    if not targets:
        raise ValueError("best_of needs at least one target")
    return max(metric(predicted, t) for t in targets)


def text_metrics(predicted: Sequence[Tokens], targets: Sequence[Tokens]) -> dict[str, float]:
    """Means over a set of predictions: ``exact_match``, ``f1``, ``rouge_1`` and ``rouge_l``.

    Raises:
      ValueError: no predictions, or another number of targets.
    """
    if not len(predicted) or len(predicted) != len(targets):
        raise ValueError(f"need one target per prediction, at least one; got {len(predicted)} and {len(targets)}")
    pairs = list(zip(predicted, targets, strict=True))
    named = {"exact_match": exact_match, "f1": token_f1, "rouge_1": rouge_1, "rouge_l": rouge_l}
    return {name: float(np.mean([metric(p, t) for p, t in pairs])) for name, metric in named.items()}


def cut(tokens: Iterable, stop: int) -> list[int]:
    """What stands before the first ``stop``, as a list."""
    tokens = [int(t) for t in tokens]
    return tokens[: tokens.index(stop)] if stop in tokens else tokens
