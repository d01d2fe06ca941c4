"""The instruction set: each op declared once, in the file of its family.

A declaration holds fields, regions read and written, the tiling rule, the cost and a numpy
reference body, which is the op's definition. The C++/CUDA header of opcodes and field layouts is
generated from these classes by `python -m tilert.ops`.
"""

from __future__ import annotations

from tilert.ir.program import Op
from tilert.ops.attend import Append, Attend
from tilert.ops.attention import Attention, Combine
from tilert.ops.draw import Adjust, Bins, Draw, Sift, Totals
from tilert.ops.embed import Embed
from tilert.ops.experts import ExpertDown, ExpertGate, Route
from tilert.ops.index import IndexRope, IndexScore, Select
from tilert.ops.linear import Linear
from tilert.ops.logprobs import Report, Survey
from tilert.ops.mla import LatentAppend, LatentAttention
from tilert.ops.norm import Norm
from tilert.ops.rope import Rope
from tilert.ops.sample import Accept, Argmax, Guess, NextToken

OPS: tuple[type[Op], ...] = (
    Linear,
    Norm,
    Embed,
    Rope,
    Attention,
    Combine,
    Argmax,
    NextToken,
    Attend,
    Adjust,
    Bins,
    Totals,
    Sift,
    Draw,
    Survey,
    Report,
    Route,
    ExpertGate,
    ExpertDown,
    LatentAppend,
    LatentAttention,
    IndexRope,
    IndexScore,
    Select,
    Append,
    Accept,
    Guess,
)

__all__ = [
    "OPS",
    "Accept",
    "Adjust",
    "Append",
    "Argmax",
    "Attend",
    "Attention",
    "Bins",
    "Combine",
    "Draw",
    "Embed",
    "ExpertDown",
    "ExpertGate",
    "Guess",
    "IndexRope",
    "IndexScore",
    "LatentAppend",
    "LatentAttention",
    "Linear",
    "NextToken",
    "Norm",
    "Report",
    "Rope",
    "Route",
    "Select",
    "Sift",
    "Survey",
    "Totals",
]
