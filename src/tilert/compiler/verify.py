"""The proof that a program means what its op table says, run on every compile.

`verify` applies the functions in RULES in order; each yields a sentence per offence, and the first one
is raised. Later rules rely on earlier ones. The rules know regions and queues, not what ops compute; what
happens before what is worked out in order.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from tilert.compiler.order import Facts, Place
from tilert.ir.dtype import DType
from tilert.ir.encode import field_kinds
from tilert.ir.program import NONE, PAST, Buffer, Kind, Op, Program, Region, Run, Wait, hulls
from tilert.ir.regions import Cells
from tilert.ops import IndexRope, IndexScore, Select

ALIGN = 64  # bytes; every activation starts at a cache line

# Kind and element type that an operand must have, by field name; one vocabulary for all ops.
_WEIGHTS = ("w", "w_up", "bias", "bias_up", "norm", "weight", "table", "q_norm", "k_norm",
            "shift")  # fmt: skip
_STATES = ("counts", "positions", "sequences", "pages", "tokens", "sampled", "gather", "controls",
           "mask", "tally", "when", "following", "places", "kept", "last", "place",
           "report")  # fmt: skip
_WORKS = ("y", "q", "k", "v", "part", "logits", "scores", "peaks", "weights", "kv", "q_rope",
          "head_weights", "residual")  # fmt: skip
_WORDS = ("bins", "totals", "candidates", "survey", "selected", "chosen", "order")
_CACHES = ("k_cache", "v_cache", "latent_cache", "index_cache", "index_scale")
_KINDS: dict[str, tuple[Kind, ...]] = {
    **dict.fromkeys(_WEIGHTS, (Kind.WEIGHT,)),
    **dict.fromkeys(_STATES, (Kind.STATE,)),
    **dict.fromkeys((*_WORKS, *_WORDS), (Kind.WORK,)),
    **dict.fromkeys(_CACHES, (Kind.CACHE,)),
    "biases": (Kind.STATE,),
    "x": (Kind.WORK, Kind.STATE),  # what the host gives is taken like an activation
}
_INTEGERS = {*_STATES, *_WORDS}
_OPTIONAL = {"w_up", "bias", "bias_up", "norm", "gather", "q_norm", "k_norm", "selected",
             "index_scale", "when", "residual"}  # fmt: skip
_MAY_BE_ZERO = {"x_col", "y_col", "q_col", "k_col", "v_col", "kv_col", "w_col", "x_stride", "window",
                "feed", "count_index", "epilogue", "x_type", "interleave", "topk", "scoring",
                "norm_topk_prob", "by_slot", "beyond", "packed"}  # fmt: skip


class VerifyError(AssertionError):
    """The program is not proven sound. `rule` is the name of the broken rule."""

    def __init__(self, rule: str, message: str) -> None:
        super().__init__(f"{rule}: {message}")
        self.rule, self.message = rule, message


def verify(program: Program) -> None:
    """Raises VerifyError for the first rule that the program breaks."""
    facts = Facts(program)
    for rule in RULES:
        for message in rule(facts):
            raise VerifyError(rule.__name__, message)


def structure(facts: Facts) -> Iterator[str]:
    """Indices in range, operands of the right kind, regions inside their buffers."""
    program = facts.program
    if len(program.queues) != program.machine.workers:
        yield f"{len(program.queues)} queues, but the machine has {program.machine.workers} resident workers"
    yield from _sound_buffers(program)
    for index, op in enumerate(program.ops):
        yield from (
            f"op o{index} {type(op).__name__.lower()}: {text}" for text in _sound_op(program, op)
        )
    for place in facts.places:
        yield from (f"{facts.name(place)}: {text}" for text in _sound_run(program, place.run))
    for place, reads, writes in zip(facts.places, facts.reads, facts.writes, strict=True):
        for region in dict.fromkeys((*reads, *writes)):
            if not _inside(program, region):
                yield f"{facts.name(place)} leaves its buffer: {facts.where(region)}"
        for region in writes:
            kind = program.buffers[region.buffer].kind
            if kind is Kind.WEIGHT or (kind is Kind.CACHE and region.row_lo < 0):
                yield f"{facts.name(place)} writes what is read only: {facts.where(region)}"


def _sound_buffers(program: Program) -> Iterator[str]:
    if len(program.buffer_ids) != len(program.buffers):
        yield "two buffers have one name"
    for index, b in enumerate(program.buffers):
        name = f"buffer b{index} '{b.label}'"
        if b.rows < 1 or b.cols < 1:
            yield f"{name} has shape [{b.rows}, {b.cols}]"
        if not 0 <= b.device < program.machine.devices:
            yield f"{name} lies on device {b.device} of {program.machine.devices}"
        if b.bank < 1 or b.rows % b.bank or (b.bank > 1 and b.kind is not Kind.WEIGHT):
            yield f"{name} cannot hold a bank of {b.bank} in {b.rows} rows"
        if b.scale != NONE and not _sound_scale(program, b):
            yield f"{name} has no fitting block scales at b{b.scale}"
    for index, counter in enumerate(program.counters):
        if not 0 <= counter.device < program.machine.devices:
            yield f"counter c{index} lies on device {counter.device} of {program.machine.devices}"


def _sound_scale(program: Program, b: Buffer) -> bool:
    if not 0 <= b.scale < len(program.buffers) or b.kind is not Kind.WEIGHT or min(b.block) < 1:
        return False
    scale = program.buffers[b.scale]
    sound = (scale.kind, scale.dtype, scale.scale) == (Kind.WEIGHT, DType.F32, NONE)
    return sound and b.scale_shape == (scale.rows, scale.cols)


def _sound_op(program: Program, op: Op) -> Iterator[str]:
    has: dict[str, int] = {name: getattr(op, name) for name, _ in field_kinds(type(op))}
    for name, kind in field_kinds(type(op)):
        value = has[name]
        if kind == "int" and value < (0 if name in _MAY_BE_ZERO else 1):
            yield f"{name} is {value}"
        if kind == "Buf" and not (value == NONE and name in _OPTIONAL):
            yield from (f"{name} is {text}" for text in _sound_operand(program, name, value))
    yield from _sound_fields(has, program)


def _sound_operand(program: Program, name: str, index: int) -> Iterator[str]:
    if not 0 <= index < len(program.buffers):
        yield f"b{index}, which does not exist"
    b = program.buffers[index]
    if b.kind not in _KINDS[name]:
        yield f"b{index} '{b.label}', a {b.kind.name.lower()} buffer"
    floats = {DType.F32}
    if b.kind is Kind.WORK and program.machine.slots and program.tokens > 1:
        floats = {DType.F32, DType.BF16}  # what one product alone takes
    elif b.kind is Kind.WEIGHT:
        floats = set(DType) - {DType.I32, DType.U8}
    elif b.kind is Kind.CACHE:
        machine = program.machine
        floats = {machine.cache_dtype if name in _CACHES[:3] else machine.index_dtype}
        if name == "index_scale":
            floats = {DType.F32}
        elif name == "latent_cache" and machine.packed_latents:
            floats = {DType.U8}
    if b.dtype not in ({DType.I32} if name in _INTEGERS else floats):
        yield f"b{index} '{b.label}' of type {b.dtype.name.lower()}"


def _sound_fields(has: dict[str, int], program: Program) -> Iterator[str]:
    """Numbers that must fit each other, by field name as for kinds."""
    if has.get("heads", 0) % has.get("kv_heads", 1):
        yield f"{has['heads']} heads do not divide over {has['kv_heads']} kv heads"
    if "table" in has and "head_dim" in has and has["head_dim"] % 2:
        yield f"head_dim {has['head_dim']} is odd, it cannot be rotated in pairs"
    if "parts" in has and has["head_dim"] % has["parts"]:
        yield f"heads of {has['head_dim']} columns do not divide into {has['parts']} parts"
    if has.get("heads", 0) % has.get("tile_heads", 1):
        yield f"{has['heads']} heads do not divide into tiles of {has['tile_heads']}"
    if "rope" in has and (has["rope"] % 2 or has["rope"] > has.get("head_dim", has["rope"])):
        yield f"{has['rope']} columns cannot be rotated in pairs"
    if "shift" in has and has["head_dim"] & (has["head_dim"] - 1):
        yield f"head_dim {has['head_dim']} is no power of two, there is no Hadamard matrix for it"
    if "packed" in has and has["packed"] != program.machine.packed_latents:
        yield f"packed is {has['packed']}, which the machine's latent caches are not"
    if "selected" in has and (has["selected"] != NONE) != (has["topk"] > 0):
        yield f"topk is {has['topk']} with selected b{has['selected']}"
    if "when" in has and (has["when"] != NONE) != (has["beyond"] > 0):
        yield f"beyond is {has['beyond']} with when b{has['when']}"
    if "w_col" in has and has["splits"] * has["width"] < program.context:
        yield f"{has['splits']} shares of {has['width']} scores for {program.context} positions"
    if "groups" in has:
        alone = has["norm"] == has["gather"] == has["w_up"] == NONE and has["epilogue"] == 0
        if has["n"] % has["groups"] or (has["groups"] > 1 and not alone):
            yield f"{has['groups']} groups of {has['n']} rows, or with more than a product"
    if "epilogue" in has:
        if has["epilogue"] > 2 or has["count_index"] > 1:
            yield f"epilogue {has['epilogue']} or count_index {has['count_index']} is unknown"
        if (has["epilogue"] == 2) != (has["w_up"] != NONE):
            yield "w_up belongs to the gate epilogue and to no other"
        yield from _sound_residual(has, program)
    if has.get("x_type", 0) > DType.F16:
        yield f"x_type {has['x_type']} is unknown"
    for w in (has.get(name, NONE) for name in ("w", "w_up", "weight", "table")):
        b, bank = program.buffers[w], has.get("bank", 1)
        if w != NONE and b.bank != bank:
            yield f"b{w} is a bank of {b.bank}, the op's have {bank}"
        if w != NONE and bank > 1 and b.rows != bank * has["n"]:
            yield f"b{w} is a bank of matrices of {b.rows // bank} rows, the op's have {has['n']}"
    if has.get("by_slot", 0) > 1:
        yield f"by_slot {has['by_slot']} is unknown"
    if "n_group" in has:
        yield from _sound_route(has)


def _sound_residual(has: dict[str, int], program: Program) -> Iterator[str]:
    if has["residual"] == NONE:
        return
    if has["epilogue"] != 1:
        yield "a residual belongs to the sum epilogue and to no other"
    shapes = [(b.rows, b.cols) for b in (program.buffers[has[n]] for n in ("residual", "y"))]
    if shapes[0] != shapes[1]:
        yield f"its residual has shape {list(shapes[0])}, its sum {list(shapes[1])}"


def _sound_route(has: dict[str, int]) -> Iterator[str]:
    experts, groups, kept = has["experts"], has["n_group"], has["topk_group"]
    if experts % groups or kept > groups:
        yield f"{experts} experts in {groups} groups, of which {kept} are kept"
    elif has["top_k"] > kept * (experts // groups):
        yield f"{has['top_k']} experts are chosen of {kept * (experts // groups)}"
    if has["scoring"] > 1 or has["norm_topk_prob"] > 1:
        yield f"scoring {has['scoring']} or norm_topk_prob {has['norm_topk_prob']} is unknown"


def _sound_run(program: Program, run: Run) -> Iterator[str]:
    if not 0 <= run.op < len(program.ops):
        yield "the op does not exist"
    tiles = program.ops[run.op].tiles
    if not 0 <= run.lo < run.hi <= tiles:
        yield f"tiles are [0, {tiles})"
    if not -1 <= run.signal < len(program.counters):
        yield f"signals c{run.signal}, which does not exist"
    for wait in run.waits:
        if not 0 <= wait.counter < len(program.counters):
            yield f"waits for c{wait.counter}, which does not exist"


def _inside(program: Program, r: Region) -> bool:
    b = program.buffers[r.buffer]
    first, end = (-PAST, program.tokens) if b.kind is Kind.CACHE else (0, b.rows)
    return first <= r.row_lo < r.row_hi <= end and 0 <= r.col_lo < r.col_hi <= b.cols


def partition(facts: Facts) -> Iterator[str]:
    """Every tile runs once in a step, and the tiles of one op do not depend on each other."""
    independent: dict[object, tuple[int, int] | None] = {}
    for index, (op, runs) in enumerate(zip(facts.program.ops, facts.of_op, strict=True)):
        name, end = f"op o{index} {type(op).__name__.lower()}", 0
        for place in (facts.places[number] for number in runs):
            if place.run.lo != end:
                what = "twice" if place.run.lo < end else "never"
                yield f"{name}: tiles from {min(end, place.run.lo)} are run {what}; see {facts.name(place)}"
            end = place.run.hi
        if end != op.tiles:
            yield f"{name}: tiles [{end}, {op.tiles}) are never run"
        key = _shape(op)
        if key not in independent:
            independent[key] = _dependent_tiles(op)
        if (pair := independent[key]) is not None:
            yield f"{name}: tile {pair[1]} touches what tile {pair[0]} writes"


def _shape(op: Op) -> tuple[object, ...]:
    """Equal for ops whose regions and costs are the same but for the numbers of their buffers."""
    values = [getattr(op, name) for name, _ in field_kinds(type(op))]
    first: dict[int, int] = {int(NONE): -1}
    for i, (_, kind) in enumerate(field_kinds(type(op))):
        if kind == "Buf":
            values[i] = first.setdefault(values[i], i)
    return (type(op), *values)


def _dependent_tiles(op: Op) -> tuple[int, int] | None:
    """Two tiles of the op of which one writes what the other touches; None when there are none."""
    changed = {r.buffer for r in op.writes(0, op.tiles)}
    read_too = any(r.buffer in changed for r in op.reads(0, op.tiles))
    writes = [op.writes(t, t + 1) for t in range(op.tiles)]
    reads = [
        [r for r in op.reads(t, t + 1) if r.buffer in changed] if read_too else []
        for t in range(op.tiles)
    ]
    cells = Cells(r for table in (writes, reads) for regions in table for r in regions)
    owner = np.full(cells.count, -1)
    for table in (writes, reads):
        for tile, regions in enumerate(table):
            for region in regions:
                touched = cells.of(region)
                others = owner[touched]
                foreign = others[(others >= 0) & (others != tile)]
                if foreign.size:
                    return int(foreign[0]), tile
                if table is writes:
                    owner[touched] = tile
    return None


def counters(facts: Facts) -> Iterator[str]:
    """Totals are what is signalled, thresholds can be reached, waits look back one step at most."""
    found = [sum(map(len, runs.values())) for runs in facts.producers]
    for index, counter in enumerate(facts.program.counters):
        if counter.total != found[index]:
            yield f"c{index} has total {counter.total}, but {found[index]} runs signal it"
    for place in facts.places:
        for wait in place.run.waits:
            if not 1 <= wait.threshold <= found[wait.counter]:
                yield (f"{facts.name(place)} waits for {wait.threshold} signals of c{wait.counter},"
                       f" which gets {found[wait.counter]} in a step")  # fmt: skip
            if wait.lag not in (0, 1):
                yield f"{facts.name(place)} waits for c{wait.counter} with lag {wait.lag}"


def deadlock(facts: Facts) -> Iterator[str]:
    """A step completes; see Facts.order for why this is enough."""
    done = set(facts.order)
    for numbers in facts.numbers:
        stuck = next((n for n in numbers if n not in done), None)
        if stuck is not None:
            waits = ", ".join(f"c{w.counter}>={w.threshold}" for w in facts.places[stuck].run.waits)
            yield f"{facts.name(facts.places[stuck])} can never start; it waits for {waits}"


def overtaking(facts: Facts) -> Iterator[str]:
    """No wait can take a producer's signal of step k + 1 for another producer's signal of step k.

    Take the first moment of an execution at which a wait holds for step k although a producer q that it
    should prove has not signalled in k. Then some producer p has signalled in k + 1. If p in k + 1
    happens after every producer's signal of step k, or after the waiting run itself, that is a
    contradiction, since all waits before that moment did prove what they should.
    """
    waiting: dict[int, list[tuple[Place, Wait]]] = defaultdict(list)
    for place in facts.places:
        for wait in place.run.waits:
            waiting[wait.counter].append((place, wait))
    for counter, waits in waiting.items():
        by_worker = facts.producers[counter]
        if len(by_worker) == 1:
            continue  # one queue signals in order
        runs = [number for numbers in by_worker.values() for number in numbers]
        last = np.zeros(len(facts.lengths), np.int32)
        for worker, numbers in by_worker.items():
            last[worker] = facts.moment(0, facts.places[numbers[-1]])
        next_step = facts.clock[1, runs]
        ahead = (next_step < last).any(axis=1)  # may signal while another owes the step before
        for place, wait in waits if ahead.any() else ():
            free = ahead & (next_step[:, place.worker] < facts.moment(wait.lag, place))
            if free.any():
                fast = facts.places[runs[int(free.argmax())]]
                yield (f"{facts.name(place)} waits for c{counter}, which {facts.name(fast)} can signal"
                       " for the next step before all others have signalled for this one")  # fmt: skip


def ordering(facts: Facts) -> Iterator[str]:
    """Of two runs that touch the same cell, one writing, one happens before the other."""
    if facts.conflict is not None and facts.conflict[0] == "ordering":
        yield facts.conflict[1]


def meaning(facts: Facts) -> Iterator[str]:
    """Runs in conflict happen in the order of the op table."""
    if facts.conflict is not None:
        yield facts.conflict[1]


def handoff(facts: Facts) -> Iterator[str]:
    """What a run uses of another worker's words has tags, or was made visible by an ordered signal."""
    if facts.unseen is not None:
        yield facts.unseen


