"""Drafts for speculation: what the checkpoint's own layer for that guesses (models/mtp.py).

The layer has caches of its own, with a row for every position, made of the model's hidden state there and
of the token after it. They lie under the model's page table, so that a prefix that is found again brings
them along. Knows no sampling: whatever is guessed, the answer stays the same. Where tokens are chosen on
the device, so are guesses, by one program of model and layer, and what is here makes the first ones only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tilert.engine.runner import Row, Runner


class LayerDrafter:
    """Follows one sequence, whose `tokens` only grow, with the layer that `runner` runs.

    `note` takes the hidden states that the model makes. The layer's rows for them are made when a draft is
    asked for, or when many have come together: a sequence among others, for which nothing is drafted, does
    not pay for a step of the layer per token.
    """

    def __init__(self, runner: Runner, tokens: Sequence[int], longest: int) -> None:
        """longest: most tokens of a draft."""
        self.runner, self.tokens, self.longest = runner, tokens, longest
        self._slot = -1
        self._done = 0  # positions whose rows are in the layer's caches
        self._noted: list[np.ndarray] = []  # hidden states of those that follow
        self._ready: list[int] = []  # a draft for what comes next, made beforehand

    def begin(self, slot: int, computed: int) -> None:
        """The sequence runs from now on, in `slot` and with the first `computed` positions found."""
        self._slot, self._done, self._noted, self._ready = slot, computed, [], []

    def note(self, hidden: np.ndarray) -> None:
        """Hidden states [n, hidden_size] of the next n positions, n up to what a step takes. The tokens
        after the positions that were noted before are known."""
        self._ready = []
        if sum(map(len, self._noted)) + len(hidden) > self.runner.prompt:
            self._feed()
        self._noted.append(hidden)

    @property
    def begun(self) -> bool:
        """True when there is something to guess from: not before the first token's hidden state is known."""
        return bool(self._noted or self._ready)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; their positions have pages."""
        count = min(most, self.longest) if self.begun else 0
        if count <= 0 or self._ready:
            return self._ready[:count]
        draft = [self._feed(guess=True)]
        # The rows of guesses are overwritten once it is known what comes there.
        for position in range(self._done, self._done + count - 1):
            row, given = Row(draft[-1], position, self._slot), self.runner.hidden(0, 1)
            draft.append(int(self.runner.step([row], [0], given)[0]))
        return draft

    def skip(self, end: int, ready: Sequence[int] = ()) -> None:
        """The model's own program has made the rows of all positions below `end`, with a launch that began
        with a draft; `ready` is the draft that it has made for what comes next."""
        self._done, self._ready = end, list(ready)

    def settle(self, end: int) -> None:
        """Make the rows of all positions below `end`, for whoever finds the sequence's pages."""
        if self._done < end:
            self._feed()

    def _feed(self, *, guess: bool = False) -> int:
        """Make the rows of all that was noted; the token after the last one's next, when asked for."""
        given = np.concatenate(self._noted)
        end = self._done + len(given)
        rows = [Row(self.tokens[p + 1], p, self._slot) for p in range(self._done, end)]
        self._done, self._noted = end, []
        made = self.runner.step(rows, [len(rows) - 1] if guess else [], given)
        return int(made[0]) if guess else -1
