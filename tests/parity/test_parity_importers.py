"""torch reads what we write, and we read what torch writes."""

import ml_dtypes
import numpy as np
import pytest
from command import ROOT

from checkpoints.importers.layout import ImporterError
from checkpoints.importers.torch_file import read_index
from checkpoints.importers.writing import write_safetensors

torch = pytest.importorskip("torch")
from safetensors.torch import load_file, save_file  # noqa: E402

TORCH = ROOT / "tests" / "golden" / "torch"
KINDS = (
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_,
    ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.uint16, np.uint32, np.uint64,
)  # fmt: skip


def as_torch(x):
    """The tensor with the bytes of an array, NumPy's own types or not."""
    name = {"bool": "bool"}.get(x.dtype.name, x.dtype.name)
    raw = torch.from_numpy(np.frombuffer(np.ascontiguousarray(x).tobytes() or b"\0", np.uint8).copy())
    kind = getattr(torch, name)
    return raw[: x.nbytes].view(kind).reshape(x.shape) if x.size else torch.zeros(x.shape, dtype=kind)


def same(tensor, array):
    assert tuple(tensor.shape) == array.shape
    assert str(tensor.dtype).removeprefix("torch.") == array.dtype.name
    ours = as_torch(array)
    assert torch.equal(
        tensor.contiguous().reshape(-1).view(torch.uint8), ours.contiguous().reshape(-1).view(torch.uint8)
    )


def test_torch_reads_what_the_writer_writes(tmp_path):
    rng = np.random.default_rng(0)
    weights = {}
    for kind in KINDS:
        name = np.dtype(kind).name
        for shape in ((), (1,), (3, 2), (0, 4), (2, 1, 3)):
            weights[f"{name}.{shape}"] = np.asarray(rng.integers(0, 2, shape) * (1 if name == "bool" else 3)).astype(
                kind
            )
    weights["turned"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write_safetensors(tmp_path / "ours.safetensors", weights, metadata={"format": "pt"})
    found = load_file(tmp_path / "ours.safetensors")
    assert set(found) == set(weights)
    for name, x in weights.items():
        same(found[name], x)
    save_file({n: as_torch(x) for n, x in weights.items()}, tmp_path / "theirs.safetensors", {"format": "pt"})
    assert (tmp_path / "theirs.safetensors").read_bytes() == (tmp_path / "ours.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["plain.pt", "legacy.pt", "nested.pt", "two.pt"])
def test_golden_files_are_read_as_torch_reads_them(name):
    theirs = torch.load(TORCH / name, weights_only=True)
    keys = {"nested.pt": ["state_dict"], "two.pt": ["student", "teacher"]}.get(name, [None])
    for key in keys:
        expected = theirs if key is None else theirs[key]
        refs = read_index(TORCH / name, key)
        assert list(refs) == list(expected)
        for weight, ref in refs.items():
            same(expected[weight], ref.read())


@pytest.mark.parametrize("name", ["class.pt", "namespace.pt", "complex.pt", "list.pt"])
def test_golden_files_that_torch_would_run_or_that_hold_no_dict_are_refused(name):
    with pytest.raises(ImporterError):
        read_index(TORCH / name)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_and_types_that_this_torch_writes(tmp_path, legacy):
    base = torch.arange(24, dtype=torch.float32)
    content = {
        "slice": base[5:17], "stepped": base[1::3], "turned": base.reshape(4, 6).T,
        "block": base.reshape(4, 6)[1:3, 2:5], "spread": base[3].expand(2, 5), "scalar": base[7], "empty": base[:0],
        "parameter": torch.nn.Parameter(base[2:4]),
        "half": base.half()[3:], "bfloat16": base.bfloat16().reshape(2, 3, 4).permute(2, 0, 1), "flags": base > 7,
        "ids": torch.arange(5)[::2], "bytes": torch.arange(7, dtype=torch.uint8),
    }  # fmt: skip
    if not legacy:  # of which torch cannot read its own old files
        content |= {"float8": base.to(torch.float8_e4m3fn)[2:], "float8_wide": base.to(torch.float8_e5m2)}
        content |= {"wide_ids": base.to(torch.uint16).reshape(4, 6)[1:, ::2], "wider_ids": base.to(torch.uint64)}
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    theirs = torch.load(tmp_path / "x.pt", weights_only=True)
    refs = read_index(tmp_path / "x.pt")
    assert list(refs) == list(content)
    for name, ref in refs.items():
        same(theirs[name].detach(), ref.read())
