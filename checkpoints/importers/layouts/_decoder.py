"""What the tables of decoder-only models share: stacked layers, names of heads, rotary settings, common refusals."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from checkpoints.importers.layout import ImporterError, Shapes, choose, depth, refuse
from checkpoints.importers.rules import Rule

ACTIVATIONS = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh", "gelu_accurate": "gelu_tanh", "relu": "relu",
    "silu": "silu", "swish": "silu",
}  # fmt: skip
"""transformers' names -> ours."""
NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
"""Ours -> transformers'."""


def stacked(*rules: Rule) -> tuple[Rule, ...]:
    """Rules of one layer whose targets are rows ``[{i}]`` of leaves stacked over layers."""
    return tuple(dataclasses.replace(r, target=tuple(f"{t}[{{i}}]" for t in r.target)) for r in rules)


def full_name(prefix: str) -> Callable[[Any, str], str]:
    """Names in a new file: the prefix before all but the head's, unless the file is of the bare model."""
    return lambda module, name: name if name.startswith("lm_head.") or module.config.head == "none" else prefix + name


def architecture(c: Any, causal: str) -> list[str]:
    """The class that a config names: the language model's, or the bare model's if there is no head."""
    return [causal.replace("ForCausalLM", "Model").replace("LMHeadModel", "Model") if c.head == "none" else causal]


def needed(config: Mapping[str, Any] | None, family: str) -> Mapping[str, Any]:
    """The config, without which heads and positions cannot be known."""
    if not config:
        raise ImporterError(
            f"{family} weights alone do not tell the number of heads and the kind of positions; give config.json with "
            "--config FILE"
        )
    return config


def layers(shapes: Shapes, pattern: str, said: int) -> int:
    """The number of layers that config and names agree on."""
    found = depth(shapes, pattern)
    if found and found != said:
        raise ImporterError(f"the config says {said} layers, but the weights have {found}: a config for another model?")
    return said


def head(config: Mapping[str, Any], shapes: Shapes, tied: bool) -> str:
    """The output head: tied or not as the config says (``tied`` by default); none in files of the bare model."""
    if config.get("tie_word_embeddings", tied):
        return "tied"
    bare = any(map(_bare, config.get("architectures") or ()))
    return "none" if bare and "lm_head.weight" not in shapes else "untied"


def _bare(architecture: str) -> bool:
    return architecture.endswith("Model") and "Head" not in architecture


def activation(config: Mapping[str, Any], key: str, default: str) -> str:
    """Our name of the config's activation function."""
    return choose(config, key, ACTIVATIONS, default)


def rope(config: Mapping[str, Any], fraction: float = 1.0) -> dict[str, Any]:
    """Settings of rotary positions in ``DecoderConfig``'s terms, from both forms of transformers' configs.

    Args:
      config: with ``rope_theta``, ``rope_scaling``, ``partial_rotary_factor``, or with all that in ``rope_parameters``.
      fraction: the family's default share of a head that is rotated.
    """
    # where both forms stand in one file, transformers reads the older one
    said = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = said.get("rope_type", said.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise ImporterError(
            f"config rope_scaling with rope_type = {kind!r} is not supported; default, linear and llama3 are"
        )
    found = {
        "positions": "rotary",
        "rope_theta": float(said.get("rope_theta", config.get("rope_theta", 10000.0))),
        "rotary_fraction": float(said.get("partial_rotary_factor", config.get("partial_rotary_factor", fraction))),
        "rope_scaling": kind,
    }
    if kind != "default":
        found["rope_factor"] = float(said["factor"])
    if kind == "llama3":
        trained = config.get("original_max_position_embeddings") or said.get("original_max_position_embeddings")
        found |= {
            "rope_low_frequency": float(said["low_freq_factor"]),
            "rope_high_frequency": float(said["high_freq_factor"]),
            "rope_original_positions": int(trained or config["max_position_embeddings"]),
        }
    return found


def rates(config: Mapping[str, Any], **keys: str) -> dict[str, float]:
    """Dropout rates: our name -> the config's value of theirs."""
    return {ours: float(config[theirs] or 0.0) for ours, theirs in keys.items()}


def rope_config(c: Any) -> dict[str, Any]:
    """The reverse of :func:`rope`, in the form that every version of transformers reads."""
    said: dict[str, Any] = {"rope_theta": c.rope_theta}
    if c.rotary_fraction != 1.0:
        said["partial_rotary_factor"] = c.rotary_fraction
    if c.rope_scaling != "default":
        said["rope_scaling"] = {"rope_type": c.rope_scaling, "factor": c.rope_factor}
    if c.rope_scaling == "llama3":
        said["rope_scaling"] |= {
            "low_freq_factor": c.rope_low_frequency,
            "high_freq_factor": c.rope_high_frequency,
            "original_max_position_embeddings": c.rope_original_positions,
        }
    return said


def sizes(c: Any) -> dict[str, Any]:
    """The entries of a config.json that LLaMA, Mistral, Qwen, Phi and OPT share."""
    return {
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "max_position_embeddings": c.max_positions,
        "tie_word_embeddings": c.head == "tied",
    }


def refuse_others(config: Mapping[str, Any], causal: Sequence[str]) -> None:
    """Refuses mixtures of experts, quantised weights, and models with another head than the language model's."""
    refuse(config, num_experts=None, num_local_experts=None, quantization_config=None, is_encoder_decoder=False)
    for name in config.get("architectures") or ():
        if name not in causal and not _bare(name):
            raise ImporterError(f"config architectures = {name!r} is not supported; {', '.join(causal)} are")
