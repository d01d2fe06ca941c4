"""LLM: a model folder in, text out. Joins weights, compiler, engine and text behind one class."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tilert.backends.cpu import MAX_THREADS, Pool, make_pool
from tilert.backends.cuda import open_device
from tilert.backends.cuda.runtime import CudaRuntime, GpuDevice
from tilert.compiler.units import with_units
from tilert.engine.core import (
    CompletionOutput,
    Logprob,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from tilert.engine.engine import Engine, Event
from tilert.engine.runner import Runner
from tilert.engine.speculate import MAX_DRAFT
from tilert.errors import UserError
from tilert.ir import machine
from tilert.ir.dtype import DType
from tilert.ir.machine import Machine
from tilert.ir.program import PAGE
from tilert.models import load_config, mtp
from tilert.models.config import DecoderConfig
from tilert.models.decoder import build as build_graph
from tilert.models.load import bind, scales
from tilert.serve import tune
from tilert.text import Detokenizer, Tokenizer, deepseek, write_gguf_tokenizer
from tilert.weights import Checkpoint, open_checkpoint, resolve_model

Prompt = str | Mapping[str, Any]
Progress = Callable[[str, int, int], None]  # (label, done bytes, total bytes)
GPU_RESERVE = 600_000_000  # bytes beside weights and cache: driver, kernel, activations, prompts
SpeculativeMethod = Literal["auto", "mtp", "lookup"]
METHODS: tuple[SpeculativeMethod, ...] = ("auto", "mtp", "lookup")
KvCacheDtype = Literal["auto", "fp8"]
DEFAULT_CONTEXT = 8192  # positions, unless the model has fewer or --max-model-len asks for more

__all__ = ["LLM", "Delta", "RequestOutput", "SamplingParams"]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one token added to one output of a request; text may be empty, at the end it may be rest."""

    index: int
    text: str
    token_id: int
    finish_reason: str | None
    request: RequestOutput  # everything so far


