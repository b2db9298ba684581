"""The constrained objective against a loop from the definition, the released code, and the limits its brief names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from zoo.base import CompositionError, Context, Loss, Objective, Shared, elements, example_elements
from zoo.hosts import simclr
from zoo.nn.mlp import MLP
from zoo.objectives import supervised
from zoo.ops.augmentation import AugmentationSpace, augment, fixed_standard, sample_transforms
from zoo.ops.images import compose
from zoo.representation import invariance_augment as ia
from zoo.representation.invariance_augment import Views, invariance_constrained

SPACE = AugmentationSpace(translate=2)
B = 6


def batch_of(seed=0, b=B, kind=np.uint8):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (b, 6, 6, 1)).astype(np.uint8)
    mask = np.ones(b, bool)
    mask[-1] = False
    return {
        "x": jnp.asarray(x if kind == np.uint8 else (x / 255).astype(np.float32)),
        "label": jnp.asarray(rng.integers(0, 3, b).astype(np.int32)),
        "index": jnp.arange(b, dtype=jnp.int32),
        "mask": jnp.asarray(mask),
        "row": jnp.arange(b, dtype=jnp.int32),
    }


def context_of(step=0, **rest):
    return Context(jax.random.key(5), jnp.int32(step), jnp.int32(20), jnp.int32(4), **rest)


HOST = supervised(MLP((8,), 3, normalise=True))
PLAIN = supervised(MLP((8,), 3))


def stepped(objective, batch, variables=None, context=None):
    """One forward, loss and ascent: outputs, mutated, loss, the new collections, the gradient of the total."""
    variables = variables or objective.init(jax.random.key(0), batch)
    context = context or context_of()

    @jax.jit
    def run(params):
        def scalar(params):
            now = {**variables, "params": params}
            outputs, mutated = objective.forward(now, batch, context)
            loss = objective.loss(outputs, batch, context.replace(collections=variables, batch=batch))
            total = jnp.sum(loss.elements.values) / jnp.sum(batch["mask"]) + sum(loss.terms.values())
            return total, (outputs, mutated, loss)

        grads, aux = jax.grad(scalar, has_aux=True)(params)
        outputs, mutated, _ = aux
        return grads, *aux, objective.after_step({**variables, **mutated, "params": params}, outputs, batch, context)

    grads, outputs, mutated, loss, after = run(variables["params"])
    return {"variables": variables, "outputs": outputs, "mutated": mutated, "loss": loss, "after": after, "g": grads}


def redrawn(objective_steps, chains, batch, context, views):
    """Proposals made once more, one example at a time, from the keys that the batch's rows have."""
    drawn = jax.jit(lambda k: sample_transforms(k, views.space, objective_steps * chains))(
        context.example_keys(batch, "transforms")
    )
    view = jax.jit(views.view)
    keys = context.example_keys(batch, "proposal views")
    out = []
    for i in range(len(batch["x"])):
        own = jax.random.split(keys[i], objective_steps * chains)
        each = [
            view(own[j], batch["x"][i], jax.tree.map(lambda v, i=i, j=j: v[j, i], drawn))
            for j in range(objective_steps * chains)
        ]
        out.append(np.stack(each).reshape(objective_steps, chains, *each[0].shape))
    return np.stack(out), jax.tree.map(np.asarray, drawn)


def floats(batch):
    """The images in [0, 1]."""
    return batch["x"].astype(jnp.float32) / 255.0


def cross_entropy(logits, label):
    z = np.asarray(logits, np.float64)
    return np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1)) + z.max(-1) - z[np.arange(len(z)), np.asarray(label)]


