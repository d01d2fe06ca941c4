"""Short texts about a run, a model or a program, for people at a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tilert.compiler.simulate import Span
from tilert.engine.core import RequestMetrics, RequestOutput
from tilert.ir import machine
from tilert.ir.program import Program
from tilert.models.config import DecoderConfig
from tilert.models.load import guessing_layers
from tilert.weights import Checkpoint

GIB = 1 << 30
CARD_BYTES = {"h100": 80e9, "h200": 141e9, "b200": 180e9}  # memory of one card, as sold


def stats(
    request: RequestOutput, load_seconds: float, phases: Mapping[str, float],
    first_use: Mapping[str, float],
) -> str:  # fmt: skip
    """Speed of one request. In seconds, phases: the parts of loading that were timed; first_use: what
    was made ready since, when it was first needed."""
    m = request.metrics
    per_token = m.time_per_output_token
    rate = (
        f"{1 / per_token:.1f} tok/s, {per_token * 1e3:.2f} ms/token" if per_token else "one token"
    )
    first = (m.time_to_first_token or 0.0) * 1e3
    parts, later = (
        ", ".join(f"{name} {seconds:.2f}" for name, seconds in table.items())
        for table in (phases, first_use)
    )
    return (
        f"[{m.generated_tokens} tokens: {rate}; prompt of {m.prompt_tokens} tokens:"
        f" first token after {first:.1f} ms; loaded in {load_seconds:.2f} s"
        + (f" ({parts})" if parts else "")
        + (f", at first use {later}" if later else "")
        + (f"; {speculation(m)}]" if m.verified else "]")
    )


def speculation(m: RequestMetrics) -> str:
    """Who drafted tokens, how many came true, and tokens per step that verified some."""
    steps, least, most = len(m.verified), min(m.verified), max(m.verified)
    return (
        f"{m.speculative_method}: {m.accepted_tokens} of {m.drafted_tokens} drafted tokens accepted:"
        f" {sum(m.verified) / steps:.2f} tokens per verifying step ({least} to {most}, {steps} steps)"
    )


def inspect(folder: Path, config: DecoderConfig, checkpoint: Checkpoint) -> str:
    """What the model is, how many bytes a token reads, and how long that takes on known machines."""
    unused = guessing_layers(config)
    if config.tie_word_embeddings:  # a copy of the embedding
        unused = (*unused, "lm_head.weight")
    tensors = {n: array for n, array in checkpoint.tensors.items() if not n.startswith(unused)}
    parameters = sum(array.size for array in tensors.values())
    stored = sum(array.nbytes for array in tensors.values())
    embedding = tensors["model.embed_tokens.weight"]
    per_token = stored - (0 if config.tie_word_embeddings else embedding.nbytes)
    mixture, heads = "", f"{config.num_key_value_heads} kv heads of {config.head_dim}"
    if (experts := config.experts) is not None:
        each = sum(array.nbytes for name, array in tensors.items() if ".experts." in name)
        per_token -= (
            each * (experts.num_experts - experts.num_experts_per_tok) // experts.num_experts
        )
        mixture = (
            f"experts {experts.num_experts}, {experts.num_experts_per_tok} per token,"
            f" moe_intermediate_size {experts.moe_intermediate_size}, in {sum(experts.sparse)} layers,"
            f" {each / stored:.0%} of all bytes"
        )
    if config.latent is not None:
        heads = f"latents of {config.latent.kv_lora_rank} and keys of {config.head_dim} for all"
    # Per position.
    on_cpu, on_gpu = config.cache_bytes(machine.cpu(1)), config.cache_bytes(machine.H100)
    packed = ""
    if config.latent is not None:
        least = config.cache_bytes(replace(machine.H100, packed_latents=True))
        packed = f", {least / 1e3:.1f} KB with --kv-cache-dtype fp8"
    dtypes = ", ".join(sorted({str(array.dtype) for array in tensors.values()}))
    lines = [
        f"{folder}",
        f"model_type {config.model_type}: {config.num_hidden_layers} layers,"
        f" hidden_size {config.hidden_size}, intermediate_size {config.intermediate_size},"
        f" {config.num_attention_heads} heads,"
        f" {heads}, vocab_size {config.vocab_size}",
        f"context {config.max_position_embeddings}, tied head {config.tie_word_embeddings},"
        f" sliding_window {config.sliding_window}, rope {config.rope_scaling.rope_type}",
        *([mixture] if mixture else []),
        f"parameters {parameters:,} ({dtypes}), {stored / GIB:.3f} GiB",
        f"a token reads {per_token / 1e6:.1f} MB of weights and {on_cpu / 1e3:.1f} KB per position of"
        f" context on a CPU (f32), {on_gpu / 1e3:.1f} KB on a GPU (bf16){packed}",
        "",
        "machine   reads   floor per token   weights + full context",
    ]
    total = stored + on_gpu * config.max_position_embeddings
    for m in (machine.H100, machine.H200, machine.B200):
        fits = "fits" if total < 0.95 * CARD_BYTES[m.name] else "does not fit"
        lines.append(
            f"{m.name:<8}{m.read_bandwidth / 1e12:6.2f} TB/s {per_token / m.read_bandwidth * 1e3:10.3f} ms"
            f"       {total / GIB:.2f} GiB of {CARD_BYTES[m.name] / GIB:.0f}: {fits}"
        )
    return "\n".join(lines)


def program(compiled: Program, spans: Sequence[Span]) -> str:
    """One line about a compiled program."""
    runs = [run for queue in compiled.queues for run in queue]
    waits = sum(len(run.waits) for run in runs)
    total = max((span.end for span in spans), default=0.0)
    return (
        f"{len(compiled.ops)} ops, {len(runs)} runs on {len(compiled.queues)} workers, {waits} waits on"
        f" {len(compiled.counters)} counters, {compiled.arena_bytes / 1e6:.2f} MB of activations; verified;"
        f" simulated step at 512 positions: {total * 1e3:.3f} ms"
    )
