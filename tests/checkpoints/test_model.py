"""Exported models: round trips without the recipe, what is trusted, and what goes wrong in one line."""

import dataclasses
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import checkpoints
from checkpoints import DamagedError, ModelError, StoreError, load_model, save_model
from checkpoints.definition import decode, encode

SOURCE = """
from __future__ import annotations
import dataclasses
from collections.abc import Callable
from typing import Any
import flax.linen as nn
import jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Block:
    width: int
    scale: float = 1.0
    act: str = "relu"

@dataclasses.dataclass(frozen=True)
class Config:
    blocks: tuple[Block, ...]
    names: dict | None = None
    sizes: list = dataclasses.field(default_factory=list)
    total: int = dataclasses.field(init=False, default=0)

class Net(nn.Module):
    config: Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.dtype("float32")
    kernel_init: Callable = nn.initializers.lecun_normal()
    head: nn.Module | None = None

    @nn.compact
    def __call__(self, x):
        for block in self.config.blocks:
            dense = nn.Dense(block.width, dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init)
            x = getattr(nn, block.act)(dense(x)) * block.scale
        return self.head(x) if self.head is not None else x

class Head(nn.Module):
    width: int = 2

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)
"""


@pytest.fixture
def toy(monkeypatch):
    """A module inside the package zoo that exists for these tests only."""
    module = types.ModuleType("zoo.nn.toy_for_tests")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(SOURCE, "toy_for_tests", "exec"), module.__dict__)
    return module


def make(toy):
    config = toy.Config((toy.Block(4), toy.Block(3, 0.5, "gelu")), {"a": (1, None), "b": [True, "x"]}, [1.5])
    net = toy.Net(config, dtype=jnp.bfloat16, head=toy.Head(5))
    x = jnp.arange(6.0).reshape(2, 3)
    return net, net.init(jax.random.key(0), x), x


def test_a_linen_module_with_nested_configuration_comes_back(tmp_path, toy):
    net, variables, x = make(toy)
    variables = {**variables, "constants": {"anchors": jnp.ones((2, 2))}, "memory": {}}
    save_model(tmp_path / "model", net, variables, {"name": "toy"}, {"recipe": {"lr": 1e-3}, "claim": None})
    model = load_model(tmp_path / "model")
    assert model.definition == net and model.definition.config == net.config
    assert isinstance(model.definition.config.blocks, tuple) and model.definition.head.width == 5
    assert model.definition.dtype is jnp.bfloat16 and isinstance(model.definition.param_dtype, np.dtype)
    assert jax.tree.structure(model.variables) == jax.tree.structure(variables)
    for a, b in zip(jax.tree.leaves(model.variables), jax.tree.leaves(variables), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(model.apply(x), net.apply(variables, x))
    assert model.card == {"name": "toy"} and model.info["recipe"] == {"lr": 1e-3}
    assert model.info["versions"]["jax"] == jax.__version__
    assert len(model.info["constants_fingerprint"]) == 16 and "git_revision" in model.info


def test_the_constants_fingerprint_follows_their_contents(tmp_path, toy):
    prints = []
    for value in (1.0, 1.0, 2.0):
        variables = {"params": {"w": jnp.ones(2)}, "constants": {"a": jnp.full(3, value)}}
        save_model(tmp_path / "m", toy.Head(), variables, {}, {})
        prints.append(load_model(tmp_path / "m").info["constants_fingerprint"])
    assert prints[0] == prints[1] != prints[2]


def test_it_loads_in_a_process_that_never_saw_the_definition(tmp_path):
    save_model(tmp_path / "m", configuration(), {"params": {"w": jnp.arange(3.0)}}, {}, {})
    code = (
        "import sys; from checkpoints import load_model\n"
        "m = load_model(sys.argv[1])\n"
        "print(type(m.definition).__name__, m.definition.effect, m.variables['params']['w'].sum())"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "m"], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["Claim", "0.1", "3.0"], done.stderr


def configuration():
    # any dataclass of the package will do
    from zoo.catalogue import Claim

    return Claim("s", "m", 0.1, "a", "b", "c")


def test_a_configuration_without_apply(tmp_path):
    save_model(tmp_path / "m", configuration(), {"codes": jnp.zeros((4, 2), jnp.uint8)}, {}, {})
    model = load_model(tmp_path / "m")
    assert model.variables["codes"].dtype == jnp.uint8 and model.definition.effect == 0.1
    with pytest.raises(ModelError, match="Claim is a configuration without apply"):
        model.apply(1)


def test_replacing_a_model_leaves_one(tmp_path, toy):
    for value in (1.0, 2.0):
        save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.full(3, value)}}, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    np.testing.assert_array_equal(load_model(tmp_path / "m").variables["params"]["w"], 2.0)


def test_a_failed_write_keeps_the_old_model(tmp_path, toy, monkeypatch):
    save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.ones(3)}}, {}, {})

    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints.model_folder.write_text", full)
    with pytest.raises(StoreError, match="cannot write the model to .*No space left"):
        save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.zeros(3)}}, {}, {})
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "zoo.nn.toy_for_tests", toy)
    np.testing.assert_array_equal(load_model(tmp_path / "m").variables["params"]["w"], 1.0)
    save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.zeros(3)}}, {}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_what_is_not_a_model_is_not_overwritten(tmp_path, toy):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not a model"):
        save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.ones(3)}}, {}, {})
    assert (tmp_path / "m" / "thesis.txt").read_text() == "mine"
    with pytest.raises(ModelError, match="holds no model.json"):
        load_model(tmp_path / "m")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "nowhere")


