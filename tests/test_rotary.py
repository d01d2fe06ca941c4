"""Rotary tables against transformers, for every rope type, within and beyond the trained context."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tilert.models import load_config
from tilert.models.rotary import attention_factor, rotary_table

CONTEXT = 128  # trained positions of the small configs


def spread(dim: int, low: float, high: float) -> list[float]:
    return np.linspace(low, high, dim // 2).tolist()


ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.7},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "dynamic 1": {"rope_type": "dynamic", "factor": 1.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn without factor": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 16,
    },
    "yarn betas": {
        "rope_type": "yarn",
        "factor": 6.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 7,
        "beta_slow": 0.3,
        "truncate": False,
    },
    "yarn step": {
        "rope_type": "yarn",
        "factor": 6.5,
        "original_max_position_embeddings": 64,
        "beta_fast": 2,
        "beta_slow": 2,
        "truncate": False,
    },
    "yarn mscale": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
        "mscale_all_dim": 1.3,
    },
    "yarn one mscale": {
        "rope_type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 64,
        "mscale": 0.707,
    },
    "yarn attention": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "yarn tiny context": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 3,
    },
    "longrope": {
        "rope_type": "longrope",
        "short_factor": spread(16, 1.0, 1.4),
        "long_factor": spread(16, 1.1, 30.0),
        "original_max_position_embeddings": 32,
    },
    "longrope factor": {
        "rope_type": "longrope",
        "short_factor": spread(16, 1.0, 1.4),
        "long_factor": spread(16, 1.1, 30.0),
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.1,
    },
}


def settings(rope: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A config.json of a llama with heads of 16 elements."""
    return {
        "model_type": "llama",
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rope_parameters": {"rope_theta": 10000.0, **rope},
    } | more


def reference(config: dict[str, Any], calls: list[range]) -> tuple[np.ndarray, np.ndarray]:
    """(cos, sin) of transformers, [positions, head_dim / 2], from one forward pass per range."""
    hf = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    rotary = LlamaRotaryEmbedding(hf)
    half = (hf.head_dim or 0) // 2
    cos, sin = [], []
    for call in calls:
        c, s = rotary(torch.zeros(1), torch.tensor([list(call)]))
        assert torch.equal(c[..., :half], c[..., half:])
        cos.append(c[0, :, :half].numpy())
        sin.append(s[0, :, :half].numpy())
    return np.concatenate(cos), np.concatenate(sin)


def compare(config: dict[str, Any], calls: list[range], prompt: int | None) -> None:
    """Our rows equal those of transformers, but for a few frequencies that are one bit off.

    torch rounds about one power in a hundred the other way. The angle is then off by as much as a
    bit of it, in radians; no scaling makes an angle larger than the plain one.
    """
    parsed = load_config(config)
    positions = np.concatenate([np.array(call) for call in calls])
    plain = parsed.rope_theta ** -(np.arange(0, parsed.head_dim, 2) / parsed.head_dim)
    one_bit = positions[:, None] * plain * 2.0**-22
    actual = rotary_table(parsed, int(positions.max()) + 1, prompt)
    for ours, theirs in zip(actual, reference(config, calls), strict=True):
        assert ours.dtype == np.float32
        off = np.abs(ours[positions] - theirs)
        assert np.all(off <= 1e-6 + one_bit), f"off by {np.max(off - one_bit)}"
        assert np.mean(off > 1e-6) < 0.05, f"{np.mean(off > 1e-6):.3f} of the entries differ"


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize(
    ("prompt", "total"),
    [(0, 40), (0, 3 * CONTEXT), (20, 2 * CONTEXT), (CONTEXT + 50, CONTEXT + 90)],
)
def test_table_is_that_of_transformers(name: str, prompt: int, total: int) -> None:
    """One pass over the prompt, then one position at a time."""
    calls = [range(prompt)] if prompt else []
    calls += [range(p, p + 1) for p in range(prompt, total)]
    compare(settings(ROPES[name]), calls, prompt or None)


@pytest.mark.parametrize("name", ["linear", "llama3", "yarn", "default"])
@pytest.mark.parametrize("theta", [10000.0, 500000.0, 1e6, 5e6, 12345.678])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
def test_frequencies_are_exact_far_out(name: str, theta: float, head_dim: int) -> None:
    """At position 20000 a frequency that is one bit off moves the angle by up to 0.002."""
    rope = ROPES[name] | {"rope_theta": theta}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = 8192
    config = settings(rope, head_dim=head_dim, max_position_embeddings=131072)
    compare(config, [range(19_990, 20_000)], None)


@pytest.mark.parametrize("length", [4097, 5000, 9999, 16384])
def test_dynamic_is_exact_far_out(length: int) -> None:
    config = settings(ROPES["dynamic"], head_dim=128, max_position_embeddings=4096)
    compare(config, [range(length)], length)


def test_blocks_join() -> None:
    """Positions are worked on in blocks; the rows around a border follow the formula."""
    cos, sin = rotary_table(load_config(settings(ROPES["default"])), 8200)
    for p in (8191, 8192, 8193):
        assert cos[p, 0] == np.float32(np.cos(p))
        assert sin[p, 0] == np.float32(np.sin(p))
    assert rotary_table(load_config(settings(ROPES["default"])), 0)[0].shape == (0, 8)


def test_rope_types_differ() -> None:
    """Guards the comparison above: the scalings are not all the default in disguise."""
    tables = {
        name: rotary_table(load_config(settings(rope)), 200)[0] for name, rope in ROPES.items()
    }
    plain = tables.pop("default")
    for name, table in tables.items():
        assert not np.allclose(table, plain, atol=1e-3), name


def test_longrope_and_dynamic_see_the_prompt() -> None:
    for name in ("longrope", "dynamic"):
        config = load_config(settings(ROPES[name]))
        alone, long = rotary_table(config, 10)[0], rotary_table(config, 10, 300)[0]
        assert not np.array_equal(alone, long), name
        assert np.array_equal(alone, rotary_table(config, 10, 20)[0]), name


@pytest.mark.parametrize("name", [name for name in ROPES if name.startswith(("yarn", "longrope"))])
def test_attention_factor(name: str) -> None:
    config = settings(ROPES[name])
    hf = LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"})
    expected = LlamaRotaryEmbedding(hf).attention_scaling
    assert attention_factor(load_config(config).rope_scaling) == pytest.approx(expected, rel=1e-12)
