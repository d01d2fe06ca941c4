"""Settings that come with tilert, for cards and sizes of models that were measured; see tune.py.

Only what was measured stands here, with its figures. What holds for a card in general is in its machine
(ir/machine.py: window 2 for the H100, 3 for the H200), and the unit that suits a model's rows is a rule
(compiler/units.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Shipped:
    """Fields of the machine for models on a card, as tune has kept them.

    card: part of the driver's name of it. least_bytes and most_bytes: of all weights as stored. A unit must
    hold a page of keys (128 * head_dim bytes) of every model that an entry is for.
    """

    card: str
    least_bytes: int
    most_bytes: int
    settings: Mapping[str, int] = field(hash=False)


# The first that fits counts; bench/results/settings-gpu-h100.json has the figures. H100: to deal each op
# out evenly takes Llama-3.2-1B (2.5 GB) 0.870 ms instead of 0.872 after 32 tokens, 0.912 instead of 0.914
# after 1,000, and Qwen3-0.6B 0.656 instead of 0.664; from 1.7B on it is no gain. Three units under way take
# Llama-3.1-8B (16 GB) 5.050 ms instead of 5.244, and 5.194 instead of 5.393; models of up to 8 GB lose by
# it or stay as they are; Qwen3-8B in FP8 (9.4 GB) takes 2.831 ms instead of 2.854, 2.883 instead of 2.908.
# A fourth gives 0.3% more, but disturbs all other accesses (docs/log.md).
# H200: with units of 16 KB window 2 was better for Qwen3-0.6B (0.567 ms, 0.581), but its units have 24 KB
# since, with which 3 takes 0.538.
SHIPPED: tuple[Shipped, ...] = (
    Shipped("H100", 0, 2_600_000_000, {"even": True}),
    Shipped("H100", 9_000_000_000, 20_000_000_000, {"window": 3}),
)


def shipped(card: str, size: int) -> Mapping[str, int]:
    """What was measured for a card and models of about `size` bytes; empty when nothing was."""
    fitting = (
        s.settings for s in SHIPPED if s.card in card and s.least_bytes <= size <= s.most_bytes
    )
    return next(fitting, {})
