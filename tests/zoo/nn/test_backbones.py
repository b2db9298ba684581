"""What every backbone has in common: a frozen configuration, number types, remat, and names on its axes."""

import dataclasses

import golden_cases
import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from jax.sharding import AxisType

from checkpoints.definition import decode, encode
from zoo.nn.partitioning import abstract_variables, axis_names, shardings, unbox

ONE_OF_EACH = {
    "ResNet": "resnet_torchvision_basic", "ViT": "vit_timm", "CLIP": "clip_openai_vit", "CLIP (RN50)": "clip_openai_rn",
    "BERT": "bert_mlm", "RoBERTa": "roberta_mlm", "DistilBERT": "distilbert_mlm", "T5": "t5_v1_1",
    "DecoderLM (GPT-2)": "gpt2_hub", "DecoderLM (LLaMA)": "llama_grouped", "DecoderLM (OPT)": "opt_pre",
    "SingleStreamVLM": "vilt_mlm", "Mamba": "mamba_tied", "UNet2D": "adm_new", "UNet2DCondition": "sd_linear",
    "AutoencoderKL": "vae_new", "SongUNet": "song_ncsnpp",
}  # fmt: skip


@pytest.fixture(params=ONE_OF_EACH)
def module(request):
    prefix = ONE_OF_EACH[request.param]
    names = [n for n in golden_cases.names() if n.startswith(prefix.split("_")[0])]
    return golden_cases.load(prefix if prefix in names else names[0]).module


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_it_is_a_frozen_configuration_and_number_types(module):
    assert dataclasses.is_dataclass(module.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(module.config, dataclasses.fields(module.config)[0].name, None)
    hash(module.config)
    fields = {f.name for f in dataclasses.fields(module)}
    assert {"config", "dtype", "param_dtype", "remat"} <= fields
    assert decode(encode(module)) == module


def test_every_matrix_names_its_axes_and_takes_the_parameters_type(module):
    abstract = abstract_variables(module.clone(param_dtype=jnp.bfloat16))
    names = axis_names(abstract)
    # vectors that are stacked over layers are no matrices
    wide = lambda p, x: x.ndim - ("layers" in p.split("/")) > 1  # noqa: E731
    matrices = {p: x for p, x in flat(unbox(abstract)).items() if p.startswith("params/") and wide(p, x)}
    assert matrices
    for path, x in matrices.items():
        assert path in names and len(names[path]) == x.ndim, path
        assert x.dtype == jnp.bfloat16, path
    assert any(any(n) for p, n in names.items())


def test_most_of_it_is_spread_over_a_mesh_of_fsdp_and_tensor(module):
    abstract = abstract_variables(module)
    mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])
    where = shardings(abstract, mesh)
    sizes = {p: x.size for p, x in flat(unbox(abstract)).items()}
    spread = sum(n for p, n in sizes.items() if any(where[p].spec))
    assert spread > 0.5 * sum(sizes.values())


def test_remat_changes_no_parameter(module):
    plain, again = abstract_variables(module), abstract_variables(module.clone(remat=True))
    assert {p: (x.shape, x.dtype) for p, x in flat(unbox(plain)).items()} == {
        p: (x.shape, x.dtype) for p, x in flat(unbox(again)).items()
    }
    assert axis_names(plain) == axis_names(again)
