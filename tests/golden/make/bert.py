"""Golden cases and key lists of BERT, RoBERTa and DistilBERT (transformers).

Inputs and outputs are named ``run.argument``: one case holds several calls of the same model.
"""

import numpy as np
import torch
import transformers as hf
from common import save_case, save_keys, seeded

torch.set_num_threads(1)
SMALL = {
    "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 19, "type_vocab_size": 2,
}  # fmt: skip
SQUARE = dict(SMALL, hidden_size=24, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4)
SHALLOW = dict(SMALL, num_hidden_layers=2)
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROBERTA = dict(SHALLOW, type_vocab_size=1, pad_token_id=1, layer_norm_eps=1e-5)
DISTIL = {"vocab_size": 53, "dim": 24, "n_layers": 2, "n_heads": 3, "hidden_dim": 40, "max_position_embeddings": 19}
CALL = "{}(config) with every weight perturbed, eager attention; train.*: .train() with dropout 0, others .eval()"


def texts(length, pad=0, seed=0, padded=True, types=True):
    """Arguments of a call in our words: ids of 3 texts, of which two are padded."""
    random = np.random.default_rng(seed + length)
    ids = random.integers(5, 53, (3, length))
    out = {"ids": ids.astype(np.int32)}
    if padded:
        mask = np.arange(length) < np.array([[length], [length - 3], [2]])
        out |= {"ids": np.where(mask, ids, pad).astype(np.int32), "padding_mask": mask}
    if types:
        out["token_types"] = random.integers(0, 2, (3, length)).astype(np.int32)
    return out


def embedded(inputs, width, seed=1):
    """The same call with embeddings instead of ids."""
    shape = (*inputs["ids"].shape, width)
    vectors = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return {k: v for k, v in inputs.items() if k != "ids"} | {"embeddings": vectors}


THEIRS = {
    "ids": "input_ids", "padding_mask": "attention_mask", "token_types": "token_type_ids",
    "embeddings": "inputs_embeds", "context": "encoder_hidden_states",
    "context_padding_mask": "encoder_attention_mask", "positions": "position_ids",
}  # fmt: skip


def call(model, inputs, train=False):
    """What the library returns, in our words."""
    model.train(train)
    theirs = {THEIRS[k]: torch.tensor(v).long() if v.dtype == bool or v.dtype == np.int32 else torch.tensor(v)
              for k, v in inputs.items()}  # fmt: skip
    with torch.no_grad():
        found = model(**theirs, output_hidden_states=True, return_dict=True)
    out = {"hidden_states": torch.stack(found.hidden_states), "tokens": found.hidden_states[-1]}
    if getattr(found, "pooler_output", None) is not None:
        out["pooled"] = found.pooler_output
    elif getattr(getattr(model, "bert", None), "pooler", None) is not None:
        with torch.no_grad():
            out["pooled"] = model.bert.pooler(found.hidden_states[-1])
    for theirs_name, ours in (("logits", "logits"), ("prediction_logits", "logits"),
                              ("seq_relationship_logits", "next_sentence")):  # fmt: skip
        if getattr(found, theirs_name, None) is not None:
            out[ours] = getattr(found, theirs_name)
    return out


def config_of(model, **changes):
    """config.json as the library writes it."""
    found = model.config.to_diff_dict() | {"architectures": [type(model).__name__]} | changes
    return {k: v for k, v in found.items() if k not in ("transformers_version", "dtype")}


def make(name, model, runs, state=None, config=None, finish=lambda out, inputs: out):
    """Runs a model and keeps the case."""
    inputs, outputs = {}, {}
    for run, arguments in runs.items():
        inputs |= {f"{run}.{k}": v for k, v in arguments.items()}
        found = finish(call(model, arguments, run.startswith("train")), arguments)
        outputs |= {f"{run}.{k}": v for k, v in found.items()}
    save_case(name, state or model.state_dict(), config or config_of(model), inputs, outputs,
              CALL.format(type(model).__name__), "transformers")  # fmt: skip


