"""Many bytes from arrays of the host to addresses of a device, by several threads.

Arrays are views of mapped files as a rule: reading them means page faults and a copy into memory that
the device can read by itself, and one thread does that at a fraction of the rate of the bus. What a lane
does with a piece is up to the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import numpy as np


class Piece(NamedTuple):
    """Bytes, and the address where they go."""

    source: np.ndarray  # u8
    target: int


class Lane(Protocol):
    """What one thread copies with."""

    def copy(self, piece: Piece) -> None:
        """Begin to copy; the bytes may arrive later."""
        ...

    def finish(self) -> None:
        """Until all bytes have arrived."""
        ...


def raw_bytes(values: np.ndarray) -> np.ndarray:
    """The bytes of an array, a view where it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


def pieces(parts: Iterable[tuple[np.ndarray, int]], size: int) -> Iterator[Piece]:
    """Arrays with their addresses, cut into pieces of at most `size` bytes."""
    for values, target in parts:
        raw = raw_bytes(values)
        for begin in range(0, raw.size, size):
            yield Piece(raw[begin : begin + size], target + begin)


def copy_all(work: Iterable[Piece], lanes: Sequence[Lane], progress: Callable[[int], None]) -> None:
    """Copy all pieces, one thread per lane; returns when everything has arrived.

    progress: told the bytes of each piece, by the calling thread. The first exception of a thread, or
    that of `progress`, ends the others early and is raised here.
    """
    waiting = deque(work)
    told: SimpleQueue[int | BaseException | None] = SimpleQueue()  # None: a thread has ended

    def run(lane: Lane) -> None:
        try:
            while (piece := _next(waiting)) is not None:
                lane.copy(piece)
                told.put(piece.source.size)
            lane.finish()
        except BaseException as error:  # raised again by the caller's thread
            waiting.clear()
            told.put(error)
        told.put(None)

    threads = [threading.Thread(target=run, args=(lane,), name="tilert-copy") for lane in lanes]
    for thread in threads:
        thread.start()
    try:
        _follow(told, len(threads), progress)
    finally:
        waiting.clear()
        for thread in threads:
            thread.join()


def _next(waiting: deque[Piece]) -> Piece | None:
    try:
        return waiting.popleft()
    except IndexError:
        return None


def _follow(
    told: SimpleQueue[int | BaseException | None], threads: int, progress: Callable[[int], None]
) -> None:
    while threads:
        match told.get():
            case None:
                threads -= 1
            case int(size):
                progress(size)
            case error:
                raise error
