"""One step's inputs in one int32 buffer: one copy to the device a step."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxengine.models.step import SlotRows
from jaxengine.pallas_kernels.ragged_paged_attention import AttentionMetadata
from jaxengine.runner.buckets import Bucket
from jaxengine.runner.page_tables import PageTables
from jaxengine.sampling.filters import FEW
from jaxengine.sampling.sampler import GREEDY, Feature, SamplingRows
from jaxengine.scheduler.batch import ScheduledBatch, ScheduledSequence

INT_FIELDS = ("slot", "samples", "features", "processors", "seed", "position", "top_k")
FLOAT_FIELDS = ("temperature", "top_p", "min_p", "repetition", "presence", "frequency")
ALL_BUT_MIN_TOKENS = ~Feature.MIN_TOKENS.value
NO_SLOT = 2**31 - 1


class StepInputs(NamedTuple):
    """What the model's part of a step reads, on the device.

    Attributes:
        token_ids: i32[T], -1 where the token is the one sampled last in the sequence's slot.
        positions: i32[T].
        last_rows: i32[S], row of each sequence's last token.
        attention: Of each cache group.
        slots: Of layers with states.
        rows: The sampler's part.
    """

    token_ids: jax.Array
    positions: jax.Array
    last_rows: jax.Array
    attention: tuple[AttentionMetadata, ...]
    slots: SlotRows
    rows: SamplingRows


class _Layout:
    """Where fields of given shapes lie in an int32 buffer, one after the other."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        self._shapes = shapes
        self._offsets, self.size = {}, 0
        for name, shape in shapes.items():
            self._offsets[name] = self.size
            self.size += math.prod(shape)

    def fields(self, buffer: Any) -> dict[str, Any]:
        """Returns the fields by name, as views if the buffer is one of numpy's."""
        return {
            name: buffer[self._offsets[name] : self._offsets[name] + math.prod(shape)].reshape(shape)
            for name, shape in self._shapes.items()
        }


