"""Pieces that the graphs of several families are made of."""

from __future__ import annotations

from tilert.ir.graph import Graph, Value


def project(
    graph: Graph, prefix: str, x: Value, rows: int, *, bias: bool, shard: int | None, name: str
) -> Value:
    """The product of x with the weight `prefix`.weight [rows, x.cols], and its bias if it has one."""
    weight = graph.weight(f"{prefix}.weight", rows, x.cols, shard)
    return graph.linear(name, x, weight, graph.vector(f"{prefix}.bias", rows) if bias else None)
