"""Pages of the KV cache: who owns which, and which full pages can be shared by equal prefixes.

A page holds 64 positions of all layers. A full page whose tokens (and everything before them) are
known is remembered under a chained hash, so that a later prompt with the same beginning finds it.
Pages that nobody uses stay remembered until they are needed, the longest unused first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from tilert.ir.program import PAGE


def page_keys(tokens: Sequence[int]) -> list[bytes]:
    """One key per full page: a hash of all tokens up to the page's end."""
    keys, key = [], b""
    for end in range(PAGE, len(tokens) + 1, PAGE):
        chunk = np.asarray(tokens[end - PAGE : end], dtype=np.int64).tobytes()
        key = hashlib.blake2b(key + chunk, digest_size=16).digest()
        keys.append(key)
    return keys


class PageCache:
    """Allocates physical pages [0, num_pages) and remembers full ones by prefix."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._users = [0] * num_pages
        self._key: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))  # oldest first

    @property
    def free(self) -> int:
        """Pages that can be taken now."""
        return len(self._idle)

    def take(self) -> int:
        """A page of one's own; forgets the prefix that it may have held. The caller checks `free`."""
        page, _ = self._idle.popitem(last=False)
        key = self._key[page]
        if key is not None:
            del self._page_of[key]
            self._key[page] = None
        self._users[page] = 1
        return page

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Take the remembered pages of the longest known prefix, leaving at least one token over."""
        pages = []
        for key in page_keys(tokens[: len(tokens) - 1]):
            page = self._page_of.get(key)
            if page is None:
                break
            self._users[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
        return pages

    def remember(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Note what the full pages of a sequence hold, for later prompts."""
        for key, page in zip(page_keys(tokens), pages, strict=False):
            if key not in self._page_of and self._key[page] is None:
                self._page_of[key] = page
                self._key[page] = key

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back; the last page of a prefix is forgotten before the first."""
        for page in reversed(pages):
            self._users[page] -= 1
            assert self._users[page] >= 0, f"page {page} released twice"
            if self._users[page] == 0:
                self._idle[page] = None

    def check(self) -> None:
        """Invariants, run when the engine is idle: every page is idle and no user count is left."""
        assert len(self._idle) == self.num_pages, f"{self.num_pages - len(self._idle)} pages leaked"
        assert not any(self._users), "a page without owner has users"
