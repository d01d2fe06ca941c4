"""The record of a launch that hung: enough to walk its protocol again, on a machine without the device.

A file of the cache, with a checksum: a line of JSON, then the program in its binary form. Neither holds
anything that is executed when it is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilert.backends.protocol import BY_RUN, BY_TAG, BY_UNIT, Standstill, Stuck, op_name, words_of
from tilert.errors import UserError
from tilert.files import cache_folder, keep, kept
from tilert.ir import encode
from tilert.ir.program import NONE, Program
from tilert.ir.tags import derive
from tilert.ops import OPS

FORMAT = "tilert hang 1"


@dataclass(frozen=True)
class Hang:
    """A launch that ended because a worker waited in vain.

    steps: that were asked for; positions, sequences: of each token of the first step; failures: of each
    worker what it waited for (run, step, counter, have, want), all 0 where it was not waiting.
    """

    program: Program
    steps: int
    positions: tuple[int, ...]
    sequences: tuple[int, ...]
    failures: tuple[tuple[int, ...], ...]

    @property
    def stuck(self) -> list[Stuck]:
        """What the workers that were waiting waited for; with BY_TAG for a counter `want` is a tag."""
        return [Stuck(w, *why) for w, why in enumerate(self.failures) if why[4]]

    def root(self) -> Stuck:
        """The wait that is to blame: what never came, or a wait that nobody else's explains."""
        stuck = self.stuck
        for cause in (BY_RUN, BY_UNIT):
            if found := [s for s in stuck if s.counter == cause]:
                return found[0]
        return (Standstill(self.program, stuck).roots() or stuck)[0]

    def cause(self) -> str:
        """A sentence on the wait that is to blame."""
        worker, run, step, counter, have, want = root = self.root()
        op = type(self.program.ops[self.program.queues[worker][run].op]).__name__.lower()
        who = f"worker {worker}, run {run} of step {step} ({op}) waited in vain for"
        if counter == BY_TAG:
            _, writer = words_of(self.program, derive(self.program), root)
            of = f", which {op_name(self.program, writer)} writes" if writer != NONE else ""
            return f"{who} words with tag {want}{of}"
        if counter == BY_UNIT:
            return f"{who} weights or keys that were being copied"
        if counter == BY_RUN:
            return f"{who} its entry of the queue"
        return f"{who} counter {counter}: it has {have}, {want} are needed"


def save(hang: Hang) -> Path | None:
    """The file in the cache that has the record now; None when it could not be written."""
    head = {f.name: getattr(hang, f.name) for f in dataclasses.fields(hang) if f.name != "program"}
    line = json.dumps({"format": FORMAT, **head}, separators=(",", ":")).encode()
    data = line + b"\n" + encode.to_bytes(hang.program)
    path = cache_folder() / "hang" / hashlib.sha256(data).hexdigest()[:16]
    keep(path, data)
    return path if path.is_file() else None


def load(path: Path) -> Hang:
    """A record from its file. Raises UserError when it is missing, was cut off or is something else."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    data = kept(path)
    if data is None:
        raise UserError(f"{path} is not the record of a hang, or not the whole of one")
    head, _, binary = data.partition(b"\n")
    try:
        return _sound(_parsed(json.loads(head), binary))
    except (
        AssertionError,
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        struct.error,
    ) as error:
        raise UserError(
            f"{path} is not a record that this version of tilert can read; accepted is '{FORMAT}' with"
            f" a program of version {encode.VERSION}"
        ) from error


def _parsed(head: dict[str, Any], binary: bytes) -> Hang:
    assert head["format"] == FORMAT, "another format"
    positions, sequences = ([int(each) for each in head[n]] for n in ("positions", "sequences"))
    failures = [tuple(int(word) for word in why) for why in head["failures"]]
    program = encode.from_bytes(binary, OPS)
    return Hang(program, int(head["steps"]), tuple(positions), tuple(sequences), tuple(failures))


def _sound(hang: Hang) -> Hang:
    """The same record, when a walk of it cannot leave its tables."""
    program, counters = hang.program, len(hang.program.counters)
    assert hang.steps >= 1, "no steps"
    assert len(hang.failures) == len(program.queues), "a failure for each worker"
    for queue, why in zip(program.queues, hang.failures, strict=True):
        assert len(why) == 5 and min(why) >= 0, "a failure has five words"
        assert not why[4] or (
            why[0] < len(queue) and (why[2] < counters or why[2] in (BY_TAG, BY_UNIT, BY_RUN))
        )
        for run in queue:
            assert 0 <= run.op < len(program.ops) and -1 <= run.signal < counters
            assert all(0 <= wait.counter < counters for wait in run.waits)
    derive(program)
    return hang
