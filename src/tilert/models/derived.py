"""Weights that no tensor of the checkpoint holds as they are used: made once, when a model is loaded.

The table of rotations is computed (rotary.py). Latent attention multiplies with the two parts of kv_b_proj
apart: the keys' part transposed, so that queries become latents, and the values' part. Both are laid out as
rows of weights, one head after another; elements and their block scales are moved, nothing is quantised
again, and the tensor itself is not kept. The layer that guesses further tokens multiplies with the two
halves of eh_proj apart, for its two inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tilert.models.config import DecoderConfig

ROPE_TABLE = "tilert.rope_table"  # [context, head_dim]: cosines, then sines; made by rotary.py


@dataclass(frozen=True, slots=True)
class HeadPart:
    """A part of kv_b_proj [heads * (nope + value), lora], whose heads have `nope` rows for keys first.

    keys: its rows are W_uk^T, [heads * lora, nope]; else W_uv, [heads * value, lora].
    """

    source: str
    heads: int
    nope: int
    value: int
    lora: int
    keys: bool

    @property
    def stored(self) -> tuple[int, int]:
        """Shape of the tensor."""
        return self.heads * (self.nope + self.value), self.lora

    def rows(self, tensor: np.ndarray) -> np.ndarray:
        """The part as rows of weights, contiguous."""
        by_head = tensor.reshape(self.heads, self.nope + self.value, self.lora)
        if not self.keys:
            return np.ascontiguousarray(by_head[:, self.nope :]).reshape(-1, self.lora)
        return np.ascontiguousarray(by_head[:, : self.nope].swapaxes(1, 2)).reshape(-1, self.nope)

    def block(self, stored: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the part that share a scale, where those of the tensor are `stored`.

        The stored blocks may reach over a border of heads or of parts; these do not.
        """
        inner = math.gcd(stored[0], self.nope, self.value)
        return (math.gcd(stored[1], self.lora), inner) if self.keys else (inner, stored[1])

    def scales(self, scales: np.ndarray, stored: tuple[int, int]) -> np.ndarray:
        """The scales of the part, one per `block`, from those of the tensor, one per `stored` block."""
        block = self.block(stored)
        first, count = (0, self.nope) if self.keys else (self.nope, self.value)
        inner = block[1] if self.keys else block[0]
        heads = np.arange(self.heads)[:, None] * (self.nope + self.value)
        rows = (heads + np.arange(first, first + count, inner)) // stored[0]  # [heads, blocks]
        step = block[0] if self.keys else block[1]
        cols = np.arange(0, self.lora, step) // stored[1]
        found = scales[rows][:, :, cols]  # [heads, blocks of the head, blocks of the latent]
        if self.keys:
            found = found.swapaxes(1, 2)
        return np.ascontiguousarray(found.reshape(-1, found.shape[2]))


@dataclass(frozen=True, slots=True)
class ColumnPart:
    """Columns [first, first + cols) of a tensor of shape `stored`."""

    source: str
    stored: tuple[int, int]
    first: int
    cols: int

    def rows(self, tensor: np.ndarray) -> np.ndarray:
        """The columns, contiguous."""
        return np.ascontiguousarray(tensor[:, self.first : self.first + self.cols])

    def block(self, stored: tuple[int, int]) -> tuple[int, int]:
        """As HeadPart.block."""
        return stored[0], math.gcd(stored[1], self.first, self.cols)

    def scales(self, scales: np.ndarray, stored: tuple[int, int]) -> np.ndarray:
        """As HeadPart.scales."""
        columns = np.arange(self.first, self.first + self.cols, self.block(stored)[1]) // stored[1]
        return np.ascontiguousarray(scales[:, columns])


def key_part(layer: int) -> str:
    """Name of the rows that make latents of a layer's queries."""
    return f"tilert.layers.{layer}.key_up"


def value_part(layer: int) -> str:
    """Name of the rows that make values of a layer's latents."""
    return f"tilert.layers.{layer}.value_up"


def embedding_part(layer: int) -> str:
    """Name of the columns of a guessing layer's eh_proj that take the token."""
    return f"tilert.layers.{layer}.e_proj"


def hidden_part(layer: int) -> str:
    """Name of the columns of a guessing layer's eh_proj that take the hidden state."""
    return f"tilert.layers.{layer}.h_proj"


def tensor_parts(config: DecoderConfig, devices: int = 1) -> dict[str, HeadPart | ColumnPart]:
    """The weights of a model, and of the layers that guess further tokens, that are parts of a tensor; of
    one device of several, which has its part of the heads."""
    if (latent := config.latent) is None:
        return {}
    parts: dict[str, HeadPart | ColumnPart] = {}
    layers, hidden = config.num_hidden_layers, config.hidden_size
    for layer in range(layers, layers + latent.num_nextn_predict_layers):
        source = f"model.layers.{layer}.eh_proj.weight"
        for name, first in ((embedding_part(layer), 0), (hidden_part(layer), hidden)):
            parts[name] = ColumnPart(source, (hidden, 2 * hidden), first, hidden)
    for layer in range(layers + latent.num_nextn_predict_layers):
        source = f"model.layers.{layer}.self_attn.kv_b_proj.weight"
        for name, keys in ((key_part(layer), True), (value_part(layer), False)):
            parts[name] = HeadPart(
                source, config.num_attention_heads // devices, latent.qk_nope_head_dim, latent.v_head_dim,
                latent.kv_lora_rank, keys,
            )  # fmt: skip
    return parts
