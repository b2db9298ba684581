"""What Mamba exports loads in transformers, and gives the same outputs there.  Needs torch and transformers."""

import golden_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoints.importers import engine
from zoo.nn.mamba import Mamba, MambaConfig
from zoo.nn.partitioning import unbox

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FRESH = {
    "tied": MambaConfig(vocab_size=40, hidden_size=12, num_layers=2, state_size=5),
    "untied": MambaConfig(
        vocab_size=40, hidden_size=12, num_layers=2, inner_size=36, step_rank=4, conv_size=3, use_bias=True,
        conv_bias=False, head="untied", norm_epsilon=1e-3,
    ),
    "bare": MambaConfig(vocab_size=40, hidden_size=12, num_layers=2, head="none"),
}  # fmt: skip


def compare(module, variables):
    layout = engine.layouts()["hub-mamba"]
    config = layout.to_config(module)
    tensors = engine.export_tensors("hub-mamba", module, variables)
    model = getattr(transformers, config["architectures"][0])(transformers.AutoConfig.for_model(**config))
    found = model.load_state_dict({k: torch.tensor(np.asarray(v)) for k, v in tensors.items()}, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if module.config.head == "tied" else set())
    model.tie_weights()
    ids = np.random.default_rng(0).integers(0, module.config.vocab_size, (2, 9))
    mask = np.arange(9) >= np.array([[0], [4]])
    ours = module.apply(variables, jnp.asarray(ids), jnp.asarray(mask))
    with torch.no_grad():
        theirs = model.eval()(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    if module.config.head == "none":
        golden_cases.close(ours.last_hidden_state, theirs.last_hidden_state.numpy())
    else:
        golden_cases.close(ours.logits, theirs.logits.numpy())


@pytest.mark.parametrize("name", FRESH)
def test_a_module_of_ours_runs_in_transformers(name):
    module = Mamba(FRESH[name])
    variables = unbox(module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.2 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    compare(module, jax.tree.unflatten(tree, moved))


@pytest.mark.parametrize("name", ["mamba_tied", "mamba_biased_untied", "mamba_square", "mamba_original"])
def test_an_import_with_other_weights_runs_in_transformers(name):
    case = golden_cases.load(name)
    compare(case.module, jax.tree.map(lambda x: x + 0.1, case.variables))
