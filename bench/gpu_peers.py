"""What else makes tokens of the same shapes on this GPU, and processes that end in time.

transformers: the forward pass over a static cache, compiled whole with CUDA graphs (or eager, op by op),
token after token on the device; the host takes them all at the end, which costs the peer less than
tilert's one by one. Its weights are those that its config draws. gpt-fast and Megakernels: a checkout
of the user's, by the command of its own README, with the weights and the prompt that it has.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CHUNK = 2048  # most tokens of a prompt at a time, as tilert has it
WARM = 8  # tokens before the first timed ones: compiling, recording the graphs, one replay


class NotMeasured(Exception):
    """One sentence on why there is no figure."""


def output_of(command: Sequence[str], timeout: float, folder: Path | None = None) -> str:
    """What a process prints, or NotMeasured; it and all that it started are gone after `timeout` s, and
    when this process is asked to end: what is left would hold the GPU's memory."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = child.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise NotMeasured(f"it took more than {timeout:g} s") from error
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            signal.signal(signal.SIGTERM, before)
        err.seek(0)
        out.seek(0)
        if code:
            said = err.read().decode(errors="replace").strip().splitlines()
            raise NotMeasured("\n".join([f"it ended with code {code} and said", *said[-8:]]))
        return out.read().decode(errors="replace")


def time_transformers(
    config: Mapping[str, Any], before: int, steps: int, repeats: int, *, compiled: bool,
    device: str = "cuda",
) -> dict[str, list[float]]:  # fmt: skip
    """`token_ms` of `steps` tokens after a prompt of `before`, and `first_token_ms`: of each repeat."""
    import torch
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=settings, max_cache_len=before + steps + 1)
    ids = torch.randint(0, settings.vocab_size, (1, before), device=device)

    def step(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The token [1, 1] after tokens [1, T] at positions [1, T]."""
        logits = model(
            input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        ).logits  # fmt: skip
        return logits[:, -1].argmax(dim=-1, keepdim=True)

    decode = torch.compile(step, mode="reduce-overhead", fullgraph=True) if compiled else step

    def run(count: int) -> tuple[float, float]:
        """(ms until the first token, ms for each of `count` more)."""
        cache.reset()
        marks = [time.perf_counter()]
        positions = torch.arange(before, device=device)[None]
        parts = zip(ids.split(CHUNK, 1), positions.split(CHUNK, 1), strict=True)
        made = [step(*part) for part in parts][-1:]
        made[0].item()
        marks.append(time.perf_counter())
        position = torch.full((1, 1), before, device=device)
        for _ in range(count):
            made.append(decode(made[-1], position).clone())  # the next replay writes there
            position += 1
        torch.cat(made).tolist()
        marks.append(time.perf_counter())
        return (marks[1] - marks[0]) * 1e3, (marks[2] - marks[1]) / count * 1e3

    with torch.no_grad():
        for _ in range(2):
            run(min(WARM, steps))
        found = [run(steps) for _ in range(repeats)]
    return {"token_ms": [t for _, t in found], "first_token_ms": [t for t, _ in found]}


def time_gpt_fast(checkout: Path, name: str, tokens: int, timeout: float) -> float:
    """Milliseconds per token as gpt-fast's generate.py counts them, prompt included."""
    _check(checkout, "generate.py")
    found = sorted(checkout.glob(f"checkpoints/**/*{name}*/model.pth"))
    if not found:
        raise NotMeasured(f"{checkout / 'checkpoints'} has no model.pth of {name}")
    command = [
        sys.executable, "generate.py", "--compile", "--checkpoint_path",
        str(found[0].relative_to(checkout)), "--prompt", "Hello, my name is",
        "--max_new_tokens", str(tokens), "--top_k", "1",
    ]  # fmt: skip
    return _rate(r"Average tokens/sec: ([0-9.]+)", output_of(command, timeout, checkout))


def time_megakernels(checkout: Path, name: str, tokens: int, timeout: float) -> float:
    """Milliseconds per token as Megakernels' generate.py counts them."""
    script = "megakernels/scripts/generate.py"
    _check(checkout, script)
    if name != "Llama-3.2-1B":
        raise NotMeasured(f"its low-latency kernel is for Llama-3.2-1B, not for {name}")
    prompt = "prompt=tell me a funny joke about cookies"
    command = [sys.executable, script, "mode=mk", prompt, f"ntok={tokens}"]
    return _rate(r"Tokens per second: ([0-9.]+)", output_of(command, timeout, checkout))


def _check(checkout: Path, script: str) -> None:
    if not (checkout / script).is_file():
        raise NotMeasured(f"there is no {checkout / script}")


def _rate(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None or float(found[1]) <= 0:
        raise NotMeasured("its output names no tokens per second")
    return 1e3 / float(found[1])
