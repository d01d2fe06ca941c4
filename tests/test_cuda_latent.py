"""Latent and sparse attention in the CUDA kernel, step by step against the interpreter. Whole tokens of
such models are in test_cuda_kernel.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import families
import numpy as np
import pytest
import test_cuda_kernel as kernel
import torch
from test_cuda_kernel import INDEX, LATENT, Devices, begin, loaded

from tilert.backends.cuda import backend as cuda
from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.jit import TARGETS
from tilert.backends.cuda.limits import step_rows
from tilert.backends.cuda.prompt import PromptRunner
from tilert.backends.interpreter import Interpreter
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import Program
from tilert.models import load_config
from tilert.models.decoder import build
from tilert.models.derived import ROPE_TABLE
from tilert.ops import IndexRope, LatentAttention
from tilert.ops.index import share_positions
from tilert.ops.mla import unpack

ONE_LAYER = {"num_hidden_layers": 1, "indexer_types": ["full"]}
# Lengths at which everything is chosen, all but one, a page and a bit, and most is not.
POSITIONS = [3, 23, 24, 63, 64, 150, 255]


def compiled(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], workers: int, **machine: int
) -> tuple[Program, dict[str, np.ndarray]]:
    """See test_cuda_kernel.compiled."""
    monkeypatch.setitem(kernel.MODELS, "own", (changes, DType.BF16, workers, machine))
    return kernel.compiled("own")


def words(backend: CudaBackend, name: str, dtype: Any, row: int = 0) -> np.ndarray:
    """A row of an activation."""
    b = backend.program.buffers[backend.program.buffer_ids[name]]
    return backend.arena.read(b.offset + row * b.cols * 4, b.cols, dtype)


def by_position(backend: CudaBackend | Interpreter, row: int, seen: int, splits: int) -> np.ndarray:
    """Scores that each share has left in falling order, in that of the positions; of equal ones the lower
    position must come first."""
    found = {}
    for name, dtype in (("l0.index", np.float32), ("l0.index.order", np.int32)):
        if isinstance(backend, Interpreter):
            found[name] = backend.read(name)[row].reshape(splits, -1)
        else:
            found[name] = words(backend, name, dtype, row).reshape(splits, -1)
    scores = np.full(seen, np.nan, np.float32)
    for split in range(splits):
        held = share_positions(split, seen, splits)
        each, at = (found[name][split, : held.size] for name in ("l0.index", "l0.index.order"))
        assert np.sort(at).tolist() == held.tolist()
        assert ((each[1:] < each[:-1]) | ((each[1:] == each[:-1]) & (at[1:] > at[:-1]))).all()
        scores[at] = each
    return scores


def with_ties(
    backend: CudaBackend, interpreter: Interpreter, share: float, groups: int = 0
) -> None:
    """Most scales of past keys become zero, so that scores are zeros of both signs, or (groups) whole keys
    the same few ones, so that equal scores stand anywhere."""
    dice = np.random.default_rng(2)
    for b in (b for b in backend.program.buffers if "index" in b.name and b.name.endswith("cache")):
        cache = interpreter.memory.arrays[backend.program.buffer_ids[b.name]]
        if groups:
            flat = cache.reshape(-1, cache.shape[-1])
            flat[:] = flat[np.random.default_rng(4).integers(0, groups, len(flat))]
        elif "scale" in b.name:
            cache[dice.random(cache.shape) < share] = 0
        stored = np.ascontiguousarray(cache.astype(b.dtype.numpy))
        backend.__dict__["homes"][b.name].write(stored)


def best(scores: np.ndarray, topk: int) -> list[int]:
    return np.sort(np.argsort(-scores, kind="stable")[:topk]).tolist()


@pytest.mark.parametrize("ties", [False, True])
def test_the_positions_that_the_indexer_chooses(
    ties: bool, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, and the choice among them; with ties nearly all scores are zeros of both signs."""
    program, weights = compiled(monkeypatch, {**INDEX, **ONE_LAYER}, 3)
    made, interpreter = loaded(program, weights, devices())
    if ties:
        with_ties(made, interpreter, 0.95)
    for position in POSITIONS:
        for each in (made, interpreter):
            begin(each, 3, position)
            list(each.steps(1))
        seen = min(position + 1, INDEX["index_topk"])
        chosen = words(made, "l0.selected", np.int32)[:seen]
        assert chosen.tolist() == interpreter.read("l0.selected")[0, :seen].tolist()
        assert (np.diff(chosen) > 0).all()
        assert (position + 1 > seen) or chosen.tolist() == list(range(seen))
        if position + 1 > seen:
            scores = by_position(made, 0, position + 1, 3)
            wanted = by_position(interpreter, 0, position + 1, 3)
            assert np.abs(scores - wanted).max() < 1e-3 * np.abs(wanted).max()
            assert chosen.tolist() == best(scores, INDEX["index_topk"])


