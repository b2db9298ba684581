"""Streams from disk: the batches of an ArrayStream, whoever reads them; prefetch."""

import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data.pipelines import GrainStream, NpySource, prefetch, source_fingerprint
from data.stream import ArrayStream, DataError, Stream, sequential, shuffled

N = 23


def arrays():
    rng = np.random.default_rng(0)
    return {"x": rng.normal(size=(N, 3)).astype(np.float32), "label": rng.integers(0, 5, N).astype(np.int32)}


@pytest.fixture
def folder(tmp_path):
    for name, values in arrays().items():
        np.save(tmp_path / f"{name}.npy", values)
    return tmp_path


class Rows:
    """A source that gives one example at a time, like TFDS's."""

    def __init__(self, fields):
        self.fields = fields

    def __len__(self):
        return len(self.fields["x"])

    def __getitem__(self, i):
        return {k: v[i] for k, v in self.fields.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("remainder", ["pad", "drop"])
@pytest.mark.parametrize("make", [lambda f: NpySource(f), lambda f: Rows(arrays())])
def test_batches_are_those_of_an_array_stream(folder, make, remainder):
    stream = GrainStream(make(folder), 8, shuffled(N, 3), remainder)
    reference = ArrayStream(arrays(), 8, shuffled(N, 3), remainder)
    assert isinstance(stream, Stream)
    assert (stream.num_examples, stream.steps_per_epoch) == (reference.num_examples, reference.steps_per_epoch)
    for position in range(7):
        assert_same(stream.batch(position), reference.batch(position))


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_iterating_gives_the_same_batches_from_any_start(folder, threads):
    stream = GrainStream(NpySource(folder), 8, shuffled(N, 3), threads=threads)
    for start in (0, 5):
        batches = stream.iterate(start)
        for position in range(start, start + 12):
            assert_same(next(batches), stream.batch(position))


def test_a_reader_that_is_closed_or_dropped_leaves_no_threads(folder):
    def reading():
        return {t for t in threading.enumerate() if t.name.startswith("grain")}

    before = reading()
    batches = GrainStream(NpySource(folder), 8, shuffled(N, 3)).iterate(0)
    next(batches)
    assert reading() - before
    batches.close()
    with prefetch(GrainStream(NpySource(folder), 8, shuffled(N, 3)).iterate(0), lambda b: b) as ahead:
        next(ahead)
    deadline = time.monotonic() + 5
    while reading() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not reading() - before


@pytest.mark.parametrize("count", [2, 4])
def test_the_slices_of_processes_make_up_the_global_batch(folder, count):
    stream = GrainStream(NpySource(folder), 8, shuffled(N, 1))
    for position in range(6):
        parts = [stream.batch(position, (rank, count)) for rank in range(count)]
        whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
        assert_same(whole, stream.batch(position))
    assert_same(next(stream.iterate(2, (1, count))), stream.batch(2, (1, count)))
    with pytest.raises(DataError, match="batch_size 8 does not divide over 3 processes"):
        stream.batch(0, (0, 3))
    with pytest.raises(DataError, match="does not divide"):
        stream.iterate(0, (0, 3))


def test_every_example_once_per_epoch_and_padding_out_of_range(folder):
    stream = GrainStream(NpySource(folder), 8, shuffled(N, 0))
    for epoch in range(2):
        batches = [stream.batch(epoch * 3 + s) for s in range(3)]
        index = np.concatenate([b["index"] for b in batches])
        mask = np.concatenate([b["mask"] for b in batches])
        assert sorted(index[mask]) == list(range(N)) and (index[~mask] == N).all() and mask.sum() == N
    assert (stream.batch(0)["index"] != stream.batch(3)["index"]).any()


def test_transform_sees_the_batch(folder):
    stream = GrainStream(NpySource(folder), 8, sequential(N), transform=lambda b: {**b, "x": b["x"] * 2})
    np.testing.assert_array_equal(stream.batch(0)["x"], arrays()["x"][:8] * 2)


def test_npy_files_are_pickled_by_path(folder):
    source = NpySource(folder)
    (folder / "large").mkdir()
    np.save(folder / "large" / "x.npy", np.zeros(10_000))
    assert len(pickle.dumps(NpySource(folder / "large"))) < 2000
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[4]["x"], arrays()["x"][4])


def test_fingerprint_follows_contents(folder):
    before = source_fingerprint(NpySource(folder))
    assert before == GrainStream(NpySource(folder), 4, sequential(N)).fingerprint == source_fingerprint(Rows(arrays()))
    changed = arrays()["x"]
    changed[0] += 1
    np.save(folder / "x.npy", changed)
    assert source_fingerprint(NpySource(folder)) != before