class LLM:
    """A loaded model.

    model: folder, .gguf file, Hub name or pypi:PACKAGE. dtype: what a GGUF file is unpacked to
    ('bfloat16' or 'float32'); safetensors are used as stored. max_model_len: positions per
    sequence. backend: 'cpu' (threads: its workers), 'cuda' (one GPU) or 'interpreter', the numpy
    definition. num_speculative_tokens: most tokens that are guessed and checked in one step, while a single
    sequence runs; 0 to 7, 0 is off. speculative_method: who guesses, 'mtp' (the checkpoint's layer for
    that), 'lookup' (how the text so far went on before) or 'auto', the first where it can be, but on a GPU
    the second, for with 'mtp' the host samples there; the attribute of that name is what it came to. Outputs
    are the same either way. kv_cache_dtype: 'fp8' keeps latents in e4m3 with a scale for 128 of them (656
    bytes per token and layer of DeepSeek-V3.2), which only models with latent attention accept; 'auto' is
    bf16 on a GPU and f32 on a CPU.
    progress and notify are told of loading and of compiling.
    Raises UserError for everything that is wrong with the input.
    """

    def __init__(
        self, model: str | os.PathLike[str], *, skip_tokenizer_init: bool = False,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto", max_model_len: int | None = None,
        max_num_seqs: int = 8, threads: int | None = None, seed: int | None = None,
        num_speculative_tokens: int = 0, speculative_method: SpeculativeMethod = "auto",
        kv_cache_dtype: KvCacheDtype = "auto",
        backend: Literal["cpu", "cuda", "interpreter"] = "cpu", progress: Progress | None = None,
        notify: Callable[[str], None] | None = None,
    ) -> None:  # fmt: skip
        started = time.perf_counter()
        if not 1 <= max_num_seqs <= 8:
            raise UserError(f"max_num_seqs is {max_num_seqs}; accepted are 1 to 8")
        if threads is not None and not 1 <= threads <= MAX_THREADS:
            raise UserError(f"threads is {threads}; accepted are 1 to {MAX_THREADS}")
        if backend not in ("cpu", "cuda", "interpreter"):
            raise UserError(
                f"backend '{backend}' is not known; accepted are cpu, cuda and interpreter"
            )
        _check_speculation(num_speculative_tokens, speculative_method)
        device = open_device(notify) if backend == "cuda" else None
        opened = time.perf_counter()
        self.seed = seed
        folder = resolve_model(
            os.fspath(model), write_gguf_tokenizer, dtype=dtype, progress=progress
        )
        checkpoint = open_checkpoint(folder)
        self.path, self.checkpoint = folder, checkpoint
        self.config = load_config(checkpoint.config, checkpoint.generation_config)
        self.tokenizer = None if skip_tokenizer_init else Tokenizer.from_folder(folder)
        context = context_length(self.config, max_model_len, "max_model_len")
        self.long_prompt = self._long_prompt()
        self.speculative_method = None
        if num_speculative_tokens:
            self.speculative_method = self._drafter(speculative_method, backend)
        graph = build_graph(self.config, context, hidden=self.speculative_method == "mtp")
        weights = bind(graph, self.config, context, checkpoint.tensors)
        stored_scales = scales(graph, self.config, checkpoint.tensors)
        self.pool = make_pool(threads) if backend == "cpu" else None
        self.tuning_path = Path()  # where the best settings of this card and model are kept
        if device is None:
            target = machine.cpu(self.pool.size if self.pool else threads or 2)
            target = with_cache_type(target, self.config, kv_cache_dtype)
            num_pages = self._num_pages(context, max_num_seqs, _available_memory() // 2, target)
            place: Pool | CudaRuntime | None = self.pool
            _read_ahead(checkpoint, progress)
        else:
            dtypes = {name: DType.of(array) for name, array in weights.items()}
            self.tuning_path = tune.path_of(device.name, graph, dtypes)
            size = sum(array.nbytes for array in weights.values())
            target = with_cache_type(device.machine, self.config, kv_cache_dtype)
            target = with_units(graph, target, dtypes, stored_scales)
            target = tune.tuned(target, device.name, size, self.tuning_path)
            own = self._layer_tensors()  # of a layer that guesses, which is loaded later
            left = _left_on(device, {**own, **weights})
            num_pages = self._num_pages(context, max_num_seqs, left, target)
            place = CudaRuntime(device, graph, weights, num_pages, progress)
        described = time.perf_counter()
        self.runner = Runner(
            graph, weights, target, context=context, sequences=max_num_seqs, num_pages=num_pages,
            place=place, scales=stored_scales,
        )  # fmt: skip
        if device is not None:
            self.runner.backend("decode")  # compiles the kernel and loads the weights
        self.engine = Engine(
            self.runner, self.config.vocab_size, self.config.eos_token_ids, num_speculative_tokens,
            self._layer(context),
        )  # fmt: skip
        self._owners: dict[int, tuple[_Request, int]] = {}  # by sequence id: request, output
        self._events: Generator[Event, None, None] | None = None  # of all requests together
        self.load_seconds = time.perf_counter() - started
        # Seconds of parts of loading, and what the first requests that needed something more waited.
        self.load_phases: dict[str, float] = {}
        self.first_use: Mapping[str, float] = {}
        if isinstance(place, CudaRuntime):
            own = {"device": opened - started, "files": described - opened}
            self.load_phases, self.first_use = own | place.seconds, place.first_use

    def _drafter(self, asked: SpeculativeMethod, backend: str) -> Literal["mtp", "lookup"]:
        """Who guesses tokens. Raises UserError when 'mtp' is asked for and the checkpoint has no layer."""
        if asked == "lookup" or (asked == "auto" and backend == "cuda"):
            return "lookup"
        if mtp.layer_tensors(self.config, self.checkpoint.tensors):
            return "mtp"
        if asked == "mtp":
            raise UserError(
                f"speculative_method is 'mtp', but {self.path} has no layer that guesses tokens; accepted"
                " are auto and lookup"
            )
        return "lookup"

    def _layer_tensors(self) -> dict[str, np.ndarray]:
        """What the layer that guesses tokens has in the checkpoint; nothing when that is not used."""
        if self.speculative_method != "mtp":
            return {}
        return mtp.layer_tensors(self.config, self.checkpoint.tensors)

    def _layer(self, context: int) -> Runner | None:
        """What runs the checkpoint's layer that guesses tokens; None when that is not used."""
        if not (tensors := self._layer_tensors()):
            return None
        graph = mtp.build(self.config, context, tensors.keys())
        weights = bind(graph, self.config, context, tensors)
        return self.runner.beside(graph, weights, scales(graph, self.config, tensors))

    def _long_prompt(self) -> int | None:
        """Longest prompt whose rotation does not depend on its own length; None: any."""
        scaling = self.config.rope_scaling
        if scaling.rope_type == "longrope":
            return scaling.original_max_position_embeddings or self.config.max_position_embeddings
        return self.config.max_position_embeddings if scaling.rope_type == "dynamic" else None

    def _num_pages(self, context: int, sequences: int, memory: int, target: Machine) -> int:
        """Pages for all sequences at full length, or as many as `memory` bytes hold."""
        config = mtp.extended(self.config) if self.speculative_method == "mtp" else self.config
        page_bytes = config.cache_bytes(target) * PAGE
        one = -(-context // PAGE)
        fits = memory // page_bytes
        if fits < one:
            raise UserError(
                f"the KV cache of {context} positions needs {one * page_bytes / 1e9:.1f} GB, but"
                f" {fits * page_bytes / 1e9:.1f} GB can be used"
                + (f"; --max-model-len {fits * PAGE} would fit" if fits else "")
            )
        return min(one * sequences, fits)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], sampling_params: Any = None
    ) -> list[RequestOutput]:
        """One RequestOutput per prompt, in order. A prompt is text or {"prompt_token_ids": [...]}.

        sampling_params: one SamplingParams (or a dict of its fields) for all, or a list with one for
        each.
        """
        if not isinstance(prompts, str | Mapping | Sequence):
            raise UserError(
                f"prompts is a {type(prompts).__name__}; accepted are a prompt or a list of them"
            )
        batch = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = (
            sampling_params
            if isinstance(sampling_params, list | tuple)
            else [sampling_params] * len(batch)
        )
        if len(params) != len(batch):
            raise UserError(f"there are {len(batch)} prompts but {len(params)} sampling params")
        requests: list[_Request] = []
        try:
            for i, (p, s) in enumerate(zip(batch, params, strict=True)):
                requests.append(self._add(f"{i}", *self._prompt(p), s))
            for _ in self._run(requests):
                pass
        finally:
            self._drop(requests)
        return [request.output for request in requests]

    def chat(
        self, messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: Any = None, **template: Any,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answers to one conversation (a list of messages) or to several (a list of those)."""
        single = not messages or isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        return self.generate(
            [self.chat_prompt(c, **template) for c in conversations], sampling_params
        )

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], **template: Any) -> dict[str, Any]:
        """The prompt that the model's chat template makes of a conversation."""
        if self.tokenizer is None:
            raise UserError(
                "chat needs the tokenizer, but the model was loaded with skip_tokenizer_init"
            )
        if not self.tokenizer.chat_templates and (own := self.chat_template) is not None:
            template = {"chat_template": own, **template}
        ids = self.tokenizer.encode_chat(messages, **template)
        return {
            "prompt_token_ids": ids,
            "prompt": self.tokenizer.decode(ids, skip_special_tokens=False),
        }

    @property
    def chat_template(self) -> str | None:
        """The model's first chat template, in Jinja; None when it has none."""
        templates = self.tokenizer.chat_templates if self.tokenizer else {}
        if not templates and self.config.model_type in deepseek.MODEL_TYPES:
            return deepseek.CHAT_TEMPLATE
        return templates.get("default") or next(iter(templates.values()), None)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Iterator[Delta]:
        """The answer to one prompt, token by token. Closing the iterator cancels the request.

        The request begins with the first token that is asked for. Several streams may be read in turn.
        """
        request = self._add("0", *self._prompt(prompt), sampling_params)
        try:
            yield from self._run([request])
        finally:  # also on Ctrl-C and when the iterator is closed
            self._drop([request])

    def _prompt(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError(
                    "a text prompt needs the tokenizer; give {'prompt_token_ids': [...]} instead"
                )
            return prompt, self.tokenizer.encode(prompt)
        ids = None
        if isinstance(prompt, Mapping):
            ids = prompt.get("prompt_token_ids")
            if ids is None and isinstance(prompt.get("prompt"), str):
                return self._prompt(prompt["prompt"])
        if not isinstance(ids, Sequence) or not all(_is_id(i) for i in ids):
            raise UserError("a prompt must be text or {'prompt_token_ids': [list of ints]}")
        return prompt.get("prompt"), [int(i) for i in ids]

    def _add(self, request_id: str, text: str | None, ids: list[int], given: Any) -> _Request:
        params = SamplingParams.from_dict(given) if isinstance(given, Mapping) else given
        params = SamplingParams() if params is None else params
        if not isinstance(params, SamplingParams):
            raise UserError(
                f"sampling_params is a {type(params).__name__}; accepted are SamplingParams or a dict"
            )
        if self.tokenizer is None and params.stop:
            raise UserError("stop strings need the tokenizer, but the model was loaded without one")
        if self.long_prompt and len(ids) > self.long_prompt:
            raise UserError(
                f"the prompt has {len(ids)} tokens; rope scaling '{self.config.rope_scaling.rope_type}'"
                f" rotates prompts of more than {self.long_prompt} tokens in another way, which tilert"
                " does not do yet"
            )
        if params.seed is None and self.seed is not None:
            params = dataclasses.replace(params, seed=self.seed)
        return _Request(self, request_id, text, ids, params)

    def _run(self, requests: list[_Request]) -> Iterator[Delta]:
        """What these requests get, until all have ended; others that run get theirs meanwhile."""
        while True:
            for request in requests:
                while request.inbox:
                    yield request.inbox.popleft()
            if all(request.output.finished for request in requests):
                return
            self._advance()

    def _advance(self) -> None:
        """One token of whoever is next, to its request."""
        if self._events is None:
            self._events = self.engine.events()
        try:
            event = next(self._events)
        except BaseException:  # the generator has ended with it
            self._events = None
            raise
        if event.id in self._owners:
            request, index = self._owners[event.id]
            request.inbox.extend(request.take(index, event))

    def _drop(self, requests: list[_Request]) -> None:
        """End what is left of these requests, and the launch when nobody waits for it any more."""
        for sequence_id in [i for request in requests for i in request.sequence_ids]:
            self.engine.abort(sequence_id)
            del self._owners[sequence_id]
        if not self._owners and self._events is not None:
            self._events.close()
            self._events = None


def _check_speculation(tokens: int, method: str) -> None:
    if not 0 <= tokens <= MAX_DRAFT:
        raise UserError(f"num_speculative_tokens is {tokens}; accepted are 0 to {MAX_DRAFT}")
    if method not in METHODS:
        raise UserError(
            f"speculative_method '{method}' is not known; accepted are auto, mtp and lookup"
        )
    if method != "auto" and not tokens:
        raise UserError(
            f"speculative_method is '{method}', but num_speculative_tokens is 0; accepted are 1 to"
            f" {MAX_DRAFT} then"
        )


def context_length(config: DecoderConfig, asked: int | None, flag: str) -> int:
    """Positions of a sequence: what `flag` asks for, else the model's own up to DEFAULT_CONTEXT.

    Raises UserError when the model has fewer.
    """
    scaling, longest = config.rope_scaling, config.max_position_embeddings
    if scaling.rope_type in ("linear", "dynamic"):  # these act beyond max_position_embeddings
        longest = int(longest * (scaling.factor or 1.0))
    if asked is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 1 <= asked <= longest:
        raise UserError(f"{flag} is {asked}; this model accepts 1 to {longest}")
    return asked


def _is_id(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


class _Request:
    """A prompt with its n outputs under construction."""

    def __init__(
        self, llm: LLM, request_id: str, text: str | None, ids: list[int], params: SamplingParams
    ) -> None:
        self.llm, self.params = llm, params
        self.inbox: deque[Delta] = deque()
        self.texts = [self._detokenizer() for _ in range(params.n)]
        self.metrics = RequestMetrics(
            time.perf_counter(), len(ids), speculative_method=llm.speculative_method
        )
        outputs = [CompletionOutput(i, "", [], None, None, None, None) for i in range(params.n)]
        self.output = RequestOutput(request_id, text, ids, None, outputs, False, self.metrics)
        self.sequence_ids: list[int] = []
        for index in range(params.n):  # an error can only come with the first
            self.sequence_ids.append(llm.engine.add(ids, params, index))
            llm._owners[self.sequence_ids[-1]] = self, index

    def _detokenizer(self) -> Detokenizer | None:
        params, tokenizer = self.params, self.llm.tokenizer
        if tokenizer is None or not params.detokenize:
            return None
        return Detokenizer(
            tokenizer,
            params.stop or (),
            params.include_stop_str_in_output,
            params.skip_special_tokens,
        )

    def take(self, index: int, event: Event) -> Iterator[Delta]:
        """Account for one token; yields what it adds."""
        output, text = self.output.outputs[index], self.texts[index]
        if output.finish_reason is not None:
            return
        token = event.token.token_id
        output.token_ids.append(token)
        self._note_logprobs(output, event)
        self._note_time(event.time)
        self._note_draft(event)
        new = ""
        if text is not None:
            hidden = event.finish_reason == "stop" and not self.params.include_stop_str_in_output
            early = len(output.token_ids) <= self.params.min_tokens  # too early for a stop string
            new = "" if hidden else text.push(token, may_stop=not early)
        reason, stop_reason = event.finish_reason, event.stop_reason
        if text is not None and text.stopped is not None:
            reason, stop_reason = "stop", text.stopped
            self.llm.engine.abort(event.id, "stop")
        elif text is not None and reason is not None:
            new += text.finish()
            if text.stopped is not None:  # completed by what was held back
                reason, stop_reason = "stop", text.stopped
        if text is not None:
            output.text = text.text
        output.finish_reason, output.stop_reason = reason, stop_reason
        if all(o.finish_reason for o in self.output.outputs):
            self.output.finished, self.metrics.finished_time = True, event.time
        yield Delta(index, new, token, reason, self.output)

    def _note_logprobs(self, output: CompletionOutput, event: Event) -> None:
        if self.params.logprobs is None:
            return
        tokenizer, token = self.llm.tokenizer, event.token
        entry = {
            i: Logprob(
                logprob,
                rank,
                tokenizer.decode([i], skip_special_tokens=False) if tokenizer else None,
            )
            for i, logprob, rank in token.top
        }
        output.logprobs = [*(output.logprobs or []), entry]
        output.cumulative_logprob = (output.cumulative_logprob or 0.0) + token.logprob

    def _note_time(self, now: float) -> None:
        if self.metrics.first_token_time is None:
            self.metrics.first_token_time = now
        self.metrics.last_token_time = now
        self.metrics.generated_tokens += 1

    def _note_draft(self, event: Event) -> None:
        if event.drafted and event.row == 0:
            self.metrics.drafted_tokens += event.drafted
            self.metrics.verified.append(0)
        if event.drafted:
            self.metrics.verified[-1] += 1


def with_cache_type(target: Machine, config: DecoderConfig, kv_cache_dtype: str) -> Machine:
    """The machine with the caches that kv_cache_dtype asks for. Raises UserError where the model has none of
    that type."""
    if kv_cache_dtype not in ("auto", "fp8"):
        raise UserError(f"kv_cache_dtype is '{kv_cache_dtype}'; accepted are auto and fp8")
    if kv_cache_dtype == "fp8" and config.latent is None:
        raise UserError(
            f"kv_cache_dtype is 'fp8', but a model of type '{config.model_type}' has no latent cache;"
            " accepted is auto"
        )
    return dataclasses.replace(target, packed_latents=kv_cache_dtype == "fp8")


def _left_on(device: GpuDevice, weights: Mapping[str, np.ndarray]) -> int:
    """Bytes that the weights leave for the KV cache; UserError when they do not fit."""
    size, free = sum(array.nbytes for array in weights.values()), device.free_bytes()
    missing = size + GPU_RESERVE - free
    if missing > 0:
        raise UserError(
            f"the weights take {size / 1e9:.1f} GB and the program {GPU_RESERVE / 1e9:.1f} GB, but"
            f" {device.name} has {free / 1e9:.1f} GB free: {missing / 1e9:.1f} GB are missing; the back"
            " end 'cpu' reads weights from the file"
        )
    return -missing


def _available_memory() -> int:
    """Bytes that can be allocated without pushing anything out (MemAvailable)."""
    for line in (
        Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    ):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _read_ahead(checkpoint: Checkpoint, progress: Progress | None) -> None:
    """Touch every page of the mapped weights once, so that the first token does not wait for the disk."""
    total = sum(array.nbytes for array in checkpoint.tensors.values())
    done = 0
    for array in checkpoint.tensors.values():
        flat = array.reshape(-1).view(np.uint8)
        for begin in range(0, flat.size, 64 << 20):
            piece = flat[begin : begin + (64 << 20)]
            piece[::4096].max(initial=0)
            done += piece.size
            if progress:
                progress("loading", done, total)
