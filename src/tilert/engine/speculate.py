"""Drafts for speculation: what followed the last few tokens when they occurred before (prompt lookup).

Answers often repeat their prompt or themselves: code that is edited, a text that is quoted, a table.
There the next tokens can be looked up instead of made; a model need only check them, several in one
step. Knows neither model nor sampling: whatever it proposes, the answer stays the same.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_DRAFT = 7  # tokens; with the last one of the sequence they make a step of eight rows
LONGEST, SHORTEST = 4, 2  # tokens of the n-grams that are looked up


class Drafter:
    """Follows one sequence, whose `tokens` only grow, and proposes how it goes on.

    At each token it expects the one that came next at an earlier occurrence of the longest known n-gram
    and, as long as that comes true, goes on from there. `trust` says how well it does: a right guess adds
    one, a wrong one halves it, whether a step has verified the guess or it was only watched, which costs
    nothing. Drafts are as long as the trust, so text that does not repeat is hardly ever drafted, while
    a copy with an edit is drafted at full length again a few tokens later.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        """longest: most tokens of a draft."""
        self.tokens, self.longest = tokens, longest
        self.trust = 0
        self._next = 0  # the first token that was not looked at
        self._source: int | None = None  # place of the token that is expected there again
        self._follows: dict[tuple[int, ...], int] = {}  # place behind the latest occurrence

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens that may come next; [] when there is no good guess."""
        while self._next < len(self.tokens):
            self._look(self._next)
            self._next += 1
        count = min(most, self.trust)
        if self._source is None or count <= 0:
            return []
        source, end = self._source, len(self.tokens)
        # A source close to the end goes on with the draft itself, like the copies of LZ77.
        return [self.tokens[source + i % (end - source)] for i in range(count)]

    def _look(self, place: int) -> None:
        """Judge the guess for the token at `place`, and make one for the next."""
        right = self._source is not None and self.tokens[self._source] == self.tokens[place]
        if right:
            self.trust = min(self.trust + 1, self.longest)
        elif self._source is not None:
            self.trust //= 2
        found = None
        for n in range(min(LONGEST, place + 1), SHORTEST - 1, -1):
            gram = tuple(self.tokens[place + 1 - n : place + 1])
            found = found or self._follows.get(gram)
            self._follows[gram] = place + 1
        self._source = self._source + 1 if right and self._source is not None else found