def coverage(facts: Facts) -> Iterator[str]:
    """Activations and new cache rows that an op reads were written by earlier ops of the same step."""
    made = np.zeros(facts.cells.count, bool)
    for moved, runs in zip(facts.moves, facts.of_op, strict=True):
        for cache in moved:  # what was row 0 of the step may be any row now
            made[facts.cells.grid(cache)] = False
        for number in runs:
            for region in facts.reads[number]:
                own = facts.of_step(region)
                if facts.program.buffers[region.buffer].kind not in (Kind.WORK, Kind.CACHE):
                    continue
                if own.row_lo < own.row_hi and not made[facts.cells.of(own)].all():
                    yield f"{facts.name(facts.places[number])} reads {facts.where(own)} before it is written"
        for number in runs:
            for region in facts.writes[number]:
                made[facts.cells.of(region)] = True


def sparing(facts: Facts) -> Iterator[str]:
    """What may be left out where no token sees more than so many positions is read by an indexer alone:
    rotated in place, then scored, then selected from, and that for more positions only."""
    ops = facts.program.ops
    for index, op in enumerate(ops):
        for made in hulls(op.writes(0, op.tiles)) if op.spared else ():
            for later in range(index + 1, len(ops)):
                other = ops[later]
                if any(made.overlaps(region) for region in other.reads(0, other.tiles)):
                    rotates = isinstance(other, IndexRope) and other.q == made.buffer != other.k
                    asks = isinstance(other, IndexScore | Select) and other.topk >= op.spared
                    if not (rotates or asks):
                        yield (
                            f"o{later} {type(other).__name__.lower()} reads what o{index} makes only for"
                            f" more than {op.spared} positions"
                        )
                elif any(made.overlaps(region) for region in other.writes(0, other.tiles)):
                    break


