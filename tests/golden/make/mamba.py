"""Golden cases and key lists of Mamba: transformers' MambaForCausalLM, random weights.

/tmp/venv-parity/bin/python tests/golden/make/mamba.py [cases] [keys]
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
ROWS, LENGTH, SHORT = 3, 10, 5
SIZES = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 5, "time_step_rank": 3}
"""Of the published models: hidden width, layers, parameters (Gu and Dao, 2023, table 12; hub pages)."""
PUBLISHED = {
    "mamba-130m": (768, 24, 129135360), "mamba-370m": (1024, 48, 371516416), "mamba-790m": (1536, 48, 793204224),
    "mamba-1.4b": (2048, 48, 1372178432), "mamba-2.8b": (2560, 64, 2768345600),
}  # fmt: skip


def config_json(model):
    """What ``save_pretrained`` writes, without the library's version."""
    said = json.loads(model.config.to_json_string(use_diff=True))
    said["architectures"] = [type(model).__name__]
    return {k: v for k, v in said.items() if k not in ("transformers_version", "dtype")}


def run(model, **call):
    """Logits, the last hidden state, and the stream before and after every layer."""
    with torch.no_grad():
        base = model.base_model(**call, output_hidden_states=True, use_cache=False)
        logits = model(**call, use_cache=False).logits if hasattr(model, "lm_head") else None
        first = call["inputs_embeds"] if "inputs_embeds" in call else model.get_input_embeddings()(call["input_ids"])
    out = {"last": base.last_hidden_state, "stream": torch.stack([first, *base.hidden_states[:-1]])}
    return out | ({} if logits is None else {"logits": logits})


def case(name, model_class, state=lambda s: s, config=lambda c: c, changed="", **settings):
    """One golden case: whole, padded on the left, padded on the right, short, from embeddings, in training mode."""
    torch.manual_seed(0)
    model = seeded(model_class(hf.MambaConfig(**{**SIZES, **settings}))).eval()
    generator = np.random.default_rng(1)
    vocab, width = model.get_input_embeddings().weight.shape
    ids = torch.tensor(generator.integers(0, vocab, (ROWS, LENGTH)))
    right = torch.tensor(np.arange(LENGTH) < np.array([LENGTH, 4, 7])[:, None])
    left = right.flip(1)
    embeddings = torch.tensor(generator.normal(size=(ROWS, LENGTH, width)).astype(np.float32))
    calls = {
        "plain": {"input_ids": ids},
        "short": {"input_ids": ids[:, :SHORT]},
        "left": {"input_ids": ids, "attention_mask": left.long()},
        "right": {"input_ids": ids, "attention_mask": right.long()},
        "embeddings": {"inputs_embeds": embeddings, "attention_mask": left.long()},
    }
    outputs = {f"{k}.{n}": v for k, call in calls.items() for n, v in run(model, **call).items()}
    outputs = {k: v for k, v in outputs.items() if not k.endswith(".stream") or k in ("plain.stream", "left.stream")}
    outputs["train.last"] = run(model.train(), **calls["left"])["last"]
    save_case(
        name,
        state(model.state_dict()),
        config(config_json(model)),
        {"ids": ids, "left": left, "right": right, "embeddings": embeddings},
        outputs,
        f"{type(model).__name__}(MambaConfig(**config.json)), pure torch path; weights seeded(model, 0){changed}",
        "transformers",
    )


def original(state):
    """Names as state-spaces/mamba writes them, the tied head stored."""
    out = {k.replace("embeddings", "embedding"): v for k, v in state.items()}
    return out | {"lm_head.weight": state["backbone.embeddings.weight"].clone()}


def cases():
    causal = hf.MambaForCausalLM
    case("mamba_tied", causal)
    case("mamba_biased_untied", causal, use_bias=True, use_conv_bias=False, conv_kernel=3, tie_word_embeddings=False,
         layer_norm_epsilon=1e-3, residual_in_fp32=False)  # fmt: skip
    case("mamba_square", causal, vocab_size=16, state_size=16, time_step_rank=16, expand=1, num_hidden_layers=2)
    case("mamba_headless", hf.MambaModel, time_step_rank="auto", expand=3)
    said = {"d_model": 16, "n_layer": 3, "vocab_size": 50, "ssm_cfg": {"d_state": 5, "dt_rank": 3}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 1}  # fmt: skip
    case("mamba_original", causal, original, lambda _: said,
         "; names and config rewritten as state-spaces/mamba has them")  # fmt: skip


def keys():
    for name, (width, layers, total) in PUBLISHED.items():
        with torch.device("meta"):
            model = hf.MambaForCausalLM(hf.MambaConfig(hidden_size=width, num_hidden_layers=layers))
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted, total)
        source = "counted on transformers' own class at full size (tied weights once); Gu and Dao, 2023, table 12"
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        save_keys(name, "hub-mamba", shapes, config_json(model), total, source, drop=("lm_head.weight",))
    said = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "rms_norm": True,
            "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8}  # fmt: skip
    shapes = {k.replace("embeddings", "embedding"): v for k, v in shapes.items()}
    save_keys("mamba-2.8b-original", "mamba-ssm", shapes, said, total, source)


if __name__ == "__main__":
    wanted = sys.argv[1:] or ["cases", "keys"]
    if "cases" in wanted:
        cases()
    if "keys" in wanted:
        keys()
