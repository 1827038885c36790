"""The shapes that steps are compiled for. Nothing else in the engine decides a shape."""

from typing import NamedTuple

FEW_SEQS = 8
# Decode steps of one call, and of how many sequences: launching a step of few may take the host longer than the device.
NUM_REPEATS = 4
MAX_REPEATED_SEQS = 32


class Bucket(NamedTuple):
    """One step's shape: T tokens of S sequences; with `decode_only`, one token of each."""

    num_tokens: int
    num_seqs: int
    decode_only: bool = False


def token_sizes(max_tokens: int, *, coarse: bool) -> list[int]:
    """Returns the sizes of the token dimension, ascending, `max_tokens` last.

    Above 64 a step carries at most 25% padding. `coarse` is for CPUs, where a shape costs time of the cores that also
    compute, and memory: there at most 50%. A step that is full of prompts has no padding anyway.
    """
    sizes = [1, 4, 8, 16, 32, 48, 64] if coarse else [1, 2, 4, 8, 16, 32, 48, 64]
    power = 64
    while sizes[-1] < max_tokens:
        sizes += [power * step // 4 for step in ((6, 8) if coarse else (5, 6, 7, 8))]
        power *= 2
    return [size for size in sizes if size < max_tokens] + [max_tokens]


def make_buckets(max_tokens: int, max_seqs: int, *, coarse: bool = False) -> list[Bucket]:
    """Returns all shapes, cheapest first.

    Each token size takes as many sequences as it can hold, and long ones also few: logits are computed for every
    sequence of the shape, and a long prompt on its own should not pay for the others. Of `coarse` sizes, only every
    second one takes few.

    Steps of decodes alone have shapes of their own unless `coarse`: they need no kernel for prompts, and steps with a
    prompt need no shapes below 16 tokens, nor between 16 and 64.
    """
    sizes = token_sizes(max_tokens, coarse=coarse)
    buckets = set()
    if not coarse:
        buckets = {Bucket(size, size, True) for size in token_sizes(min(max_tokens, max_seqs), coarse=False)}
        sizes = [size for size in sizes if size in (16, 64, max_tokens) or size > 64]
    for size in sizes:
        buckets.add(Bucket(size, min(size, max_seqs)))
        has_few = not coarse or size == max_tokens or size & (size - 1) == 0
        if size > 64 and max_seqs > FEW_SEQS and has_few:
            buckets.add(Bucket(size, FEW_SEQS))
    return sorted(buckets, key=lambda bucket: (bucket.num_tokens, not bucket.decode_only, bucket.num_seqs))


def fitting(buckets: list[Bucket], num_tokens: int, num_seqs: int, *, decode_only: bool = False) -> list[Bucket]:
    """Returns the buckets that hold a step, cheapest first.

    Raises:
        ValueError: None does: the scheduler's limits and the buckets disagree.
    """
    found = [
        bucket
        for bucket in buckets
        if bucket.num_tokens >= num_tokens and bucket.num_seqs >= num_seqs and (decode_only or not bucket.decode_only)
    ]
    if not found:
        raise ValueError(f"no bucket holds {num_tokens} tokens of {num_seqs} sequences; the largest is {buckets[-1]}")
    return found


def warmup_order(buckets: list[Bucket]) -> list[Bucket]:
    """Returns the buckets, most needed first.

    With one small bucket and the decode of one request everything can run, if slowly.
    """
    decodes = [b for b in buckets if b.decode_only]
    any_step = [b for b in buckets if not b.decode_only]
    full = [b for b in any_step if b.num_seqs == max(x.num_seqs for x in any_step if x.num_tokens == b.num_tokens)]
    first = [b for b in full if b.num_tokens == 16] or full[-1:]
    one = [b for b in decodes + full if b.num_tokens == 1]
    order = first + one + [b for b in full if b.num_tokens == 128] + full[-1:] + decodes + full + buckets
    return list(dict.fromkeys(order))
