"""The queues of a program as the kernel reads them: struct Run and struct Wait of program.cuh, with every
operand resolved to an address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tilert.backends.cuda.limits import RUN_BYTES, WAIT_BYTES, Layout, entry_bytes
from tilert.backends.cuda.looks import Looks
from tilert.backends.cuda.shapes import sharing
from tilert.backends.cuda.source import PASS_SHIFT, attend_of, passes
from tilert.ir.program import NONE, Buf, Kind, Op, Program, Run
from tilert.ir.tags import TAGS, Tags, derive
from tilert.ops import (
    Accept,
    Adjust,
    Append,
    Argmax,
    Attend,
    Bins,
    Combine,
    Draw,
    Embed,
    ExpertDown,
    ExpertGate,
    Guess,
    IndexRope,
    IndexScore,
    LatentAppend,
    LatentAttention,
    Linear,
    NextToken,
    Norm,
    Report,
    Route,
    Select,
    Sift,
    Survey,
    Totals,
)
from tilert.ops.linear import ADD

NO_SIGNAL = 0xFFFF
RANK_SHIFT = 24  # kRankShift
AT_HAND_SHIFT, CHOICE_KNOWN_SHIFT = 16, 17  # x_at_hand, choice_known
RUN = np.dtype(  # struct Run
    [(name, "<u2") for name in ("variant", "wait_begin", "wait_count", "signal")]
    + [(name, "<u4") for name in ("first", "count")]
    + [
        (name, "<u8")
        for name in ("w", "w_up", "norm", "norm2", "bias", "bias_up", "scale", "scale_up")
    ]
    + [(name, "<u4") for name in ("x", "y", "x2", "x3")]
)
WAIT = np.dtype([("counter", "<u2"), ("threshold", "<u2"), ("total", "<u4")])  # struct Wait
# Operands that the kernel reads by their tags, where they have some; those of products see _add_ranks.
READ: dict[type[Op], dict[str, str]] = {
    Attend: {"x": "q", "x2": "k", "x3": "v"},
    Append: {"x2": "k", "x3": "v"},
    Combine: {"x": "part"},
    Route: {"x": "logits"},
    LatentAppend: {"x": "kv"},
    Norm: {"x": "x"},
    LatentAttention: {"x": "q", "x2": "q_rope"},
    IndexRope: {"x2": "k"},
    IndexScore: {"x2": "head_weights"},
}
assert (RUN.itemsize, WAIT.itemsize) == (RUN_BYTES, WAIT_BYTES)


def tables(
    program: Program, layout: Layout, runs: Sequence[np.ndarray], waits: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:  # fmt: skip
    """The read-only tables of struct Params. runs, waits: of each worker's queue, RUN records and WAIT
    records, those of one run after those of another. They are laid out as Block in program.cuh says."""
    size = entry_bytes(program, layout.entries)
    beside = (size - RUN_BYTES) // WAIT_BYTES
    entry = np.dtype([("run", RUN), ("waits", WAIT, (beside,))])
    assert entry.itemsize == size
    queues = list[np.ndarray]()
    for own, each in zip(runs, waits, strict=True):
        length, counts = len(own), own["wait_count"].astype(np.int64)
        first = np.cumsum(counts) - counts  # of the waits of the queue
        entries = np.zeros(length, entry)
        entries["run"] = own
        table = entries.view(np.uint8)
        if layout.entries:
            entries["run"]["wait_begin"] = RUN_BYTES // WAIT_BYTES
            run = np.repeat(np.arange(length), counts)
            entries["waits"][run, np.arange(len(each)) - first[run]] = each
        else:
            behind = RUN_BYTES // WAIT_BYTES * np.arange(length, 0, -1)
            entries["run"]["wait_begin"] = behind + first
            table = np.concatenate([table, each.view(np.uint8)])
        queues.append(np.concatenate([table, np.zeros(-len(table) % 16, np.uint8)]))
    return {
        "queues": np.concatenate(queues),
        "queue_begin": np.cumsum([0, *(len(table) // 16 for table in queues)]).astype(np.uint32),
        "run_begin": np.cumsum([0, *map(len, runs)]).astype(np.uint32),
    }


def queues(
    program: Program, variants: list[int], weights: Mapping[str, int], caches: Mapping[str, int],
    states: Mapping[str, int], arena: int,
) -> tuple[list[np.ndarray], list[np.ndarray]]:  # fmt: skip
    """Each worker's runs, with all operands resolved to addresses, and their waits; see `tables`.

    states: where the state buffers are that ops find through their run, an address or a place in the arena;
    others come with Params.
    arena: where it begins.
    """
    tags = derive(program)
    homes = {Kind.WEIGHT: weights, Kind.CACHE: caches}
    at = [
        homes[b.kind][b.name] if b.kind in homes else states.get(b.name, b.offset // 4)
        for b in program.buffers
    ]
    shared = _of_ops(program, variants, at, tags)
    pitches = _row_bytes(program)
    totals = [counter.total for counter in program.counters]
    looks, bodies = Looks(program, tags), sharing(program)
    runs, waits = list[np.ndarray](), list[np.ndarray]()
    for queue in program.queues:
        index = np.asarray([run.op for run in queue], np.int64)
        made = shared[index]
        made["signal"] = [NO_SIGNAL if run.signal < 0 else run.signal for run in queue]
        spans = np.asarray([_span(program, run) for run in queue], np.int64).reshape(-1, 2)
        made["first"], made["count"] = spans[:, 0], spans[:, 1] - spans[:, 0]
        for name, pitch in pitches.items():
            made[name] += spans[:, 0].astype(np.uint64) * pitch[index]
        own: list[tuple[int, int, int]] = []
        ops = set(index.tolist())
        known = -1  # the choice that the loader has
        for number, run in enumerate(queue):
            wanted, op = looks.wanted(run, ops), program.ops[run.op]
            if isinstance(op, ExpertGate | ExpertDown):
                record, maker = made[number], looks.choices[run.op]
                # Those for the choice first: the loader has them, too.
                kept = sorted(wanted, key=lambda w: not looks.for_choice(run.op, w))
                wanted = {w: wanted[w] for w in kept}
                record["x3"] |= sum(looks.for_choice(run.op, w) for w in kept)
                record["x3"] |= (maker == known) << CHOICE_KNOWN_SHIFT
                # x' of `down` takes the weights of the choice, too.
                if bodies[run.op] and (isinstance(op, ExpertGate) or maker == known):
                    record["x3"] |= looks.at_hand(run, ops, wanted) << AT_HAND_SHIFT
                known = maker
                record["bias_up"] = arena + program.buffers[op.chosen].offset
                if isinstance(op, ExpertDown):
                    record["bias"] = arena + program.buffers[op.weights].offset
            made["wait_count"][number] = len(wanted)
            own += [(w.counter, n | w.lag << 15, totals[w.counter]) for w, n in wanted.items()]
        runs.append(made)
        waits.append(np.asarray(own, WAIT))
    return runs, waits


def _of_ops(program: Program, variants: list[int], at: list[int], tags: Tags) -> np.ndarray:
    """RUN records of what all runs of an op share, where they begin with row 0."""
    number, found = passes(program), np.zeros(len(program.ops), RUN)
    for index, record in enumerate(found):
        record["variant"] = variants[index] | number[index] << PASS_SHIFT
        _resolve(record, program, program.ops[index], at)
        _add_ranks(record, program, index, tags)
    return found


def _row_bytes(program: Program) -> dict[str, np.ndarray]:
    """For each field that holds where a product's rows begin: bytes of a row, by op; 0 where it stays."""
    names = ("w", "w_up", "bias", "bias_up")
    found = {name: np.zeros(len(program.ops), np.uint64) for name in names}
    for index, op in enumerate(program.ops):
        if isinstance(op, Linear):
            for name, cols in zip(names, (op.k, op.k, 1, 1), strict=True):
                if (buf := getattr(op, name)) != NONE:
                    found[name][index] = cols * program.buffers[buf].dtype.bytes
    return found


