"""`tilert trace`: timelines, their sums, the Chrome trace and the page; and the simulator."""

from __future__ import annotations

import itertools
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import families
import numpy as np
import pytest

from tilert import LLM, SamplingParams
from tilert.backends.cpu import CpuBackend
from tilert.compiler.simulate import Span, simulate
from tilert.errors import UserError
from tilert.ir.machine import Machine
from tilert.ir.program import Cost, Counter, Op, Program, Region, Run, Wait
from tilert.serve import trace
from tilert.serve.trace import Recorded, Timeline

HOSTILE = "</script><script>alert(1)</script><!-- & \u2028 'a' \"b\""
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 9, 33, 7]}


# The simulator, on programs small enough to compute by hand


@dataclass(frozen=True, slots=True)
class Load(Op):
    """An op that only costs: bytes and flops per tile."""

    opcode: ClassVar[int] = 99
    size: int
    flops: int = 0

    @property
    def tiles(self) -> int:
        return 100

    def reads(self, lo: int, hi: int) -> list[Region]:
        return []

    def writes(self, lo: int, hi: int) -> list[Region]:
        return []

    def cost(self, lo: int, hi: int, dtype_bytes: int, context: int) -> Cost:
        return Cost((hi - lo) * self.size, 0, (hi - lo) * self.flops)


def program(
    ops: Iterable[Op], queues: Iterable[Iterable[Run]], totals: Iterable[int] = (), **speeds: float
) -> Program:
    """A program without buffers on a machine that reads 10 B/s, one worker 8 B/s, 100 flops/s."""
    rows = tuple(tuple(queue) for queue in queues)
    rates = {"read_bandwidth": 10.0, "worker_bandwidth": 8.0, "worker_flops": 100.0} | speeds
    machine = Machine("paper", len(rows), **rates)  # type: ignore[arg-type]
    return Program(machine, 1, 1, 1, 1, (), tuple(ops), tuple(Counter(n) for n in totals), rows)


def ends(spans: Iterable[Span]) -> dict[tuple[int, int], float]:
    return {(s.worker, s.index): round(s.end, 9) for s in spans}


def test_readers_share_the_bandwidth_and_the_last_one_is_bound_by_its_own_rate() -> None:
    ops = (Load(80), Load(20))
    found = simulate(program(ops, [[Run(0, 0, 1)], [Run(1, 0, 1)]]), 0)
    # 5 B/s each until 4 s, then 60 B at 8 B/s.
    assert ends(found) == {(0, 0): 11.5, (1, 0): 4.0}


def test_a_run_takes_the_longer_of_reading_and_computing_plus_its_overhead() -> None:
    ops = (Load(8, 50), Load(8, 300), Load(0, 100), Load(0, 0))
    queue = [Run(i, 0, 1) for i in range(4)]
    found = simulate(program(ops, [queue], run_overhead=0.25), 0)
    lengths = [round(s.end - s.start, 9) for s in found]
    assert lengths == [1.25, 3.25, 1.25, 0.25]


def test_a_signal_reaches_others_after_the_hand_off_and_its_sender_at_once() -> None:
    waits = (Wait(0, 1),)
    queues = [
        [Run(0, 0, 1, signal=0), Run(1, 0, 1, waits)],
        [Run(1, 0, 1, waits)],
    ]
    first, own, other = simulate(program((Load(8), Load(0)), queues, [1], handoff=0.5), 0)
    assert (first.end, own.wait, own.start) == (1.0, 1.0, 1.0)
    assert (other.wait, other.start) == (0.0, 1.5)


def test_a_wait_holds_until_the_threshold_and_one_on_the_step_before_holds_at_once() -> None:
    queues = [
        [Run(0, 0, 1, signal=0), Run(0, 0, 2, signal=0)],
        [Run(1, 0, 1, (Wait(0, 1, lag=1),)), Run(1, 0, 1, (Wait(0, 2),))],
    ]
    found = simulate(program((Load(8), Load(0)), queues, [2]), 0)
    assert ends(found) == {(0, 0): 1.0, (0, 1): 3.0, (1, 0): 0.0, (1, 1): 3.0}