@pytest.mark.parametrize(
    ("workers", "topk", "position", "groups"),
    [
        (3, 900, 8999, 0),  # nearly all of them are of one share, which is read again and again
        (3, 900, 8999, 5),
        (16, 48, 32900, 0),  # more than are listed at a time
        (5, 48, 1086, 2),
        (7, 512, 513, 0),  # all but two
    ],
)
def test_the_choice_among_many(
    workers: int, topk: int, position: int, groups: int,
    devices: Devices, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Shares of many pages, of which one has the largest scores; with groups there are but so many
    different ones."""
    changes = {**INDEX, **ONE_LAYER, "index_topk": topk}
    monkeypatch.setitem(kernel.MODELS, "own", (changes, DType.BF16, workers, {}))
    context = position // 1024 * 1024 + 1088
    program, weights = kernel.compiled("own", context=context)
    made, interpreter = loaded(program, weights, devices(), pages=context // 64)
    pages = np.random.default_rng(1).permutation(context // 64)
    made.state["pages"][0] = pages
    splits = min(workers, context // 64)
    if not groups:
        name = next(b.name for b in program.buffers if b.name.endswith("index_scale_cache"))
        interpreter.memory.arrays[program.buffer_ids[name]][pages[::splits]] *= 8
    with_ties(made, interpreter, 0, groups)
    begin(made, 3, position)
    list(made.steps(1))
    scores = by_position(made, 0, position + 1, splits)
    if groups:
        assert len(np.unique(scores)) <= groups + 1
    elif 2 * topk < position:
        assert np.mean(np.asarray(best(scores, topk)) // 64 % splits == 0) > 2 / splits
    assert words(made, "l0.selected", np.int32)[:topk].tolist() == best(scores, topk)


def test_tokens_of_a_step_choose_each_for_itself(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four tokens in one page and over its border, of which the first chooses everything that it sees, and
    two sequences side by side; as the interpreter, and as each token alone."""
    monkeypatch.setitem(kernel.MODELS, "own", ({**INDEX, **ONE_LAYER}, DType.BF16, 3, {}))
    together, interpreter = loaded(*kernel.compiled("own", tokens=4), devices())
    alone, _ = loaded(*kernel.compiled("own"), devices())
    for made in (together, alone):
        with_ties(made, interpreter, 0.5)
    topk = INDEX["index_topk"]
    for rows in (
        [(0, topk - 1 + i) for i in range(4)],
        [(0, 190 + i) for i in range(4)],
        [(0, 150), (0, 151), (1, 20), (1, 21)],
        [(1, 64), (0, 255)],
    ):
        for each in (together, interpreter):
            kernel.begin_rows(each, rows, [3 + i for i in range(len(rows))])
            list(each.steps(1))
        for row, (sequence, position) in enumerate(rows):
            chosen = words(together, "l0.selected", np.int32, row)[: min(topk, position + 1)]
            wanted = interpreter.read("l0.selected")[row, : chosen.size]
            assert chosen.tolist() == wanted.tolist()
            kernel.begin_rows(alone, [(sequence, position)], [3 + row])
            list(alone.steps(1))
            if position >= topk:
                own = by_position(alone, 0, position + 1, 3)
                assert own.tobytes() == by_position(together, row, position + 1, 3).tobytes()
            assert words(alone, "l0.selected", np.int32)[: chosen.size].tolist() == wanted.tolist()


def test_all_positions_chosen_is_attention_to_all(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights with an indexer that chooses all there are, and without one, over a page's border."""
    logits = []
    for changes in ({**LATENT}, {**INDEX, **ONE_LAYER, "index_topk": 256}):
        program, weights = compiled(monkeypatch, {**changes, "num_hidden_layers": 1}, 3, slots=8)
        rng = np.random.default_rng(11)
        for name in sorted(w for w in weights if "indexer" not in w and "rope_table" not in w):
            fresh = rng.standard_normal(weights[name].shape) * weights[name].shape[1] ** -0.5
            weights[name] = fresh.astype(weights[name].dtype)
        made, _ = loaded(program, weights, devices())
        cache = made.__dict__["homes"]["layers.0.latent_cache"]
        cache.write(np.zeros(kernel.PAGES * 64 * 48, np.uint16))
        begin(made, 5, 0)
        tokens = [int(t[0]) for t in made.steps(70)]
        logits.append((tokens, made.read("logits")[0]))
    assert logits[0][0] == logits[1][0]
    assert np.abs(logits[0][1] - logits[1][1]).max() < 0.02 * np.abs(logits[0][1]).max()


@pytest.mark.parametrize("packed", [False, True])
def test_prompts_leave_what_the_kernel_reads(
    packed: bool, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same tokens as a prompt through PyTorch, in two runs, and one by one through the kernel: logits,
    and rows of latents and of the indexer's keys, which are swizzled and quantised. Packed ones have two
    scales, and are all chosen."""
    changes, machine, lora = {**INDEX, **ONE_LAYER}, dict[str, int](), 160
    if packed:
        changes |= {"kv_lora_rank": lora, "index_topk": 40}
        machine = {"slots": 8, "slot_bytes": 8192, "packed_latents": True}
    program, weights = compiled(monkeypatch, changes, 3, **machine)
    made, _ = loaded(program, weights, devices())
    tokens = [(5 * i + 3) % 96 for i in range(28)]
    for position, token in enumerate(tokens):
        begin(made, token, position)
        list(made.steps(1))
    config = load_config({k: v for k, v in {**kernel.BASE, **changes}.items() if v is not None})
    tensors = {n: torch.tensor(w.astype(np.float32)) for n, w in weights.items()}
    tensors = {n: t if n == ROPE_TABLE else t.to(torch.bfloat16) for n, t in tensors.items()}
    types = {"latent": torch.uint8 if packed else torch.bfloat16, "index": torch.float8_e4m3fn,
             "index_scale": torch.float32}  # fmt: skip
    caches = {
        name: torch.zeros(shape, dtype=types[name.split(".")[2].removesuffix("_cache")])
        for name, shape in cuda.cache_shapes(program, kernel.PAGES).items()
    }
    graph = build(config, kernel.CONTEXT)
    tensors, _ = families.stacked(graph, tensors, {})
    runner = PromptRunner(graph, tensors, caches, {})
    runner.run(tokens[:9], 0, kernel.TABLE, [])
    logits = runner.run(tokens[9:], 9, kernel.TABLE, [len(tokens) - 10])[0].numpy()
    assert np.abs(made.read("logits")[0] - logits).max() < 0.02 * np.abs(logits).max()
    rows: dict[str, list[torch.Tensor]] = {}
    for name, cache in caches.items():
        page = cache[kernel.TABLE[0], 0]  # all of them are in it
        mine = made.__dict__["homes"][name].read(
            kernel.TABLE[0] * page.numel() * page.element_size(),
            len(tokens) * page.shape[1] * page.element_size(),
            np.uint8,
        )
        own = torch.from_numpy(mine).view(cache.dtype).view(len(tokens), -1)
        rows[name.split(".")[2]] = found = [own, page[: len(tokens)]]
        if cache.dtype is torch.uint8:
            assert (own != page[: len(tokens)])[:, :lora].float().mean() < 0.1
            found[:] = (torch.from_numpy(unpack(x.numpy(), lora).astype(np.float32)) for x in found)
    rows = {name: [x.float() for x in pair] for name, pair in rows.items()}
    scales = rows.pop("index_scale_cache")
    rows["index_cache"] = [k * scale for k, scale in zip(rows["index_cache"], scales, strict=True)]
    for name, (own, prompt) in rows.items():
        # A sum that rounds the other way moves an e4m3 by a step, an eighth of itself at most.
        most = 0.13 if name == "index_cache" or packed else 0.02
        assert ((own - prompt).abs() <= most * prompt.abs().clamp(min=1)).all(), name


def test_shapes_that_the_kernel_cannot_run_are_refused(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = compiled(monkeypatch, {**INDEX, **ONE_LAYER}, 2)
    assert step_rows(program, TARGETS["sm_90a"]) == 8

    def refused(kind: type[LatentAttention | IndexRope], match: str, **changes: int) -> None:
        ops = tuple(replace(o, **changes) if isinstance(o, kind) else o for o in program.ops)
        with pytest.raises(UserError, match=match):
            CudaBackend(replace(program, ops=ops), {}, {}, devices())

    refused(
        LatentAttention, r"latents of 24 and rotated keys of 16 elements; .* up to 128", lora=24
    )
    refused(IndexRope, r"indexer has 16 heads of 8 elements; .* heads of 16 to 60", head_dim=8)
    refused(IndexRope, "indexer has 80 heads of 16 elements; .* accepts up to 64 heads", heads=80)