def _span(program: Program, run: Run) -> tuple[int, int]:
    """Tiles of a run, or rows of weights, [begin, end)."""
    op = program.ops[run.op]
    if isinstance(op, Linear | ExpertDown):
        return op.span(run.lo, run.hi)
    if isinstance(op, ExpertGate):  # whole tiles: where they begin in a bank the choice says
        return run.lo * op.tile_rows, run.hi * op.tile_rows
    # Tiles of Append follow those of its attention.
    behind = attend_of(program, op).tiles if isinstance(op, Append) else 0
    return run.lo + behind, run.hi + behind


def _add_ranks(record: Any, program: Program, index: int, tags: Tags) -> None:
    """Ranks of tags into the operands' top bytes: of the op's own write, of those that it reads."""
    op = program.ops[index]

    def writer(buf: Buf) -> int:
        return tags.rank[tags.writer(buf, index)] % TAGS << RANK_SHIFT

    if isinstance(op, Linear | ExpertGate | ExpertDown):
        if op.x in tags.writers:
            record["x"] += writer(op.x)
        if op.choice in tags.writers:
            record["x3"] |= writer(op.choice)
        old = _residual(op)
        assert old == NONE or (old in tags.writers) == (op.y in tags.writers), "one flag says both"
        if old in tags.writers:
            record["x2"] += writer(old)
    for name, operand in READ.get(type(op), {}).items():
        if (buf := getattr(op, operand)) in tags.writers:
            record[name] += writer(buf)
    if tags.silent(index):
        record["y"] += tags.rank[index] % TAGS << RANK_SHIFT


def _residual(op: Op) -> Buf:
    """What the sums of a product are added to."""
    if isinstance(op, ExpertDown):
        return op.y
    return op.old if isinstance(op, Linear) and op.epilogue == ADD else NONE


