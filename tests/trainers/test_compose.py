"""The composition matrix: what it says is what happens, on 8 devices, under jit and under pmap."""

import functools

import jax
import numpy as np
import optax
import pytest

from data.stream import training_stream
from trainers import compose
from trainers.errors import UserError
from trainers.parallel import Parallel, Placement
from trainers.phases import Train
from trainers.state import begin_phase, init_variables
from trainers.step import make_step
from trainers.trees import flatten, to_host
from zoo import base, hosts
from zoo.base import CompositionError, LossTransformation
from zoo.nn.mlp import MLP

HOSTS = {h.name: h for h in compose.shared_hosts()}
QUICK = {
    "supervised", "softmax, fixed", "proxy anchor", "contrastive pairs", "triplet, semi-hard", "supervised contrastive",
    "simclr", "moco, several heads", "simsiam, several heads", "barlow twins, several heads", "memory bank",
}  # fmt: skip
"""One host of each kind; the others, which share their code with one of these, take their two steps in the slow run."""


def fitting(host):
    """The parts that the matrix says run on a host, identity left out: it adds nothing to the host alone."""
    parts = {**compose.transformations(), **compose.wrappers()}
    return {n: p for n, p in parts.items() if compose.reason(p, host.objective) is None}


@functools.cache
def phases(name):
    """A training phase for each part that fits a host, on the host's own batch twice over."""
    host = HOSTS[name]
    arrays = {k: np.concatenate([v, v[::-1]]) for k, v in host.batch.items() if k not in ("index", "mask", "row")}
    stream = training_stream(arrays, compose.ROWS)
    made = {}
    for n, part in fitting(host).items():
        transform = part if isinstance(part, LossTransformation) else None
        objective = host.objective if transform is not None else part(host.objective)
        made[n] = Train("t", 2, objective, optax.sgd(0.01), stream, transform)
    return made, stream


def two_steps(name, parallel):
    """The states after two steps, all of a host's parts in one compiled program."""
    made, stream = phases(name)
    place = Placement(parallel)
    first = {"row": np.arange(compose.ROWS), **stream.batch(0)}
    states = {}
    for n, phase in made.items():
        objective = phase.updates["main"].objective
        variables = init_variables(objective, jax.random.key(0), jax.tree.map(jax.numpy.asarray, first))
        states[n] = begin_phase(variables, phase, 0)
    steps = {n: make_step(phase, {"main": 2}, place.axis_name) for n, phase in made.items()}

    def both(states, batches, artefacts, count):
        found = {n: step(states[n], batches, artefacts, count) for n, step in steps.items()}
        return tuple({n: v[i] for n, v in found.items()} for i in range(3))

    states = place.put_state(states)
    batches = [{"main": jax.tree.map(lambda x: x[None, None], stream.batch(i))} for i in range(2)]
    count = place.put_count(1)
    compiled = None
    for batch in batches:
        placed = place.put_batches(batch)
        compiled = compiled or place.compile(both, states, placed, {}, count)
        states, metrics, _ = compiled(states, placed, {}, count)
    return {n: flatten(to_host(place.local(s))) for n, s in states.items()}, metrics


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in HOSTS])
def test_what_runs_takes_two_steps_alike_under_jit_and_pmap(name):
    one, metrics = two_steps(name, Parallel())
    other, _ = two_steps(name, Parallel("pmap"))
    assert {"identity"} <= set(one)
    moved = 0
    for part, state in one.items():
        assert np.isfinite(np.asarray(metrics[part]["loss"])).all(), part
        for path, value in state.items():
            if np.asarray(value).dtype.kind == "f":
                np.testing.assert_allclose(other[part][path], value, rtol=1e-5, atol=1e-5, err_msg=f"{part}: {path}")
            else:
                np.testing.assert_array_equal(other[part][path], value, err_msg=f"{part}: {path}")
        moved += any("params" in p and np.abs(v).max() > 0 for p, v in state.items())
    assert moved == len(one)


def test_the_matrix_names_every_pair_once_with_a_reason_where_it_must():
    rows = compose.matrix()
    assert len({(r["transformation"], r["host"]) for r in rows}) == len(rows)
    assert all(r["runs"] == (r["reason"] is None) for r in rows)
    cells = {(r["transformation"], r["host"]): r for r in rows}
    assert cells["tcm", "contrastive pairs"]["runs"] and cells["tcm", "proxy anchor"]["runs"]
    assert cells["tcm", "simclr"]["reason"].startswith("tcm requires 'label', which simclr does not provide")
    assert "barlow twins yields elements of unit 'batch'" in cells["dynamic_bad_pair_mining", "barlow twins"]["reason"]
    assert {"dbpm", "tcm", "ict"} <= {r["host"] for r in rows if not r["shared"]}


def test_a_pair_that_does_not_run_is_refused_by_a_phase_with_the_same_words():
    rows = [r for r in compose.matrix() if r["shared"] and not r["runs"]]
    assert rows
    for r in rows:
        part, host = {**compose.transformations(), **compose.wrappers()}[r["transformation"]], HOSTS[r["host"]]
        join = functools.partial(base.check_fit, part) if isinstance(part, LossTransformation) else part
        with pytest.raises(CompositionError) as refused:
            join(host.objective)
        assert str(refused.value).split(" (it")[0].split(" which ")[0].split(" but ")[0] in r["reason"]


def test_every_function_of_the_hosts_module_is_in_the_matrix():
    public = {"simclr", "supervised_contrast", "ordinal_contrast", "moco", "simsiam", "barlow_twins",
              "metric_learning", "proxies", "softmax_classifier"}  # fmt: skip
    defined = {n for n, f in vars(hosts).items() if callable(f) and getattr(f, "__module__", "") == "zoo.hosts"}
    assert {n for n in defined if not n.startswith("_")} - {"two_views", "batch_element"} == public
    assert len(HOSTS) == 31 and set(HOSTS) >= QUICK


def test_tables_number_the_reasons():
    text = compose.tables(compose.report())
    assert "| simclr | runs |" in text
    assert ". tcm requires 'label', which the host does not provide" in text
    assert text.count("tcm requires 'label'") == 1


def test_parts_of_the_matrix_and_unknown_names():
    assert {r["host"] for r in compose.report(host="moco")} == {"moco"}
    assert {r["transformation"] for r in compose.report("tcm")} == {"tcm"}
    assert "tcm  moco  tcm requires" in compose.describe(compose.report("tcm", "moco"))
    with pytest.raises(UserError, match="unknown host 'moko'; did you mean 'moco'"):
        compose.report(host="moko")
    with pytest.raises(UserError, match="unknown transformation 'tcn'; did you mean 'tcm'"):
        compose.report("tcn")


def test_a_wrapper_says_why_not():
    def wrap(objective):
        raise CompositionError(f"no wrapping of {objective.name}")

    assert compose.reason(wrap, hosts.simclr(MLP(), lambda k, x: (x, x))) == "no wrapping of simclr"
