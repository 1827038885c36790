"""The sampler against numpy, row by row, in mixed batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxengine.request import Request
from jaxengine.runner.input_batch import request_features
from jaxengine.sampling import filters
from jaxengine.sampling.filters import FEW, filter_logits, top_few
from jaxengine.sampling.logprobs import gather_logprobs, top_k
from jaxengine.sampling.sampler import (
    EVERY_FEATURE,
    FEATURE_SETS,
    Feature,
    SamplingRows,
    feature_set,
    mask_logits,
    sample,
)
from jaxengine.sampling.state import make_sampling_state, set_slot, slot_values
from jaxengine.sampling_params import SamplingParams

VOCAB = 97


def kept_by_numpy(logits, top_k, top_p, min_p):
    """Token ids that vLLM's definition keeps: by sorting."""
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    kept = probabilities >= min_p * probabilities.max()
    order = np.argsort(-np.where(kept, logits, -np.inf), kind="stable")
    order = order[: kept.sum()]
    order = order[: top_k if top_k > 0 else VOCAB]
    if top_p >= 1:
        return set(order.tolist())
    mass = np.cumsum(probabilities[order]) / probabilities[order].sum()
    return set(order[: int(np.searchsorted(mass, top_p - 1e-6)) + 1].tolist())


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(0, 1.0, 0.0), (1, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (0, 1.0, 0.2), (20, 0.5, 0.05), (1000, 0.01, 0.0)],
)
def test_filters_keep_what_sorting_keeps(top_k, top_p, min_p):
    logits = np.random.default_rng(0).normal(size=(6, VOCAB)).astype(np.float32) * 2
    rows = [jnp.full(6, x, d) for x, d in ((top_k, jnp.int32), (top_p, jnp.float32), (min_p, jnp.float32))]
    for has_small_k in (False, True) if top_k <= FEW else (False,):
        got = np.asarray(jax.jit(functools.partial(filter_logits, has_small_k=has_small_k))(logits, *rows))
        for row in range(6):
            assert set(np.flatnonzero(np.isfinite(got[row]))) == kept_by_numpy(logits[row], top_k, top_p, min_p)
        finite = np.isfinite(got)
        np.testing.assert_array_equal(got[finite], logits[finite])


