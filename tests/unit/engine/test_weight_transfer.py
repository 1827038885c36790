"""Arrays on their way to a core: all that come are as they were sent, whatever their kind and shape."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxengine.engine import wire
from jaxengine.engine.weight_transfer import ReceivedWeights, pieces

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int32", "int64", "bool"]


def sent(names: list[str], arrays: list[np.ndarray]) -> wire.Call:
    """A call as the core reads it."""
    first, *frames = wire.encode_frames(wire.Call(3, "receive_weights", [names, arrays]))
    message = wire.decode_to_core(first, [memoryview(frame) for frame in frames])
    assert isinstance(message, wire.Call)
    return message


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.booleans()), max_size=5))
def test_arrays_come_as_they_were_sent(kinds):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 2, (*shape[::-1],)).astype(ml_dtypes.bfloat16).astype(dtype) for dtype, shape, _ in kinds]
    arrays = [array.T if is_transposed else array for array, (*_, is_transposed) in zip(arrays, kinds, strict=True)]
    names = [str(index) for index in range(len(arrays))]
    message = sent(names, arrays)
    assert (message.id, message.method, message.args[0]) == (3, "receive_weights", names)
    for ours, theirs in zip(arrays, message.args[1], strict=True):
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert theirs.tobytes() == ours.tobytes()


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 100))
def test_pieces_are_whole_and_small_and_taken_one_by_one(sizes, piece_bytes):
    num_asked = 0

    def weights():
        nonlocal num_asked
        for index, size in enumerate(sizes):
            num_asked += 1
            yield str(index), np.full(size, index, np.uint8)

    received = ReceivedWeights()
    num_sent = 0
    for piece in pieces(weights(), piece_bytes):
        assert sum(array.nbytes for _, array in piece) <= piece_bytes or len(piece) == 1
        num_sent += len(piece)
        assert num_asked <= num_sent + 1  # no more of them than what is on its way and the first of what follows
        received.receive(*map(list, zip(*piece, strict=True)))
    taken = dict(received.take())
    assert list(taken) == [str(index) for index in range(len(sizes))]
    assert all((taken[str(index)] == np.full(size, index)).all() for index, size in enumerate(sizes))
    assert dict(received.take()) == {}


def test_arrays_of_jax_and_of_the_other_byte_order_are_taken():
    given: list[tuple[str, Any]] = [("a", jnp.ones((2, 3), jnp.bfloat16)), ("b", np.arange(3, dtype=">i4"))]
    (piece,) = pieces(given)
    (_, first), (_, second) = piece
    assert (first.dtype, first.shape) == (ml_dtypes.bfloat16, (2, 3))
    assert second.dtype == np.int32
    assert sent(["a", "b"], [first, second]).args[1][1].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "wrong",
    [5, "ab", ("name",), (5, np.ones(2)), ("w", "text"), ("w", [1.0]), ("w", None), ("w", np.array(["x"]))],
    ids=str,
)
def test_what_is_no_weight_is_refused_by_its_name(wrong):
    with pytest.raises(ValueError, match="weights: "):
        list(pieces([("right", np.ones(2)), wrong]))


def test_a_call_that_cannot_be_read_names_itself():
    data = wire.encode(["Call", 12, 5])
    with pytest.raises(ValueError, match="Expected `str`"):
        wire.decode_to_core(data)
    assert wire.call_id_of(data) == 12
    assert wire.call_id_of(wire.encode(["Add", [12], 5])) is None
    first, frame = wire.encode_frames(wire.Call(7, "receive_weights", [["a"], [np.ones(3)]]))
    with pytest.raises(ValueError, match="buffer"):
        wire.decode_to_core(first, [memoryview(frame)[:5]])
    assert wire.call_id_of(first) == 7


@pytest.mark.parametrize("error", [ValueError("wrong"), wire.EngineStateError("not now"), KeyError("own")])
def test_errors_come_by_their_kind(error):
    result = wire.decode_to_front(wire.encode(wire.Result.of_error(4, "sleep", error)))
    assert isinstance(result, wire.Result)
    kind = RuntimeError if isinstance(error, KeyError) else type(error)
    with pytest.raises(kind, match="sleep has failed: KeyError: 'own'" if kind is RuntimeError else str(error)):
        result.get()
    assert wire.Result(4, [1, True]).get() == [1, True]
