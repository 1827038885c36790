"""Opens damaged models one after the other, and tells of each what came of it: a line of JSON.

    python -m tests.models.malformed.runner NAME ...

A process of its own: what hangs or takes too much memory must not take the tests with it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
MEMORY_BYTES = 2**30


def open_model(path: Path) -> None:
    """Everything that happens to a model's files before its first step."""
    from jaxengine.engine.build import load_weights
    from jaxengine.engine.front import default_sampling_params, eos_token_ids, load_tokenizer
    from jaxengine.engine_args import EngineArgs
    from jaxengine.loading.resolve import resolve_model

    args = EngineArgs(model=str(path), max_model_len=32, max_num_seqs=2, num_gpu_blocks_override=16, dtype="float32")
    checkpoint = resolve_model(args.model)
    config = args.resolve(checkpoint)
    tokenizer = load_tokenizer(args, checkpoint)
    tokenizer.encode("some text")
    eos_token_ids(checkpoint)
    default_sampling_params(args, checkpoint)
    load_weights(args, checkpoint, config, None)


def main(names: list[str]) -> None:
    """Runs cases by name; of each the outcome, the seconds and the memory that it added."""
    import jax

    from tests.models.malformed.cases import all_cases, write_model

    warnings.simplefilter("ignore")
    cases = all_cases()
    jax.numpy.zeros(4).block_until_ready()
    with tempfile.TemporaryDirectory() as first:
        open_model(write_model(Path(first), tokenizer=True))  # what is imported on the way is not the cases' fault
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    limit = int(status["VmData"].split()[0]) * 1024 + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    for name in names:
        folder = Path(tempfile.mkdtemp(prefix="malformed-"))
        path = cases[name](folder)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        print(json.dumps({"name": name, "begun": True}), flush=True)
        try:
            open_model(path)
            outcome = "ok"
        except ValueError as error:
            outcome = "ValueError"
            if "\n" in str(error).strip() or not str(error):
                outcome = f"not one line: {str(error)[:100]!r}"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:100]}"
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        line = {
            "name": name,
            "outcome": outcome,
            "seconds": round(time.monotonic() - started, 3),
            "mib": round(added, 1),
        }
        print(json.dumps(line), flush=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