def new(kind, config, seed, **options):
    """A model with every weight away from 0 and 1."""
    torch.manual_seed(seed)
    config._attn_implementation = "eager"
    return seeded(kind(config, **options), seed, 0.7).eval()


def bert(kind, seed, base=SHALLOW, model_options=None, **changes):
    """A small BERT."""
    return new(kind, hf.BertConfig(**{**base, **changes}), seed, **(model_options or {}))


def roberta(kind, seed, **changes):
    """A small RoBERTa."""
    return new(kind, hf.RobertaConfig(**{**ROBERTA, **changes}), seed)


def distil(kind, seed, **changes):
    """A small DistilBERT."""
    return new(kind, hf.DistilBertConfig(**{**DISTIL, **changes}), seed)


RUNS = {
    "full": texts(7, padded=False, types=False),
    "padded": texts(11),
    "embedded": embedded(texts(9), 24),
    "train": texts(6),
}


def scores(out, inputs):
    """One label: a score."""
    return {**{k: v for k, v in out.items() if k != "logits"}, "scores": out["logits"][:, 0]}


def bert_cases():
    """BERT in all its forms."""
    make("bert_model", bert(hf.BertModel, 0, SMALL, **QUIET), RUNS)
    square = bert(hf.BertModel, 1, SQUARE, {"add_pooling_layer": False}, hidden_act="gelu_new", layer_norm_eps=1e-3)
    make("bert_square", square, {k: RUNS[k] for k in ("full", "padded")})
    make(
        "bert_mlm", bert(hf.BertForMaskedLM, 2, hidden_act="relu"), {k: RUNS[k] for k in ("full", "padded", "embedded")}
    )
    untied = bert(hf.BertForMaskedLM, 3, tie_word_embeddings=False)
    # the library adds the decoder's; older versions made one of the two
    untied.cls.predictions.bias.data = untied.cls.predictions.decoder.bias.data.clone()
    make("bert_mlm_untied", untied, {"padded": RUNS["padded"]})
    old = bert(hf.BertForPreTraining, 4)
    state = {k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v.clone()
             for k, v in old.state_dict().items()}  # fmt: skip
    state["bert.embeddings.position_ids"] = torch.arange(19)[None]
    make("bert_pretraining", old, {"padded": RUNS["padded"]}, state)
    make("bert_classifier", bert(hf.BertForSequenceClassification, 5, num_labels=5, **QUIET),
         {k: RUNS[k] for k in ("padded", "train")})  # fmt: skip
    make(
        "bert_cross", bert(hf.BertForSequenceClassification, 6, num_labels=1), {"padded": RUNS["padded"]}, finish=scores
    )
    context = {"context": np.random.default_rng(2).standard_normal((3, 5, 24)).astype(np.float32)}
    mask = {"context_padding_mask": np.arange(5) < np.array([[5], [2], [4]])}
    runs = {"alone": RUNS["full"], "context": {**RUNS["padded"], **context, **mask},
            "unmasked": {**RUNS["full"], **context}}  # fmt: skip
    make("bert_decoder", bert(hf.BertLMHeadModel, 7, is_decoder=True, add_cross_attention=True, use_cache=False), runs)
    sentence_cases()