def ring(facts: Facts) -> Iterator[str]:
    """Tickets count the ring slots that a queue has filled before; each tile starts a new slot."""
    program = facts.program
    ringed = program.machine.slots > 0
    if ringed and program.machine.slot_bytes < 1:
        yield f"the ring has slots of {program.machine.slot_bytes} bytes"
        return
    for worker, queue in enumerate(program.queues):
        ticket = 0 if ringed else -1
        for position, run in enumerate(queue):
            if run.ring != ticket:
                name = facts.name(Place(worker, position, run))
                yield f"{name} has ring ticket {run.ring}, not {ticket}"
            if ringed:
                ticket += program.ring_units(program.ops[run.op], run.lo, run.hi)


def stream(facts: Facts) -> Iterator[str]:
    """Who streams past rows of a cache has waits of its own for all that append to it in the step before:
    its loader runs ahead of the queue and holds only those. Older rows are in order with them. Where rows
    are streamed only when all waits of the run hold, there is nothing to prove."""
    program = facts.program
    if not program.machine.slots or program.held:
        return
    writers: dict[int, set[int]] = defaultdict(set)
    for number, regions in enumerate(facts.writes):
        for buffer in {r.buffer for r in regions}:
            if program.buffers[buffer].kind is Kind.CACHE:
                writers[buffer].add(number)
    proven: dict[Wait, set[int]] = {}
    for number, regions in enumerate(facts.reads):
        place, missing = facts.places[number], set[int]()
        for region in (r for r in regions if r.row_lo < 0):
            missing |= {
                w for w in writers[region.buffer]
                if any(_same_columns(region, own) for own in facts.writes[w])
            }  # fmt: skip
        missing -= _awaited(facts, [w for w in place.run.waits if w.lag], proven)
        if missing:
            yield (f"{facts.name(place)} streams what {facts.name(facts.places[min(missing)])}"
                   " appends, but has no wait for it in the step before")  # fmt: skip


