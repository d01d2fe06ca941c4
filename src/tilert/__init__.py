"""tilert: ultra-low-latency inference of large language models, compiled to tiles.

    from tilert import LLM, SamplingParams

The public names are loaded on first use, so that `python -m tilert.ops` needs numpy only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilert.engine.core import SamplingParams
    from tilert.serve.llm import LLM, RequestOutput

    __version__: str

__all__ = ["LLM", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "RequestOutput"):
        from tilert.serve import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from tilert.engine.core import SamplingParams

        return SamplingParams
    if name == "__version__":
        from importlib.metadata import version

        return version("tilert")
    raise AttributeError(f"module 'tilert' has no attribute '{name}'")