def _resolve(record: Any, program: Program, op: Op, at: list[int]) -> None:
    """The operands of an op in struct Run. at: address (arena: float) of each buffer."""

    def home(buf: int) -> int:
        return 0 if buf == NONE else at[buf]

    if isinstance(op, Linear):
        record["w"], record["w_up"] = home(op.w), home(op.w_up)
        record["bias"], record["bias_up"] = home(op.bias), home(op.bias_up)
        scales = (program.buffers[w].scale if w != NONE else NONE for w in (op.w, op.w_up))
        record["scale"], record["scale_up"] = (home(scale) for scale in scales)
        record["norm"] = home(op.norm)
        record["x"], record["y"] = at[op.x] + op.x_col, at[op.y] + op.y_col
        if op.epilogue == ADD:
            record["x2"] = at[op.old] + op.y_col
        return
    if isinstance(op, Append):
        op = attend_of(program, op)
    if isinstance(op, ExpertGate | ExpertDown):
        _resolve_experts(record, program, op, at)
    elif isinstance(op, Attend):
        record["w"], record["w_up"], record["y"] = at[op.k_cache], at[op.v_cache], at[op.y]
        record["norm"], record["norm2"] = home(op.q_norm), home(op.k_norm)
        record["bias_up"] = at[op.table]
        record["x"], record["x2"], record["x3"] = at[op.q], at[op.k] + op.k_col, at[op.v] + op.v_col
    elif isinstance(op, LatentAppend):
        record["w"], record["norm"], record["bias_up"] = (
            at[op.latent_cache],
            at[op.weight],
            at[op.table],
        )
        record["x"] = at[op.kv] + op.kv_col
    elif isinstance(op, LatentAttention):
        record["w"], record["y"] = at[op.latent_cache], at[op.y]
        record["bias_up"] = at[op.table]
        record["x"], record["x2"] = at[op.q], at[op.q_rope] + op.q_col
        record["x3"] = 0 if op.selected == NONE else at[op.selected]
    elif isinstance(op, IndexRope):
        record["w"], record["w_up"] = at[op.index_cache], at[op.index_scale]
        record["norm"], record["norm2"] = at[op.weight], at[op.shift]
        record["bias_up"] = at[op.table]
        record["x"], record["x2"] = at[op.q] + op.q_col, at[op.k] + op.k_col
    elif isinstance(op, IndexScore):
        record["w"], record["w_up"] = at[op.index_cache], at[op.index_scale]
        record["x"], record["x2"] = at[op.q] + op.q_col, at[op.head_weights] + op.w_col
        record["y"], record["x3"] = at[op.y], at[op.order]
    elif isinstance(op, Select):
        record["x"], record["x2"], record["y"] = at[op.scores], at[op.order], at[op.chosen]
    elif isinstance(op, Embed):
        record["w"], record["y"] = at[op.table], at[op.y]
    elif isinstance(op, Argmax):
        record["x"], record["y"] = at[op.logits], at[op.part]
    elif isinstance(op, Route):
        record["norm"], record["x"] = home(op.bias), at[op.logits]
        record["y"], record["x2"] = at[op.chosen], at[op.weights]
    elif isinstance(op, NextToken | Accept | Guess):
        record["x"] = at[op.part]
    elif isinstance(op, Norm):
        record["norm"], record["x"], record["y"] = at[op.weight], at[op.x], at[op.y]
    elif isinstance(op, Totals):
        record["x"], record["y"] = at[op.bins], at[op.totals]
    elif isinstance(op, Combine):
        record["x"], record["y"] = at[op.part], at[op.y]
    elif isinstance(op, Survey | Report):
        record["w"], record["x"], record["x2"] = at[op.controls], at[op.logits], at[op.part]
        record["y" if isinstance(op, Survey) else "x3"] = at[op.survey]
    elif isinstance(op, Adjust | Bins | Sift | Draw):
        _resolve_sampling(record, op, at)


def _resolve_experts(
    record: Any, program: Program, op: ExpertGate | ExpertDown, at: list[int]
) -> None:
    if isinstance(op, ExpertDown):
        record["x2"] = at[op.y]
    record["x"], record["y"] = at[op.x], at[op.y]
    banks = {"": op.w, "_up": op.w_up} if isinstance(op, ExpertGate) else {"": op.w}
    for name, bank in banks.items():
        scale = program.buffers[bank].scale
        record[f"w{name}"], record[f"scale{name}"] = at[bank], 0 if scale == NONE else at[scale]
    if isinstance(op, ExpertGate) and op.norm != NONE:
        record["norm"] = at[op.norm]


def _resolve_sampling(record: Any, op: Adjust | Bins | Sift | Draw, at: list[int]) -> None:
    record["w"], record["y" if isinstance(op, Adjust) else "x"] = at[op.controls], at[op.scores]
    if isinstance(op, Adjust):
        record["w_up"], record["bias"] = at[op.mask], at[op.biases]
        record["bias_up"], record["x"], record["x2"] = at[op.tally], at[op.logits], at[op.peaks]
    elif isinstance(op, Bins):
        record["x2"], record["y"] = at[op.peaks], at[op.bins]
    elif isinstance(op, Sift):
        record["x2"], record["x3"], record["y"] = at[op.peaks], at[op.totals], at[op.candidates]
    else:
        record["x2"], record["x3"] = at[op.candidates], at[op.totals]
        record["bias_up"] = at[op.tally]
