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

    card: part of the driver's name of it. most_bytes: of all weights as stored. A unit must hold a page
    of keys (128 * head_dim bytes) of every model that an entry is for.
    """

    card: str
    most_bytes: int
    settings: Mapping[str, int] = field(hash=False)


# The first that fits counts. None yet: on an H200, window 2 was measured better for Qwen3-0.6B (1.19 GB) with
# units of 16 KB, 0.567 ms and 0.581, but its units have 24 KB since, with which 3 takes 0.538.
SHIPPED: tuple[Shipped, ...] = ()


def shipped(card: str, size: int) -> Mapping[str, int]:
    """What was measured for a card and models of about `size` bytes; empty when nothing was."""
    fitting = (s.settings for s in SHIPPED if s.card in card and size <= s.most_bytes)
    return next(fitting, {})
