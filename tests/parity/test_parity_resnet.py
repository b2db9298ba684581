"""Exported ResNets load in torchvision and timm, with nothing missing or unexpected, and compute the same."""

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints import load_model, save_model
from checkpoints.importers.engine import export_tensors
from checkpoints.importers.exporting import export_model
from checkpoints.importers.importing import import_model
from zoo.nn.partitioning import unbox
from zoo.nn.resnet import ResNet, ResNetConfig

torch = pytest.importorskip("torch")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
from safetensors.torch import load_file  # noqa: E402

DEEP = ResNetConfig((3, 4, 6, 3), (64, 128, 256, 512), "bottleneck", "deep", 64, average_down=True, classes=7)
FRESH = {
    "resnet18": (ResNetConfig.of_depth(18, classes=7), lambda: torchvision.models.resnet18(num_classes=7)),
    "resnet50": (ResNetConfig.of_depth(50, classes=7), lambda: torchvision.models.resnet50(num_classes=7)),
    "resnet50d": (DEEP, lambda: timm.create_model("resnet50d", num_classes=7)),
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def images(size=64):
    return np.random.default_rng(1).normal(size=(2, size, size, 3)).astype(np.float32)


def fresh(config):
    """A network with random weights and statistics, none of them 0 or 1."""
    variables = unbox(jax.jit(ResNet(config).init)(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))
    rng = np.random.default_rng(0)

    def stirred(x):
        more = rng.uniform(0.0, 0.05, x.shape) if x.ndim == 1 else 0.0
        return jnp.asarray(np.asarray(x) * rng.uniform(0.8, 1.2, x.shape) + more, x.dtype)

    return ResNet(config), jax.tree.map(stirred, variables)


def agree(module, variables, model):
    x = images()
    model.eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    golden_cases.close(jax.jit(module.apply)(variables, x)["logits"], theirs)


def loaded(model, tensors):
    """The reference with these weights: every key, no other."""
    model.load_state_dict({k: torch.as_tensor(np.array(v)) for k, v in tensors.items()}, strict=True)
    return model


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_model_loads_in_the_reference_library(name, tmp_path):
    config, make = FRESH[name]
    module, variables = fresh(config)
    if name == "resnet18":  # through files too
        save_model(tmp_path / "model", module, variables, {"name": name}, {})
        export_model(tmp_path / "model", tmp_path / "back", layout="torchvision-resnet")
        tensors = {k: v.numpy() for k, v in load_file(tmp_path / "back" / "model.safetensors").items()}
    else:
        tensors = export_tensors("torchvision-resnet", module, variables)
    agree(module, variables, loaded(make(), tensors))


@pytest.mark.parametrize("name", FRESH)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_the_reference_library_is_imported_and_comes_back(name, legacy, tmp_path):
    if legacy and name != "resnet18":
        pytest.skip("one of the old format is enough")
    torch.manual_seed(0)
    model = FRESH[name][1]()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point() and value.ndim == 1:
                value += 0.05 * torch.rand_like(value)
    torch.save(model.state_dict(), tmp_path / "model.pth", _use_new_zipfile_serialization=not legacy)
    outcome = import_model(str(tmp_path / "model.pth"), tmp_path / "model")
    assert outcome.layout.name == "torchvision-resnet" and not outcome.report.missing and not outcome.report.unused
    assert outcome.module.config == FRESH[name][0]
    found = load_model(tmp_path / "model")
    agree(found.definition, dict(found.variables), model)
    export_model(tmp_path / "model", tmp_path / "back.safetensors")
    back, own = load_file(tmp_path / "back.safetensors"), model.state_dict()
    assert set(back) == set(own)
    for key, value in own.items():
        assert back[key].dtype == value.dtype and torch.equal(back[key], value), key


@pytest.mark.parametrize("name", ["resnet_torchvision_basic", "resnet_torchvision_bottleneck"])
def test_an_imported_case_comes_back_with_every_name(name):
    case = golden_cases.load(name)
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, value in case.tensors.items():
        np.testing.assert_array_equal(back[key], value)
