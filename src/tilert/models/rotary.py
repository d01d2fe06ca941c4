"""Tables of rotary position embeddings: cosines and sines for every position.

Formulas and their order follow transformers' modeling_rope_utils.py, which works in float32. At
position 10000 one bit of a frequency moves an angle by about 1e-3, so frequencies round to float32
where it rounds; powers and cosines, which libraries round differently, are taken in float64 first.
The tables then agree but for a bit in about one of a hundred frequencies. Knows settings only: how
a table is applied to q and k is the business of ops.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from tilert.models.config import DecoderConfig, RopeScaling

F32 = np.float32
Floats = NDArray[np.float32]
_BLOCK = 8192  # positions worked on at once, which bounds the float64 temporaries


def rotary_table(
    config: DecoderConfig, max_positions: int, prompt_length: int | None = None
) -> tuple[Floats, Floats]:
    """(cos, sin), each float32 [max_positions, head_dim / 2], scaled by the attention factor.

    Row p serves position p. dynamic and longrope depend on the length of the sequence too: row p
    assumes max(p + 1, prompt_length) positions, which is what transformers sees when it prefills
    prompt_length tokens at once and then decodes one by one. The other types ignore prompt_length.
    """
    assert max_positions >= 0, f"a table of {max_positions} positions"
    half = config.head_dim // 2
    cos = np.empty((max_positions, half), F32)
    sin = np.empty((max_positions, half), F32)
    scale = F32(attention_factor(config.rope_scaling))
    for start in range(0, max_positions, _BLOCK):
        positions = np.arange(start, min(start + _BLOCK, max_positions))
        lengths = np.maximum(positions + 1, prompt_length or 0)
        angles = positions.astype(F32)[:, None] * frequencies(config, lengths)
        wide = angles.astype(np.float64)
        rows = slice(start, start + len(positions))
        cos[rows] = np.cos(wide).astype(F32) * scale
        sin[rows] = np.sin(wide).astype(F32) * scale
    return cos, sin


def attention_factor(scaling: RopeScaling) -> float:
    """What cosines and sines are multiplied by; 1 except for yarn and longrope."""
    if scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    assert factor is not None and original is not None, f"{scaling.rope_type} is incomplete"
    if factor <= 1.0:
        return 1.0
    if scaling.rope_type == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))
    if scaling.mscale and scaling.mscale_all_dim:
        return _mscale(factor, scaling.mscale) / _mscale(factor, scaling.mscale_all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def frequencies(config: DecoderConfig, lengths: NDArray[np.int64]) -> Floats:
    """Radians per position, [head_dim / 2], or [lengths, head_dim / 2] where the length matters."""
    scaling, theta, dim = config.rope_scaling, config.rope_theta, config.head_dim
    match scaling.rope_type:
        case "default":
            return F32(1) / _powers(theta, dim)
        case "linear":
            return F32(1) / _powers(theta, dim) / F32(scaling.factor or 1)
        case "llama3":
            return _llama3(scaling, F32(1) / _powers(theta, dim))
        case "yarn":
            return _yarn(scaling, theta, dim)
        case "longrope":
            divisors = np.array([scaling.short_factor, scaling.long_factor], F32)
            both = F32(1) / (divisors * _powers(theta, dim))
            is_long = lengths > (scaling.original_max_position_embeddings or 0)
            return both[is_long.astype(np.int64)]
        case "dynamic":
            return _dynamic(scaling, theta, dim, lengths, config.max_position_embeddings)
    raise AssertionError(f"unknown rope_type {scaling.rope_type}")


def _powers(base: float | Floats, dim: int) -> Floats:
    """base ** (2 i / dim) for i < dim / 2, correctly rounded to float32."""
    exponents = np.arange(0, dim, 2, dtype=F32) / F32(dim)
    return _power(np.asarray(base, F32), exponents)


def _power(base: Floats, exponent: Floats | float) -> Floats:
    exact = base.astype(np.float64) ** np.asarray(exponent, np.float64)
    return exact.astype(F32)


def _dynamic(
    scaling: RopeScaling, theta: float, dim: int, lengths: NDArray[np.int64], context: int
) -> Floats:
    """NTK scaling: theta grows with the length beyond the trained context."""
    factor = scaling.factor or 1.0
    grown = F32(factor) * np.maximum(lengths, context).astype(F32) / F32(context)
    grown = _power(grown - F32(factor - 1), dim / (dim - 2))
    bases = np.where(lengths > context, F32(theta) * grown, F32(theta))
    return F32(1) / _powers(bases[:, None], dim)


def _llama3(scaling: RopeScaling, plain: Floats) -> Floats:
    """Long waves are stretched by the factor, short ones kept, and those between interpolated."""
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert factor and original and low and high, f"{scaling} is incomplete"
    # transformers divides a number by a tensor, which torch does as reciprocal, then product.
    wavelength = F32(1) / plain * F32(2 * math.pi)
    is_long = wavelength > F32(original / low)
    is_short = wavelength < F32(original / high)
    smooth = (F32(1) / wavelength * F32(original) - F32(low)) / F32(high - low)
    stretched = np.where(is_long, plain / F32(factor), plain)
    between = (F32(1) - smooth) * stretched / F32(factor) + smooth * stretched
    return np.where(is_long | is_short, stretched, between)


def _yarn(scaling: RopeScaling, theta: float, dim: int) -> Floats:
    """A ramp over the dimensions from plain frequencies to frequencies divided by the factor.

    Source: https://arxiv.org/abs/2309.00071, section 3.2.
    """
    factor, original = scaling.factor, scaling.original_max_position_embeddings
    fast, slow = scaling.beta_fast, scaling.beta_slow
    assert factor and original and fast and slow, f"{scaling} is incomplete"

    def dimension(rotations: float) -> float:
        """Where the original context makes that many rotations."""
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension(fast), dimension(slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # no division by zero
    ramp = (np.arange(dim // 2, dtype=F32) - F32(low)) / F32(high - low)
    plain_share = F32(1) - np.clip(ramp, 0, 1).astype(F32)
    divided_share = F32(1) - plain_share  # rounds, so it is not always the ramp itself
    powers = _powers(theta, dim)
    plain, divided = F32(1) / powers, F32(1) / (F32(factor) * powers)
    return (divided * divided_share + plain * plain_share).astype(F32)
