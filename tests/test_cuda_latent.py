"""Latent and sparse attention in the CUDA kernel, step by step against the interpreter. Whole tokens of
such models are in test_cuda_kernel.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import test_cuda_kernel as kernel
from test_cuda_kernel import INDEX, LATENT, Devices, begin, loaded

from tilert.backends.cuda.backend import CudaBackend
from tilert.backends.cuda.limits import step_rows
from tilert.errors import UserError
from tilert.ir.dtype import DType
from tilert.ir.program import Program
from tilert.ops import IndexRope, LatentAttention

folder, devices = kernel.folder, kernel.devices  # fixtures

ONE_LAYER = {"num_hidden_layers": 1, "indexer_types": ["full"]}
# Lengths at which everything is chosen, all but one, a page and a bit, and most is not.
POSITIONS = [3, 23, 24, 63, 64, 150, 255]


def compiled(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], workers: int, **machine: int
) -> tuple[Program, dict[str, np.ndarray]]:
    """See test_cuda_kernel.compiled."""
    monkeypatch.setitem(kernel.MODELS, "own", (changes, DType.BF16, workers, machine))
    return kernel.compiled("own")


def words(backend: CudaBackend, name: str, dtype: Any) -> np.ndarray:
    """The first row of an activation."""
    b = backend.program.buffers[backend.program.buffer_ids[name]]
    return backend.arena.read(b.offset, b.cols, dtype)


@pytest.mark.parametrize("ties", [False, True])
def test_the_positions_that_the_indexer_chooses(
    ties: bool, devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, and the choice among them; with ties nearly all scores are zeros of both signs."""
    program, weights = compiled(monkeypatch, {**INDEX, **ONE_LAYER}, 3)
    made, interpreter = loaded(program, weights, devices())
    name = next(b.name for b in program.buffers if b.name.endswith("index_scale_cache"))
    scales = interpreter.memory.arrays[program.buffer_ids[name]]
    if ties:
        scales[np.random.default_rng(2).random(scales.shape) < 0.95] = 0
    made.__dict__["homes"][name].write(np.ascontiguousarray(scales.astype(np.float32)))
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
            scores, wanted = words(made, "l0.index", np.float32), interpreter.read("l0.index")[0]
            pages = range(position // 64 + 1)
            columns = np.concatenate(  # of three shares, one page after another
                [
                    np.arange(min(64, position + 1 - 64 * n)) + n % 3 * 128 + n // 3 * 64
                    for n in pages
                ]
            )
            scale = np.abs(wanted[columns]).max()
            assert np.abs(scores[columns] - wanted[columns]).max() < 1e-3 * scale


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


def test_shapes_that_the_kernel_cannot_run_are_refused(
    devices: Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, _ = compiled(monkeypatch, {**INDEX, **ONE_LAYER}, 2)
    assert step_rows(program) == 1

    def refused(kind: Any, match: str, **changes: int) -> None:
        ops = tuple(replace(o, **changes) if isinstance(o, kind) else o for o in program.ops)
        with pytest.raises(UserError, match=match):
            CudaBackend(replace(program, ops=ops), {}, {}, devices())

    refused(
        LatentAttention, r"latents of 24 and rotated keys of 16 elements; .* up to 128", lora=24
    )
    refused(IndexRope, r"indexer has 16 heads of 8 elements; .* heads of 16 to 60", head_dim=8)