def test_bad_sources_are_named(folder):
    with pytest.raises(DataError, match="holds no .npy files"):
        NpySource(folder / "nowhere")
    with pytest.raises(DataError, match="at least one"):
        GrainStream(Rows({"x": np.zeros((3, 1))}), 2, lambda e: np.array([0, 3]))
    with pytest.raises(DataError, match="holds no examples"):
        GrainStream(Rows({"x": np.zeros((0, 1))}), 2, sequential(1))
    with pytest.raises(DataError, match="batch_size must be at least 1"):
        GrainStream(NpySource(folder), 0, sequential(N))
    with pytest.raises(DataError, match="exceeds the 23 examples"):
        GrainStream(NpySource(folder), 24, sequential(N), remainder="drop")
    ragged = [{"x": np.zeros(2)}, {"x": np.zeros(3)}]
    with pytest.raises(DataError, match=r"field 'x': example 1 has shape \[3\], example 0 \[2\]"):
        GrainStream(ragged, 2, sequential(2))
    np.save(folder / "x.npy", np.zeros(3))
    with pytest.raises(DataError, match="same number of examples"):
        NpySource(folder)
    (folder / "x.npy").write_text("no array")
    with pytest.raises(DataError, match="x.npy: not readable"):
        NpySource(folder)


def test_an_error_in_a_reading_thread_arrives():
    class Broken(Rows):
        def __getitem__(self, i):
            if i == 11:
                raise DataError("example 11 is broken")
            return super().__getitem__(i)

    stream = GrainStream(Broken(arrays()), 4, sequential(N), fingerprint="given")
    batches = stream.iterate(0)
    next(batches), next(batches)
    with pytest.raises(Exception, match="example 11 is broken"):
        next(batches)


WORKERS = """
import sys
import numpy as np
from data.pipelines import GrainStream, NpySource
from data.stream import shuffled
if __name__ == "__main__":
    stream = GrainStream(NpySource(sys.argv[1]), 8, shuffled(23, 3), threads=1, workers=2)
    batches = stream.iterate(1)
    for position in range(1, 9):
        got, wanted = next(batches), stream.batch(position)
        assert all((got[k] == wanted[k]).all() for k in wanted), position
    print("same")
"""


@pytest.mark.slow
def test_worker_processes_read_the_same(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(WORKERS)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run([sys.executable, program, folder], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "same", done.stderr[-3000:]


def test_tfds_sources(tmp_path):
    from data.builders import prepare_digits

    source = prepare_digits(tmp_path).as_data_source(split="test")
    stream = GrainStream(source, 16, shuffled(len(source), 0))
    batch = next(stream.iterate(3))
    assert batch["image"].shape == (16, 8, 8, 1) and batch["image"].dtype == np.uint8
    assert_same(batch, stream.batch(3))
    np.testing.assert_array_equal(batch["image"][5], source[int(batch["index"][5])]["image"])


# prefetch


def prefetching():
    return sum(t.name == "prefetch" for t in threading.enumerate())


def test_prefetch_keeps_order_and_ends():
    out = prefetch(iter(range(10)), lambda x: x * 2, size=3)
    assert list(out) == [2 * x for x in range(10)]
    with pytest.raises(StopIteration):
        next(out)


def test_prefetch_reads_ahead_but_not_without_bound():
    seen = []

    def numbers():
        for i in range(100):
            seen.append(i)
            yield i

    with prefetch(numbers(), lambda x: x, size=2) as out:
        assert seen == []  # nothing is read before the first is asked for
        assert next(out) == 0
        deadline = time.monotonic() + 5
        while len(seen) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(seen) == 4  # one used, two waiting, one in hand
    assert prefetching() == 0


@pytest.mark.parametrize("where", ["iterator", "put"])
def test_prefetch_raises_in_place(where):
    def numbers():
        for i in range(5):
            if where == "iterator" and i == 2:
                raise DataError("broken")
            yield i

    def put(x):
        if where == "put" and x == 2:
            raise DataError("broken")
        return x

    out = prefetch(numbers(), put)
    assert [next(out), next(out)] == [0, 1]
    for _ in range(2):
        with pytest.raises(DataError, match="broken"):
            next(out)
    out.close()
    assert prefetching() == 0


def test_prefetch_closes_its_iterator_and_stops_when_dropped():
    closed = threading.Event()

    def numbers():
        try:
            while True:
                yield 1
        finally:
            closed.set()

    out = prefetch(numbers(), lambda x: x)
    next(out)
    del out
    gc.collect()
    assert closed.wait(5)
    out = prefetch(iter([1]), lambda x: x)
    out.close()
    with pytest.raises(StopIteration):
        next(out)
    with pytest.raises(ValueError, match="size must be at least 1"):
        prefetch(iter([]), lambda x: x, size=0)
