"""Tags of words: which buffers have them, and that a reader cannot take one write for another."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import programs
import pytest

from tilert.compiler import Limits, build
from tilert.ir import machine
from tilert.ir.program import Buf, Kind, Program
from tilert.ir.tags import TAGS, derive
from tilert.models import load_config
from tilert.models.decoder import build as build_graph
from tilert.ops import Append, Argmax, Attend, Embed, Linear


def deep(layers: int) -> Program:
    config = load_config({
        "model_type": "llama", "vocab_size": 40, "hidden_size": 64, "intermediate_size": 24,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    })  # fmt: skip
    small = replace(machine.H100, workers_per_device=3)
    return build(build_graph(config, 128), small, Limits(1, 1, 1, 128), {})


def test_what_streams_between_products_is_tagged() -> None:
    program = deep(2)
    tags = derive(program)
    for index, op in enumerate(program.ops):
        if isinstance(op, Embed):
            assert op.y in tags.writers
        elif isinstance(op, Attend):
            assert {op.q, op.k, op.v} <= tags.writers.keys()
            assert op.y in tags.writers
        elif isinstance(op, Argmax):
            assert op.logits not in tags.writers  # the host reads them too
        elif isinstance(op, Append):
            assert not tags.silent(index)  # a cache has no tags
        writes = {r.buffer for r in op.writes(0, op.tiles)}
        assert tags.silent(index) == bool(writes & tags.writers.keys())


def test_layers_that_leave_out_other_shares_have_no_tags() -> None:
    """With a window fewer early shares are empty than without; the words of one could pass for another's."""
    program = deep(2)
    first = next(op for op in program.ops if isinstance(op, Attend))
    ops = tuple(replace(first, window=70) if op is first else op for op in program.ops)
    assert first.y in derive(program).writers
    assert first.y not in derive(replace(program, ops=ops)).writers


# 6 tagged ops per layer and the embedding: 63 layers need more ranks than there are tags.
@pytest.mark.parametrize("layers", [1, 2, 63, 64, 70])
def test_writes_in_turn_differ(layers: int) -> None:
    """Replayed: the words of a buffer through three steps, each reader against what it finds."""
    program = deep(layers)
    tags = derive(program)
    found: dict[Buf, int] = {}
    for step in range(3):
        for index, op in enumerate(program.ops):
            for buf in {*op.tag_checking()} & tags.writers.keys():
                if isinstance(op, Linear) and buf == op.y and op.epilogue != 1:
                    continue  # written, not read
                wanted = (tags.rank[tags.writer(buf, index)] + step * tags.stride) % TAGS
                assert found[buf] == wanted
            for buf in {r.buffer for r in op.writes(0, op.tiles)} & tags.writers.keys():
                made = (tags.rank[index] + step * tags.stride) % TAGS
                assert made != found.get(Buf(buf))
                found[Buf(buf)] = made


def test_the_last_write_of_a_step_differs_from_the_first_of_the_next() -> None:
    for layers in (1, 63, 64):
        tags = derive(deep(layers))
        for ops in tags.writers.values():
            ranks = [tags.rank[op] for op in ops]
            assert all((b - a) % TAGS for a, b in pairwise([*ranks, ranks[0] + tags.stride]))


def test_machines_without_rings_and_steps_of_many_tokens_have_none() -> None:
    assert not derive(programs.tiny_model(machine.cpu(2), 1)).writers
    assert derive(programs.tiny_model(machine.NULL, 8)).writers
    assert not derive(programs.tiny_model(machine.NULL, 16)).writers


def test_a_buffer_that_something_else_reads_is_not_tagged() -> None:
    program = deep(1)
    down = max(i for i, op in enumerate(program.ops) if isinstance(op, Linear) and op.epilogue == 1)
    mixed = program.ops[down]
    assert isinstance(mixed, Linear)
    reader = next(op for op in program.ops if isinstance(op, Argmax))
    changed = replace(program, ops=(*program.ops, replace(reader, logits=mixed.x)))
    assert mixed.x in derive(program).writers
    assert mixed.x not in derive(changed).writers
    assert program.buffers[mixed.x].kind is Kind.WORK


def test_who_reads_every_word_is_told_by_words() -> None:
    """Products know from the words of x alone that those who made it are done; attention reads only a part
    of what each worker leaves, and what may be left out reads nothing."""
    program = deep(2)
    tags = derive(program)
    for index, op in enumerate(program.ops):
        maker, others = tags.told(program, index)
        if isinstance(op, Linear):
            assert maker == tags.writer(op.x, index)
            assert all(isinstance(program.ops[other], Linear) for other in others)
        else:
            assert (maker, others) == (-1, frozenset())
    first = next(i for i, op in enumerate(program.ops) if isinstance(op, Linear))
    op = program.ops[first]
    assert isinstance(op, Linear)
    spared = replace(op, beyond=8)
    left_out = replace(program, ops=(*program.ops[:first], spared, *program.ops[first + 1 :]))
    assert derive(left_out).told(left_out, first)[0] == -1
    part = replace(spared, beyond=0, k=spared.k // 2)
    half = replace(program, ops=(*program.ops[:first], part, *program.ops[first + 1 :]))
    assert derive(half).told(half, first)[0] == -1


def test_nobody_is_told_who_might_find_older_words() -> None:
    """The write before must have been read as a whole, or the one before that may still be seen."""
    program = deep(2)
    tags = derive(program)
    down = next(
        i for i, op in enumerate(program.ops) if isinstance(op, Linear) and i > 0
        and tags.told(program, i)[0] != -1 and tags.writers[op.x].index(tags.writer(op.x, i)) > 0
    )  # fmt: skip
    _, others = tags.told(program, down)
    ops = list(program.ops)
    for other in others:
        op = ops[other]
        assert isinstance(op, Linear)
        ops[other] = replace(op, k=op.k // 2)
    assert tags.told(replace(program, ops=tuple(ops)), down)[0] == -1
