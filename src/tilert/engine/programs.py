"""Compiled programs that are kept on disk: for a GPU's many workers, compiling takes seconds.

The key covers all that decides the result: graph, machine, limits, types, scales, and the sources of the
compiler. A program was verified before it was kept, and a file that is damaged is compiled again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tilert.compiler import Limits, build
from tilert.files import cache_folder, keep, kept
from tilert.ir import encode
from tilert.ir.dtype import DType
from tilert.ir.graph import Graph, Speculation
from tilert.ir.machine import Machine
from tilert.ir.program import Program, Scale
from tilert.ops import OPS

MANY_WORKERS = 16  # with fewer, compiling is as fast as finding


def program_for(
    graph: Graph | Speculation, machine: Machine, limits: Limits, dtypes: Mapping[str, DType],
    scales: Mapping[str, Scale] | None = None,
) -> Program:  # fmt: skip
    """As compiler.build, which it calls when the program is not kept yet."""
    if machine.workers <= MANY_WORKERS:
        return build(graph, machine, limits, dtypes, scales)
    given = (graph, machine, limits, sorted(dtypes.items()), sorted((scales or {}).items()))
    key = hashlib.sha256(repr((_compiler(), given)).encode()).hexdigest()
    path = cache_folder() / "program" / key[:32]
    if (data := kept(path)) is not None:
        return encode.from_bytes(data, OPS)
    program = build(graph, machine, limits, dtypes, scales)
    keep(path, encode.to_bytes(program))
    return program


@cache
def _compiler() -> str:
    """A digest of the sources that turn a graph into a program."""
    root = Path(__file__).parents[1]
    files = sorted(
        path for room in ("ir", "ops", "compiler") for path in (root / room).glob("*.py")
    )
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()
