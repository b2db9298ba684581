"""GeAR against its definition and the limits its brief names."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zoo.base import Context, named_key, total_loss
from zoo.losses.momentum import clamped_temperature, momentum_soft_contrastive
from zoo.nn.bert import BERT, BERTConfig
from zoo.nn.dropout import layer_keys
from zoo.nn.partitioning import unbox
from zoo.retrieval import gear
from zoo.retrieval.gear import GeAR

SHAPE = BERTConfig(vocab_size=19, width=8, depth=1, num_heads=2, mlp_width=12, max_positions=10, token_types=0,
                   dropout=0.2, attention_dropout=0.1)  # fmt: skip
MODEL = GeAR(SHAPE)
STOP, B = 2, 4


def texts(seed, width, lengths):
    rng = np.random.default_rng(seed)
    mask = np.arange(width) < np.asarray(lengths)[:, None]
    return {
        "ids": jnp.asarray(np.where(mask, rng.integers(3, 19, mask.shape), 0), jnp.int32),
        "mask": jnp.asarray(mask),
    }


QUERY, DOCUMENT, TARGET = texts(0, 5, [5, 3, 4, 5]), texts(1, 8, [8, 6, 7, 8]), texts(2, 4, [4, 2, 3, 1])
BATCH = {
    "query": QUERY["ids"], "query_mask": QUERY["mask"], "document": DOCUMENT["ids"], "document_mask": DOCUMENT["mask"],
    "target": TARGET["ids"], "target_mask": TARGET["mask"], "document_id": jnp.array([5, 1, 5, 2], jnp.int32),
    "mask": jnp.ones(B, bool), "row": jnp.arange(B, dtype=jnp.int32), "index": jnp.arange(B, dtype=jnp.int32),
}  # fmt: skip
OBJECTIVE = gear.gear(MODEL, alpha=0.25, soft=0.4, momentum=0.9, queue_size=6)


def perturbed(tree):
    leaves, kind = jax.tree.flatten(unbox(tree))
    keys = jax.random.split(jax.random.key(7), len(leaves))
    noise = lambda x, key: x + 0.4 * jax.random.normal(key, x.shape) if x.ndim else x  # noqa: E731
    return jax.tree.unflatten(kind, [noise(x, k) for x, k in zip(leaves, keys, strict=True)])


@pytest.fixture(scope="module")
def fresh():
    return unbox(jax.jit(OBJECTIVE.init)(jax.random.key(0), BATCH))


@pytest.fixture(scope="module")
def variables(fresh):
    """Nothing keeps a value that hides a mistake; the teacher differs from the student."""
    params = perturbed(fresh["params"])
    teacher = jax.tree.map(lambda p: p + 0.05, gear.bi_encoder(params))
    return {**fresh, "params": params, "teacher": teacher}


@pytest.fixture(scope="module")
def outputs(variables):
    context = Context(rng=jax.random.key(1), train=False)
    return jax.jit(lambda v: OBJECTIVE.forward(v, BATCH, context)[0])(variables)


def run(variables, method, *args, **rest):
    return MODEL.apply({"params": variables["params"]}, *args, method=method, **rest)


def value(objective, params, variables, step=4, batch=BATCH, train=False):
    context = Context(rng=jax.random.key(1), step=jnp.int32(step), steps_per_epoch=jnp.int32(8), train=train,
                      collections=variables)  # fmt: skip
    outputs, _ = objective.forward({**variables, "params": params}, batch, context)
    return total_loss(objective.loss(outputs, batch, context), None, (), context)[0]


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


# --- the model --------------------------------------------------------------------------------------------------------


def test_names_of_words_and_blocks():
    assert MODEL.decoder_config.vocab_size == 20 and MODEL.decode_id == 19
    assert MODEL.decoder_config.causal and MODEL.decoder_config.cross_attention
    assert [GeAR(dataclasses.replace(SHAPE, depth=n)).shown_block for n in (1, 2, 6, 12)] == [0, 1, 4, 9]
    assert GeAR(SHAPE, attention_block=0).shown_block == 0
    own = GeAR(SHAPE, dataclasses.replace(SHAPE, vocab_size=30, depth=1))
    assert own.decode_id == 29 and own.decoder_config.depth == 1
    np.testing.assert_array_equal(gear.shift_right(jnp.array([[4, 5, 6], [7, 2, 0]]), 19), [[19, 4, 5], [19, 7, 2]])


def test_embeddings_are_unit_means_of_an_encoder_that_knows_no_fusion(variables, outputs):
    for name, text in (("query", QUERY), ("document", DOCUMENT)):
        params = gear.bi_encoder(variables["params"])[f"{name}_encoder"]
        assert not any("cross" in k for part in params.values() for k in part)
        tokens = np.asarray(BERT(SHAPE).apply({"params": params}, text["ids"], text["mask"])["tokens"], np.float64)
        mean = np.stack([t[m].mean(0) for t, m in zip(tokens, np.asarray(text["mask"]), strict=True)])
        np.testing.assert_allclose(outputs[name], mean / np.linalg.norm(mean, axis=1, keepdims=True), atol=1e-5)
        taught = BERT(SHAPE).apply({"params": variables["teacher"][f"{name}_encoder"]}, text["ids"], text["mask"])
        mean = np.stack(
            [t[m].mean(0) for t, m in zip(np.asarray(taught["tokens"]), np.asarray(text["mask"]), strict=True)]
        )
        expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        np.testing.assert_allclose(outputs[f"{name}_momentum"], expected, atol=1e-5)
    np.testing.assert_array_equal(outputs["embedding"], outputs["query"])
    assert np.abs(np.asarray(outputs["query"] - outputs["query_momentum"])).max() > 1e-4


def test_fusion_without_its_projection_is_the_query_encoder(fresh):
    params = jax.tree.map(lambda x: x, fresh["params"])
    out = params["query_encoder"]["layer0"]["cross_attention"]["out"]
    out["kernel"], out["bias"] = jnp.zeros_like(out["kernel"]), jnp.zeros_like(out["bias"])
    variables = {"params": params}
    states = run(variables, "encode_document", *DOCUMENT.values())["tokens"]
    fused, _ = run(variables, "fuse", *QUERY.values(), states, DOCUMENT["mask"])
    alone = run(variables, "encode_query", *QUERY.values())["tokens"]
    np.testing.assert_allclose(fused, alone, atol=1e-4)
    fused, _ = run(fresh, "fuse", *QUERY.values(), states, DOCUMENT["mask"])
    assert np.abs(np.asarray(fused - alone)).max() > 1e-2


def test_attention_is_one_blocks_over_real_document_tokens(variables):
    states = run(variables, "encode_document", *DOCUMENT.values())["tokens"]
    fused, shown = run(variables, "fuse", *QUERY.values(), states, DOCUMENT["mask"], show=True)
    assert shown.shape == (B, 2, 5, 8)
    np.testing.assert_allclose(jnp.sum(shown, -1), jnp.ones((B, 2, 5)), rtol=1e-5)
    assert not np.asarray(jnp.where(DOCUMENT["mask"][:, None, None], 0.0, shown)).any()
    quiet, none = run(variables, "fuse", *QUERY.values(), states, DOCUMENT["mask"])
    assert none is None
    np.testing.assert_array_equal(quiet, fused)
    # the states of padding are not read
    dirty = jnp.where(DOCUMENT["mask"][..., None], states, 7.0)
    np.testing.assert_allclose(run(variables, "fuse", *QUERY.values(), dirty, DOCUMENT["mask"])[0], fused, atol=1e-6)


def test_the_decoder_sees_neither_later_tokens_nor_padded_query_tokens(variables):
    fused = jax.random.normal(jax.random.key(5), (B, 5, 8))
    inputs = gear.shift_right(TARGET["ids"], 19)
    logits = run(variables, "decode_logits", inputs, fused, QUERY["mask"])
    assert logits.shape == (B, 4, 20)
    other = run(variables, "decode_logits", inputs.at[:, 2].set(11), fused, QUERY["mask"])
    np.testing.assert_allclose(other[:, :2], logits[:, :2], atol=1e-6)
    assert np.abs(np.asarray(other - logits))[:, 2:].max() > 1e-3
    dirty = jnp.where(QUERY["mask"][..., None], fused, 9.0)
    np.testing.assert_allclose(run(variables, "decode_logits", inputs, dirty, QUERY["mask"]), logits, atol=1e-6)
    moved = run(variables, "decode_logits", inputs, fused.at[:, 0].add(1.0), QUERY["mask"])
    assert np.abs(np.asarray(moved - logits)).max(-1).min() > 1e-4


# --- the objective ----------------------------------------------------------------------------------------------------


def test_the_loss_is_contrastive_plus_alpha_times_generation(variables, outputs):
    states = run(variables, "encode_document", *DOCUMENT.values())["tokens"]
    fused, _ = run(variables, "fuse", *QUERY.values(), states, DOCUMENT["mask"])
    inputs = np.concatenate([np.full((B, 1), 19), np.asarray(TARGET["ids"])[:, :-1]], 1)
    logits = np.asarray(
        run(variables, "decode_logits", jnp.asarray(inputs, jnp.int32), fused, QUERY["mask"]), np.float64
    )
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    lengths = np.asarray(TARGET["mask"]).sum(1)
    lm = [-np.mean([logs[i, j, int(TARGET["ids"][i, j])] for j in range(lengths[i])]) for i in range(B)]
    np.testing.assert_allclose(outputs["lm"], lm, rtol=1e-4)

    memory = {
        "rows": {
            "a": outputs["query_momentum"][::-1],
            "b": outputs["document_momentum"],
            "id": jnp.array([9, 1, 5, 0]),
        },
        "filled": jnp.array([True, True, False, True]),
    }
    context = Context(rng=jax.random.key(1), step=jnp.int32(6), steps_per_epoch=jnp.int32(8),
                      collections={**variables, "memory": memory})  # fmt: skip
    found = OBJECTIVE.loss(outputs, BATCH, context)
    tau = float(variables["params"]["tau"])
    contrastive = momentum_soft_contrastive(
        outputs["query"], outputs["document"], outputs["query_momentum"], outputs["document_momentum"], tau,
        0.4 * 6 / 8, BATCH["document_id"], None, memory,
    )  # fmt: skip
    np.testing.assert_allclose(found.elements.values, contrastive + 0.25 * np.asarray(lm), rtol=1e-4)
    np.testing.assert_allclose(found.metrics["contrastive"], jnp.mean(contrastive), rtol=1e-5)
    np.testing.assert_allclose(found.metrics["lm"], np.mean(lm), rtol=1e-4)
    assert float(found.metrics["tau"]) == pytest.approx(0.07) and float(found.metrics["soft"]) == pytest.approx(0.3)


def test_the_ramp_ends_with_its_epochs(variables, outputs):
    def share(step, **settings):
        objective = gear.gear(MODEL, soft=0.4, **settings)
        context = Context(rng=jax.random.key(1), step=jnp.int32(step), steps_per_epoch=jnp.int32(8), collections={})
        return float(objective.loss(outputs, BATCH, context).metrics["soft"])

    assert [share(s) for s in (0, 4, 8, 80)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert share(0, ramp_epochs=0) == pytest.approx(0.4) and share(8, ramp_epochs=2) == pytest.approx(0.2)


def test_plain_info_nce_without_opinion(variables, outputs):
    same = {**outputs, "query_momentum": outputs["query"], "document_momentum": outputs["document"]}
    context = Context(rng=jax.random.key(1), step=jnp.int32(9), steps_per_epoch=jnp.int32(1), collections={})
    alone = {**BATCH, "document_id": jnp.arange(B)}
    objective = gear.gear(MODEL, alpha=0.0, soft=0.0)
    logits = outputs["query"] @ outputs["document"].T / 0.07
    ce = optax.softmax_cross_entropy_with_integer_labels
    expected = (ce(logits, jnp.arange(B)) + ce(logits.T, jnp.arange(B))) / 2
    np.testing.assert_allclose(objective.loss(same, alone, context).elements.values, expected, rtol=1e-4)
    flat = {**same, **{k: jnp.ones((B, 8)) / math.sqrt(8) for k in same if "query" in k or "document" in k}}
    np.testing.assert_allclose(
        objective.loss(flat, alone, context).elements.values, jnp.full(B, math.log(B)), rtol=1e-5
    )


@pytest.fixture(scope="module")
def gradients(variables):
    """By alpha, with respect to the parameters; and with respect to the momentum encoders."""

    def scalar(params, teacher, alpha):
        return value(gear.gear(MODEL, alpha=alpha), params, {**variables, "teacher": teacher})

    @jax.jit
    def both(params, teacher):
        plain = jax.grad(scalar)(params, teacher, 0.0)
        return plain, *jax.grad(scalar, argnums=(0, 1))(params, teacher, 0.25)

    return dict(zip((0.0, 0.25, "teacher"), both(variables["params"], variables["teacher"]), strict=True))


def test_without_alpha_the_decoder_and_the_cross_attention_learn_nothing(gradients):
    assert largest(gradients[0.0]["decoder"]) == 0 < largest(gradients[0.25]["decoder"])
    own = {a: gradients[a]["query_encoder"]["layer0"]["cross_attention"] for a in (0.0, 0.25)}
    assert largest(own[0.0]) == 0 < largest(own[0.25])
    assert largest(gradients[0.0]["query_encoder"]) > 0 and largest(gradients[0.0]["document_encoder"]) > 0
    assert float(jnp.abs(gradients[0.0]["tau"])) > 0
    np.testing.assert_allclose(gradients[0.0]["tau"], gradients[0.25]["tau"], rtol=1e-4)


def test_the_generation_loss_reaches_both_encoders(gradients):
    for tower in ("query_encoder", "document_encoder"):
        change = jax.tree.map(lambda a, b: a - b, gradients[0.25][tower], gradients[0.0][tower])
        assert largest(change["embeddings"]) > 1e-6, tower


def test_no_gradient_reaches_the_momentum_encoders(gradients):
    assert largest(gradients["teacher"]) == 0


def test_the_teacher_starts_equal_and_follows_after_each_step(fresh, variables, outputs):
    np.testing.assert_array_equal(
        fresh["teacher"]["query_encoder"]["layer0"]["up"]["kernel"],
        fresh["params"]["query_encoder"]["layer0"]["up"]["kernel"],
    )
    assert "decoder" not in fresh["teacher"] and "cross_attention" not in fresh["teacher"]["query_encoder"]["layer0"]
    context = Context(rng=jax.random.key(1))
    changed = OBJECTIVE.after_step(variables, outputs, BATCH, context)
    jax.tree.map(
        lambda t, old, p: np.testing.assert_allclose(t, 0.9 * old + 0.1 * p, rtol=1e-5),
        changed["teacher"], variables["teacher"], gear.bi_encoder(variables["params"]),
    )  # fmt: skip
    old, new = {"x": jnp.array([1.0, 2.0])}, {"x": jnp.array([3.0, 6.0])}
    np.testing.assert_array_equal(gear.ema_update(old, new, 1.0)["x"], old["x"])
    np.testing.assert_array_equal(gear.ema_update(old, new, 0.0)["x"], new["x"])
    np.testing.assert_allclose(gear.ema_update(old, new, 0.75)["x"], [1.5, 3.0])


def test_the_queue_takes_the_momentum_embeddings_of_real_rows(variables, outputs):
    batch = {**BATCH, "mask": jnp.array([True, False, True, True])}
    memory = OBJECTIVE.after_step(variables, outputs, batch, Context(rng=jax.random.key(1)))["memory"]
    np.testing.assert_array_equal(memory["rows"]["id"], [5, 5, 2, 0, 0, 0])
    np.testing.assert_array_equal(memory["rows"]["a"][1], outputs["query_momentum"][2])
    np.testing.assert_array_equal(memory["rows"]["b"][2], outputs["document_momentum"][3])
    np.testing.assert_array_equal(memory["filled"], [True] * 3 + [False] * 3)
    assert "memory" not in gear.gear(MODEL).after_step(variables, outputs, BATCH, Context(rng=jax.random.key(1)))


def test_padding_anywhere_changes_nothing(variables):
    real = {k: jnp.where(BATCH[f"{k}_mask"], BATCH[k], 13) for k in ("query", "document", "target")}
    scalar = jax.jit(lambda batch: value(OBJECTIVE, variables["params"], variables, batch=batch))
    np.testing.assert_allclose(scalar({**BATCH, **real}), scalar(BATCH), rtol=1e-6)
    other = {k: jnp.where(BATCH[f"{k}_mask"], BATCH[k] % 5 + 3, BATCH[k]) for k in ("query", "document", "target")}
    assert abs(float(scalar({**BATCH, **other}) - scalar(BATCH))) > 1e-3


def test_dropout_has_a_key_for_each_part_and_spares_the_teacher(variables, outputs):
    context = Context(rng=jax.random.key(1))
    found = jax.jit(lambda v: OBJECTIVE.forward(v, BATCH, context)[0])(variables)
    keys = jax.vmap(lambda row: jax.random.fold_in(named_key(jax.random.key(1), "dropout"), row))(jnp.arange(B))
    for part, name, text in ((0, "query", QUERY), (1, "document", DOCUMENT)):
        expected = run(variables, f"encode_{name}", *text.values(), keys=layer_keys(keys, part))
        np.testing.assert_allclose(found[name], expected["embedding"], atol=1e-5)
        assert np.abs(np.asarray(found[name] - outputs[name])).max() > 1e-3
        np.testing.assert_allclose(found[f"{name}_momentum"], outputs[f"{name}_momentum"], atol=1e-6)
    assert np.abs(np.asarray(found["lm"] - outputs["lm"])).max() > 1e-3
    assert float(found["tau"].value) == pytest.approx(float(clamped_temperature(variables["params"]["tau"])))


# --- localisation and generation --------------------------------------------------------------------------------------


def test_localisation_by_hand():
    # two heads, three query tokens of which the middle counts, five document tokens
    probabilities = (
        jnp.zeros((1, 2, 3, 5)).at[0, :, 1].set(jnp.array([[0.1, 0.2, 0.3, 0.15, 0.25], [0.3, 0.0, 0.1, 0.35, 0.25]]))
    )
    probabilities = probabilities.at[0, :, 0, 4].set(1.0)
    query = jnp.array([[False, True, False]])
    document = jnp.array([[True, True, True, True, False]])
    owner = jnp.array([[-1, 0, 0, 1, 1]], jnp.int32)
    found = gear.attention_localize(probabilities, query, document, owner, 3)
    np.testing.assert_allclose(found[0, :2], [(0.1 + 0.2) / 2, 0.25], rtol=1e-6)
    assert found[0, 2] == -jnp.inf
    found = gear.attention_localize(probabilities, query, document, owner, 3, "sum")
    np.testing.assert_allclose(found[0, :2], [0.3, 0.25], rtol=1e-6)
    # two rows do not mix, and ids beyond S belong to none
    two = lambda x: jnp.concatenate([x, x])  # noqa: E731
    owners = jnp.array([[1, 1, 0, 2, 0], [-1, 0, 0, 1, 1]], jnp.int32)
    found = gear.attention_localize(two(probabilities), two(query), two(document), owners, 2)
    np.testing.assert_allclose(found, [[0.2, 0.15], [0.15, 0.25]], rtol=1e-6)
    both = gear.attention_localize(probabilities, jnp.array([[True, True, False]]), document | True, owner, 2)
    np.testing.assert_allclose(both[0], [0.15 / 2, (0.25 + 1.25) / 2 / 2], rtol=1e-6)
    with pytest.raises(ValueError, match="reduce must be 'mean' or 'sum', got 'max'"):
        gear.attention_localize(probabilities, query, document, owner, 3, "max")


def test_ends_are_left_out_where_something_is_between():
    mask = jnp.arange(5) < jnp.array([[5], [3], [2], [1], [0]])
    expected = [[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [0] * 5]
    np.testing.assert_array_equal(gear.without_ends(mask), np.array(expected, bool))


def test_localise_is_fusion_seen_through_sentences(variables):
    states = run(variables, "encode_document", *DOCUMENT.values())["tokens"]
    owner = jnp.broadcast_to(jnp.array([-1, 0, 0, 0, 1, 1, 2, 2], jnp.int32), (B, 8))
    scores, fused = gear.localize(MODEL, variables, *QUERY.values(), states, DOCUMENT["mask"], owner, 3)
    expected, shown = run(variables, "fuse", *QUERY.values(), states, DOCUMENT["mask"], show=True)
    np.testing.assert_array_equal(fused, expected)
    inner = np.asarray(gear.without_ends(QUERY["mask"]))
    for i in range(B):
        weight = np.asarray(shown)[i].mean(0)[inner[i]].mean(0)
        for s in range(3):
            own = (np.asarray(owner)[i] == s) & np.asarray(DOCUMENT["mask"])[i]
            assert float(scores[i, s]) == (pytest.approx(weight[own].mean(), rel=1e-4) if own.any() else -np.inf)
    given = gear.localize(MODEL, variables, *QUERY.values(), states, DOCUMENT["mask"], owner, 3, QUERY["mask"], "sum")[
        0
    ]
    direct = gear.attention_localize(shown, QUERY["mask"], DOCUMENT["mask"], owner, 3, "sum")
    np.testing.assert_array_equal(given, direct)


def test_generation_is_the_argmax_without_a_cache(variables):
    # a scorer that does not prefer one word whatever stands before it
    variables = jax.tree.map(lambda x: x, variables)
    words = variables["params"]["decoder"]["embeddings"]["word"]
    words["embedding"] = jax.random.normal(jax.random.key(4), words["embedding"].shape)
    variables["params"]["decoder"]["mlm"]["norm"]["bias"] *= 0
    fused = jax.random.normal(jax.random.key(9), (B, 5, 8)) * 2
    logits = jax.jit(lambda made: run(variables, "decode_logits", made, fused, QUERY["mask"]))
    made = np.full((B, 7), 19, np.int32)
    for t in range(6):
        made[:, t + 1] = np.argmax(logits(jnp.asarray(made))[:, t], -1)
    made = made[:, 1:].tolist()
    assert len({t for row in made for t in row}) > 2
    # a token that comes late in some row as the stop
    late = lambda t: max(r.index(t) for r in made if t in r)  # noqa: E731
    stop = max((t for row in made for t in row), key=late)
    expected = [r[: r.index(stop)] + [stop] * (6 - r.index(stop)) if stop in r else r for r in made]
    found = jax.jit(lambda v: gear.generate(MODEL, v, fused, QUERY["mask"], 6, stop))(variables)
    assert found.tolist() == expected
    assert max(r.index(stop) for r in made if stop in r) >= 2


def test_beams_are_those_of_the_decoder_without_a_cache(variables):
    fused, beams, length = jax.random.normal(jax.random.key(9), (B, 5, 8)) * 2, 3, 4
    logits = jax.jit(lambda made, f, m: run(variables, "decode_logits", made, f, m))
    expected = []
    for i in range(B):
        context = jnp.repeat(fused[i : i + 1], beams, 0), jnp.repeat(QUERY["mask"][i : i + 1], beams, 0)
        kept = [((), 0.0)]
        for t in range(length):
            inputs = np.full((beams, length), 19, np.int32)
            for n, (tokens, _) in enumerate(kept):
                inputs[n, 1 : t + 1] = tokens[:t]
            logs = np.asarray(jax.nn.log_softmax(logits(jnp.asarray(inputs), *context)), np.float64)[:, t]
            longer = []
            for n, (tokens, total) in enumerate(kept):
                words = [(STOP, 0.0)] if STOP in tokens else list(enumerate(logs[n]))
                longer += [((*tokens, w), total + x) for w, x in words]
            kept = sorted(longer, key=lambda x: -x[1])[:beams]
        size = lambda tokens: tokens.index(STOP) + 1 if STOP in tokens else length  # noqa: E731
        expected.append(list(max(kept, key=lambda x: x[1] / size(x[0]))[0]))
    found = jax.jit(lambda v: gear.generate(MODEL, v, fused, QUERY["mask"], length, STOP, beams))(variables)
    assert found.tolist() == expected


# --- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha must not be negative, got -0.1"),
        ({"soft": 1.1}, r"soft must lie in \[0, 1\], got 1.1"),
        ({"soft": -0.1}, r"soft must lie in \[0, 1\], got -0.1"),
        ({"momentum": 1.01}, r"momentum must lie in \[0, 1\], got 1.01"),
        ({"momentum": -0.01}, r"momentum must lie in \[0, 1\]"),
        ({"queue_size": -1}, "must not be negative, got -1 and 1.0"),
        ({"ramp_epochs": -1}, "must not be negative, got 0 and -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        gear.gear(MODEL, **settings)


def test_a_temperature_or_a_length_that_cannot_be_is_named(variables):
    for tau in (0.0, -0.07):
        with pytest.raises(ValueError, match="tau must be positive"):
            gear.gear(GeAR(SHAPE, initial_tau=tau))
    fused = jnp.ones((1, 5, 8))
    for length, message in ((11, "there are positions for 10"), (0, "length must be at least 1")):
        with pytest.raises(ValueError, match=message):
            gear.generate(MODEL, variables, fused, QUERY["mask"][:1], length, STOP)
    for beams in (0, -1):
        with pytest.raises(ValueError, match="beams must be at least 1"):
            gear.generate(MODEL, variables, fused, QUERY["mask"][:1], 3, STOP, beams=beams)