def _same_columns(one: Region, other: Region) -> bool:
    """True when two regions share columns of a buffer: rows of a cache move from step to step."""
    return (
        one.buffer == other.buffer and one.col_lo < other.col_hi and other.col_lo < one.col_hi
    )  # fmt: skip


def choice(facts: Facts) -> Iterator[str]:
    """Who streams what a choice names has waits of its own for all that make what it reads of the choice:
    its loader runs ahead of the queue and holds only those."""
    ops = facts.program.ops
    proven: dict[Wait, set[int]] = {}
    for index, op in enumerate(ops) if facts.program.machine.slots else ():
        if op.choice == NONE:
            continue
        makers = next(
            facts.of_op[i] for i in reversed(range(index))
            if any(r.buffer == op.choice for r in ops[i].writes(0, ops[i].tiles))
        )  # fmt: skip
        for number in facts.of_op[index]:
            place = facts.places[number]
            read = [r for r in facts.reads[number] if r.buffer == op.choice]
            missing = {m for m in makers if _meet(facts.writes[m], read)}
            missing -= _awaited(facts, [w for w in place.run.waits if not w.lag], proven)
            if missing:
                yield (f"{facts.name(place)} streams what {facts.name(facts.places[min(missing)])}"
                       " chooses, but has no wait for it")  # fmt: skip


