"""Streaming detokenizer: token ids in one at a time, final text out.

A tokenizer's decoder is a chain of steps over the token strings of the whole output (bytes to
UTF-8, byte-fallback runs, the space mark, the leading space). Each step is done here on a stream
with the state it needs, so a token costs the same at position 10 and 100,000, and the pieces add
up to exactly what `decode` gives for all ids, whatever the ids are. Text that may still change or
may be the start of a stop string is held back.
Knows the decoder types of tokenizer.json; knows no model and no end-of-sequence rule.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from tokenizers import Regex, decoders

from tilert.errors import UserError
from tilert.text.tokenizer import Tokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_level_alphabet() -> dict[int, str]:
    """The 256 characters that spell bytes in byte-level BPE (GPT-2): printable Latin-1 stands for
    itself, the others take the code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling.update({byte: chr(256 + index) for index, byte in enumerate(others)})
    return spelling


_BYTE_OF = {char: byte for byte, char in byte_level_alphabet().items()}


class _Step(Protocol):
    """One step of the chain: strings in, the strings that are final now out."""

    def push(self, piece: str) -> list[str]: ...

    def finish(self) -> list[str]: ...


class _Each:
    """A step that looks at one string at a time."""

    def __init__(self, function: Callable[[str], str]) -> None:
        self._function = function

    def push(self, piece: str) -> list[str]:
        return [self._function(piece)]

    def finish(self) -> list[str]:
        return []


class _ByteLevel:
    """Byte-level spelling to text; an unfinished UTF-8 sequence waits for its other bytes."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, piece: str) -> list[str]:
        try:
            data = bytes(_BYTE_OF[char] for char in piece)
        except KeyError:  # an added token, spelled as it reads
            data = piece.encode("utf-8")
        return [self._utf8.decode(data)]

    def finish(self) -> list[str]:
        return [self._utf8.decode(b"", final=True)]


class _ByteFallback:
    """Runs of `<0xNN>` tokens to text. A run that is not valid UTF-8 as a whole becomes one U+FFFD
    per byte, also for its valid parts, so nothing of a run is final before its end."""

    def __init__(self) -> None:
        self._run = bytearray()

    def push(self, piece: str) -> list[str]:
        if match := _BYTE_TOKEN.fullmatch(piece):
            self._run.append(int(match[1], 16))
            return []
        if not self._run:
            return [piece]
        return [*self.finish(), piece]

    def finish(self) -> list[str]:
        run, self._run = bytes(self._run), bytearray()
        try:
            return [run.decode("utf-8")] if run else []
        except UnicodeDecodeError:
            return ["\ufffd"] * len(run)


class _First:
    """A step that treats the first string unlike the others."""

    def __init__(self, first: Callable[[str], str], rest: Callable[[str], str]) -> None:
        self._function = first
        self._rest = rest

    def push(self, piece: str) -> list[str]:
        function, self._function = self._function, self._rest
        return [function(piece)]

    def finish(self) -> list[str]:
        return []


class _StripStart:
    """Removes up to `count` characters `char` from the start of the whole text."""

    def __init__(self, char: str, count: int) -> None:
        self._char = char
        self._count = count

    def push(self, piece: str) -> list[str]:
        while self._count and piece:
            if piece[0] != self._char:
                self._count = 0
                break
            piece = piece[1:]
            self._count -= 1
        return [piece]

    def finish(self) -> list[str]:
        return []


def _flatten(spec: dict[str, Any]) -> list[dict[str, Any]]:
    if spec["type"] == "Sequence":
        return [leaf for inner in spec["decoders"] for leaf in _flatten(inner)]
    return [spec]


def _decoder_steps(tokenizer: Tokenizer) -> list[_Step]:
    """The decoder of tokenizer.json as steps with fresh state."""
    decoder = tokenizer.backend.decoder
    if decoder is None:  # tokens are words
        return [_First(lambda piece: piece, lambda piece: " " + piece)]
    specs = _flatten(json.loads(decoder.__getstate__()))
    steps: list[_Step] = []
    fused = False  # after Fuse or ByteLevel the chain sees one string, which we see in pieces
    for spec in specs:
        kind = spec["type"]
        if kind == "Fuse":
            fused = True
            continue
        step = _text_step(spec) if fused else _token_step(spec)
        if step is None:
            names = [inner["type"] for inner in specs]
            raise UserError(f"cannot stream text with the tokenizer's decoder {names}")
        steps.append(step)
        fused = fused or kind == "ByteLevel"
    return steps


def _token_step(spec: dict[str, Any]) -> _Step | None:
    """A step before the strings are joined: it sees one string per token."""
    match spec["type"]:
        case "ByteLevel":
            return _ByteLevel()
        case "ByteFallback":
            return _ByteFallback()
        case "Metaspace":
            mark = spec["replacement"]
            if spec["prepend_scheme"] == "never":
                return _Each(lambda piece: piece.replace(mark, " "))
            # Every mark in the first token goes, not only the one that was prepended.
            return _First(lambda piece: piece.replace(mark, ""), lambda p: p.replace(mark, " "))
        case "Replace":
            (form, pattern), content = next(iter(spec["pattern"].items())), spec["content"]
            if form == "String":
                return _Each(lambda piece: piece.replace(pattern, content))
            replace = decoders.Replace(Regex(pattern), content)
            return _Each(lambda piece: replace.decode([piece]))
        case "Strip":
            strip = decoders.Strip(spec["content"], spec["start"], spec["stop"])
            return _Each(lambda piece: strip.decode([piece]))
    return None


def _text_step(spec: dict[str, Any]) -> _Step | None:
    """A step after the strings are joined: it sees one text, here in pieces."""
    if spec["type"] == "Strip" and spec["stop"] == 0:
        return _StripStart(spec["content"], spec["start"])
    return None


class _Decoding:
    """All steps of a tokenizer's decoder on one stream of token ids."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._id_to_token = tokenizer.backend.id_to_token
        self._skipped = tokenizer.special_tokens if skip_special_tokens else frozenset()
        self._steps = _decoder_steps(tokenizer)

    def push(self, token_id: int) -> str:
        token = self._id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        return "".join(_through(self._steps, [token]))

    def finish(self) -> str:
        pieces: list[str] = []
        for index, step in enumerate(self._steps):
            pieces += _through(self._steps[index + 1 :], step.finish())
        return "".join(pieces)