class RowLayout(_Layout):
    """The sampling parameters of S sequences."""

    def __init__(self, num_seqs: int):
        super().__init__(dict.fromkeys(INT_FIELDS + FLOAT_FIELDS, (num_seqs,)))
        self.num_seqs = num_seqs

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Returns the fields as writable views of a host buffer."""
        fields = self.fields(buffer)
        return fields | {name: fields[name].view(np.float32) for name in FLOAT_FIELDS}

    def table(self, buffer: np.ndarray) -> np.ndarray:
        """Returns all fields as one writable view, i32[fields, S]."""
        return buffer.reshape(-1, self.num_seqs)

    def wanted_features(self, rows: np.ndarray) -> int:
        """Returns all features that some row of some shard asks for."""
        parts = rows.reshape(-1, self.size)
        return int(np.bitwise_or.reduce([np.bitwise_or.reduce(self.fields(part)["features"]) for part in parts]))

    def unpack(self, packed: jax.Array) -> SamplingRows:
        """Returns the fields on the device; runs inside a step."""
        fields = self.fields(packed)
        return SamplingRows(**fields | {n: lax.bitcast_convert_type(fields[n], jnp.float32) for n in FLOAT_FIELDS})


class PackedLayout(_Layout):
    """The inputs of a step in one bucket; those of its sampler are the last part.

    Attributes:
        rows: The layout of the sampler's part, which begins at `rows_start`.
    """

    def __init__(self, bucket: Bucket, tables: PageTables, attention_backend: str = "reference"):
        num_tokens, num_seqs = bucket.num_tokens, bucket.num_seqs
        self.bucket = bucket
        self.tables = tables.of_bucket(bucket)
        self.attention_backend = attention_backend
        super().__init__(
            {
                "token_ids": (num_tokens,),
                "positions": (num_tokens,),
                "last_rows": (num_seqs,),
                "kv_lens": (num_seqs,),
                "query_starts": (num_seqs + 1,),
                "num_seqs": (),
                "num_decodes": (),
            }
            | {table.name: (num_seqs, table.width) for table in self.tables}
            | {table.first_token: (num_seqs,) for table in self.tables if table.first_token}
        )
        self.rows_start = self.size
        self.rows = RowLayout(num_seqs)
        self.size += self.rows.size

    def rows_of(self, packed: np.ndarray) -> np.ndarray:
        """Returns the sampler's part of every shard's buffer, one after the other."""
        return packed.reshape(-1, self.size)[:, self.rows_start :].reshape(-1)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """Returns all fields as writable views of a host buffer."""
        return self.fields(buffer) | self.rows.views(buffer[self.rows_start :])

    def unpack(self, packed: jax.Array) -> StepInputs:
        """Returns the fields on the device; runs inside the step."""
        fields = self.fields(packed)
        attention = tuple(
            AttentionMetadata(
                # Of a table that begins later, so does the sequence.
                fields["kv_lens"] - fields[table.first_token] if table.first_token else fields["kv_lens"],
                fields["query_starts"],
                fields[table.name],
                fields["num_seqs"],
                fields["num_decodes"],
                implementation=self.attention_backend,
                max_query_len=1 if self.bucket.decode_only else None,
            )
            for table in self.tables
        )
        rows = self.rows.unpack(packed[self.rows_start :])
        is_real = jnp.arange(self.bucket.num_seqs) < fields["num_seqs"]
        starts = fields["kv_lens"] - jnp.diff(fields["query_starts"])
        slots = SlotRows(jnp.where(is_real, rows.slot, NO_SLOT), starts, fields["query_starts"])
        return StepInputs(fields["token_ids"], fields["positions"], fields["last_rows"], attention, slots, rows)


class SlotTable:
    """What the host knows of each slot and does not change from step to step: page ids and sampling parameters."""

    def __init__(self, num_slots: int, tables: PageTables, vocab_size: int):
        self.vocab_size = vocab_size
        self.page_tables = [np.zeros((num_slots, width), np.int32) for width in tables.full_widths]
        # Of each group and slot; read one by one for each step, which lists are made for.
        self.num_pages = [[0] * num_slots for _ in self.page_tables]
        self._layout = RowLayout(num_slots)
        self._rows = np.zeros(self._layout.size, np.int32)
        self.min_tokens = np.zeros(num_slots, np.int32)

    def take(self, sequence: ScheduledSequence, seed: int, processors: int) -> Feature:
        """Fills a slot for the request that has taken it; returns the request's features."""
        params, slot = sequence.request.sampling_params, sequence.slot
        for num_pages in self.num_pages:
            num_pages[slot] = 0
        self.min_tokens[slot] = params.min_tokens
        features = request_features(params)
        values = dict.fromkeys(INT_FIELDS + FLOAT_FIELDS, 0) | {
            "slot": slot,
            "features": features,
            "processors": processors,
            "seed": np.uint32(seed & 0xFFFFFFFF).astype(np.int32),
            "top_k": min(max(params.top_k, 0), self.vocab_size),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "min_p": params.min_p,
            "repetition": params.repetition_penalty,
            "presence": params.presence_penalty,
            "frequency": params.frequency_penalty,
        }
        fields = self._layout.views(self._rows)
        for name, value in values.items():
            fields[name][slot] = value
        return features

    def rows(self, slots: np.ndarray) -> np.ndarray:
        """Returns the sampling parameters of some slots, i32[fields, n], in the order of `RowLayout`."""
        return self._layout.table(self._rows)[:, slots]

    def update_pages(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Notes the pages that sequences have gained."""
        for group, table in enumerate(self.page_tables):
            num_pages = self.num_pages[group]
            for sequence in sequences:
                slot, own = sequence.slot, sequence.page_ids[group]
                known = num_pages[slot]
                if len(own) > known:
                    table[slot, known : len(own)] = own[known:]
                    num_pages[slot] = len(own)


def request_features(params) -> Feature:
    """Returns what sampling parameters ask for."""
    features = GREEDY
    if not params.is_greedy:
        features |= Feature.RANDOM
        if params.top_k > 0 or params.top_p < 1 or params.min_p > 0:
            features |= Feature.FILTER
        if not 0 < params.top_k <= FEW:
            features |= Feature.WIDE
        if params.top_k > FEW:
            features |= Feature.LARGE_K
    if params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0:
        features |= Feature.PENALTIES
    if params.logit_bias or params.allowed_token_ids is not None:
        features |= Feature.TOKEN_RULES
    if params.min_tokens > 0:
        features |= Feature.MIN_TOKENS
    if params.bad_words_token_ids:
        features |= Feature.BAD_WORDS
    if params.logprobs is not None:
        features |= Feature.LOGPROBS
    if params.logits_processors:
        features |= Feature.PROCESSORS
    return features


def order_rows(batch: ScheduledBatch) -> list[int]:
    """Returns the rows of the step, as indices of `batch.sequences`.

    Decodes come by length, since attention on CPU takes them in groups that cost as much as their longest member.
    """
    starts = [s.start for s in batch.sequences[: batch.num_decodes]]
    return [*sorted(range(batch.num_decodes), key=starts.__getitem__), *range(batch.num_decodes, len(batch.sequences))]


def pack(
    batches: Sequence[ScheduledBatch], orders: Sequence[list[int]], layout: PackedLayout, tables: Sequence[SlotTable]
) -> np.ndarray:
    """Writes the batch of every shard into a fresh buffer, one after the other, each padded to the layout's bucket.

    Args:
        batches: One for each shard; may be empty.
        orders: Of each batch: indices of its sequences in the order of their rows.
        layout: Of one shard's part.
        tables: The slots of each shard.

    Returns:
        i32[shards * layout.size].
    """
    buffer = np.zeros((len(batches), layout.size), np.int32)
    for part, batch, order, slots in zip(buffer, batches, orders, tables, strict=True):
        views = layout.views(part)
        views["temperature"][len(order) :] = 1
        if order:
            _pack_one(batch, order, views, layout.rows.table(part[layout.rows_start :]), slots)
            _pack_pages(batch, order, views, layout, slots)
    return buffer.reshape(-1)


def advance(
    packed: np.ndarray, batches: Sequence[ScheduledBatch], layout: PackedLayout, tables: Sequence[SlotTable]
) -> np.ndarray:
    """Returns the inputs of a step that is run again, in a fresh buffer: every sequence has the token sampled before.

    Args:
        packed: What `pack` or this function gave for the time before.
        batches: One for each shard, all of decodes.
        layout: See `pack`.
        tables: See `pack`.
    """
    packed = packed.copy()  # the device may still read the buffer
    for part, batch, slots in zip(packed.reshape(len(batches), -1), batches, tables, strict=True):
        fields = {name: field[: len(batch.sequences)] for name, field in layout.views(part).items() if field.ndim}
        fields["token_ids"][:] = -1
        for name in ("positions", "kv_lens", "position"):
            fields[name] += 1
        fields["features"][fields["position"] >= slots.min_tokens[fields["slot"]]] &= ALL_BUT_MIN_TOKENS
    return packed


def _pack_one(
    batch: ScheduledBatch, order: list[int], views: dict[str, np.ndarray], rows: np.ndarray, slots: SlotTable
) -> None:
    """Fills the fields of one shard's batch, which are zero, `rows` being those of its sampler.

    Padding rows sample nothing.
    """
    sequences = [batch.sequences[i] for i in order]
    num_seqs, num_decodes = len(sequences), batch.num_decodes
    slot_ids = np.array([s.slot for s in sequences])
    lengths = np.array([s.num_new_tokens for s in sequences])
    starts = np.array([s.start for s in sequences])
    ends = np.cumsum(lengths)

    token_ids, positions = views["token_ids"], views["positions"]
    token_ids[:num_decodes] = [
        -1 if s.token_on_device else s.request.all_token_ids[s.start] for s in sequences[:num_decodes]
    ]
    positions[:num_decodes] = starts[:num_decodes]
    for i in range(num_decodes, num_seqs):
        sequence, own = sequences[i], slice(ends[i] - lengths[i], ends[i])
        token_ids[own] = sequence.request.all_token_ids[sequence.start : sequence.start + sequence.num_new_tokens]
        positions[own] = np.arange(sequence.start, sequence.start + sequence.num_new_tokens)

    views["kv_lens"][:num_seqs] = starts + lengths
    views["query_starts"][1 : num_seqs + 1] = ends
    views["query_starts"][num_seqs + 1 :] = ends[-1]
    views["num_seqs"][...] = num_seqs
    views["num_decodes"][...] = num_decodes
    views["last_rows"][:num_seqs] = ends - 1
    rows[:, :num_seqs] = slots.rows(slot_ids)
    samples = np.array([s.samples for s in sequences])
    outputs = np.array([s.num_output_tokens for s in sequences])
    views["samples"][:num_seqs] = samples
    views["position"][:num_seqs] = outputs
    features = views["features"][:num_seqs]
    features[outputs >= slots.min_tokens[slot_ids]] &= ALL_BUT_MIN_TOKENS
    features[~samples] = 0


def _pack_pages(
    batch: ScheduledBatch, order: list[int], views: dict[str, np.ndarray], layout: PackedLayout, slots: SlotTable
) -> None:
    """Fills the page tables of one shard's batch, which are zero."""
    sequences = [batch.sequences[i] for i in order]
    slots.update_pages(sequences)
    slot_ids, num_seqs = np.array([s.slot for s in sequences]), len(sequences)
    for group, (table, source) in enumerate(zip(layout.tables, slots.page_tables, strict=True)):
        num_pages = max(len(s.page_ids[group]) for s in sequences)
        if not table.first_token:
            views[table.name][:num_seqs, :num_pages] = source[slot_ids, :num_pages]
            continue
        first = table.first_pages(np.array([s.start for s in sequences]))
        views[table.first_token][:num_seqs] = first * table.group.page_size
        columns = np.minimum(first[:, None] + np.arange(table.width), source.shape[1] - 1)
        views[table.name][:num_seqs] = source[slot_ids[:, None], columns]


def prompt_targets(
    batches: Sequence[ScheduledBatch], orders: Sequence[list[int]], num_tokens: int
) -> np.ndarray | None:
    """Returns i32[shards * T]: after each row of sequences that ask for log probabilities, the prompt's next token.

    None if no sequence asks.
    """
    asks = (
        s.request.sampling_params.prompt_logprobs is not None
        for batch in batches
        for s in batch.sequences
        if not s.token_on_device  # its prompt has been computed
    )
    if not any(asks):
        return None
    targets = np.zeros((len(batches), num_tokens), np.int32)
    for part, batch, order in zip(targets, batches, orders, strict=True):
        row = 0
        for sequence in (batch.sequences[i] for i in order):
            after = sequence.start + 1
            tokens = sequence.request.prompt_token_ids[after : after + sequence.num_new_tokens]
            part[row : row + len(tokens)] = tokens
            row += sequence.num_new_tokens
    return targets.reshape(-1)