def sentence_cases():
    """Heads that the library lacks: ColBERT's and the dual encoder's, from their definitions."""
    for name, own in {
        "bert_colbert": None,
        "bert_dual": {"head": "dual", "pooling": "mean", "normalise": True},
        "bert_dual_cls": {"head": "dual", "pooling": "cls", "normalise": False},
    }.items():
        model = bert(hf.BertModel, len(name))
        torch.manual_seed(9)
        linear = torch.nn.Linear(24, 8, bias=own is not None)
        has_map = name != "bert_dual_cls"

        def finish(out, inputs, own=own, linear=linear, has_map=has_map):
            real = torch.tensor(inputs.get("padding_mask", np.ones(out["tokens"].shape[:2], bool)))[..., None].float()
            with torch.no_grad():
                if own is None:
                    vectors = torch.nn.functional.normalize(linear(out["tokens"]) * real, dim=-1)
                    return {**out, "vectors": vectors}
                x = (out["tokens"] * real).sum(1) / real.sum(1) if own["pooling"] == "mean" else out["tokens"][:, 0]
                x = linear(x) if has_map else x
                return {**out, "embedding": torch.nn.functional.normalize(x, dim=-1) if own["normalise"] else x}

        # as the authors' own class does; an encoder alone has no prefix
        state = {f"bert.{k}" if has_map else k: v for k, v in model.state_dict().items()}
        state |= {f"linear.{k}": v for k, v in linear.state_dict().items()} if has_map else {}
        config = config_of(model, **({"zoo": own} if own else {"architectures": ["HF_ColBERT"]}))
        make(name, model, {k: RUNS[k] for k in ("full", "padded")}, state, config, finish)


def roberta_cases():
    """RoBERTa: positions from the ids, or in a row when there are only embeddings."""
    plain = {"full": texts(7, 1, padded=False, types=False), "padded": texts(11, 1, types=False)}
    # padding in front and in the middle too: the numbers go on where the text does
    holes = texts(9, 1, types=False)
    holes["ids"][0, :2], holes["ids"][1, 3] = 1, 1
    holes["padding_mask"] = holes["ids"] != 1
    plain |= {"holes": holes, "embedded": embedded(plain["padded"], 24), "train": texts(6, 1, types=False)}
    make("roberta_model", roberta(hf.RobertaModel, 10, **QUIET), plain)
    short = {k: plain[k] for k in ("padded", "holes")}
    make("roberta_mlm", roberta(hf.RobertaForMaskedLM, 11, hidden_act="gelu_new", type_vocab_size=2), short)
    make("roberta_classifier", roberta(hf.RobertaForSequenceClassification, 12, num_labels=5, **QUIET),
         {k: plain[k] for k in ("padded", "train")})  # fmt: skip
    make("roberta_cross", roberta(hf.RobertaForSequenceClassification, 13, num_labels=1, intermediate_size=24),
         {"padded": plain["padded"]}, finish=scores)  # fmt: skip
    make("roberta_decoder", roberta(hf.RobertaForCausalLM, 14, is_decoder=True, pad_token_id=3, use_cache=False),
         {"padded": texts(8, 3, types=False)})  # fmt: skip


def distilbert_cases():
    """DistilBERT."""
    plain = {"full": texts(7, padded=False, types=False), "padded": texts(11, types=False)}
    plain |= {"embedded": embedded(plain["padded"], 24), "train": texts(6, types=False)}
    quiet = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    make("distilbert_model", distil(hf.DistilBertModel, 20, **quiet), plain)
    make("distilbert_square", distil(hf.DistilBertModel, 21, hidden_dim=24, n_layers=2, activation="relu"),
         {"padded": plain["padded"]})  # fmt: skip
    make("distilbert_mlm", distil(hf.DistilBertForMaskedLM, 22, activation="gelu_new"), {"padded": plain["padded"]})
    make("distilbert_classifier", distil(hf.DistilBertForSequenceClassification, 23, num_labels=5, **quiet),
         {k: plain[k] for k in ("padded", "train")})  # fmt: skip
    make("distilbert_cross", distil(hf.DistilBertForSequenceClassification, 24, num_labels=1, activation="relu"),
         {"padded": plain["padded"]}, finish=scores)  # fmt: skip


LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
MINI = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
ROBERTA_BASE = {"max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
POSITIONS = {"bert.embeddings.position_ids": [1, 512]}
HUB = "parameter count that the hub shows for the file's float weights"


def key_lists():
    """Full-size shapes, from the library on the meta device, as the hub's files hold them."""

    def keep(name, layout, kind, config, total, source, drop=(), extra=None, rename=lambda k: k):
        with torch.device("meta"):
            model = kind(config)
        counted = sum(p.numel() for p in model.parameters())
        shapes = {rename(k): list(v.shape) for k, v in model.state_dict().items()}
        assert counted == total, (name, counted, total)
        save_keys(name, layout, shapes, config_of(model), total, source, drop, extra)

    tf = lambda k: k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")  # noqa: E731
    tied = ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    keep("bert-base-uncased", "hub-bert", hf.BertModel, hf.BertConfig(), 109_482_240,
         "BertModel.num_parameters(), as quoted in the library's model pages (110M)")  # fmt: skip
    keep("bert-base-uncased-pretraining", "hub-bert", hf.BertForPreTraining, hf.BertConfig(), 110_106_428,
         f"{HUB}, which still says gamma and beta", tied, rename=tf)  # fmt: skip
    keep("bert-large-uncased", "hub-bert", hf.BertModel, hf.BertConfig(**LARGE), 335_141_888,
         "BertModel.num_parameters() (340M in Devlin et al., 2019, heads included)")  # fmt: skip
    keep("bert-large-uncased-pretraining", "hub-bert", hf.BertForPreTraining, hf.BertConfig(**LARGE), 336_226_108,
         HUB, tied, rename=tf)  # fmt: skip
    keep("all-MiniLM-L6-v2", "hub-bert", hf.BertModel, hf.BertConfig(**MINI), 22_713_216,
         "22,713,728 on the hub, of which 512 are position ids",
         extra={"embeddings.position_ids": [1, 512]})  # fmt: skip
    keep("ms-marco-MiniLM-L6-v2", "hub-bert", hf.BertForSequenceClassification, hf.BertConfig(**MINI, num_labels=1),
         22_713_601, HUB, extra=POSITIONS)  # fmt: skip
    keep("roberta-base", "hub-roberta", hf.RobertaModel, hf.RobertaConfig(**ROBERTA_BASE), 124_645_632,
         "RobertaModel.num_parameters() (125M in Liu et al., 2019)")  # fmt: skip
    keep("roberta-base-mlm", "hub-roberta", hf.RobertaForMaskedLM, hf.RobertaConfig(**ROBERTA_BASE), 124_697_433,
         "124,697,947 on the hub, of which 514 are position ids", ("lm_head.decoder.weight", "lm_head.decoder.bias"),
         {"roberta.embeddings.position_ids": [1, 514]})  # fmt: skip
    keep("roberta-large", "hub-roberta", hf.RobertaModel, hf.RobertaConfig(**LARGE, **ROBERTA_BASE), 355_359_744,
         "RobertaModel.num_parameters() (355M in Liu et al., 2019)")  # fmt: skip
    keep("distilbert-base-uncased", "hub-distilbert", hf.DistilBertModel, hf.DistilBertConfig(), 66_362_880,
         "DistilBertModel.num_parameters() (66M in Sanh et al., 2019)")  # fmt: skip
    keep("distilbert-base-uncased-mlm", "hub-distilbert", hf.DistilBertForMaskedLM, hf.DistilBertConfig(), 66_985_530,
         HUB, ("vocab_projector.weight",))  # fmt: skip
    with torch.device("meta"):
        model = hf.BertModel(hf.BertConfig())
    shapes = {f"bert.{k}": list(v.shape) for k, v in model.state_dict().items()} | {"linear.weight": [128, 768]}
    config = config_of(model, architectures=["HF_ColBERT"])
    save_keys("colbertv2.0", "hub-bert", shapes, config, 109_580_544,
              "bert-base-uncased and a map to 128 numbers (Santhanam et al., 2022)", extra=POSITIONS)  # fmt: skip


if __name__ == "__main__":
    bert_cases()
    roberta_cases()
    distilbert_cases()
    key_lists()
