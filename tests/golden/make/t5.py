"""Golden cases and key lists of T5 (transformers).  Inputs and outputs are named ``run.argument``."""

import numpy as np
import torch
import transformers as hf
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
SMALL = {
    "vocab_size": 31, "d_model": 20, "d_kv": 6, "d_ff": 28, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "decoder_start_token_id": 0,
}  # fmt: skip
# one size for all: no shape shows a kernel that is not transposed
SQUARE = dict(SMALL, d_model=24, d_kv=6, d_ff=24, num_layers=2, num_decoder_layers=2, relative_attention_num_buckets=32,
              relative_attention_max_distance=128)  # fmt: skip
V1_1 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CALL = "{}(config) with every weight perturbed, eager attention; train.*: .train() with dropout 0, others .eval()"
THEIRS = {
    "ids": "input_ids", "padding_mask": "attention_mask", "decoder_ids": "decoder_input_ids",
    "decoder_padding_mask": "decoder_attention_mask", "embeddings": "inputs_embeds",
    "decoder_embeddings": "decoder_inputs_embeds",
}  # fmt: skip


def texts(length, target, seed=0, padded=True):
    random = np.random.default_rng(seed + length)
    out = {"ids": random.integers(2, 31, (3, length)), "decoder_ids": random.integers(2, 31, (3, target))}
    out["decoder_ids"][:, 0] = 0
    out = {k: v.astype(np.int32) for k, v in out.items()}
    if padded:
        out["padding_mask"] = np.arange(length) < np.array([[length], [length - 4], [3]])
        out["decoder_padding_mask"] = np.arange(target) < np.array([[target - 2], [target], [2]])
    return out


def new(kind, seed, base=SMALL, **changes):
    torch.manual_seed(seed)
    config = hf.T5Config(**{**base, **changes})
    config._attn_implementation = "eager"
    model = kind(config)
    if changes.get("tie_word_embeddings") is False and hasattr(model, "lm_head"):
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model) * 0.3)
    model = seeded(model, seed, 0.5)
    with torch.no_grad():  # the fresh table and kernels are for wide models: their scores would hardly differ
        for name, p in model.named_parameters():
            if "relative_attention_bias" in name:
                p.mul_(2.0)
    return model.eval()


def call(model, inputs, train=False):
    model.train(train)
    tensor = lambda v: torch.tensor(v) if v.dtype == np.float32 else torch.tensor(v).long()  # noqa: E731
    theirs = {THEIRS[k]: tensor(v) for k, v in inputs.items()}
    decodes = {"use_cache": False} if isinstance(model, hf.T5ForConditionalGeneration) else {}
    with torch.no_grad():
        found = model(**theirs, output_hidden_states=True, return_dict=True, **decodes)
    if not hasattr(found, "decoder_hidden_states"):
        return {"encoder_tokens": found.last_hidden_state, "encoder_hidden_states": torch.stack(found.hidden_states)}
    out = {
        "encoder_tokens": found.encoder_last_hidden_state,
        "encoder_hidden_states": torch.stack(found.encoder_hidden_states),
        "tokens": found.decoder_hidden_states[-1], "hidden_states": torch.stack(found.decoder_hidden_states),
    }  # fmt: skip
    return out | {"logits": found.logits}


def config_of(model, **changes):
    found = model.config.to_diff_dict() | {"architectures": [type(model).__name__], **changes}
    return {k: v for k, v in found.items() if k not in ("transformers_version", "dtype")}


def make(name, model, runs, state=None, config=None):
    inputs, outputs = {}, {}
    for run, arguments in runs.items():
        inputs |= {f"{run}.{k}": v for k, v in arguments.items()}
        outputs |= {f"{run}.{k}": v for k, v in call(model, arguments, run.startswith("train")).items()}
    if hasattr(model, "lm_head"):
        ids, mask = (torch.tensor(runs["padded"][k]).long() for k in ("ids", "padding_mask"))
        words = model.eval().generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None,
                                      num_beams=1)  # fmt: skip
        outputs["greedy"] = words[:, 1:].int()
    save_case(name, state or model.state_dict(), config or config_of(model), inputs, outputs,
              CALL.format(type(model).__name__), "transformers")  # fmt: skip