def _through(steps: Iterable[_Step], pieces: list[str]) -> list[str]:
    for step in steps:
        pieces = [out for piece in pieces for out in step.push(piece)]
    return pieces


class Detokenizer:
    """Text of a growing token sequence, piece by piece, up to the first stop string.

    The stop string that is completed first wins; of two that end together the longer one. What is
    emitted does not depend on how the text is cut into tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ) -> None:
        """Raises UserError for an empty stop string, or a decoder that cannot be streamed."""
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise UserError(f"a stop string must be non-empty text, got {list(stops)!r}")
        self._stops = stops
        self._longest = max(map(len, stops), default=0)
        self._include_stop = include_stop
        self._decoding = _Decoding(tokenizer, skip_special_tokens)
        self._held = ""  # decoded, not emitted: a possible start of a stop string
        self._emitted: list[str] = []
        self._finished = False
        self.stopped: str | None = None
        """The stop string that ended the text, once one has."""

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        if len(self._emitted) > 1:
            self._emitted = ["".join(self._emitted)]
        return self._emitted[0] if self._emitted else ""

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Takes the next token; returns the text that is final now, which may be empty.

        may_stop False: no stop string is looked for in this token's text or in what was held back.
        """
        assert not self._finished, f"token {token_id} pushed after finish"
        if self.stopped is not None:
            return ""
        new = self._decoding.push(token_id)
        if not may_stop:
            new, self._held = self._held + new, ""
            self._emitted += [new] if new else []
            return new
        return self._emit(new, last=False)

    def finish(self) -> str:
        """Ends the sequence; returns what was held back."""
        if self._finished or self.stopped is not None:
            return ""
        self._finished = True
        return self._emit(self._decoding.finish(), last=True)

    def _emit(self, new: str, last: bool) -> str:
        text = self._held + new
        if self._stops:
            found = self._first_stop(text)
            if found is not None:
                start, end, self.stopped = found
                text = text[: end if self._include_stop else start]
            keep = 0 if last or found is not None else self._possible_start(text)
            self._held = text[len(text) - keep :]
            text = text[: len(text) - keep]
        if text:
            self._emitted.append(text)
        return text

    def _first_stop(self, text: str) -> tuple[int, int, str] | None:
        """(start, end, stop string) of the match with the earliest end."""
        matches = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if not matches:
            return None
        end, start, stop = min(matches)
        return start, end, stop

    def _possible_start(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0