def test_damage_is_noticed(tmp_path, toy):
    save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.ones(300)}}, {}, {})
    document = tmp_path / "m" / "model.json"
    text = document.read_text()
    crc = str(json.loads(text)["leaves"]["params/w"]["crc32"])
    document.write_text(text.replace(crc, str(int(crc) ^ 1)))
    with pytest.raises(DamagedError, match="checksum of params/w"):
        load_model(tmp_path / "m")
    document.write_text(text[:-30])
    with pytest.raises(DamagedError, match="unreadable"):
        load_model(tmp_path / "m")
    document.write_text(text.replace('"format": 1', '"format": 9'))
    with pytest.raises(ModelError, match="format 9"):
        load_model(tmp_path / "m")
    document.write_text(text)
    file = next((tmp_path / "m" / "weights" / "d").iterdir())
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DamagedError, match="bytes, but"):
        load_model(tmp_path / "m")


@dataclasses.dataclass(frozen=True)
class Outside:
    width: int = 3
    extra: Any = None


def test_only_classes_of_the_zoo_are_made_unless_another_package_is_trusted(tmp_path, toy):
    save_model(tmp_path / "m", Outside(7), {"params": {"w": jnp.ones(3)}}, {}, {})
    package = Outside.__module__.split(".")[0]
    with pytest.raises(ModelError, match=f"outside zoo; load it with trust='{package}'"):
        load_model(tmp_path / "m")
    assert load_model(tmp_path / "m", trust=package).definition == Outside(7)
    # neither a callable of a trusted module, nor what a trusted module has imported
    toy.Outside = Outside
    for path in ("zoo.catalogue:card", "zoo.catalogue:ast.parse", "zoo.catalogue:Any", "zoo.nn.toy_for_tests:Outside"):
        with pytest.raises(ModelError, match="not a dataclass of zoo"):
            decode({"class": path, "fields": {}})
    for path in ("zoological:X", "os:system"):
        with pytest.raises(ModelError, match="outside zoo"):
            decode({"class": path, "fields": {}})


def test_pieces_that_are_unknown_or_missing_are_named(toy):
    data = encode(toy.Block(4))
    with pytest.raises(ModelError, match="has no field 'widht' .* width"):
        decode({**data, "fields": {"widht": 4}})
    with pytest.raises(ModelError, match="needs a field 'width'"):
        decode({**data, "fields": {}})
    with pytest.raises(ModelError, match="does not define Blok; did you mean Block"):
        decode({**data, "class": "zoo.nn.toy_for_tests:Blok"})
    with pytest.raises(ModelError, match="zoo.nn.gone cannot be imported"):
        decode({**data, "class": "zoo.nn.gone:Block"})
    with pytest.raises(ModelError, match="unknown piece 'set'"):
        decode({**data, "fields": {"width": {"set": []}}})
    with pytest.raises(ModelError, match="no number type 'system'"):
        decode({**data, "fields": {"width": {"scalar": "system"}}})


def test_definitions_that_cannot_be_written(tmp_path, toy):
    @dataclasses.dataclass(frozen=True)
    class Local:
        x: int = 1

    with pytest.raises(ModelError, match="cannot be imported again"):
        encode(Local())
    with pytest.raises(ModelError, match=r"Outside.extra\[1\]: a function cannot be rebuilt"):
        encode(Outside(extra=(1, lambda: 0)))
    with pytest.raises(ModelError, match="Outside.extra: a ndarray"):
        encode(Outside(extra=np.ones(3)))
    with pytest.raises(ModelError, match="keys of a dict must be strings"):
        encode(Outside(extra={1: 2}))
    with pytest.raises(ModelError, match="a definition is a dataclass or a Linen module, got a dict"):
        encode({})
    with pytest.raises(ModelError, match="params/w: variables must be nested dicts of arrays, got a tuple"):
        save_model(tmp_path / "m", toy.Head(), {"params": {"w": (1, 2)}}, {}, {})
    with pytest.raises(ModelError, match="card and info must be JSON"):
        save_model(tmp_path / "m", toy.Head(), {"params": {"w": jnp.ones(1)}}, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [0, -1.5, float("inf"), "s", True, None, (), ((1,), [2]), {"a": {"b": (1,)}},
                                   np.float32, jnp.int8, np.dtype("int32"), jnp.dtype("bfloat16")])  # fmt: skip
def test_values_come_back_equal(value):
    out = decode(json.loads(json.dumps(encode(Outside(extra=value)))), (Outside.__module__,)).extra
    assert out == value and (isinstance(value, type) or type(out) is type(value))


def test_a_module_as_definition_keeps_neither_name_nor_parent(toy):
    data = encode(toy.Head(3, name="head"))
    assert list(data["fields"]) == ["width"]
    assert decode(data) == toy.Head(3)
    assert issubclass(toy.Head, nn.Module)


def test_public_names():
    assert checkpoints.load_model is load_model and all(hasattr(checkpoints, n) for n in checkpoints.__all__)
