"""ShowHandsGenerator: the interface of the public TileRT package, as a thin layer over LLM.

    generator = ShowHandsGenerator(max_new_tokens=1000, model_weights_dir=MODEL_WEIGHTS_DIR)
    generator.from_pretrained()
    completion = generator.generate(prompt)

The folder is an official checkpoint or its conversion for one device; the prompt is a user's message.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tilert.backends.cuda import open_device
from tilert.engine.core import RequestMetrics, SamplingParams
from tilert.errors import UserError
from tilert.models import load_config
from tilert.models.mtp import layer_tensors
from tilert.serve import report
from tilert.serve.commands import Bars, show
from tilert.serve.llm import DEFAULT_CONTEXT, LLM, KvCacheDtype
from tilert.text import write_gguf_tokenizer
from tilert.weights import read_config, resolve_model, settings

NAME = "deepseek_v3_2"  # what the user's settings call the model when no folder is given
DRAFTS = 3  # tokens guessed in a step with with_mtp, as in the public package


class ShowHandsGenerator:
    """One model that answers one prompt at a time.

    max_new_tokens: most tokens of an answer. model_weights_dir: folder or name of the model; by default
    what MODEL_WEIGHTS_DIR or ~/.tilert/config.toml say. with_mtp: guess three tokens, with the checkpoint's
    layer for that or else from the text so far, and verify them in one step; the answer is the same.
    Greedy unless use_topp (then top_p and top_k count, and a temperature of 1 unless another is given) or
    a temperature above 0 (then all tokens can be drawn). sampling_seed: equal seeds give equal answers.
    enable_thinking: the model reasons first. kv_cache_dtype: as LLM takes it.
    Raises UserError for values outside their range.
    """

    def __init__(
        self, max_new_tokens: int = 100, temperature: float | None = None,
        model_weights_dir: str | os.PathLike[str] = "", with_mtp: bool = False,
        use_topp: bool = False, top_p: float = 0.9, top_k: int = 256, sampling_seed: int = 42,
        enable_thinking: bool = False, kv_cache_dtype: KvCacheDtype = "auto",
    ) -> None:  # fmt: skip
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens!r}; accepted are integers from 1")
        self.max_new_tokens, self.model_weights_dir = max_new_tokens, model_weights_dir
        self.with_mtp, self.enable_thinking = with_mtp, enable_thinking
        self.sampling_seed = sampling_seed
        self.kv_cache_dtype: KvCacheDtype = kv_cache_dtype
        self.update_sampling_params(temperature, top_p, top_k, use_topp)
        self.llm: LLM | None = None

    def update_sampling_params(
        self, temperature: float | None = None, top_p: float = 0.9, top_k: int = 256,
        use_topp: bool = False,
    ) -> None:  # fmt: skip
        """Sample the next answers otherwise; see the class for what the values mean."""
        chosen: dict[str, Any] = {"temperature": temperature or 0.0}
        if use_topp:
            chosen = {"temperature": 1.0 if temperature is None else temperature}
            chosen |= {"top_p": top_p, "top_k": top_k}
        self.params = SamplingParams(
            max_tokens=self.max_new_tokens, seed=self.sampling_seed, **chosen
        )

    def from_pretrained(self) -> None:
        """Load the model: on a GPU where there is one, else on the CPU.

        What a CPU cannot run yet, the interpreter does, and says so. Raises UserError like LLM.
        """
        given = os.fspath(self.model_weights_dir)
        bars = Bars()
        try:
            folder = resolve_model(
                given or str(settings.default_folder(NAME)), write_gguf_tokenizer, progress=bars
            )
            drafts = DRAFTS if self.with_mtp else 0
            self.llm = _load(folder, self.max_new_tokens, drafts, self.kv_cache_dtype, bars)
            if self.llm.speculative_method == "lookup":
                bars.say(f"with_mtp: tokens are guessed from the text so far; {_why(self.llm)}")
        finally:
            bars.close()

    def generate(self, prompt: str, print_log: bool = True) -> str:
        """The answer to a prompt. print_log: it goes to stdout as it is made, its speed to stderr."""
        if self.llm is None:
            raise UserError("the model is not loaded; call from_pretrained() first")
        deltas = self.llm.stream(self._prompt(self.llm, prompt), self.params)
        if not print_log:
            *_, last = deltas
            return last.request.outputs[0].text
        request = show(deltas)
        print()
        assert request is not None, "a request without a token"
        text = report.stats(
            request, self.llm.load_seconds, self.llm.load_phases, self.llm.first_use
        )
        print(text, file=sys.stderr)
        if self.with_mtp:
            print(_accepted(request.metrics), file=sys.stderr)
        return request.outputs[0].text

    def cleanup(self) -> None:
        """Let go of the model and its memory."""
        self.llm = None

    def _prompt(self, llm: LLM, prompt: str) -> Any:
        """The prompt as a user's message; as it is for a model without a chat template."""
        if not isinstance(prompt, str) or not prompt:
            raise UserError(f"the prompt is {prompt!r}; accepted is a text that is not empty")
        template = llm.chat_template
        if self.enable_thinking and "thinking" not in (template or ""):
            raise UserError(f"enable_thinking is set, but {llm.path} has no template that thinks")
        if template is None:
            return prompt
        thinks = self.enable_thinking  # templates name it in one of two ways
        return llm.chat_prompt(
            [{"role": "user", "content": prompt}], thinking=thinks, enable_thinking=thinks
        )


def _load(
    folder: Path, max_new_tokens: int, drafts: int, kv_cache_dtype: KvCacheDtype, bars: Bars
) -> LLM:
    config = load_config(*read_config(folder))
    context = min(config.max_position_embeddings, DEFAULT_CONTEXT + max_new_tokens)

    def loaded(backend: Any) -> LLM:
        return LLM(
            folder, backend=backend, max_model_len=context, max_num_seqs=1, progress=bars,
            notify=bars.say, num_speculative_tokens=drafts, kv_cache_dtype=kv_cache_dtype,
        )  # fmt: skip

    if _has_gpu():
        return loaded("cuda")
    llm = loaded("cpu")
    try:
        llm.runner.backend("decode")
    except UserError as error:
        bars.say(f"{error}; the interpreter takes its place, slowly")
        return loaded("interpreter")
    return llm


def _why(llm: LLM) -> str:
    """Why the layer that guesses tokens does not."""
    if layer_tensors(llm.config, llm.checkpoint.tensors):
        return "a GPU does not run the checkpoint's layer for that yet"
    return "the checkpoint has no layer for that"


def _has_gpu() -> bool:
    try:
        open_device()
    except UserError:
        return False
    return True


def _accepted(m: RequestMetrics) -> str:
    """Tokens per step that verified drafts."""
    if not m.verified:
        return "Accepted length: no token could be guessed"
    mean = sum(m.verified) / len(m.verified)
    return f"Accepted length: mean={mean:.2f}, min={min(m.verified)}, max={max(m.verified)}"
