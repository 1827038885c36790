"""Heads and fused parameters over several devices."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.loading.parameters import fill
from jaxengine.models.config import ModelConfig
from jaxengine.models.layers.param import ParameterSpec
from jaxengine.sharding.layout import ZEROS, Part, check_divides, cut, head_layout


def read(spec: ParameterSpec, tensors: list, index: tuple[slice, slice]) -> np.ndarray:
    """The part `index` of a parameter of two axes, which is made of these tensors."""
    spans = (range(*part.indices(size)) for part, size in zip(index, spec.shape, strict=True))
    out = np.full(tuple(map(len, spans)), -1, np.int64)
    fill(out, spec, [tensors], index)
    return out


@given(st.integers(1, 12), st.integers(1, 8), st.integers(1, 8))
def test_every_query_head_finds_its_keys(num_kv_heads, group, size):
    num_heads = num_kv_heads * group
    layout = head_layout(num_heads, num_kv_heads, size)
    assert layout.num_heads % size == layout.num_kv_heads % size == 0
    assert [head for head in layout.q_heads if head != ZEROS] == list(range(num_heads))
    assert set(layout.kv_heads) - {ZEROS} == set(range(num_kv_heads))
    own_group = layout.num_heads // layout.num_kv_heads
    for i, head in enumerate(layout.q_heads):
        if head != ZEROS:
            assert layout.kv_heads[i // own_group] == head // group
    if num_kv_heads % size == 0:
        assert not layout.is_padded
        assert layout.kv_heads == tuple(range(num_kv_heads))


def test_few_key_value_heads_are_copied_and_odd_ones_filled_up():
    assert head_layout(32, 8, 16).kv_heads == (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7)
    smollm2 = head_layout(9, 3, 2)
    assert (smollm2.num_heads, smollm2.kv_heads) == (12, (0, 1, 2, ZEROS))
    assert smollm2.q_heads[8:] == (8, ZEROS, ZEROS, ZEROS)


@given(st.data())
def test_parts_of_a_parameter_are_read_from_the_right_places(data):
    size = data.draw(st.integers(1, 4))
    layout = head_layout(data.draw(st.integers(1, 3)) * (kv := data.draw(st.integers(1, 4))), kv, size)
    real, width = len(set(layout.q_heads) - {ZEROS}), 2
    counts = (real, kv, kv)
    tensors = [np.arange(n * width * 5).reshape(-1, 5) + 1000 * i for i, n in enumerate(counts)]
    units = (layout.q_heads, layout.kv_heads, layout.kv_heads)
    parts = tuple(Part(name, n * width, width, own) for name, n, own in zip("qkv", counts, units, strict=True))
    shape = (sum(map(len, units)) * width, 5)
    spec = ParameterSpec(shape, "int64", (None, None), parts=(parts, ()), num_devices=size)
    # What each device should hold: its share of every part, one after the other.
    whole = []
    for device in range(size):
        for tensor, heads in zip(tensors, units, strict=True):
            share = len(heads) // size
            for head in heads[device * share : (device + 1) * share]:
                zeros = np.zeros((width, 5), np.int64)
                whole.append(zeros if head == ZEROS else tensor[head * width : (head + 1) * width])
    whole = np.concatenate(whole)
    start = data.draw(st.integers(0, shape[0] - 1))
    stop = data.draw(st.integers(start + 1, shape[0]))
    got = read(spec, tensors, (slice(start, stop), slice(1, 4)))
    np.testing.assert_array_equal(got, whole[start:stop, 1:4])


def test_columns_are_read_from_the_right_places():
    tensor = np.arange(12).reshape(2, 6)
    columns = ((2, 4), (ZEROS, 2), (0, 2))
    spec = ParameterSpec((2, 8), "int64", (None, None), parts=((), (Part("", 6, 2, (1, 2, ZEROS, 0)),)))
    assert spec.runs == ((), columns)
    got = read(spec, [tensor], (slice(None), slice(3, 7)))
    np.testing.assert_array_equal(got, np.concatenate([tensor, np.zeros((2, 2), int)], axis=1)[:, [5, 6, 7, 0]])
    assert cut(columns, 3, 7) == ((5, 1), (ZEROS, 2), (0, 1))


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(
        ValueError, match="tensor_parallel_size=5 does not divide intermediate_size=24; sizes that do: 1, 2"
    ):
        check_divides("intermediate_size", 24, 5)
    fields: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 8,
        "intermediate_size": 24,
        "head_dim": 4,
        "vocab_size": 8,
    }
    fields |= {"num_heads": 3, "num_kv_heads": 3, "qk_norm": "projection"}
    with pytest.raises(ValueError, match="cannot be filled up with zeros"):
        ModelConfig("Olmo2ForCausalLM", **fields, tensor_parallel_size=2)
