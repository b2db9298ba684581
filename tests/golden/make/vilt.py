"""Golden cases and key lists of ViLT (transformers).  Inputs and outputs are named ``run.argument``.

The library shuffles the patches that it keeps; here its draws are made in order, and what it returns is put back where
the patch lies in the frame (zeros where it kept none), with ``mask`` saying where.
"""

import numpy as np
import torch
import transformers as hf
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
SMALL = {
    "vocab_size": 43, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 36,
    "max_position_embeddings": 11, "image_size": 16, "patch_size": 4, "num_channels": 3,
}  # fmt: skip
SQUARE = {**SMALL, "num_attention_heads": 4, "intermediate_size": 24, "qkv_bias": False, "hidden_act": "gelu_new"}
CALL = "{}(config) with every weight perturbed; torch.multinomial in order; train.*: .train() with dropout 0"


def in_order(weights, number, replacement=False):
    number = int(number)
    return torch.zeros(number, dtype=torch.long) if replacement else torch.arange(number)


torch.multinomial = in_order


def pairs(length, height, width, sizes=None, channels=3, seed=0):
    """Arguments of a call in our words; ``sizes``: of three images in the frame."""
    random = np.random.default_rng(seed + length)
    out = {
        "ids": random.integers(5, 43, (3, length)).astype(np.int32),
        "images": random.standard_normal((3, height, width, channels)).astype(np.float32),
    }
    if sizes:
        out["padding_mask"] = np.arange(length) < np.array([[length], [length - 2], [3]])
        out["token_types"] = random.integers(0, 2, (3, length)).astype(np.int32)
        rows, columns = np.arange(height)[:, None], np.arange(width)[None, :]
        out["pixel_mask"] = np.stack([(rows < h) & (columns < w) for h, w in sizes])
    return out


THEIRS = {
    "ids": "input_ids", "padding_mask": "attention_mask", "token_types": "token_type_ids",
    "embeddings": "inputs_embeds", "image_embeddings": "image_embeds",
}  # fmt: skip


