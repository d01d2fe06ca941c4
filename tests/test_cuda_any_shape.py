"""Products of all shapes by one body of code (backends/cuda/shapes.cuh), as programs with many have it.

The models of other tests are small, so that they have few shapes; here any number is too many for code of
their own.
"""

from __future__ import annotations

import re

import pytest
import test_cuda_experts as experts
import test_cuda_kernel as kernel
from test_cuda_kernel import Devices

from tilert.backends.cuda import shapes
from tilert.backends.cuda.jit import TARGETS
from tilert.backends.cuda.limits import fitting
from tilert.backends.cuda.source import SHAPE_SHIFT, Source, generate
from tilert.ir.program import Program
from tilert.ir.tags import derive
from tilert.ops import ExpertDown, ExpertGate, Linear


@pytest.fixture(autouse=True)
def one_body(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "FEW", 0)


def source_of(program: Program) -> Source:
    return generate(program, fitting(program, TARGETS["sm_90a"]))


def shapes_in(source: Source) -> list[list[str]]:
    """The rows of the table, as the compiler reads them."""
    return [row.split(", ") for row in re.findall(r"\{([^{}]+)\}", source.headers["shapes.h"])]


@pytest.mark.parametrize("name", ["fp8-wide-blocks", "fp8-latent", "fp8-indexed"])
def test_tokens_equal_the_interpreter(name: str, devices: Devices) -> None:
    program, _ = kernel.compiled(name)
    source = source_of(program)
    assert source.headers["variants.h"].count("AnyShape") == 1
    assert len(shapes_in(source)) >= 3
    for position in (0, 62, 200):
        kernel.test_logits_equal_the_interpreter(name, position, devices)


@pytest.mark.parametrize("case", ["over-a-page-border", "one-of-two", "at-a-border"])
@pytest.mark.parametrize("name", ["fp8-wide-blocks", "fp8-latent"])
def test_bits_do_not_depend_on_how_many_tokens_a_step_has(
    name: str, case: str, devices: Devices
) -> None:
    kernel.test_steps_of_several_tokens(name, case, devices)


def test_chosen_experts(devices: Devices) -> None:
    name = "fp8-side-by-side"
    program, _ = experts.compiled(name)
    source = source_of(program)
    variants, table = dict(zip(program.ops, source.variants, strict=True)), shapes_in(source)
    assert source.headers["variants.h"].count("AnyShape") == 1
    for op in program.ops:
        if isinstance(op, ExpertGate | ExpertDown):
            assert shapes.has_shape(program, op), op
            assert variants[op] >> SHAPE_SHIFT < len(table), op
    experts.test_logits_equal_the_interpreter(name, devices)


def test_each_token_has_experts_of_its_own(devices: Devices) -> None:
    experts.test_each_token_has_experts_of_its_own("fp8-side-by-side", 4, devices)


def test_what_nobody_reads_is_left_out_where_a_step_has_one_pass() -> None:
    program, _ = kernel.compiled("fp8-indexed")
    op = next(op for op in program.ops if isinstance(op, Linear) and op.beyond)
    assert shapes.has_shape(program, op)
    tags = derive(program)
    rows = [shapes.initializer(program, op, tags, spared=s).split(", ") for s in (True, False)]
    assert [(a, b) for a, b in zip(*rows, strict=True) if a != b] == [(str(op.beyond), "0")]
    assert rows[0] in shapes_in(source_of(program))


def test_what_divides_is_multiplied_exactly() -> None:
    """quotient() of shapes.cuh, for every divisor and number that a rank of DeepSeek-V3.2 has."""
    for divisor in (1, 2, 8, 16, 56, 128, 256, 512, 2048, 7168):
        inverse = shapes._inverse(divisor)
        assert inverse < 1 << 32
        for n in (*range(4 * divisor), *range(16 * 7168 - 5, 16 * 7168 + 5)):
            assert n * inverse >> 31 == n // divisor, (n, divisor)


def test_few_shapes_have_code_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    program, _ = kernel.compiled("fp8-wide-blocks")
    kinds = {(op.k, op.tile_rows, op.epilogue) for op in program.ops if isinstance(op, Linear)}
    monkeypatch.setattr(shapes, "FEW", len(kinds))
    assert not any(shapes.sharing(program))
    assert "AnyShape" not in source_of(program).headers["variants.h"]
    monkeypatch.setattr(shapes, "FEW", len(kinds) - 1)
    assert any(shapes.sharing(program))
