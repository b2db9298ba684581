"""Real checkpoints by name and shape: nothing missing, nothing unused, and as many parameters as were published."""

import gzip
import json
from pathlib import Path

import golden_cases
import jax
import numpy as np
import pytest

from checkpoints.importers.engine import abstract_shapes, export_tensors, identify, plan
from checkpoints.importers.recognition import layouts

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "keys"
LISTS = sorted(p.name.removesuffix(".json.gz") for p in FOLDER.glob("*.json.gz"))


def read(name):
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


@pytest.mark.parametrize("name", LISTS)
def test_every_weight_of_the_published_checkpoint_has_its_place(name):
    found = read(name)
    kind = lambda key: np.int64 if key.endswith(("num_batches_tracked", "position_ids")) else np.float32  # noqa: E731
    tensors = {k: jax.ShapeDtypeStruct(tuple(s), kind(k)) for k, s in found["keys"].items()}
    layout, _, names = identify(found["config"], tensors, None)
    assert layout.name == found["layout"]  # recognised, not told
    shapes = {short: tensors[full] for short, full in names.items()}
    module = layout.configure(found["config"], abstract_shapes(shapes))
    result = plan(layout, module, shapes)  # by jax.eval_shape: nothing is allocated
    assert (result.missing, result.unused, result.mismatched) == ((), (), ())
    total = sum(int(np.prod(x.shape)) for path, x in result.abstract.items() if path.startswith("params/"))
    assert total == found["total"], (total, found["total"], found["source"])


@pytest.mark.parametrize("layout", list(layouts()))
def test_every_layout_has_a_golden_case_and_a_full_key_list(layout):
    assert any(read(n)["layout"] == layout for n in LISTS), f"no key list for {layout}"
    assert any(golden_cases.load(n).imported.layout.name == layout for n in golden_cases.names()), layout


@pytest.mark.parametrize("name", golden_cases.names())
def test_golden_weights_go_in_and_out_byte_for_byte(name):
    case = golden_cases.load(name)
    assert not case.imported.report.missing and not case.imported.report.unused
    back = export_tensors(case.imported)
    assert list(back) == list(case.tensors)
    for key, x in case.tensors.items():
        assert back[key].dtype == x.dtype and back[key].shape == x.shape and back[key].tobytes() == x.tobytes(), key


@pytest.mark.parametrize("name", golden_cases.names())
def test_a_model_written_anew_reads_as_the_same_model(name):
    from checkpoints.importers.engine import import_tensors

    case = golden_cases.load(name)
    layout = case.imported.layout
    fresh = export_tensors(layout.name, case.module, case.variables)
    again = import_tensors(fresh, layout.to_config(case.module))
    assert again.layout.name == layout.name
    assert again.module == case.module
    jax.tree.map(np.testing.assert_array_equal, dict(again.variables), dict(case.variables))


@pytest.mark.parametrize("name", golden_cases.names("song_"))
def test_buffers_of_a_new_file_are_those_of_the_library(name):
    imported = golden_cases.load(name).imported
    made = imported.layout.new_buffers(imported.module, [])
    assert made.keys() == imported.buffers.keys()
    for key, x in imported.buffers.items():
        np.testing.assert_array_equal(made[key], x)
        assert made[key].dtype == x.dtype


@pytest.mark.parametrize("name", ["resnet_torchvision_basic", "resnet_mammoth", "resnet_pycil", "clip_openai_rn"])
def test_a_new_file_has_the_counters_of_batch_norms(name):
    case = golden_cases.load(name)
    fresh = export_tensors(case.imported.layout.name, case.module, case.variables)
    counters = [n for n in fresh if n.endswith("num_batches_tracked")]
    assert len(counters) == len([n for n in case.tensors if n.endswith("num_batches_tracked")]) > 4
    for key in counters:
        assert fresh[key].shape == () and fresh[key].dtype == np.int64 and fresh[key] == 0