def test_signals_beyond_the_threshold_change_nothing() -> None:
    waiting = [Run(1, 0, 1, (Wait(0, 1),)), Run(1, 0, 1, (Wait(0, 3),)), Run(1, 0, 1)]
    found = simulate(program((Load(8), Load(0)), [[Run(0, 0, 1, signal=0)] * 3, waiting], [3]), 0)
    assert [s.end for s in found if s.worker == 0] == [1.0, 2.0, 3.0]
    assert [s.end for s in found if s.worker == 1] == [1.0, 3.0, 3.0]


def test_devices_have_their_own_memories() -> None:
    made = program((Load(80),), [[Run(0, 0, 1)], [Run(0, 0, 1)]])
    apart = replace(made.machine, workers_per_device=1, devices=2)
    assert set(ends(simulate(made, 0)).values()) == {16.0}
    assert set(ends(simulate(replace(made, machine=apart), 0)).values()) == {10.0}


def test_a_program_that_never_ends_is_found() -> None:
    stuck = program((Load(1),), [[Run(0, 0, 1, (Wait(0, 1),), signal=0)]], [1])
    with pytest.raises(AssertionError, match="never ends"):
        simulate(stuck, 0)


# Recording


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tmp_path_factory.mktemp("llama")
    families.make("llama", path)
    return LLM(path, skip_tokenizer_init=True, threads=2)


@pytest.fixture(scope="module")
def recorded(llm: LLM) -> Recorded:
    return trace.record(llm, PROMPT, GREEDY)


def check_waits(made: Program, timeline: Timeline) -> None:
    """Every run is there once, after the run before it and after the signals that it waits for."""
    signals: defaultdict[int, list[float]] = defaultdict(list)
    rows: defaultdict[int, list[Span]] = defaultdict(list)
    for span in timeline.spans:
        rows[span.worker].append(span)
        signals[made.queues[span.worker][span.index].signal].append(span.end)
    for worker, queue in enumerate(made.queues):
        row = sorted(rows[worker], key=lambda span: span.index)
        assert [span.index for span in row] == list(range(len(queue)))
        for before, after in itertools.pairwise(row):
            assert before.end <= after.wait + 1e-9
        for span, run in zip(row, queue, strict=True):
            assert span.wait <= span.start <= span.end <= timeline.seconds + 1e-9
            for wait in (w for w in run.waits if not w.lag):
                held = sorted(signals[wait.counter])[wait.threshold - 1]
                assert held <= span.start + 1e-9


def test_measured_and_simulated_steps_obey_the_program(recorded: Recorded) -> None:
    assert len(recorded.steps) == GREEDY.max_tokens - 1  # type: ignore[operator]  # one is of the prompt
    for timeline in [*recorded.steps, recorded.simulated]:
        check_waits(recorded.program, timeline)


