"""What is measured: requests as (prompt token ids, number of output tokens), drawn at random with fixed seeds.

The draws are the ones that our peers' published figures were measured with, so the lists must not change: a test holds
checksums of them. Nothing here imports jax.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_VOCAB = 30000
"""Prompts are random ids from 0 to this, both included."""
MIN_LEN = 4
MAX_PROMPT_LEN = 1024
MAX_TOTAL_LEN = 2048
"""Bounds of what is taken of a file of conversations; the ones that vLLM's benchmark has."""


@dataclass(frozen=True)
class Workload:
    """Requests that are sent at once.

    Attributes:
        name: What reports call it.
        requests: Prompt token ids, and how many tokens are generated.
    """

    name: str
    requests: list[tuple[list[int], int]]

    @property
    def num_input_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt, _ in self.requests)

    @property
    def num_output_tokens(self) -> int:
        """Tokens to generate for all requests."""
        return sum(output_len for _, output_len in self.requests)


def uniform(
    num_prompts: int, input_len: int, output_len: int, *, vocab: int = DEFAULT_VOCAB, seed: int = 0, name: str = ""
) -> Workload:
    """Returns requests of one length."""
    draw = random.Random(seed + num_prompts * 1000003 + input_len * 101 + output_len).randint
    prompts = [[draw(0, vocab) for _ in range(input_len)] for _ in range(num_prompts)]
    title = name or f"uniform {num_prompts} x {input_len}/{output_len}"
    return Workload(title, [(prompt, output_len) for prompt in prompts])


def mixed(
    num_prompts: int = 256,
    lo: int = 100,
    hi: int = 1024,
    *,
    output_lo: int | None = None,
    output_hi: int | None = None,
    vocab: int = DEFAULT_VOCAB,
    seed: int = 0,
    name: str = "",
) -> Workload:
    """Returns requests with prompts of [lo, hi] tokens and outputs of [output_lo, output_hi], by default the same."""
    out_lo, out_hi = lo if output_lo is None else output_lo, hi if output_hi is None else output_hi
    draw = random.Random(seed).randint
    requests = []
    for _ in range(num_prompts):
        input_len = draw(lo, hi)
        prompt = [draw(0, vocab) for _ in range(input_len)]
        requests.append((prompt, draw(out_lo, out_hi)))
    return Workload(name or f"mixed {num_prompts} x {lo}-{hi}/{out_lo}-{out_hi}", requests)


def sharegpt(path: str | Path, tokenizer: Any, num_prompts: int, *, seed: int = 0) -> Workload:
    """Returns requests from a JSON file of conversations.

    The first message is the prompt, the second's length is the output's.

    Args:
        path: A list of `{"conversations": [{"value": ...}, ...]}` (ShareGPT's form), or of
            `{"prompt": ..., "output_len": ...}`.
        tokenizer: Counts the tokens.
        num_prompts: Conversations to draw, at most; too short and too long ones are left out.
        seed: Of the draw.

    Raises:
        ValueError: The file is no such list, or nothing of it is left.
    """
    entries = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(entries, list):
        raise ValueError(f"{path} holds {type(entries).__name__}, expected a list of conversations")
    random.Random(seed).shuffle(entries)
    requests: list[tuple[list[int], int]] = []
    for entry in entries:
        if len(requests) == num_prompts:
            break
        request = _conversation(entry, tokenizer)
        if request is None:
            continue
        prompt, output_len = request
        too_short = len(prompt) < MIN_LEN or output_len < MIN_LEN
        if not too_short and len(prompt) <= MAX_PROMPT_LEN and len(prompt) + output_len <= MAX_TOTAL_LEN:
            requests.append((prompt, output_len))
    if not requests:
        raise ValueError(
            f"{path} has no conversation of {MIN_LEN} to {MAX_TOTAL_LEN} tokens among {len(entries)} entries"
        )
    return Workload(f"sharegpt {len(requests)} of {Path(path).name}", requests)


def _conversation(entry: Any, tokenizer: Any) -> tuple[list[int], int] | None:
    if isinstance(entry, dict) and "prompt" in entry and "output_len" in entry:
        return tokenizer.encode(entry["prompt"]), int(entry["output_len"])
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not turns or len(turns) < 2:
        return None
    prompt, answer = (turns[i]["value"] for i in (0, 1))
    return tokenizer.encode(prompt), len(tokenizer.encode(answer, add_special_tokens=False))