@pytest.mark.parametrize(("steps", "chains"), [(3, 2), (2, 1)])
def test_a_step_equals_the_definition(steps, chains):
    """Proposals, Metropolis-Hastings, the Lagrangian, its gradient's parts and the dual step, by loops."""
    batch, context, gamma, epsilon, rate = batch_of(), context_of(), 0.7, 0.4, 0.05
    objective = invariance_constrained(
        PLAIN, SPACE, epsilon, rate, steps, chains, dual_start=gamma, normalise=lambda x: 2 * x - 1, epochs=2
    )
    got = stepped(objective, batch, context=context)
    params = got["variables"]["params"]
    logits = lambda x: np.asarray(PLAIN.forward({"params": params}, {**batch, "x": x}, context)[0]["logits"])  # noqa: E731
    views = Views(SPACE, normalise=lambda x: 2 * x - 1)
    proposals, drawn = redrawn(steps, chains, batch, context, views)
    uniform = np.asarray(
        jax.vmap(lambda k: jax.random.uniform(k, (steps - 1, chains)))(context.example_keys(batch, "moves"))
    )
    mine = got["outputs"]["invariance"]
    chosen = np.zeros((B, chains), int)
    moved = []
    for i in range(B):
        for c in range(chains):
            losses = [cross_entropy(logits(jnp.asarray(proposals[:, j, c])), batch["label"])[i] for j in range(steps)]
            for j in range(1, steps):
                accept = uniform[i, j - 1, c] < min(1.0, losses[j] / losses[chosen[i, c]])
                chosen[i, c] = j if accept else chosen[i, c]
                moved.append(accept if batch["mask"][i] else None)
            assert int(mine["op"][i, c]) == drawn.op[chosen[i, c] * chains + c, i]
            assert int(mine["level"][i, c]) == drawn.level[chosen[i, c] * chains + c, i]
    picked = np.stack([[proposals[i, chosen[i, c], c] for c in range(chains)] for i in range(B)])
    real = np.asarray(batch["mask"])
    per_chain = [cross_entropy(logits(jnp.asarray(picked[:, c])), batch["label"])[real].mean() for c in range(chains)]
    constraint = np.mean(per_chain)
    clean = cross_entropy(logits(2 * floats(batch) - 1), batch["label"])
    np.testing.assert_allclose(np.asarray(got["loss"].elements.values)[real], clean[real], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(got["loss"].metrics["constraint"], constraint, rtol=1e-5)
    np.testing.assert_allclose(got["loss"].terms["penalty"], gamma * (constraint - epsilon), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got["loss"].metrics["gamma"], gamma)
    rate_of_moves = np.mean([m for m in moved if m is not None])
    np.testing.assert_allclose(got["loss"].metrics["acceptance"], rate_of_moves, rtol=1e-6)
    state = got["after"]["invariance"]
    np.testing.assert_allclose(state["duals"], [max(0.0, gamma + rate * (constraint - epsilon))], rtol=1e-6)
    counts = np.zeros((2, 14, 30), int)
    for i in np.flatnonzero(real):
        for c in range(chains):
            counts[0, int(mine["op"][i, c]), int(mine["level"][i, c])] += 1
    np.testing.assert_array_equal(state["counts"], counts)

    def direct(params):  # the Lagrangian with the chosen images as constants
        def loss(x):
            outputs, _ = PLAIN.forward({"params": params}, {**batch, "x": x}, context)
            values = PLAIN.loss(outputs, batch, context).elements.values
            return jnp.sum(jnp.where(batch["mask"], values, 0)) / real.sum()

        augmented = sum(loss(jnp.asarray(picked[:, c])) for c in range(chains)) / chains
        return loss(2 * floats(batch) - 1) + gamma * augmented

    for a, b in zip(jax.tree.leaves(got["g"]), jax.tree.leaves(jax.grad(direct)(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gamma_zero_gives_clean_trainings_gradient_exactly():
    batch, context = batch_of(kind=np.float32), context_of()
    got = stepped(invariance_constrained(PLAIN, SPACE, 0.5), batch)
    assert float(got["loss"].metrics["gamma"]) == 0

    @jax.jit
    def clean(params):
        loss = PLAIN.loss(PLAIN.forward({"params": params}, batch, context)[0], batch, context)
        return jnp.sum(loss.elements.values) / jnp.sum(batch["mask"])

    for a, b in zip(
        jax.tree.leaves(got["g"]), jax.tree.leaves(jax.grad(clean)(got["variables"]["params"])), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


def test_gamma_follows_constant_slack_and_is_never_negative():
    """A host whose loss is 1 for every image: the slack is constant."""
    constant = Objective(
        lambda rng, batch: {"params": {"w": jnp.zeros(())}},
        lambda v, batch, c: ({"embedding": jnp.ones(batch["x"].shape[0]) + v["params"]["w"]}, {}),
        lambda o, batch, c: Loss(example_elements(o["embedding"], batch)),
        gathers=(),
    )
    for epsilon, rate, start in ((0.4, 0.1, 0.0), (1.5, 0.1, 0.12), (0.4, 0.0, 0.3)):
        objective = invariance_constrained(constant, SPACE, epsilon, rate, dual_start=start, epochs=2)
        batch = batch_of()
        variables = objective.init(jax.random.key(0), batch)
        for t in range(1, 6):
            got = stepped(objective, batch, variables, context_of(step=t + 2))
            variables = {**variables, **got["after"]}
            expected = max(0.0, start + t * rate * (1 - epsilon))
            np.testing.assert_allclose(variables["invariance"]["duals"], [expected], atol=1e-6)
            assert float(got["loss"].metrics["acceptance"]) == 1  # equal losses
        rises = rate > 0 and epsilon < 1
        assert int(variables["invariance"]["rising"][0]) == (5 if rises else 0)
        np.testing.assert_allclose(got["loss"].metrics["epochs_rising"], 1.0 if rises else 0.0)
        # steps 3, 4, ..: 4 steps an epoch; step 3 is of the first epoch, later ones are added to the last
        assert variables["invariance"]["counts"].sum((1, 2)).tolist() == [5, 20]


def test_several_chains_begin_with_gamma_one():
    for chains, expected in ((1, 0.0), (2, 1.0)):
        state = invariance_constrained(PLAIN, SPACE, 0.5, chains=chains).init(jax.random.key(0), batch_of())
        assert state["invariance"]["duals"].tolist() == [expected]


def test_samplers_choose_as_they_say():
    losses = jnp.array([[[1.0, 5.0, jnp.nan]], [[3.0, 2.0, 0.1]], [[2.0, 4.0, 0.0]]])
    never = jnp.full((2, 1, 3), 0.999)
    worst = ia.choose_proposals(losses, never, "adversarial")
    assert worst.index.tolist() == [[1, 0, 1]] and worst.accepted.shape == (0, 1, 3)
    walked = ia.choose_proposals(losses, jnp.full((2, 1, 3), 0.5))
    assert walked.index.tolist() == [[2, 2, 1]]  # 3 > 1 then 2/3; 2/5 refused then 4/5; NaN is left, then 0
    # density [l - kappa]_+: 1.5 / 2.5, where l would give 2 / 3
    above = ia.choose_proposals(losses, jnp.full((2, 1, 3), 0.65), kappa=0.5)
    assert above.index.tolist() == [[1, 2, 2]]
    assert ia.choose_proposals(losses[:2], jnp.full((1, 1, 3), 0.39)).index.tolist() == [[1, 1, 1]]
    assert ia.choose_proposals(losses[:2], jnp.full((1, 1, 3), 0.39), kappa=1.0).index.tolist() == [[1, 0, 1]]
    zero = jnp.zeros((2, 1, 1))
    assert int(ia.choose_proposals(zero, zero[:1]).index[0, 0]) == 1
    assert int(ia.choose_proposals(zero, zero[:1], variant="official").index[0, 0]) == 0


def test_the_adversary_takes_the_highest_loss_and_may_take_the_clean_image():
    batch, context = batch_of(b=40), context_of()
    make = functools.partial(invariance_constrained, PLAIN, SPACE, 0.5, steps=2)
    plain = stepped(make(sampler="adversarial"), batch, context=context)
    both = stepped(make(sampler="adversarial_identity"), batch, context=context)
    params, label = plain["variables"]["params"], batch["label"]
    loss = lambda x: cross_entropy(PLAIN.forward({"params": params}, {**batch, "x": x}, context)[0]["logits"], label)  # noqa: E731
    proposals, _ = redrawn(2, 1, batch, context, Views(SPACE))
    each = np.stack([loss(jnp.asarray(proposals[:, j, 0])) for j in range(2)])
    clean = loss(floats(batch))
    real = np.asarray(batch["mask"])
    np.testing.assert_allclose(plain["loss"].metrics["constraint"], each.max(0)[real].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        both["loss"].metrics["constraint"], np.maximum(each.max(0), clean)[real].mean(), rtol=1e-5
    )
    took = np.asarray(both["outputs"]["invariance"]["op"])[:, 0] == 0
    sure = real & (np.abs(clean - each.max(0)) > 1e-5)
    np.testing.assert_array_equal(took[sure], (clean > each.max(0))[sure])
    assert 0 < took.sum() < 40 and "acceptance" not in both["loss"].metrics
    assert (np.asarray(both["outputs"]["invariance"]["level"])[took] == 0).all()


def test_one_proposal_is_uniform_augmentation_without_a_scoring_pass():
    batch, seen = batch_of(), []

    def forward(variables, batch, context):
        seen.append(batch["x"].shape[0])
        return PLAIN.forward(variables, batch, context)

    counted = dataclasses.replace(PLAIN, forward=forward)
    for steps, expected in ((1, [B, B]), (3, [3 * B, B, B])):
        seen.clear()
        objective = invariance_constrained(counted, SPACE, 0.5, steps=steps)
        variables = objective.init(jax.random.key(0), batch)
        jax.eval_shape(lambda v, o=objective: o.forward(v, batch, context_of())[0], variables)
        assert seen == expected
    got = stepped(invariance_constrained(PLAIN, SPACE, 0.5, steps=1), batch)
    _, drawn = redrawn(1, 1, batch, context_of(), Views(SPACE))
    np.testing.assert_array_equal(got["outputs"]["invariance"]["op"][:, 0], drawn.op[0])


def test_the_sampled_lagrangian_keeps_examples_clean_by_gamma():
    n, gamma = 400, 1.5
    batch, context = batch_of(b=n), context_of()
    objective = invariance_constrained(PLAIN, SPACE, 0.5, 0.1, sample=True, dual_start=gamma)
    got = stepped(objective, batch, context=context)
    params = got["variables"]["params"]
    logits = lambda x: np.asarray(PLAIN.forward({"params": params}, {**batch, "x": x}, context)[0]["logits"])  # noqa: E731
    coins = np.asarray(jax.vmap(jax.random.uniform)(context.example_keys(batch, "clean or not")))
    still = coins < 1 / (1 + gamma)
    assert abs(still.mean() - 0.4) < 3 * np.sqrt(0.24 / n)
    # no second loss; gamma moves by the losses of the chosen proposals, clean or not
    assert "penalty" not in got["loss"].terms
    proposals, drawn = redrawn(2, 1, batch, context, Views(SPACE))
    each = np.stack([cross_entropy(logits(jnp.asarray(proposals[:, j, 0])), batch["label"]) for j in range(2)])
    moves = np.asarray(got["outputs"]["invariance"]["accepted"])[:, 0, 0].astype(int)
    chosen = logits(jnp.asarray(proposals[np.arange(n), moves, 0]))
    expected = np.where(still[:, None], logits(floats(batch)), chosen)
    np.testing.assert_allclose(got["outputs"]["logits"], expected, rtol=1e-4, atol=1e-5)
    found = each[moves, np.arange(n)][np.asarray(batch["mask"])].mean()
    np.testing.assert_allclose(got["loss"].metrics["constraint"], found, rtol=1e-5)
    np.testing.assert_allclose(got["after"]["invariance"]["duals"], [gamma + 0.1 * (found - 0.5)], rtol=1e-5)
    assert ia.keep_clean(jnp.array([0.3, 0.39, 0.41]), jnp.array(1.5)).tolist() == [True, True, False]
    assert ia.keep_clean(jnp.array([0.999]), jnp.array(0.0)).tolist() == [True]


def statistics(tree):
    return np.concatenate([np.ravel(v) for v in jax.tree.leaves(tree)])


def test_proposals_leave_the_batch_statistics_alone_unless_asked():
    batch, context = batch_of(), context_of()
    make = functools.partial(invariance_constrained, HOST, SPACE, 0.5)
    ways = {"default": {}, "kept": {"keep_statistics": True}, "official": {"variant": "official"}}
    found = {k: stepped(make(**settings), batch, context=context) for k, settings in ways.items()}
    variables = {c: v for c, v in found["default"]["variables"].items() if c != "invariance"}
    clean = {**batch, "x": floats(batch)}
    # clean first, then the chosen views
    once = HOST.forward(variables, clean, context)[1]["batch_stats"]
    proposals, _ = redrawn(2, 1, batch, context, Views(SPACE))
    flat = proposals.reshape(2 * B, 6, 6, 1)
    twice = {"x": jnp.asarray(flat), "mask": jnp.repeat(batch["mask"], 2), "row": jnp.arange(2 * B)}
    scored = HOST.forward(variables, twice, context)[1]["batch_stats"]

    def after(start, kept):
        stats = HOST.forward({**variables, "batch_stats": start}, clean, context)[1]["batch_stats"]
        moves = np.asarray(kept["outputs"]["invariance"]["accepted"])[:, 0, 0].astype(int)
        chosen = jnp.asarray(proposals[np.arange(B), moves, 0])
        return HOST.forward({**variables, "batch_stats": stats}, {**batch, "x": chosen}, context)[1]["batch_stats"]

    default = statistics(after(variables["batch_stats"], found["default"]))
    kept = statistics(after(scored, found["kept"]))
    np.testing.assert_allclose(statistics(found["default"]["mutated"]["batch_stats"]), default, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics(found["kept"]["mutated"]["batch_stats"]), kept, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(statistics(found["official"]["mutated"]["batch_stats"]), kept, rtol=1e-4, atol=1e-6)
    assert np.abs(default - kept).max() > 1e-3 and np.abs(default - statistics(once)).max() > 1e-3


def test_proposals_are_scored_on_the_whole_batch_where_the_host_looks_at_it():
    """SimCLR: proposal j of an example meets proposal j of the others."""
    b = 14
    batch, context = batch_of(b=b), context_of()
    host = simclr(MLP((8,), 4), lambda key, x: (x, x[::-1]), 0.1)
    got = stepped(invariance_constrained(host, SPACE, 0.5, dual_start=1.0, steps=3), batch, context=context)
    params = got["variables"]["params"]
    proposals, drawn = redrawn(3, 1, batch, context, Views(SPACE))

    def losses(x):
        outputs, _ = host.forward({"params": params}, {**batch, "x": jnp.asarray(x)}, context)
        return np.asarray(host.loss(outputs, batch, context).elements.values)

    each = np.stack([losses(proposals[:, j, 0]) for j in range(3)])
    uniform = np.asarray(jax.vmap(lambda k: jax.random.uniform(k, (2, 1)))(context.example_keys(batch, "moves")))[
        ..., 0
    ]
    index = np.zeros(b, int)
    for i in range(b - 1):
        for j in (1, 2):
            index[i] = j if uniform[i, j - 1] < min(1, each[j, i] / each[index[i], i]) else index[i]
    op = np.asarray(got["outputs"]["invariance"]["op"])[:, 0]
    np.testing.assert_array_equal(op[:-1], drawn.op[index, np.arange(b)][:-1])
    assert len(set(index[:-1])) > 1
    chosen = proposals[np.arange(b), index, 0]
    chosen[-1] = 0
    np.testing.assert_allclose(got["loss"].metrics["constraint"], losses(chosen)[:-1].mean(), rtol=1e-4)


def test_evaluation_sees_the_normalised_image_only():
    batch = batch_of()
    noise = lambda key, x: x + jax.random.normal(key, x.shape)  # noqa: E731
    objective = invariance_constrained(
        PLAIN, SPACE, 0.5, normalise=lambda x: 3 * x, erase=noise, base=lambda k, x: x[::-1]
    )
    variables = objective.init(jax.random.key(0), batch)
    context = context_of(train=False)
    outputs, mutated = objective.forward(variables, batch, context)
    own = {"params": variables["params"]}
    expected = PLAIN.forward(own, {**batch, "x": 3 * floats(batch)}, context)[0]["logits"]
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-6)
    assert not mutated and "invariance" not in outputs
    assert not objective.loss(outputs, batch, context).terms


def test_a_view_is_made_in_the_published_order():
    """Base, operation, scaling, erasing; base and erasing with keys of their own."""
    image = batch_of()["x"][0]
    seen = []
    note = lambda name, f: lambda key, x: (seen.append((name, x.dtype, jax.random.key_data(key).tolist())), f(x))[1]  # noqa: E731
    views = Views(SPACE, note("base", lambda x: x[::-1]), lambda x: x - 0.5, note("erase", lambda x: x.at[0].set(9.0)))
    t = jax.tree.map(lambda v: v[0, 0], sample_transforms(jax.random.split(jax.random.key(3), 1), SPACE, 1))
    found = views.view(jax.random.key(1), image, t)
    expected = (augment(image[::-1], t, SPACE) / 255.0 - 0.5).at[0].set(9.0)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert [(n, str(d)) for n, d, _ in seen] == [("base", "uint8"), ("erase", "float32")]
    assert seen[0][2] != seen[1][2]
    np.testing.assert_allclose(views.plain(image), image / 255.0 - 0.5, atol=1e-7)


def test_clean_and_augmented_views_are_cropped_differently():
    batch, context = batch_of(b=64), context_of()
    marks = compose(lambda key, x: jnp.full_like(x, jax.random.randint(key, (), 0, 256)))
    one = AugmentationSpace(("identity", "rotate"), rotate=0)
    host = Objective(
        lambda rng, b: {"params": {"w": jnp.ones(())}},
        lambda v, b, c: ({"embedding": b["x"][:, 0, 0, 0] * v["params"]["w"]}, {}),
        lambda o, b, c: Loss(example_elements(o["embedding"], b)),
        gathers=(),
    )
    got = stepped(invariance_constrained(host, one, 0.5, dual_start=1.0, chains=2, base=marks), batch, context=context)
    clean = np.asarray(got["outputs"]["embedding"])
    first, second = np.asarray(got["outputs"]["invariance"]["augmented"]["embedding"]).T
    assert max(np.mean(clean == first), np.mean(clean == second), np.mean(first == second)) < 0.1


def test_copies_of_an_example_have_rows_of_their_own():
    batch = batch_of(b=3)
    images = jnp.arange(3 * 2 * 4, dtype=jnp.float32).reshape(3, 2, 2, 2, 1)
    copies = ia._copies(batch, images, "x", 5)
    assert copies["label"].tolist() == np.repeat(np.asarray(batch["label"]), 2).tolist()
    assert copies["mask"].tolist() == [True, True, True, True, False, False]
    np.testing.assert_array_equal(copies["x"], images.reshape(6, 2, 2, 1))
    assert copies["row"].tolist() == [i + (1 << 22) * j for i in range(3) for j in (5, 6)]
    back = ia._by_example({"a": copies["x"], "s": Shared(jnp.ones(6)), "t": jnp.ones(())}, 3)
    np.testing.assert_array_equal(back["a"], images)
    assert back["s"].value.shape == (6,) and back["t"].shape == ()
    np.testing.assert_array_equal(ia._copy(back, 1)["a"], images[:, 1])


def test_hosts_of_pairs_count_for_their_anchors():
    """Elements that are pairs are averaged over each anchor's."""

    def loss(o, batch, context):
        z = o["embedding"]
        index = jnp.array([[0, 1], [0, 2], [1, 2], [2, 0]])
        return Loss(
            elements((z[index[:, 0]] + z[index[:, 1]]) ** 2, index, jnp.array([True, True, True, False]), "pair")
        )

    host = Objective(
        lambda rng, b: {"params": {"w": jnp.ones(())}},
        lambda v, b, c: ({"embedding": b["x"].mean((1, 2, 3)) * v["params"]["w"]}, {}),
        loss,
        unit="pair",
        gathers=(),
    )
    batch = {**batch_of(b=3), "mask": jnp.ones(3, bool)}
    variables = host.init(None, batch)
    proposals = jax.random.uniform(jax.random.key(0), (3, 2, 6, 6, 1))
    losses, _ = ia._proposal_losses(host, variables, proposals, "x", batch, context_of())
    z = np.asarray(proposals).mean((2, 3, 4)).T
    expected = np.stack(
        [((z[:, 0] + z[:, 1]) ** 2 + (z[:, 0] + z[:, 2]) ** 2) / 2, (z[:, 1] + z[:, 2]) ** 2, 0 * z[:, 0]]
    )
    np.testing.assert_allclose(losses, expected.T, rtol=1e-5)
    objective = invariance_constrained(host, SPACE, 0.5)
    assert objective.unit == "pair" and objective.provides == host.provides


def test_the_hosts_own_memory_still_moves():
    def after(variables, outputs, batch, context):
        assert "invariance" not in variables and "invariance" not in outputs
        return {"memory": variables["memory"] + 1}

    host = dataclasses.replace(
        PLAIN, init=lambda r, b: {**PLAIN.init(r, b), "memory": jnp.zeros(())}, after_step=after,
        forward=lambda v, b, c: PLAIN.forward({"params": v["params"]}, b, c),
    )  # fmt: skip
    got = stepped(invariance_constrained(host, SPACE, 0.5), batch_of())
    assert float(got["after"]["memory"]) == 1 and set(got["after"]) == {"memory", "invariance"}


def test_chosen_operations_lean_towards_high_losses():
    """Shifts out of the picture cost this host 9, all else 1: after many proposals nine in ten are shifts."""
    host = Objective(
        lambda rng, b: {"params": {"w": jnp.zeros(())}},
        lambda v, b, c: ({"embedding": jnp.where(b["x"][:, 3, 3, 0] > 0.9, 1.0, 9.0) + v["params"]["w"]}, {}),
        lambda o, b, c: Loss(example_elements(o["embedding"], b)),
        gathers=(),
    )
    space = AugmentationSpace(("identity", "translate_x", "posterize"), translate=1000, posterize=0)
    n = 1500
    batch = {**batch_of(b=n), "x": jnp.full((n, 6, 6, 1), 255, jnp.uint8), "mask": jnp.ones(n, bool)}
    for steps, expected in ((1, 0.5), (30, 0.9)):
        got = stepped(invariance_constrained(host, space, 0.5, steps=steps), batch)
        shares, _ = ia.operation_shares(np.asarray(got["after"]["invariance"]["counts"]))
        assert abs(shares[0, 1] - expected) < 3 * np.sqrt(expected * (1 - expected) / n) + 0.01


def test_analysis_by_hand():
    counts = np.zeros((2, 3, 4), int)
    counts[0, 1, 3], counts[0, 2, 1], counts[0, 2, 2] = 3, 1, 2
    shares, levels = ia.operation_shares(counts)
    np.testing.assert_allclose(shares, [[0, 0.5, 0.5], [0, 0, 0]])
    np.testing.assert_allclose(levels, [[0, 3, 5 / 3], [0, 0, 0]])
    accepted = jnp.array([[[True], [False]], [[True], [True]], [[True], [True]]])
    assert float(ia.acceptance_rate(accepted, jnp.array([True, True, False]))) == 0.75
    assert ia.rising_warning(3, 4, 0.1, 2.0) is None
    assert "gamma has grown at each of the last 4 steps, to 2; " in ia.rising_warning(4, 4, 0.1, 2.0)
    assert "raise epsilon" in ia.rising_warning(9, 4, 0.1, 2.0) and "epsilon 0.1" in ia.rising_warning(9, 4, 0.1, 2.0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epsilon": 0.0}, "epsilon must be above 0 .*got 0.0.*dual_rate=0"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 0.5, "kappa": 0.5}, r"above 0.5 \(kappa\)"),
        ({"steps": 0}, "steps, chains and epochs must be at least 1, got 0, 1 and 1"),
        ({"chains": 0}, "at least 1"),
        ({"epochs": 0}, "at least 1"),
        ({"dual_rate": -0.1}, "dual_rate"),
        ({"dual_start": -0.1}, "at least 0"),
        ({"variant": "new"}, "variant"),
        ({"sampler": "greedy"}, "'greedy'"),
        ({"sample": True, "chains": 2}, "chains=2"),
        ({"sampler": "adversarial_identity", "space": AugmentationSpace(("rotate",))}, "'identity' in the space"),
    ],
)
def test_settings_that_cannot_work_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        invariance_constrained(**{"host": PLAIN, "space": fixed_standard(), "epsilon": 0.5, **change})
    with pytest.raises(ValueError, match="greedy"):
        ia.choose_proposals(jnp.ones((1, 1, 1)), jnp.ones((0, 1, 1)), "greedy")


def test_negative_losses_need_kappa():
    assert invariance_constrained(PLAIN, SPACE, -0.5, kappa=-1.0).name == "invariance_constrained(supervised)"


def test_what_does_not_fit_is_refused():
    whole = dataclasses.replace(PLAIN, unit="batch", name="whole")
    with pytest.raises(CompositionError, match="whole has one loss for the whole batch"):
        invariance_constrained(whole, SPACE, 0.5)
    objective = invariance_constrained(PLAIN, SPACE, 0.5)
    batch = batch_of(kind=np.float32)
    with pytest.raises(ValueError, match=r"'x': augmentations expect \[0,1\] or uint8 before normalisation"):
        objective.init(jax.random.key(0), {**batch, "x": 2 * batch["x"] - 1})
    objective.init(jax.random.key(0), {**batch, "x": batch["x"].at[-1].set(7.0)})  # padding may be anything
    bare = dataclasses.replace(
        PLAIN, forward=lambda v, b, c: (b["x"], {}), loss=lambda o, b, c: Loss(example_elements(o[:, 0, 0, 0], b))
    )
    objective = invariance_constrained(bare, SPACE, 0.5)
    with pytest.raises(CompositionError, match="outputs have names"):
        objective.forward(objective.init(jax.random.key(0), batch), batch, context_of())


def test_linen_modules_are_seen_once():
    """Initialisation gives the host normalised images."""

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x.reshape(len(x), -1)) + self.param("first", lambda k: x[0, 0, 0, 0])

    batch = batch_of()
    variables = invariance_constrained(supervised(Probe()), SPACE, 0.5, normalise=lambda x: 2 * x - 1).init(
        jax.random.key(0), batch
    )
    np.testing.assert_allclose(variables["params"]["first"], 2 * floats(batch)[0, 0, 0, 0] - 1, rtol=1e-5)