def test_steps_follow_each_other_and_the_median_one_is_shown(recorded: Recorded) -> None:
    for before, after in itertools.pairwise(recorded.steps):
        assert after.begin == pytest.approx(before.begin + before.seconds, abs=1e-9)
        assert after.context == before.context + 1
    assert recorded.steps[0].context == len(PROMPT["prompt_token_ids"])
    times = sorted(step.seconds for step in recorded.steps)
    assert recorded.measured.seconds == times[len(times) // 2]
    assert recorded.simulated.context == recorded.measured.context


def test_sampling_with_one_launch_per_token_is_recorded_too(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=1, max_tokens=6, ignore_eos=True)
    found = trace.record(llm, PROMPT, params)
    assert [step.context for step in found.steps] == [4, 5, 6, 7, 8]
    begins = [step.begin for step in found.steps]
    assert begins == sorted(begins)


def test_tracing_ends_with_the_recording_and_changes_no_token(llm: LLM) -> None:
    before = llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids
    trace.record(llm, PROMPT, GREEDY)
    assert llm.generate(PROMPT, GREEDY)[0].outputs[0].token_ids == before
    backend = llm.runner.backend("decode")
    assert isinstance(backend, CpuBackend)
    assert not len(backend.records())
    assert "steps" not in vars(backend)


def test_nothing_to_record_is_a_user_error(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 2 tokens"):
        trace.record(llm, PROMPT, replace(GREEDY, max_tokens=1))
    families.make("llama", tmp_path)
    slow = LLM(tmp_path, skip_tokenizer_init=True, backend="interpreter")
    with pytest.raises(UserError, match="has no clock"):
        trace.record(slow, PROMPT, GREEDY)


def test_steps_of_a_record_last_from_end_to_end() -> None:
    rows = [  # worker, run, step, wait begin, start, end
        [0, 0, 0, 1000, 1000, 3000],
        [1, 0, 0, 1100, 2000, 4000],
        [0, 0, 1, 3000, 4500, 6000],
        [1, 0, 1, 4000, 4000, 5000],
    ]
    first, second = trace.timelines(np.asarray(rows, np.int64), 7)
    assert (first.context, second.context) == (7, 8)
    assert (first.begin, first.seconds) == pytest.approx((1e-6, 3e-6))
    assert (second.begin, second.seconds) == pytest.approx((4e-6, 2e-6))
    # Worker 0 began to wait while the step before was still going on; that time is not counted.
    assert second.spans[0].wait == 0
    assert second.spans[0].start == pytest.approx(0.5e-6)
    assert trace.timelines(np.zeros((0, 6), np.int64), 0) == []


# What is made of it


def test_every_second_of_every_worker_is_accounted_for(recorded: Recorded) -> None:
    made = recorded.program
    for timeline in (recorded.measured, recorded.simulated):
        work = sum(share.work for share in trace.shares(made, timeline).values())
        waiting = trace.waiting_share(made, timeline)
        assert work / timeline.seconds / len(made.queues) + waiting == pytest.approx(1)
        assert 0 <= waiting < 1


def test_a_step_reads_every_matrix_once(recorded: Recorded) -> None:
    kinds = trace.shares(recorded.program, recorded.measured)
    linear = sum(
        share.bytes for kind, share in kinds.items() if kind.endswith(("_proj", "lm_head"))
    )
    matrices = [
        b for b in recorded.program.buffers if b.name.endswith(("_proj.weight", "lm_head.weight"))
    ]
    assert linear == sum(b.bytes for b in matrices)
    assert linear <= recorded.step_bytes


def test_ops_are_named_after_their_weights_and_layers(recorded: Recorded) -> None:
    labels = [label for _, label in trace.op_names(recorded.program)]
    assert {"Embed", "layers.1.mlp.gate_proj", "layers.0 Attention", "lm_head", "NextToken"} <= set(
        labels
    )
    combines = [label for label in labels if label.endswith("Combine")]
    assert combines == [f"layers.{i} Combine" for i in range(len(combines))]


def test_models_are_named_as_people_name_them() -> None:
    commit, digest = "0123456789abcdef0123456789abcdef01234567", "0123456789abcdef"
    hub = Path("/hub/models--Qwen--Qwen3-0.6B/snapshots") / commit
    assert trace.model_name(hub) == "Qwen/Qwen3-0.6B"
    assert trace.model_name(Path(f"/cache/gguf/tiny.Q4_1-{digest}")) == "tiny.Q4_1"
    assert trace.model_name(Path("/models/my-model")) == "my-model"


def test_the_summary_names_both_times_and_every_kind(recorded: Recorded) -> None:
    text = trace.summary(recorded)
    for timeline in (recorded.measured, recorded.simulated):
        assert f"{timeline.seconds * 1e3:.3f} ms/step" in text
    for kind in trace.shares(recorded.program, recorded.measured):
        assert re.search(rf"^{kind} ", text, re.MULTILINE)
    assert "something else was running" in trace.summary(replace(recorded, read_rates=[1e9, 2e9]))
    assert "something else was running" not in trace.summary(
        replace(recorded, read_rates=[1e9, 1.1e9])
    )


def test_the_chrome_trace_has_what_perfetto_needs(recorded: Recorded) -> None:
    made = json.loads(trace.chrome_json(recorded))
    rows: defaultdict[tuple[int, int], list[tuple[float, float]]] = defaultdict(list)
    names: dict[int, str] = {}
    for event in made["traceEvents"]:
        if event["ph"] == "M":
            if event["name"] == "process_name":
                names[event["pid"]] = event["args"]["name"]
            continue
        assert event["ph"] == "X"
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert event["name"]
        assert event["cat"]
        rows[event["pid"], event["tid"]].append((event["ts"], event["dur"]))
    assert names == {1: "measured", 2: "simulated"}
    assert set(rows) == {(pid, worker) for pid in (1, 2) for worker in range(2)}
    for row in rows.values():  # bars of one thread do not overlap, or Perfetto would nest them
        for (begin, length), (after, _) in itertools.pairwise(sorted(row)):
            assert begin + length <= after + 0.002
    works = sum(event.get("cat") != "wait" for event in made["traceEvents"] if event["ph"] == "X")
    runs = sum(len(queue) for queue in recorded.program.queues)
    assert works == runs * (len(recorded.steps) + 1)


def test_a_long_chrome_trace_keeps_the_shown_step(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = sum(len(queue) for queue in recorded.program.queues)
    monkeypatch.setattr(trace, "MAX_EVENTS", 3 * runs)
    events = json.loads(trace.chrome_json(recorded))["traceEvents"]
    steps = {
        event["args"]["step"] for event in events if event["pid"] == 1 and "step" in event["args"]
    }
    assert len(steps) == 3
    assert recorded.shown in steps


def page_json(page: str) -> str:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return found[1]


def test_the_page_holds_its_data_whatever_the_names_are(recorded: Recorded) -> None:
    plain, hostile = (trace.page(replace(recorded, model=name)) for name in ("m", HOSTILE))
    for tag in ("<script", "</script", "<!--", "<img"):
        assert hostile.count(tag) == plain.count(tag)
    assert json.loads(page_json(hostile))["model"] == HOSTILE
    assert not set(page_json(hostile)) & set("<>&\u2028\u2029")


def test_the_page_shows_the_spans_of_both_timelines(recorded: Recorded) -> None:
    data = json.loads(page_json(trace.page(recorded)))
    queues = [len(queue) for queue in recorded.program.queues]
    assert [len(queue) for queue in data["queues"]] == queues
    for shown, timeline in zip(
        data["timelines"], (recorded.measured, recorded.simulated), strict=True
    ):
        assert [len(row) // 4 for row in shown["rows"]] == queues
        assert shown["seconds"] == timeline.seconds
        for row in shown["rows"]:
            times = np.asarray(row).reshape(-1, 4)
            assert (times[:, 0] == np.arange(len(times))).all()
            assert (np.diff(times[:, 1:].reshape(-1)) >= 0).all()  # wait, start, end, next wait ...
    for _, _, _, waits in (run[1:] for queue in data["queues"] for run in queue):
        assert all(counter < len(data["counters"]) for counter, _, _ in waits)


def test_the_page_needs_nothing_from_outside_and_sets_no_html(recorded: Recorded) -> None:
    page = trace.page(recorded)
    assert not re.search(r"https?:|\bsrc=|\bhref=|@import|url\(|\bfetch\(|XMLHttpRequest", page)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", page)
    assert "Content-Security-Policy" in page
