"""Whether many runs of one prompt give the same tokens and the same last logits, bit for bit.

    python bench/repeat_gpu.py [--model Llama-3.2-1B] [--runs 100] [--out FILE]

Random weights at true shapes and a random cache, as in decode_gpu.py; each run is a launch of 127 greedy
tokens after 32. Ends with 1 and names the first run that differs from the first of all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

from decode_gpu import (
    FIRST,
    STEPS,
    RandomModel,
    capacity,
    environment,
    known,
    one_sentence,
    result_options,
)

from tilert.backends.cuda import open_device

POSITION = 32


def outcome(model: RandomModel) -> tuple[list[int], str]:
    """The tokens of one launch, and a digest of its last logits."""
    tokens = model.tokens(FIRST, POSITION, STEPS)
    return tokens, hashlib.sha256(model.decode.read("logits").tobytes()).hexdigest()


def first_that_differs(model: RandomModel, runs: int) -> int:
    """The number of the first run whose outcome is not that of run 0; -1: all are the same."""
    wanted = outcome(model)
    return next((run for run in range(1, runs) if outcome(model) != wanted), -1)


@one_sentence
def main() -> int:
    """Say whether all runs were the same, and write it as JSON; 2 without a GPU."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=known(), default="Llama-3.2-1B")
    parser.add_argument("--runs", type=int, default=100)
    result_options(parser)
    args = parser.parse_args()
    if args.runs < 2:
        parser.error("--runs accepts 2 and more")
    device = open_device()
    differs = first_that_differs(RandomModel(args.model, capacity([POSITION]), device), args.runs)
    said = "all the same, bit for bit" if differs < 0 else f"run {differs} differs from run 0"
    print(f"{args.model}, {args.runs} runs of {STEPS} tokens: {said}")
    result: dict[str, Any] = {
        **environment(device, "repeat_gpu.py", args.commit), "model": args.model,
        "runs": args.runs, "tokens": STEPS, "first_that_differs": differs,
    }  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(differs >= 0)


if __name__ == "__main__":
    sys.exit(main())
