"""Golden cases and key lists of DecoderLM: GPT-2, OPT, LLaMA, Mistral, Phi, Qwen of transformers, random weights.

/tmp/venv-parity/bin/python tests/golden/make/decoder_lm.py [cases] [keys]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import transformers as hf
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
ROWS, LENGTH = 3, 10
SHORT = 5


def config_json(model):
    """What ``save_pretrained`` writes, without the library's version."""
    said = json.loads(model.config.to_json_string(use_diff=True))
    said["architectures"] = [type(model).__name__]
    return {k: v for k, v in said.items() if k not in ("transformers_version", "dtype")}


def perturbed(model):
    """As ``seeded``, but the frequencies of rotary positions, which are no weights, stay what the config says."""
    frequencies = {n: b.clone() for n, b in model.named_buffers() if "inv_freq" in n}
    seeded(model)
    for name, buffer in model.named_buffers():
        if name in frequencies:
            buffer.copy_(frequencies[name])
    return model


def layers_of(model):
    base = model.base_model
    base = getattr(base, "decoder", base)
    return base.h if hasattr(base, "h") else base.layers


def run(model, positions=True, **call):
    """Logits, the last hidden state, and the stream before and after every block."""
    last = []
    hook = layers_of(model)[-1].register_forward_hook(lambda m, i, o: last.append(o[0] if isinstance(o, tuple) else o))
    mask = call.get("attention_mask")
    if mask is not None and positions:
        call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        base = model.base_model(**call, output_hidden_states=True, use_cache=False)
        logits = model(**call, use_cache=False).logits if hasattr(model, "lm_head") else None
    hook.remove()
    out = {"last": base.last_hidden_state, "stream": torch.stack([*base.hidden_states[:-1], last[0]])}
    return out | ({} if logits is None else {"logits": logits})


def case(name, model, state=None, config=None, positions=True, changed=""):
    """One golden case: whole, padded on the left, padded on the right, short, from embeddings, in training mode."""
    perturbed(model).eval()
    generator = np.random.default_rng(1)
    vocab, width = model.get_input_embeddings().weight.shape
    ids = torch.tensor(generator.integers(0, vocab, (ROWS, LENGTH)))
    lengths = np.array([LENGTH, 4, 7])[:, None]
    right = torch.tensor(np.arange(LENGTH) < lengths)
    left = right.flip(1)
    embeddings = torch.tensor(generator.normal(size=(ROWS, LENGTH, width)).astype(np.float32))
    calls = {
        "plain": {"input_ids": ids},
        "short": {"input_ids": ids[:, :SHORT]},
        "left": {"input_ids": ids, "attention_mask": left.long()},
        "right": {"input_ids": ids, "attention_mask": right.long()},
        "embeddings": {"inputs_embeds": embeddings, "attention_mask": left.long()},
    }
    outputs = {f"{k}.{n}": v for k, call in calls.items() for n, v in run(model, positions, **call).items()}
    outputs = {k: v for k, v in outputs.items() if not k.endswith(".stream") or k in ("plain.stream", "left.stream")}
    if not any(v for k, v in model.config.to_dict().items() if "drop" in k):
        outputs["train.last"] = run(model.train(), positions, **calls["left"])["last"]
    call = f"{type(model).__name__}({type(model.config).__name__}(**config.json)), eager attention; " + (
        "position_ids = attention_mask.cumsum(-1) - 1 where there is a mask; " if positions else ""
    )
    save_case(
        name,
        model.state_dict() if state is None else state,
        config_json(model) if config is None else config(config_json(model)),
        {"ids": ids, "left": left, "right": right, "embeddings": embeddings},
        outputs,
        call + "weights seeded(model, 0)" + changed,
        "transformers",
    )


def make(config, model, **settings):
    torch.manual_seed(0)
    return model(config(**settings, attn_implementation="eager"))