def cases():
    plain = {"full": texts(6, 4, padded=False), "padded": texts(12, 10)}
    vectors = np.random.default_rng(5).standard_normal((2, 3, 6, 20)).astype(np.float32)
    embedded = {"embeddings": vectors[0], "decoder_embeddings": vectors[1, :, :4]}
    make("t5_original", new(hf.T5ForConditionalGeneration, 0, dropout_rate=0.0),
         {**plain, "train": texts(4, 3), "embedded": embedded})  # fmt: skip
    v1_1 = new(hf.T5ForConditionalGeneration, 1, **V1_1, layer_norm_epsilon=1e-3)
    # the library forgets how it was called: the published files say tie_word_embeddings = false
    old = {k: v for k, v in config_of(v1_1, tie_word_embeddings=False).items() if k != "scale_decoder_outputs"}
    make("t5_v1_1", v1_1, plain, config=old)
    make("t5_v1_1_saved_anew", new(hf.T5ForConditionalGeneration, 2, SQUARE, **V1_1), {"padded": texts(22, 20)})
    square = new(hf.T5ForConditionalGeneration, 3, SQUARE)
    # the first published files hold every copy, and a table that nothing reads
    state = {k: v.clone() for k, v in square.state_dict().items()}
    state["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.randn(32, 4)
    make("t5_square", square, {"padded": texts(22, 20)}, state)
    encoder = new(hf.T5EncoderModel, 4, **V1_1)
    make("t5_encoder", encoder, {k: {n: v for n, v in r.items() if "decoder" not in n} for k, r in plain.items()})


def buckets():
    """Where the library puts every distance."""
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-600, 601)
    rule = T5Attention._relative_position_bucket
    kinds = [(b, n, m) for b in (True, False) for n, m in ((32, 128), (8, 12), (64, 500), (4, 16))]
    out = {f"{int(b)}_{n}_{m}": rule(distance, b, n, m).int().numpy() for b, n, m in kinds}
    from common import GOLDEN

    np.savez_compressed(GOLDEN / "backbones" / "t5_buckets.npz", distance=distance.numpy(), **out)


BASE = {"d_model": 768, "num_heads": 12, "d_ff": 3072, "num_layers": 12, "decoder_start_token_id": 0}
LARGE = {"d_model": 1024, "num_heads": 16, "d_ff": 4096, "num_layers": 24, "decoder_start_token_id": 0}
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNREAD = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def key_lists():
    def keep(name, config, total, source, untied=False, kind=hf.T5ForConditionalGeneration, drop=COPIES, extra=None):
        with torch.device("meta"):
            model = kind(hf.T5Config(**config))
            if untied:
                model.lm_head.weight = torch.nn.Parameter(torch.empty(32128, config["d_model"]))
        assert sum(p.numel() for p in model.parameters()) == total, name
        drop = drop if untied else (*drop, "lm_head.weight")
        said = config_of(model, **({"tie_word_embeddings": False} if untied else {}))
        said = {k: v for k, v in said.items() if k != "scale_decoder_outputs"} if untied else said
        save_keys(name, "hub-t5", model, said, total, source, drop, extra)

    paper = "num_parameters() of the library's model; {} in table 14 or section 2.3 of Raffel et al., 2020"
    keep("t5-small", {"decoder_start_token_id": 0}, 60_506_624, paper.format("60M"))
    with torch.device("meta"):
        full = hf.T5ForConditionalGeneration(hf.T5Config(**BASE))
    assert sum(p.numel() for p in full.parameters()) == 222_903_552
    save_keys("t5-base", "hub-t5", full, config_of(full), 222_903_552, paper.format("220M"), (), {UNREAD: [32, 12]})
    keep("t5-large", LARGE, 737_668_096, paper.format("770M"))
    v1_1 = dict(BASE, d_ff=2048, **V1_1)
    keep("t5-v1_1-base", v1_1, 247_577_856, "the hub's count for google/t5-v1_1-base and flan-t5-base (248M)", True)
    xxl = dict(d_model=4096, num_heads=64, d_ff=10240, num_layers=24, **V1_1)
    keep("t5-v1_1-xxl-encoder", xxl, 4_762_310_656, "the text encoder of Stable Diffusion 3 and FLUX (4.76B)",
         kind=hf.T5EncoderModel, drop=("encoder.embed_tokens.weight",))  # fmt: skip


if __name__ == "__main__":
    cases()
    buckets()
    key_lists()