def call(model, inputs, train=False):
    model.train(train)
    tensor = lambda v: torch.tensor(v) if v.dtype == np.float32 else torch.tensor(v).long()  # noqa: E731
    theirs = {THEIRS[k]: tensor(v) for k, v in inputs.items() if k in THEIRS}
    if "images" in inputs:
        theirs["pixel_values"] = torch.tensor(inputs["images"]).permute(0, 3, 1, 2)
        mask = torch.tensor(inputs.get("pixel_mask", np.ones(inputs["images"].shape[:3], bool)))
        theirs["pixel_mask"] = mask.long()
        side = model.config.patch_size
        rows, columns = (n // side for n in mask.shape[1:])
        mask = torch.nn.functional.interpolate(mask[:, None].float(), size=(rows, columns))[:, 0].flatten(1).bool()
        mask = torch.cat([torch.ones(len(mask), 1, dtype=torch.bool), mask], 1)
    else:
        mask = torch.tensor(inputs["image_mask"])
        theirs["pixel_mask"] = mask.long()
    if "image_type" in inputs:
        theirs["image_token_type_idx"] = int(inputs["image_type"])
    base = getattr(model, "vilt", model)
    with torch.no_grad():
        found = base(**theirs, output_hidden_states=True)
        out = {"tokens": found.last_hidden_state, "hidden_states": torch.stack(found.hidden_states)}
        if found.pooler_output is not None:
            out["pooled"] = found.pooler_output
        if base is not model:
            logits = model(**theirs).logits
            out |= {"scores": logits[:, 0]} if hasattr(model, "rank_output") else {"logits": logits}
    length = (inputs["ids"] if "ids" in inputs else inputs["embeddings"]).shape[1]
    for key in ("tokens", "hidden_states"):
        x = out[key]
        whole = torch.zeros(*x.shape[:-2], length + mask.shape[1], x.shape[-1])
        whole[..., :length, :] = x[..., :length, :]
        for b, real in enumerate(mask):
            whole[..., b, length:, :][..., real, :] = x[..., b, length : length + int(real.sum()), :]
        out[key] = whole
    text = torch.ones(3, length, dtype=torch.bool)
    return out | {"mask": torch.cat([text, mask], 1)}


def config_of(model, **changes):
    found = model.config.to_diff_dict() | {"architectures": [type(model).__name__], **changes}
    return {k: v for k, v in found.items() if k not in ("transformers_version", "dtype")}


def new(kind, seed, base=SMALL, options=None, **changes):
    torch.manual_seed(seed)
    return seeded(kind(hf.ViltConfig(**{**base, **changes}), **(options or {})), seed, 0.7).eval()


def make(name, model, runs, state=None):
    inputs, outputs = {}, {}
    for run, arguments in runs.items():
        inputs |= {f"{run}.{k}": v for k, v in arguments.items()}
        outputs |= {f"{run}.{k}": v for k, v in call(model, arguments, run.startswith("train")).items()}
    save_case(name, state or model.state_dict(), config_of(model), inputs, outputs,
              CALL.format(type(model).__name__), "transformers")  # fmt: skip


def cases():
    sizes = [(12, 20), (8, 12), (4, 16)]
    plain = {
        "full": pairs(3, 16, 16), "padded": pairs(7, 12, 20, sizes),
        # sides that are no multiple of the patch, and an image one patch wide
        "odd": pairs(6, 14, 11, [(14, 11), (6, 5), (12, 2)]),
    }  # fmt: skip
    random = np.random.default_rng(3)
    embedded = {
        "embeddings": random.standard_normal((3, 4, 24)).astype(np.float32),
        "image_embeddings": random.standard_normal((3, 6, 24)).astype(np.float32),
        "image_mask": np.arange(6) < np.array([[6], [4], [1]]),
    }
    make("vilt_model", new(hf.ViltModel, 0),
         {**plain, "train": pairs(2, 8, 8), "embedded": embedded})  # fmt: skip
    bare = new(hf.ViltModel, 1, SQUARE, {"add_pooling_layer": False}, modality_type_vocab_size=3, layer_norm_eps=1e-3)
    second = {**pairs(5, 12, 16, [(12, 16), (8, 8), (12, 4)]), "image_type": np.array(2)}
    make("vilt_square", bare, {"padded": plain["padded"], "second": second})
    mlm = new(hf.ViltForMaskedLM, 2, hidden_act="relu")
    # older versions of the library named the bias otherwise, stored the tied table twice, and the position ids
    state = {k.replace("mlm_score.decoder.bias", "mlm_score.bias"): v.clone() for k, v in mlm.state_dict().items()}
    state["vilt.embeddings.text_embeddings.position_ids"] = torch.arange(11)[None]
    make("vilt_mlm", mlm, {"padded": plain["padded"]}, state)
    make("vilt_vqa", new(hf.ViltForQuestionAnswering, 3, num_labels=7), {"padded": plain["padded"]})
    make("vilt_matching", new(hf.ViltForImageAndTextRetrieval, 4), {"padded": plain["padded"]})


def key_lists():
    def keep(name, kind, total, source, drop=(), extra=None, **changes):
        with torch.device("meta"):
            model = kind(hf.ViltConfig(**changes))
        assert sum(p.numel() for p in model.parameters()) == total, (name, sum(p.numel() for p in model.parameters()))
        config = {k: v for k, v in config_of(model).items() if k not in ("id2label", "label2id")}
        save_keys(name, "hub-vilt", model, config, total, source, drop, extra)

    ids = {"vilt.embeddings.text_embeddings.position_ids": [1, 40]}
    counted = "num_parameters() of the library's model; no exact figure is published (87.4M without embeddings)"
    word = ("mlm_score.decoder.weight", "mlm_score.decoder.bias")
    keep("vilt-b32", hf.ViltModel, 111_595_008, counted)
    keep("vilt-b32-mlm", hf.ViltForMaskedLM, 112_217_658, counted, word, {**ids, "mlm_score.bias": [30522]})
    keep("vilt-b32-finetuned-vqa", hf.ViltForQuestionAnswering, 117_588_537, counted, (), ids, num_labels=3129)
    keep("vilt-b32-finetuned-coco", hf.ViltForImageAndTextRetrieval, 111_595_777, counted, (), ids)


if __name__ == "__main__":
    cases()
    key_lists()