def old_rope(said):
    """The form of transformers before version 5."""
    rope = said.pop("rope_parameters")
    kind = rope.pop("rope_type")
    said["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        said["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    said["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    return said


def cases():
    gpt2 = {
        "n_embd": 24,
        "n_layer": 3,
        "n_head": 3,
        "n_inner": 40,
        "n_positions": 20,
        "vocab_size": 50,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    # as the published file: the bare model's names, causal masks among them
    model = make(hf.GPT2Config, hf.GPT2LMHeadModel, **gpt2, resid_pdrop=0.05, embd_pdrop=0.15, attn_pdrop=0.25)
    perturbed(model)
    state = {k.removeprefix("transformer."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.tril(torch.ones(20, 20))[None, None].clone()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    model = make(hf.GPT2Config, hf.GPT2LMHeadModel, **gpt2, resid_pdrop=0.05, embd_pdrop=0.15, attn_pdrop=0.25)
    case("gpt2_hub", model, state=state, changed="; names without transformer., causal-mask buffers added")
    case(
        "gpt2_prefixed",
        make(
            hf.GPT2Config,
            hf.GPT2LMHeadModel,
            **gpt2 | still | {"activation_function": "relu", "layer_norm_epsilon": 1e-3, "n_inner": None, "n_layer": 2},
        ),
    )
    square = {"n_embd": 16, "n_inner": 16, "n_head": 2, "n_layer": 2, "n_positions": 16, "vocab_size": 16}
    case(
        "gpt2_square_untied",
        make(
            hf.GPT2Config,
            hf.GPT2LMHeadModel,
            **gpt2 | still | square | {"tie_word_embeddings": False, "activation_function": "gelu"},
        ),
    )

    opt = {
        "vocab_size": 50,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "ffn_dim": 40,
        "num_attention_heads": 3,
        "dropout": 0.0,
        "max_position_embeddings": 20,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 2,
    }
    case("opt_pre", make(hf.OPTConfig, hf.OPTForCausalLM, **opt), positions=False)
    post = make(hf.OPTConfig, hf.OPTForCausalLM, **opt, do_layer_norm_before=False, word_embed_proj_dim=12)
    # as the published file: without model., the tied copy stored
    state = {k.removeprefix("model."): v for k, v in perturbed(post).state_dict().items()}
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    post = make(hf.OPTConfig, hf.OPTForCausalLM, **opt, do_layer_norm_before=False, word_embed_proj_dim=12)
    case("opt_post", post, state=state, positions=False, changed="; names without model., lm_head.weight stored")
    case(
        "opt_square_untied",
        make(
            hf.OPTConfig,
            hf.OPTForCausalLM,
            **opt
            | {
                "hidden_size": 16,
                "ffn_dim": 16,
                "num_attention_heads": 2,
                "vocab_size": 16,
                "tie_word_embeddings": False,
                "enable_bias": False,
                "activation_function": "gelu",
                "_remove_final_layer_norm": True,
            },
        ),
        positions=False,
    )

    llama = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    square = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 16,
        "num_hidden_layers": 2,
    }
    case("llama_grouped", make(hf.LlamaConfig, hf.LlamaForCausalLM, **llama, head_dim=8))
    case("llama_square", make(hf.LlamaConfig, hf.LlamaForCausalLM, **llama | square), config=old_rope)
    linear = {"rope_type": "linear", "factor": 3.0, "rope_theta": 500.0}
    case(
        "llama_biased_tied_linear",
        make(
            hf.LlamaConfig,
            hf.LlamaForCausalLM,
            **llama,
            attention_bias=True,
            mlp_bias=True,
            tie_word_embeddings=True,
            rope_parameters=linear,
            rms_norm_eps=1e-3,
            hidden_act="gelu_pytorch_tanh",
        ),
        config=old_rope,
    )
    # with a head of 16 and these bounds there are frequencies of all three kinds: kept, blended, divided
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
        "rope_theta": 500.0,
    }
    case(
        "llama_llama3",
        make(
            hf.LlamaConfig,
            hf.LlamaForCausalLM,
            **llama | {"head_dim": 16, "rope_parameters": llama3, "num_hidden_layers": 2},
        ),
    )
    base = make(hf.LlamaConfig, hf.LlamaModel, **llama)
    state = dict(perturbed(base).state_dict()) | {
        f"layers.{i}.self_attn.rotary_emb.inv_freq": base.rotary_emb.inv_freq.clone() for i in range(3)
    }
    base = make(hf.LlamaConfig, hf.LlamaModel, **llama)
    case("llama_headless", base, state=state, changed="; rotary_emb.inv_freq buffers as in old files")

    case("mistral_window", make(hf.MistralConfig, hf.MistralForCausalLM, **llama, sliding_window=3, head_dim=4))
    case("mistral_square", make(hf.MistralConfig, hf.MistralForCausalLM, **llama | square, sliding_window=None))

    phi = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    case("phi_partial", make(hf.PhiConfig, hf.PhiForCausalLM, **phi, num_key_value_heads=2))
    case(
        "phi_square_normed",
        make(hf.PhiConfig, hf.PhiForCausalLM, **phi | square | {"qk_layernorm": True, "partial_rotary_factor": 0.75}),
        config=old_rope,
    )
    case("phi3_fused", make(hf.Phi3Config, hf.Phi3ForCausalLM, **phi, num_key_value_heads=2, sliding_window=4))
    case(
        "phi3_square_tied",
        make(
            hf.Phi3Config,
            hf.Phi3ForCausalLM,
            **phi | square | {"tie_word_embeddings": True, "partial_rotary_factor": 0.5},
        ),
    )

    case("qwen2_tied", make(hf.Qwen2Config, hf.Qwen2ForCausalLM, **llama, tie_word_embeddings=True))
    case(
        "qwen2_square_window",
        make(
            hf.Qwen2Config,
            hf.Qwen2ForCausalLM,
            **llama | square | {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0},
        ),
    )
    case("qwen3_normed", make(hf.Qwen3Config, hf.Qwen3ForCausalLM, **llama, head_dim=10))
    case(
        "qwen3_square_biased",
        make(
            hf.Qwen3Config,
            hf.Qwen3ForCausalLM,
            **llama | square | {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        ),
    )


def keys():
    """Key lists of published checkpoints, from the library's class at full size on the meta device."""

    def save(name, layout, model_class, config, total, source, drop=(), extra=None, rename=lambda k: k):
        with torch.device("meta"):
            model = model_class(config)
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted, total)
        shapes = {rename(k): list(v.shape) for k, v in model.state_dict().items() if k not in drop}
        save_keys(name, layout, shapes, config_json(model), total, source, extra=extra)

    tied = ("lm_head.weight",)
    counted = "counted on transformers' own class at full size (tied weights once)"
    masks = {f"h.{i}.attn.bias": [1, 1, 1024, 1024] for i in range(12)}
    save(
        "gpt2",
        "hub-gpt2",
        hf.GPT2LMHeadModel,
        hf.GPT2Config(),
        124439808,
        f"{counted}; published as 124M; the file of openai-community/gpt2 holds 124,439,808 and causal masks",
        tied,
        masks,
        lambda k: k.removeprefix("transformer."),
    )
    save(
        "gpt2-xl",
        "hub-gpt2",
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=1600, n_layer=48, n_head=25),
        1557611200,
        f"{counted}; published as 1558M (Radford et al., 2019; release notes)",
        tied,
        {f"h.{i}.attn.bias": [1, 1, 1024, 1024] for i in range(48)},
        lambda k: k.removeprefix("transformer."),
    )
    opt = {"vocab_size": 50272, "max_position_embeddings": 2048}
    bare = lambda k: k.removeprefix("model.")  # noqa: E731
    for name, total, sizes in (
        (
            "opt-125m",
            125239296,
            {"hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
        ),
        (
            "opt-350m",
            331196416,
            {
                "hidden_size": 1024,
                "ffn_dim": 4096,
                "num_hidden_layers": 24,
                "num_attention_heads": 16,
                "do_layer_norm_before": False,
                "word_embed_proj_dim": 512,
            },
        ),
        (
            "opt-1.3b",
            1315758080,
            {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32},
        ),
    ):
        save(
            name,
            "hub-opt",
            hf.OPTForCausalLM,
            hf.OPTConfig(**opt, **sizes),
            total,
            f"{counted}; published as {name[4:].upper()} (Zhang et al., 2022, table 1)",
            (),
            None,
            bare if name == "opt-350m" else lambda k: k,
        )
    frequencies = lambda n, d: {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": [d // 2] for i in range(n)}  # noqa: E731
    llama = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
    for name, total, source, extra, sizes in (
        (
            "llama-7b",
            6738415616,
            "6.7B (Touvron et al., 2023, table 2); model card 6,738,415,616",
            frequencies(32, 128),
            {"intermediate_size": 11008},
        ),
        (
            "llama-2-70b",
            68976648192,
            "70B (Touvron et al., 2023b, table 1)",
            frequencies(80, 128),
            {
                "hidden_size": 8192,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "intermediate_size": 28672,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
            },
        ),
        (
            "llama-3-8b",
            8030261248,
            "8B; safetensors metadata of meta-llama/Meta-Llama-3-8B 8,030,261,248",
            None,
            {
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "vocab_size": 128256,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
            },
        ),
        (
            "llama-3.1-8b",
            8030261248,
            "8B; safetensors metadata of meta-llama/Llama-3.1-8B 8,030,261,248",
            None,
            {
                "num_key_value_heads": 8,
                "intermediate_size": 14336,
                "vocab_size": 128256,
                "max_position_embeddings": 131072,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 500000.0,
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
        ),
    ):
        save(
            name,
            "hub-llama",
            hf.LlamaForCausalLM,
            hf.LlamaConfig(**llama | sizes),
            total,
            f"{counted}; published as {source}",
            extra=extra,
        )
    save(
        "mistral-7b",
        "hub-llama",
        hf.MistralForCausalLM,
        hf.MistralConfig(max_position_embeddings=32768, rms_norm_eps=1e-5),
        7241732096,
        f"{counted}; published as 7.24B (safetensors metadata 7,241,732,096)",
    )
    save(
        "phi-2",
        "hub-phi",
        hf.PhiForCausalLM,
        hf.PhiConfig(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=32,
            num_attention_heads=32,
            resid_pdrop=0.1,
            partial_rotary_factor=0.4,
        ),
        2779683840,
        f"{counted}; published as 2.78B (safetensors metadata 2,779,683,840)",
    )
    save(
        "phi-3-mini-4k",
        "hub-phi3",
        hf.Phi3ForCausalLM,
        hf.Phi3Config(sliding_window=2047),
        3821079552,
        f"{counted}; published as 3.8B",
    )
    save(
        "qwen2-0.5b",
        "hub-llama",
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            max_position_embeddings=131072,
            max_window_layers=24,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        494032768,
        f"{counted}; published as 0.49B (safetensors metadata 494,032,768)",
        tied,
    )
    save(
        "qwen3-0.6b",
        "hub-llama",
        hf.Qwen3ForCausalLM,
        hf.Qwen3Config(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            max_position_embeddings=40960,
            max_window_layers=28,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        ),
        596049920,
        f"{counted}; published as 0.6B; the file stores lm_head.weight besides",
    )


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["cases", "keys"]
    if "cases" in wanted:
        cases()
    if "keys" in wanted:
        keys()
