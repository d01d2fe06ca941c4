"""The one exception type that a user may see: a single sentence, no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or an environment that cannot serve it; the text says what was given and what is accepted."""
