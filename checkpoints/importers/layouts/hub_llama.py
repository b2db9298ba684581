"""transformers' LLaMA, Mistral, Qwen2 and Qwen3: ``layers.{i}.self_attn.q_proj.weight``, ``mlp.gate_proj.weight``.

One table: Qwen2 adds biases to queries, keys and values, Qwen3 norms of queries and keys, Mistral a window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, choose, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import LINEAR, Rule, embedding, linear, norm
from zoo.nn.decoder_lm import DecoderConfig, DecoderLM

LLAMA = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "sliding_window": None,
}  # fmt: skip
QWEN = {
    **LLAMA, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
    "max_position_embeddings": 32768, "sliding_window": 4096, "max_window_layers": 28,
}  # fmt: skip
DEFAULTS = {
    "llama": LLAMA,
    "mistral": {
        **LLAMA, "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "qwen2": QWEN,
    "qwen3": {**QWEN, "head_dim": 128},
}  # fmt: skip
CLASSES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> DecoderLM:
    """All from the config."""
    config = shared.needed(config, "LLaMA-like")
    family = choose(config, "model_type", {k: k for k in DEFAULTS}, "llama")
    shared.refuse_others(config, (CLASSES[family],))
    said = {**DEFAULTS[family], **config}
    if family in ("mistral", "qwen2"):  # these classes have no such entry: whatever it says changes nothing there
        said["attention_bias"] = False
    if family != "llama":
        said["mlp_bias"] = False
    rope = shared.rope(config)
    refuse(rope, rotary_fraction=1.0)
    return DecoderLM(
        DecoderConfig(
            vocab_size=said["vocab_size"],
            hidden_size=said["hidden_size"],
            num_layers=shared.layers(shapes, "layers.{i}.", said["num_hidden_layers"]),
            num_heads=said["num_attention_heads"],
            num_kv_heads=said["num_key_value_heads"],
            head_dim=said["head_dim"],
            mlp_dim=said["intermediate_size"],
            max_positions=said["max_position_embeddings"],
            **rope,
            norm="rms",
            norm_epsilon=said["rms_norm_eps"],
            activation=shared.activation(said, "hidden_act", "silu"),
            gated=True,
            qkv_bias=said["attention_bias"] or family == "qwen2",
            out_bias=said["attention_bias"],
            mlp_bias=said["mlp_bias"],
            qk_norm=family == "qwen3",
            window=_window(family, config, said),
            head=shared.head(config, shapes, tied=False),
            **shared.rates(said, attention_dropout="attention_dropout"),
        )
    )


def _window(family: str, config: Mapping[str, Any], said: Mapping[str, Any]) -> int | None:
    if family == "llama":
        refuse(config, sliding_window=None)
    if family in ("llama", "mistral"):
        return said["sliding_window"]
    if not said.get("use_sliding_window") or said["sliding_window"] is None:
        return None
    count, first = said["num_hidden_layers"], said["max_window_layers"]
    types = said.get("layer_types") or ["full_attention"] * min(first, count) + ["sliding_attention"] * (count - first)
    if len(set(types)) > 1:
        raise ImporterError(
            "config use_sliding_window = True with windows in some layers only (max_window_layers, layer_types) is not "
            "supported; all layers or none"
        )
    return said["sliding_window"] if types[0] == "sliding_attention" else None


def rules(_: DecoderLM) -> tuple[Rule, ...]:
    """The table."""
    attention, mlp = "layers.{i}.self_attn", "layers.{i}.mlp"
    return (
        *embedding("embed_tokens", "embed"),
        *shared.stacked(
            *norm("layers.{i}.input_layernorm", "layers/attention_norm"),
            *linear(f"{attention}.q_proj", "layers/query"),
            *linear(f"{attention}.k_proj", "layers/key"),
            *linear(f"{attention}.v_proj", "layers/value"),
            *linear(f"{attention}.o_proj", "layers/out"),
            *norm(f"{attention}.q_norm", "layers/query_norm"),
            *norm(f"{attention}.k_norm", "layers/key_norm"),
            *norm("layers.{i}.post_attention_layernorm", "layers/mlp_norm"),
            *linear(f"{mlp}.gate_proj", "layers/gate"),
            *linear(f"{mlp}.up_proj", "layers/up"),
            *linear(f"{mlp}.down_proj", "layers/down"),
        ),
        *norm("norm", "final_norm"),
        Rule("lm_head.weight", "head/kernel", LINEAR),
    )


def to_config(module: DecoderLM) -> Mapping[str, Any]:
    """What the family's ``ForCausalLM`` loads: the plainest family that has all of the module's settings."""
    c = module.config
    family = "qwen3" if c.qk_norm else "qwen2" if c.qkv_bias and not c.out_bias else "mistral" if c.window else "llama"
    config = {
        "model_type": family,
        "architectures": shared.architecture(c, CLASSES[family]),
        **shared.sizes(c),
        "intermediate_size": c.mlp_dim,
        "num_key_value_heads": c.kv_heads,
        "head_dim": c.head_width,
        "rms_norm_eps": c.norm_epsilon,
        "hidden_act": shared.NAMES[c.activation],
        "attention_bias": c.out_bias,
        "mlp_bias": c.mlp_bias,
        "attention_dropout": c.attention_dropout,
        "sliding_window": c.window,
        **shared.rope_config(c),
    }
    if family.startswith("qwen"):
        config |= {"use_sliding_window": c.window is not None, "max_window_layers": 0}
    return config


LAYOUT = Layout(
    name="hub-llama",
    title="LLaMA 1-3, Mistral, Qwen2 and Qwen3 of transformers",
    configure=configure,
    rules=rules,
    model_types=tuple(DEFAULTS),
    signature=("embed_tokens.weight", "norm.weight", "layers.{i}.self_attn.q_proj.weight",
               "layers.{i}.mlp.gate_proj.weight", "layers.{i}.post_attention_layernorm.weight"),
    absent=("layers.{i}.pre_feedforward_layernorm.weight", "layers.{i}.cross_attn.*"),
    prefixes=("model.",),
    buffers=("layers.{i}.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"),
    duplicates=(("lm_head.weight", "embed_tokens.weight"),),
    to_config=to_config,
    full_name=shared.full_name("model."),
)  # fmt: skip
