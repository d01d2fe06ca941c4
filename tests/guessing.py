"""Tiny models with the layer that guesses tokens, and that layer in torch: the independent reference.

transformers does not load such layers, but their blocks are its decoder layers: a model with one layer more
than its config says is made, and that last layer is the block.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)  # for such sizes several threads wait for each other most of the time
LAYERS = 3  # of the model; the layer that guesses is number 3 from 0
PREFIX = f"model.layers.{LAYERS}."
ADDS = ("o_proj.weight", "down_proj.weight")  # what blocks add to the residual comes from these


@dataclass(frozen=True)
class Reference:
    """The model, the block as a model of one layer with shared_head, and what goes in front of it."""

    main: Any
    block: Any
    own: dict[str, torch.Tensor]  # enorm, hnorm and eh_proj

    def inputs(self, tokens: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """x of the block [n, hidden_size], for tokens [n] and the hidden states before them."""
        eps = self.main.config.rms_norm_eps

        def normed(x: torch.Tensor, name: str) -> torch.Tensor:
            return torch.nn.functional.rms_norm(x, x.shape[-1:], self.own[name], eps)

        token = normed(self.block.model.embed_tokens(tokens), "enorm")
        return torch.cat([token, normed(hidden, "hnorm")], dim=-1) @ self.own["eh_proj"].T

    def logits(self, tokens: list[int]) -> np.ndarray:
        """What the layer makes at positions 0 to len(tokens) - 2, [positions, vocab_size]."""
        with torch.no_grad():
            return self.block(inputs_embeds=self._known(tokens)[None]).logits[0].numpy()

    def draft(self, tokens: list[int], count: int) -> tuple[list[int], np.ndarray]:
        """`count` guesses, the layer applied again to what it made, and the logits of the last."""
        guesses: list[int] = []
        with torch.no_grad():
            x = self._known(tokens)
            while True:
                made = self.block.model(inputs_embeds=x[None]).last_hidden_state[0, -1:]
                logits = self.block.lm_head(made)[0]
                guesses.append(int(logits.argmax()))
                if len(guesses) == count:
                    return guesses, logits.numpy()
                x = torch.cat([x, self.inputs(torch.tensor(guesses[-1:]), made)])

    def hidden(self, tokens: list[int]) -> torch.Tensor:
        """The model's hidden states after its last norm."""
        with torch.no_grad():
            return self.main.model(torch.tensor([tokens])).last_hidden_state[0]

    def _known(self, tokens: list[int]) -> torch.Tensor:
        return self.inputs(torch.tensor(tokens[1:]), self.hidden(tokens)[:-1])


def make(
    name: str, folder: Path, adds: float = 1.0, *, shared: bool = False,
    dtype: torch.dtype = torch.float32, **changes: Any,
) -> Reference:  # fmt: skip
    """Write a model of the family with such a layer into `folder`.

    adds: a factor on what all blocks add. At 0 the next token hangs on the token alone, and every guess is
    right. shared: the layer has no embedding and head of its own.
    """
    if name == "glm_moe_dsa":
        changes = {"indexer_types": ["full", "shared", "full", "full"], **changes}
    model = families.make(name, folder, dtype, num_hidden_layers=LAYERS + 1, **changes)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(7)
    width = model.config.hidden_size
    own = {n: torch.randn(width) * 0.2 + 1 for n in ("enorm", "hnorm", "shared_head.norm")}
    own["eh_proj"] = torch.randn(width, 2 * width) * 0.15
    if adds != 1:  # guesses should be right: the layer takes the token, as the model does
        own |= {"enorm": torch.ones(width), "shared_head.norm": tensors["model.norm.weight"]}
        own["eh_proj"] = torch.cat([torch.eye(width), torch.zeros(width, width)], dim=1)
    own |= {"embed_tokens": tensors["model.embed_tokens.weight"],
            "shared_head.head": tensors["lm_head.weight"]}  # fmt: skip
    if adds == 1 and not shared:  # others than the model's, so that a mistake is seen
        for part in ("embed_tokens", "shared_head.head"):
            own[part] = torch.randn_like(own[part]) * 0.15
    own = {n: tensor.to(dtype) for n, tensor in own.items()}
    for key in [key for key in tensors if key.endswith(ADDS)]:
        tensors[key] = tensors[key] * adds
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(ADDS) or key.endswith("experts.down_proj"):
                parameter *= adds
    stored = {
        n: t for n, t in own.items() if not shared or n not in ("embed_tokens", "shared_head.head")
    }
    tensors |= {f"{PREFIX}{n}.weight": t.clone() for n, t in stored.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    _shorten(folder / "config.json")
    return Reference(*_split(model, own), own)


def _shorten(path: Path) -> None:
    """One layer less, of what is said of every layer, too."""
    config = json.loads(path.read_text())
    for key, value in config.items():
        if isinstance(value, list) and len(value) == LAYERS + 1:
            config[key] = value[:LAYERS]
    config |= {"num_hidden_layers": LAYERS, "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(config))


def _split(model: Any, own: dict[str, torch.Tensor]) -> tuple[Any, Any]:
    """The model without its last layer, and a model that has only that."""
    main, block = model, copy.deepcopy(model)
    block.model.layers = block.model.layers[LAYERS:]
    main.model.layers = main.model.layers[:LAYERS]
    with torch.no_grad():
        block.model.embed_tokens.weight.copy_(own["embed_tokens"])
        block.lm_head.weight.copy_(own["shared_head.head"])
        block.model.norm.weight.copy_(own["shared_head.norm"])
    return main, block
