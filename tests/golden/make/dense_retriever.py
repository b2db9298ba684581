"""Golden cases and key lists of dense retrievers over RoBERTa: ANCE, STAR and ADORE (transformers' encoder).

The class is written here from its definition: the encoder's first token, ``embeddingHead``, ``norm``.
"""

import torch
import transformers as hf
from bert import QUIET, ROBERTA, ROBERTA_BASE, config_of, new, texts
from common import save_case, save_keys

torch.set_num_threads(1)
CALL = (
    "norm(embeddingHead(RobertaModel(ids, ids != pad)[:, 0])) with every weight perturbed, eager attention; "
    "train.*: .train() with dropout 0, others .eval()"
)


class RobertaDot(torch.nn.Module):
    """RoBERTa, a map of its first token, a layer norm, under the published names.

    ``size`` is of the vector where no config says it, as in pyserini's class; ``beside``: more modules, by name.
    """

    def __init__(self, config, pooler=False, size=None, beside=None):
        super().__init__()
        self.config = config
        size = getattr(config, "output_embedding_size", None) or size or config.hidden_size
        self.roberta = hf.RobertaModel(config, add_pooling_layer=pooler)
        self.embeddingHead = torch.nn.Linear(config.hidden_size, size)
        self.norm = torch.nn.LayerNorm(size)
        for name, module in (beside or {}).items():
            self.add_module(name, module)

    def forward(self, ids):
        """The vectors of texts."""
        tokens = self.roberta(input_ids=ids, attention_mask=(ids != self.config.pad_token_id).long())[0]
        return self.norm(self.embeddingHead(tokens[:, 0]))


def old_heads(width, words, labels=2):
    """What files of models that began as others still hold: a classifier's and a language model's head."""
    linear, norm = torch.nn.Linear, torch.nn.LayerNorm
    return {
        "classifier": torch.nn.ModuleDict({"dense": linear(width, width), "out_proj": linear(width, labels)}),
        "lm_head": torch.nn.ModuleDict(
            {"dense": linear(width, width), "layer_norm": norm(width), "decoder": linear(width, words)}
        ),
    }


def make(name, seed, runs, changes=None, state=None, architecture="RobertaDot", **options):
    """Runs a small retriever and keeps the case."""
    config = hf.RobertaConfig(**{**ROBERTA, **(changes or {})})
    model = new(lambda c, **o: RobertaDot(c, **o), config, seed, **options)
    inputs, outputs = {}, {}
    for run in runs:
        ids = RUNS[run]
        model.train(run == "train")
        with torch.no_grad():
            outputs[f"{run}.vector"] = model(torch.tensor(ids).long())
        inputs[f"{run}.ids"] = ids
    save_case(name, {**model.state_dict(), **(state or {})}, config_of(model, architectures=[architecture]), inputs,
              outputs, CALL, "transformers")  # fmt: skip


def ids_of(length, padded=True):
    """Ids of 3 texts, of which two are padded with 1."""
    return texts(length, 1, padded=padded, types=False)["ids"]


HOLES = ids_of(9)
HOLES[1, 3] = 1
RUNS = {"full": ids_of(7, False), "padded": ids_of(11), "holes": HOLES, "train": ids_of(6)}


def cases():
    """As STAR and ADORE are released, all square, and as ANCE is."""
    make("dense_retriever_star", 30, RUNS, {**QUIET, "output_embedding_size": 20})
    make("dense_retriever_square", 31, ("full", "padded"), {"intermediate_size": 24, "num_attention_heads": 4})
    positions = {"roberta.embeddings.position_ids": torch.arange(19)[None]}
    make("dense_retriever_ance", 32, ("full", "padded"), {"layer_norm_eps": 1e-3, "hidden_act": "gelu_new"}, positions,
         "AnceEncoder", pooler=True, size=16, beside=old_heads(24, 53))  # fmt: skip


def key_lists():
    """Full-size shapes, from the class on the meta device."""
    position_ids = {"roberta.embeddings.position_ids": [1, 514]}

    def keep(name, total, source, architecture="RobertaDot", extra=None, pooler=False):
        with torch.device("meta"):
            model = RobertaDot(hf.RobertaConfig(**ROBERTA_BASE), pooler)
        counted = sum(p.numel() for p in model.parameters())
        assert counted == total, (name, counted, total)
        shapes = {k: list(v.shape) for k, v in model.state_dict().items()}
        config = config_of(model, architectures=[architecture])
        save_keys(name, "hub-dense-retriever", shapes, config, total, source, (), extra)

    width = 768
    head = width * width + width + 2 * width
    counted = "counted by the class of the definition (RoBERTa-base {} a pooler, a map and a norm of 768)"
    keep("drhard-star", 124_055_040 + head, counted.format("without"), extra=position_ids)
    keep("ance-msmarco-passage", 124_645_632 + head, counted.format("with"), "AnceEncoder", position_ids, True)
    heads = {f"classifier.{k}": list(v.shape) for k, v in old_heads(width, 1)["classifier"].state_dict().items()}
    keep("ance-firstp", 124_645_632 + head, counted.format("with") + "; a classifier that is not used lies beside it",
         "RobertaDot_NLL_LN", heads, True)  # fmt: skip


if __name__ == "__main__":
    cases()
    key_lists()
