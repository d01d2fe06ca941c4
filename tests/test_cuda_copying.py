"""Copies by several threads: all bytes arrive, and what goes wrong in a thread is told."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from tilert.backends.cuda.copying import Piece, copy_all, pieces


class Lane:
    """Keeps what it is given until it is finished; fails at pieces of a size."""

    def __init__(self, memory: np.ndarray, failing: int = -1) -> None:
        self.memory, self.failing = memory, failing
        self.kept: list[Piece] = []

    def copy(self, piece: Piece) -> None:
        if piece.source.size == self.failing:
            raise RuntimeError("no more memory")
        self.kept.append(piece)

    def finish(self) -> None:
        for piece in self.kept:
            self.memory[piece.target : piece.target + piece.source.size] = piece.source


def arrays() -> list[tuple[np.ndarray, int]]:
    """Arrays of several types with their places in 3200 bytes; one is empty, one has strides."""
    rng = np.random.default_rng(1)
    made = [
        rng.standard_normal((9, 30)).astype(np.float32), np.zeros((0, 4), np.float32),
        rng.integers(0, 255, (30, 40), np.uint8)[:, ::2], rng.integers(0, 9, 200, np.int64),
    ]  # fmt: skip
    begins = np.cumsum([0, *(a.nbytes for a in made)]).tolist()
    return list(zip(made, begins, strict=False))


@pytest.mark.parametrize("threads", [1, 3, 8])
@pytest.mark.parametrize("size", [1, 64, 1000, 1 << 20])
def test_all_bytes_arrive(threads: int, size: int) -> None:
    memory = np.full(4000, 7, np.uint8)
    told: list[int] = []
    lanes = [Lane(memory) for _ in range(threads)]
    copy_all(pieces(arrays(), size), lanes, told.append)
    expected = b"".join(values.tobytes() for values, _ in arrays())
    assert memory[: len(expected)].tobytes() == expected
    assert (memory[len(expected) :] == 7).all()
    assert sum(told) == len(expected)
    assert max(told) <= size


def test_read_only_arrays_are_not_copied_first() -> None:
    values = np.frombuffer(bytes(range(100)), np.uint16)
    assert all(np.shares_memory(p.source, values) for p in pieces([(values, 0)], 30))


def test_an_error_of_a_thread_reaches_the_caller() -> None:
    memory = np.zeros(4000, np.uint8)
    before = threading.active_count()
    lanes = [Lane(memory), Lane(memory), Lane(memory, failing=10), Lane(memory, failing=10)]
    work = [Piece(memory[:10], 0)] * 1000
    slow = threading.Barrier(4, timeout=60)  # every thread gets a piece

    def copy(lane: Lane, piece: Piece) -> None:
        if len(lane.kept) == 0 and not slow.broken:
            slow.wait()
        Lane.copy(lane, piece)

    for lane in lanes:
        lane.copy = lambda piece, lane=lane: copy(lane, piece)  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="no more memory"):
        copy_all(work, lanes, lambda _: None)
    assert threading.active_count() == before


def test_an_error_at_the_end_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    lane = Lane(np.zeros(4))  # too small for the pieces
    with pytest.raises(ValueError, match="broadcast"):
        copy_all([Piece(np.zeros(9, np.uint8), 0)], [lane], lambda _: None)


def test_progress_that_fails_ends_the_threads() -> None:
    before = threading.active_count()

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    memory = np.zeros(10, np.uint8)
    with pytest.raises(KeyboardInterrupt):
        copy_all([Piece(memory, 0)] * 100, [Lane(memory), Lane(memory)], stop)
    assert threading.active_count() == before
