"""`python -m tilert.generate`: the command of the public TileRT package, over ShowHandsGenerator."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tilert.serve.cli import Parser, cache_option, guarded


def parser() -> argparse.ArgumentParser:
    """The parser of the command's flags."""
    p = Parser(prog="python -m tilert.generate", description="Answer prompts with DeepSeek-V3.2.")
    p.add_argument("--model-weights-dir", default="", metavar="DIR",
                   help="checkpoint (default: $MODEL_WEIGHTS_DIR, then ~/.tilert/config.toml)")  # fmt: skip
    p.add_argument("--max-new-tokens", type=int, default=4000, metavar="N", help="default 4000")
    p.add_argument("--temperature", type=float, metavar="T", help="default 0: greedy")
    p.add_argument(
        "--top-p", type=float, default=1.0, metavar="P", help="below 1: nucleus sampling"
    )
    p.add_argument("--top-k", type=int, default=256, metavar="K", help="with --top-p (default 256)")
    p.add_argument("--sampling-seed", type=int, default=42, metavar="S", help="default 42")
    p.add_argument(
        "--with-mtp", action="store_true", help="guess tokens and verify several at once"
    )
    p.add_argument("--enable-thinking", action="store_true", help="let the model reason first")
    cache_option(p)
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from stdin)")
    source.add_argument(
        "--prompt-file", "--file", dest="file", metavar="PATH", help="a prompt in UTF-8"
    )
    source.add_argument(
        "--interactive", action="store_true", help="one prompt per line, until /exit; none is kept"
    )
    return p


def run(args: argparse.Namespace) -> None:
    """Answer the prompts that the arguments name."""
    from tilert.serve.commands import ask, read_prompt
    from tilert.serve.show_hands import ShowHandsGenerator

    text = None if args.interactive else read_prompt(args)
    generator = ShowHandsGenerator(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        model_weights_dir=args.model_weights_dir,
        with_mtp=args.with_mtp,
        use_topp=args.top_p < 1,
        top_p=args.top_p,
        top_k=args.top_k,
        sampling_seed=args.sampling_seed,
        enable_thinking=args.enable_thinking,
        kv_cache_dtype=args.kv_cache_dtype,
    )
    generator.from_pretrained()
    if text is not None:
        generator.generate(text)
        return
    while (line := ask()) not in (None, "/exit"):
        generator.generate(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_args(argv)
    return guarded("tilert.generate", lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
