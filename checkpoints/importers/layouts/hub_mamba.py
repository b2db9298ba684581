"""transformers' Mamba: ``backbone.layers.{i}.mixer.in_proj.weight``, ``backbone.embeddings.weight``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checkpoints.importers.layout import ImporterError, Layout, Shapes, depth, refuse
from checkpoints.importers.layouts import _decoder as shared
from checkpoints.importers.rules import CONV1D, LINEAR, Rule, Split, embedding, linear, norm
from zoo.nn.mamba import Mamba, MambaConfig


def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> Mamba:
    """Sizes from the shapes, where there are any; a config adds the norm's epsilon, and whether the head is tied."""
    config = config or {}
    refuse(config, model_type="mamba")
    shared.refuse_others(config, ("MambaForCausalLM",))
    refuse({"hidden_act": shared.activation(config, "hidden_act", "silu")}, hidden_act="silu")
    layers = shared.layers(shapes, "layers.{i}.", config.get("num_hidden_layers") or depth(shapes, "layers.{i}."))
    # what only the config can say, or says in the absence of weights
    said = {
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-5),
        "float32_stream": config.get("residual_in_fp32", True),
        "step_min": config.get("time_step_min", 0.001),
        "step_max": config.get("time_step_max", 0.1),
        "step_floor": config.get("time_step_floor", 1e-4),
        "head": shared.head(config, shapes, tied=True),
    }
    if shapes:
        found = measured(shapes, "embeddings.weight")
        check(config, found, vocab_size="vocab_size", hidden_size="hidden_size", state_size="state_size")
        return Mamba(MambaConfig(**found, **said))
    width = config.get("hidden_size", 768)
    rank = config.get("time_step_rank", "auto")
    return Mamba(
        MambaConfig(
            vocab_size=config.get("vocab_size", 50280),
            hidden_size=width,
            num_layers=layers,
            inner_size=int(config.get("expand", 2) * width),
            state_size=config.get("state_size", 16),
            conv_size=config.get("conv_kernel", 4),
            step_rank=None if rank == "auto" else rank,
            use_bias=config.get("use_bias", False),
            conv_bias=config.get("use_conv_bias", True),
            **said,
        )
    )


def measured(shapes: Shapes, embeddings: str) -> dict[str, Any]:
    """Everything that the shapes of the weights tell."""
    mixer = "layers.0.mixer"
    return {
        "vocab_size": shapes[embeddings].shape[0],
        "hidden_size": shapes[embeddings].shape[1],
        "num_layers": depth(shapes, "layers.{i}."),
        "inner_size": shapes[f"{mixer}.A_log"].shape[0],
        "state_size": shapes[f"{mixer}.A_log"].shape[1],
        "conv_size": shapes[f"{mixer}.conv1d.weight"].shape[2],
        "step_rank": shapes[f"{mixer}.dt_proj.weight"].shape[1],
        "use_bias": f"{mixer}.in_proj.bias" in shapes,
        "conv_bias": f"{mixer}.conv1d.bias" in shapes,
    }


def check(config: Mapping[str, Any], found: Mapping[str, Any], **keys: str) -> None:
    """Refuses a config that speaks of other sizes than the weights have; ``keys``: our name = the config's."""
    for ours, theirs in keys.items():
        if config.get(theirs, found[ours]) != found[ours]:
            raise ImporterError(
                f"the config says {theirs} = {config[theirs]}, but the weights have {found[ours]}: for another model?"
            )


def table(module: Mamba, embeddings: str) -> tuple[Rule, ...]:
    """The table, with the embedding's name as this library has it."""
    c = module.config
    mixer, step = "layers.{i}.mixer", (c.rank, c.state_size, c.state_size)
    selected = ("layers/step_down/kernel", "layers/write/kernel", "layers/read/kernel")
    return (
        *embedding(embeddings, "embed"),
        *shared.stacked(
            *norm("layers.{i}.norm", "layers/norm"),
            Rule(f"{mixer}.in_proj.weight", ("layers/in/kernel", "layers/gate/kernel"), (Split(0, 2), LINEAR)),
            Rule(f"{mixer}.in_proj.bias", ("layers/in/bias", "layers/gate/bias"), Split(0, 2)),
            Rule(f"{mixer}.conv1d.weight", "layers/conv_kernel", CONV1D),
            Rule(f"{mixer}.conv1d.bias", "layers/conv_bias"),
            Rule(f"{mixer}.x_proj.weight", selected, (Split(0, step), LINEAR)),
            Rule(f"{mixer}.dt_proj.weight", "layers/step_up/kernel", LINEAR),
            Rule(f"{mixer}.dt_proj.bias", "layers/step_bias"),
            Rule(f"{mixer}.A_log", "layers/log_decay"),
            Rule(f"{mixer}.D", "layers/skip"),
            *linear(f"{mixer}.out_proj", "layers/out"),
        ),
        *norm("norm_f", "final_norm"),
        Rule("lm_head.weight", "head/kernel", LINEAR),
    )


def rules(module: Mamba) -> tuple[Rule, ...]:
    """See :func:`table`."""
    return table(module, "embeddings")


def to_config(module: Mamba) -> Mapping[str, Any]:
    """What ``MambaForCausalLM`` loads."""
    c = module.config
    if c.channels % c.hidden_size:
        raise ImporterError(f"hub-mamba cannot express inner_size = {c.channels}, no multiple of {c.hidden_size}")
    return {
        "model_type": "mamba",
        "architectures": shared.architecture(c, "MambaForCausalLM"),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "state_size": c.state_size,
        "expand": c.channels // c.hidden_size,
        "conv_kernel": c.conv_size,
        "time_step_rank": c.rank,
        "layer_norm_epsilon": c.norm_epsilon,
        "use_bias": c.use_bias,
        "use_conv_bias": c.conv_bias,
        "hidden_act": "silu",
        "residual_in_fp32": c.float32_stream,
        "time_step_min": c.step_min,
        "time_step_max": c.step_max,
        "time_step_floor": c.step_floor,
        "tie_word_embeddings": c.head == "tied",
    }


LAYOUT = Layout(
    name="hub-mamba",
    title="Mamba of transformers (130M to 2.8B)",
    configure=configure,
    rules=rules,
    model_types=("mamba",),
    signature=("embeddings.weight", "norm_f.weight", "layers.{i}.mixer.A_log", "layers.{i}.mixer.x_proj.weight"),
    prefixes=("backbone.",),
    duplicates=(("lm_head.weight", "embeddings.weight"),),
    to_config=to_config,
    full_name=shared.full_name("backbone."),
)
