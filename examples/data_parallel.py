"""Data parallelism over processes: every rank has an engine of its own and a part of the prompts.

On one machine: python examples/data_parallel.py --dp-size 2
On several, once on each, with the rank of each:
    JAXENGINE_DP_RANK=0 JAXENGINE_DP_SIZE=2 JAXENGINE_DP_MASTER_IP=10.0.0.1 JAXENGINE_DP_MASTER_PORT=13345 \
        python examples/data_parallel.py

Within one process, `LLM(data_parallel_size=2)` does the same and shares the requests out as they come.
"""

import argparse
import os
import socket
import subprocess
import sys
import time

from jaxengine import LLM, SamplingParams
from jaxengine.sharding.data_parallel import PREFIXES, DataParallelGroup

PROMPTS = ["The capital of France is", "Water boils at", "Once upon a time", "1, 2, 3, 4,", "The moon is"]


def run_rank(args: argparse.Namespace) -> None:
    """Generates this rank's part of the prompts, and writes it."""
    group = DataParallelGroup()
    prompts = group.part(PROMPTS)
    # One write, line end and all: print() makes two where output is unbuffered, and ranks would mix their lines.
    sys.stdout.write(f"rank {group.rank} of {group.size}: {len(prompts)} prompts\n")
    sys.stdout.flush()
    results = []
    if prompts:
        with LLM(args.model, tensor_parallel_size=args.tp_size, max_model_len=512, warmup="lazy") as llm:
            params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
            for output in llm.generate(prompts, params, use_tqdm=False):
                results.append([output.prompt, output.outputs[0].text, group.rank])
    everything = group.gather(results)
    group.close()
    for prompt, text, rank in everything or []:
        print(f"{prompt!r} -> {text!r} (rank {rank})")


def start_rank(rank: int, args: argparse.Namespace, port: int) -> subprocess.Popen:
    """Starts this script again as one of several ranks on this machine, with its share of the GPUs."""
    settings = {"RANK": rank, "SIZE": args.dp_size, "MASTER_IP": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {f"{PREFIXES[0]}{name}": str(value) for name, value in settings.items()}
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.dp_size * args.tp_size)))
    own = devices.split(",")[rank * args.tp_size : (rank + 1) * args.tp_size]
    environment["CUDA_VISIBLE_DEVICES"] = ",".join(own)
    return subprocess.Popen([sys.executable, *sys.argv], env=environment)


def run_all(args: argparse.Namespace) -> int:
    """Starts all ranks; if one fails, so does everything."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    ranks = [start_rank(rank, args, port) for rank in range(args.dp_size)]
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            for number, code in enumerate(codes):
                if code:
                    print(f"rank {number} has failed with exit code {code}", file=sys.stderr)
                    return 1
            if None not in codes:
                return 0
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def main() -> int:
    """Starts the ranks, or is one of them; returns the exit code."""
    parser = argparse.ArgumentParser(description="Data parallelism over processes.")
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--dp-size", type=int, default=2, help="ranks to start on this machine")
    parser.add_argument("--tp-size", type=int, default=1, help="devices of each rank")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    if args.dp_size < 1:
        parser.error(f"--dp-size={args.dp_size}: must be at least 1")
    if any(f"{prefix}RANK" in os.environ for prefix in PREFIXES):
        run_rank(args)
        return 0
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