@pytest.mark.parametrize("find", [filters._bit_by_bit, filters._several_bits_at_a_time])
def test_thresholds_are_exact(find):
    rng = np.random.default_rng(2)
    keys = rng.integers(0, 2**32, (7, 333), dtype=np.uint32)
    keys[1] = 2**32 - 1
    keys[2, ::2] = keys[2, 0]
    weights = rng.integers(0, 5, keys.shape).astype(np.float32)
    total = weights.sum(axis=1)
    target = np.array([1, total[1], total[2] // 2, total[3], 3, total[5] / 3, total[6] - 1], np.float32)
    found = np.asarray(jax.jit(find)(keys, weights, target))
    for row, threshold in enumerate(found):
        assert weights[row][keys[row] >= threshold].sum() >= target[row]
        higher = int(threshold) + 1
        assert higher == 2**32 or weights[row][keys[row] >= higher].sum() < target[row]


def test_top_k_keeps_ties_and_banned_tokens_stay_banned():
    logits = np.full((1, VOCAB), -np.inf, np.float32)
    logits[0, :4] = [3.0, 2.0, 2.0, 1.0]
    got = np.asarray(filter_logits(jnp.asarray(logits), jnp.array([2]), jnp.array([1.0]), jnp.array([0.0])))
    assert np.flatnonzero(np.isfinite(got[0])).tolist() == [0, 1, 2]


def test_logprobs_ranks_and_order():
    logits = np.random.default_rng(1).normal(size=(3, VOCAB)).astype(np.float32)
    got = gather_logprobs(jnp.asarray(logits), jnp.array([5, 6, 7]), 4)
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for row in range(3):
        order = np.argsort(-want[row])
        assert got.token_ids[row].tolist() == [5 + row, *order[:4].tolist()]
        np.testing.assert_allclose(got.logprobs[row], want[row][np.asarray(got.token_ids[row])], atol=1e-5)
        assert got.ranks[row] == 1 + order.tolist().index(5 + row)


def test_the_best_of_many_columns_come_in_order():
    x = np.random.default_rng(3).integers(-40, 40, (4, 3001)).astype(np.float32)
    x[1] = -np.inf
    x[2, 5:] = -np.inf
    best, ids = jax.jit(top_k, static_argnums=1)(x, 7)
    order = np.argsort(-x, axis=1, kind="stable")[:, :7]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(best, np.take_along_axis(x, order, axis=1))


def numpy_logits(logits, params, prompt, outputs, stops):
    """What argmax sees: the rules of vLLM in plain Python."""
    x = logits.astype(np.float64).copy()
    if params.allowed_token_ids is not None:
        x[[t for t in range(VOCAB) if t not in params.allowed_token_ids]] = -np.inf
    for word in params.bad_words_token_ids or ():
        if word[:-1] == (outputs[-(len(word) - 1) :] if len(word) > 1 else []):
            x[word[-1]] = -np.inf
    if len(outputs) < params.min_tokens:
        x[list(stops)] = -np.inf
    for token, value in (params.logit_bias or {}).items():
        x[token] += value
    for token in set(prompt) | set(outputs):
        x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
    for token in set(outputs):
        x[token] -= params.frequency_penalty * outputs.count(token) + params.presence_penalty
    return x


def make_params(bad_words=None, **kwargs):
    params = SamplingParams(temperature=kwargs.pop("temperature", 0), max_tokens=50, **kwargs)
    params.bad_words_token_ids = bad_words
    return params


GREEDY_ROWS = [
    make_params(),
    make_params(allowed_token_ids=[3, 4, 5]),
    make_params(logit_bias={7: 100.0}),
    make_params(bad_words=[[11], [1, 2, 12], [12, 13]]),
    make_params(min_tokens=30, logit_bias={0: 50.0, 9: 40.0}),
    make_params(repetition_penalty=1.9),
    make_params(frequency_penalty=1.5, presence_penalty=-0.5),
    make_params(repetition_penalty=0.5, logit_bias={3: 2.0}, min_tokens=3, bad_words=[[3]]),
]


def run_rows(all_params, steps=12, processors=(), seed=0, features=EVERY_FEATURE):
    """Samples `steps` tokens for all rows together from random logits; returns tokens and the logits of each step."""
    rng = np.random.default_rng(seed)
    num_slots = len(all_params) + 2
    state = make_sampling_state(num_slots, VOCAB)
    requests = [
        Request(str(i), rng.integers(1, VOCAB, 6).tolist(), p, 50, frozenset({0})) for i, p in enumerate(all_params)
    ]
    slots = rng.permutation(num_slots)[: len(all_params)]
    for request, slot in zip(requests, slots, strict=True):
        state = set_slot(state, jnp.int32(slot), slot_values(request, VOCAB))
    last_token = jnp.zeros(num_slots, jnp.int32)
    step = jax.jit(functools.partial(sample, features=features, processors=processors, num_top=5))
    drawn, outputs = [], [[] for _ in requests]
    for position in range(steps):
        logits = rng.normal(size=(len(requests), VOCAB)).astype(np.float32) * 2

        def field(read, dtype):
            return jnp.asarray([read(p) for p in all_params], dtype)

        def wanted(params, position=position):
            bits = request_features(params)
            return bits & ~Feature.MIN_TOKENS if position >= params.min_tokens else bits

        rows = SamplingRows(
            slot=jnp.asarray(slots, jnp.int32),
            samples=jnp.ones(len(requests), jnp.int32),
            features=field(wanted, jnp.int32),
            processors=field(lambda p: 1 if request_features(p) & Feature.PROCESSORS else 0, jnp.int32),
            seed=field(lambda p: p.seed or 0, jnp.int32),
            position=jnp.full(len(requests), position, jnp.int32),
            top_k=field(lambda p: p.top_k, jnp.int32),
            temperature=field(lambda p: p.temperature or 1.0, jnp.float32),
            top_p=field(lambda p: p.top_p, jnp.float32),
            min_p=field(lambda p: p.min_p, jnp.float32),
            repetition=field(lambda p: p.repetition_penalty, jnp.float32),
            presence=field(lambda p: p.presence_penalty, jnp.float32),
            frequency=field(lambda p: p.frequency_penalty, jnp.float32),
        )
        kept, last_token, tokens, _ = step(logits, rows, state if features == EVERY_FEATURE else None, last_token)
        state = state if kept is None else kept
        drawn.append((logits, [list(o) for o in outputs], np.asarray(tokens)))
        for output, token in zip(outputs, np.asarray(tokens).tolist(), strict=True):
            output.append(token)
    return requests, drawn, (state, last_token), slots


def test_every_rule_in_one_batch_matches_plain_python():
    requests, drawn, (state, last_token), slots = run_rows(GREEDY_ROWS)
    for logits, outputs, tokens in drawn:
        for row, request in enumerate(requests):
            x = numpy_logits(
                logits[row], request.sampling_params, request.prompt_token_ids, outputs[row], request.stop_token_ids
            )
            assert tokens[row] == np.argmax(x), (row, request.sampling_params)
    last = drawn[-1][2]
    np.testing.assert_array_equal(np.asarray(last_token)[slots], last)
    counts = np.asarray(state.output_counts)[slots]
    assert (counts.sum(axis=1) == len(drawn)).all()


def test_a_seed_gives_the_same_tokens_whatever_else_is_in_the_batch():
    random_row = make_params(temperature=1.3, seed=7, top_p=0.9)
    alone = run_rows([random_row], seed=3, features=Feature.RANDOM | Feature.FILTER | Feature.WIDE)[1]
    batch = run_rows([random_row, *GREEDY_ROWS, make_params(temperature=1.0, seed=8)], seed=3)[1]
    for one, many in zip(alone, batch, strict=True):
        for logits, _, tokens in (one, many):
            noise = jax.random.gumbel(jax.random.fold_in(jax.random.key(7), len(one[1][0])), (VOCAB,))
            x = np.asarray(
                filter_logits(jnp.asarray(logits[:1]) / 1.3, jnp.array([0]), jnp.array([0.9]), jnp.array([0.0]))
            )
            assert tokens[0] == np.argmax(x[0] + np.asarray(noise))


def test_a_greedy_row_among_random_ones_gets_its_argmax():
    for features in FEATURE_SETS:
        rows = [make_params(), make_params(temperature=5.0, seed=1, top_k=FEW)]
        _, drawn, _, _ = run_rows(rows, features=features)
        assert all(tokens[0] == np.argmax(logits[0]) for logits, _, tokens in drawn)
        assert any(tokens[1] != np.argmax(logits[1]) for logits, _, tokens in drawn)


@pytest.mark.parametrize("vocab_size", [1, 31, 32, 97])
def test_masks_of_packed_bits(vocab_size):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(5, vocab_size)).astype(np.float32)
    allowed = rng.random((5, vocab_size)) < 0.5
    allowed[0] = True
    bits = np.zeros((5, -(-vocab_size // 32) * 32), np.uint8)
    bits[:, :vocab_size] = allowed
    bitmask = np.packbits(bits, axis=1, bitorder="little").view(np.int32)
    masked = mask_logits(jnp.asarray(logits), jnp.asarray(bitmask))
    np.testing.assert_array_equal(masked, np.where(allowed, logits, -np.inf))


def test_the_smallest_sampler_is_chosen():
    wanted = (
        Feature.RANDOM | Feature.WIDE,
        Feature.RANDOM | Feature.FILTER,
        Feature.RANDOM | Feature.FILTER | Feature.WIDE,
        Feature.MIN_TOKENS,
    )
    assert [feature_set(x) for x in wanted] == list(FEATURE_SETS)
    assert feature_set(Feature.RANDOM) == Feature.RANDOM | Feature.WIDE  # what masks of grammars ask for
    few, many = {"temperature": 1.0, "top_k": FEW}, {"temperature": 1.0, "top_k": FEW + 1}
    for params, features in (
        (few, Feature.RANDOM | Feature.FILTER),
        (few | {"top_p": 0.9, "min_p": 0.1}, Feature.RANDOM | Feature.FILTER),
        (many, EVERY_FEATURE),
        ({"temperature": 1.0, "top_p": 0.9}, Feature.RANDOM | Feature.FILTER | Feature.WIDE),
        ({"temperature": 1.0}, Feature.RANDOM | Feature.WIDE),
    ):
        assert feature_set(request_features(make_params(**params))) == features


@pytest.mark.parametrize("vocab_size", [5, 64, 8192, 8193, 20_000])
def test_the_largest_few(vocab_size):
    rng = np.random.default_rng(vocab_size)
    logits = rng.permuted(np.tile(np.linspace(-9, 9, vocab_size, dtype=np.float32), (6, 1)), axis=1)
    logits[1] = np.sort(logits[1])  # all of them neighbours
    logits[2, :-3] = -np.inf
    values, ids = jax.jit(top_few)(logits)
    want = -np.sort(-logits, axis=1)[:, :FEW]
    np.testing.assert_array_equal(values, want)
    found = np.take_along_axis(logits, np.asarray(ids), axis=1)
    np.testing.assert_array_equal(np.where(want == -np.inf, want, found), want)


def test_a_draw_among_few_is_that_among_all():
    vocab_size, num = 20_001, 40
    rng = np.random.default_rng(0)
    params = [
        make_params(
            temperature=0.0 if i % 8 == 7 else rng.choice([0.5, 1.0, 3.0]),
            top_k=int(rng.choice([1, 2, 20, FEW])),
            top_p=rng.choice([0.3, 0.9, 1.0]),
            min_p=rng.choice([0.0, 0.05]),
        )
        for i in range(num)
    ]

    def field(read, dtype):
        return jnp.asarray([read(p) for p in params], dtype)

    rows = SamplingRows(
        slot=jnp.arange(num, dtype=jnp.int32),
        samples=jnp.ones(num, jnp.int32),
        features=field(request_features, jnp.int32),
        processors=jnp.zeros(num, jnp.int32),
        seed=jnp.arange(num, dtype=jnp.int32),
        position=jnp.arange(num, dtype=jnp.int32) % 5,
        top_k=field(lambda p: p.top_k, jnp.int32),
        temperature=field(lambda p: p.temperature or 1.0, jnp.float32),
        top_p=field(lambda p: p.top_p, jnp.float32),
        min_p=field(lambda p: p.min_p, jnp.float32),
        **{n: jnp.ones(num) for n in ("repetition", "presence", "frequency")},
    )
    last_token = jnp.zeros(num, jnp.int32)
    draws = [
        jax.jit(functools.partial(sample, features=features, processors=(), num_top=1))
        for features in (Feature.RANDOM | Feature.FILTER, Feature.RANDOM | Feature.FILTER | Feature.WIDE)
    ]
    for _ in range(3):
        logits = rng.normal(size=(num, vocab_size)).astype(np.float32) * 3
        few, all_ = (np.asarray(draw(logits, rows, None, last_token)[2]) for draw in draws)
        np.testing.assert_array_equal(few, all_)
        assert (few[7::8] == logits.argmax(axis=1)[7::8]).all()
        assert (few != logits.argmax(axis=1)).sum() > num // 8


def test_draws_follow_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    num = 4000
    rows = SamplingRows(
        slot=jnp.zeros(num, jnp.int32),
        samples=jnp.zeros(num, jnp.int32),
        features=jnp.full(num, request_features(make_params(temperature=1.0)), jnp.int32),
        processors=jnp.zeros(num, jnp.int32),
        seed=jnp.arange(num, dtype=jnp.int32),
        position=jnp.zeros(num, jnp.int32),
        top_k=jnp.zeros(num, jnp.int32),
        **{n: jnp.ones(num) for n in ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")},
    )
    last_token = jnp.zeros(1, jnp.int32)
    _, _, tokens, _ = sample(
        jnp.tile(logits, (num, 1)),
        rows,
        None,
        last_token,
        features=Feature.RANDOM | Feature.WIDE,
        processors=(),
        num_top=1,
    )
    shares = np.bincount(np.asarray(tokens), minlength=4) / num
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_logits_processor_sees_its_own_request():
    def only_even_after_three(logits, state):
        odd = jnp.arange(VOCAB) % 2 == 1
        return jnp.where(odd & (state.num_output_tokens >= 3), -jnp.inf, logits)

    rows = [make_params(logits_processors=[only_even_after_three]), make_params()]
    _, drawn, _, _ = run_rows(rows, processors=(only_even_after_three,))
    processed = [int(tokens[0]) for _, _, tokens in drawn]
    assert all(token % 2 == 0 for token in processed[3:])
    assert any(token % 2 == 1 for token in processed[:3]) or drawn[0][0][0].argmax() % 2 == 0
    assert all(tokens[1] == logits[1].argmax() for logits, _, tokens in drawn)
