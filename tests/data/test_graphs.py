"""Graphs: planted communities keep their degrees, edge lists are read both ways or refused with the line."""

import numpy as np
import pytest

from data.graphs import planted_communities, read_graph
from data.stream import DataError


def test_communities_have_the_degree_and_the_mixing_asked_for():
    graph = planted_communities(0, nodes=400, classes=4, degree=8.0, within=0.75, signal=2.0, test_share=0.25)
    assert graph.x.shape == (400, 16) and graph.train.sum() == 300 and graph.mask.all()
    pairs = set(zip(graph.src.tolist(), graph.dst.tolist(), strict=True))
    assert len(pairs) == len(graph.src) and all((b, a) in pairs and a != b for a, b in pairs)
    assert len(graph.src) / 400 == pytest.approx(8, rel=0.1)
    assert (graph.label[graph.src] == graph.label[graph.dst]).mean() == pytest.approx(0.75, abs=0.04)
    means = np.stack([graph.x[graph.label == c].mean(0) for c in range(4)])
    np.testing.assert_allclose(np.linalg.norm(means, axis=1), 2, rtol=0.15)
    assert graph.fingerprint == planted_communities(0, 400, 4, 16, 8.0, 0.75, 2.0, 0.25).fingerprint
    assert set(graph.arrays()) == {"x", "src", "dst", "mask"}
    with pytest.raises(DataError, match="two nodes a class"):
        planted_communities(nodes=4, classes=3)


def folder(tmp_path, edges="# a comment\n0,1\n1,0\n2 3\n2\t2\n", **nodes):
    nodes = {"features": np.eye(4), "labels": np.array([0, 1, 1, 0]), **nodes}
    np.savez(tmp_path / "nodes.npz", **{k: v for k, v in nodes.items() if v is not None})
    (tmp_path / "edges.csv").write_text(edges)
    return tmp_path


def test_edges_count_both_ways_and_once(tmp_path):
    graph = read_graph(folder(tmp_path, train=np.array([True, True, False, True])))
    found = sorted(zip(graph.src.tolist(), graph.dst.tolist(), strict=True))
    assert found == [(0, 1), (1, 0), (2, 3), (3, 2)]
    np.testing.assert_array_equal(graph.train, [True, True, False, True])
    np.testing.assert_array_equal(graph.label, [0, 1, 1, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": "0,1\n0,4\n"}, r"edges.csv: line 2: expected two node numbers in \[0, 4\), got '0,4'"),
        ({"edges": "0,-1\n"}, "line 1: expected two node numbers"),
        ({"edges": "0\n"}, "line 1: expected two node numbers"),
        ({"edges": "\n"}, "holds no edges"),
        ({"labels": None}, "nodes.npz: has no labels; it has features"),
        ({"labels": np.zeros(3, int)}, "expected features .* and integer labels"),
        ({"features": np.full((4, 2), np.nan)}, "features of node 0 are not finite"),
        ({"train": np.ones(3, bool)}, "train must be bool"),
        ({"train": np.ones(4, bool)}, "some of each"),
        ({"train": np.zeros(4, bool)}, "some of each"),
        ({"labels": np.array([0, 1, -2, 0])}, "label of node 2 is -2; classes count from 0"),
    ],
)
def test_malformed_graphs_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_graph(folder(tmp_path, **change))


def test_a_folder_without_a_graph_is_refused(tmp_path):
    with pytest.raises(DataError, match="expected edges.csv"):
        read_graph(tmp_path)
    folder(tmp_path)
    (tmp_path / "nodes.npz").write_bytes(b"no")
    with pytest.raises(DataError, match=r"not a readable .npz"):
        read_graph(tmp_path)
