"""`from tilert.models.deepseek_v3_2.dsa_show_hands import ShowHandsGenerator`, as scripts have it."""

from __future__ import annotations

from tilert.serve.show_hands import ShowHandsGenerator

__all__ = ["ShowHandsGenerator"]