def _meet(writes: Sequence[Region], reads: Sequence[Region]) -> bool:
    return any(w.overlaps(r) for w in writes for r in reads)


def _awaited(facts: Facts, waits: Iterable[Wait], proven: dict[Wait, set[int]]) -> set[int]:
    """Runs that must have signalled where all of some waits hold; `proven` keeps those of each."""
    found: set[int] = set()
    for wait in waits:
        if wait not in proven:
            proven[wait] = _signallers(facts, wait)
        found |= proven[wait]
    return found


def _signallers(facts: Facts, wait: Wait) -> set[int]:
    """Runs that have signalled when the wait holds, in the step that it asks for."""
    sure = set[int]()
    for last in facts.proves(wait):
        runs = facts.producers[wait.counter][facts.places[last].worker]
        sure.update(runs[: runs.index(last) + 1])
    return sure


def memory(facts: Facts) -> Iterator[str]:
    """Activations lie in their device's arena, aligned, and no two share a byte."""
    program = facts.program
    end: dict[int, tuple[int, str]] = {}
    for b in sorted(program.buffers, key=lambda b: b.offset):
        if b.kind is not Kind.WORK:
            if b.offset != -1:
                yield f"'{b.name}' has offset {b.offset} but does not live in the arena"
            continue
        if b.offset < 0 or b.offset % ALIGN:
            yield f"'{b.name}' starts at {b.offset}, which is not a multiple of {ALIGN}"
        if b.offset + b.bytes > program.machine.arena_bytes:
            arena = program.machine.arena_bytes
            yield f"'{b.name}' ends at {b.offset + b.bytes}; the arena has {arena} bytes"
        before, name = end.get(b.device, (0, ""))
        if b.offset < before:
            yield f"'{b.name}' starts at {b.offset}, inside '{name}', which ends at {before}"
        end[b.device] = (b.offset + b.bytes, b.name)


def devices(facts: Facts) -> Iterator[str]:
    """A run touches buffers of its own device only. Counters may be signalled and read from anywhere."""
    program = facts.program
    for place in facts.places:
        home = program.machine.device_of(place.worker)
        for buffer in program.operands(program.ops[place.run.op]):
            scales = [program.buffers[buffer.scale]] if buffer.scale != NONE else []
            for b in (buffer, *scales):
                if b.device != home:
                    yield f"{facts.name(place)} is on device {home}, '{b.label}' on device {b.device}"


RULES: tuple[Callable[[Facts], Iterator[str]], ...] = (
    structure, sparing, partition, counters, memory, devices, ring, deadlock, overtaking, ordering,
    meaning, handoff, coverage, stream, choice,
)  # fmt: skip
