"""A JSON object of settings, read key by key with one sentence for whatever is not accepted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tilert.errors import UserError


@dataclass(frozen=True, slots=True)
class Section:
    """A JSON object read key by key; `name` is what error texts call it."""

    name: str
    values: Mapping[str, Any]

    def error(self, key: str, accepted: str) -> UserError:
        """What the key has, and what is accepted."""
        return UserError(f"{self.name} has {key} {show(self.values.get(key))}; {accepted}")

    def integer(self, key: str, low: int, high: int) -> int:
        """A whole number from low to high."""
        value = self.values[key]
        if type(value) is not int or not low <= value <= high:  # bool is not a number here
            raise self.error(key, f"accepted are whole numbers from {low} to {high}")
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A number from low to high."""
        value = self.values[key]
        if type(value) not in (int, float) or not low <= value <= high:  # NaN fails the comparison
            raise self.error(key, f"accepted are numbers from {low:g} to {high:g}")
        return float(value)

    def maybe_number(self, key: str, low: float, high: float) -> float | None:
        """The same, or None for null and for a key that is absent."""
        return None if self.values.get(key) is None else self.number(key, low, high)

    def boolean(self, key: str) -> bool:
        """true or false."""
        value = self.values[key]
        if type(value) is not bool:
            raise self.error(key, "accepted are true and false")
        return value

    def one_of(self, key: str, accepted: tuple[Any, ...]) -> Any:
        """One of the accepted values."""
        value = self.values.get(key)
        for candidate in accepted:
            if value == candidate and isinstance(value, bool) == isinstance(candidate, bool):
                return value
        verb = "accepted is" if len(accepted) == 1 else "accepted are"
        raise self.error(key, f"{verb} {', '.join(map(show, accepted))}")

    def agree(self, key: str, stated: Any, other: str, also: Any) -> None:
        """Two places may state the same setting, but not differently."""
        if stated is not None and also is not None and stated != also:
            raise UserError(
                f"{self.name} has {key} {show(stated)} and {other} {show(also)};"
                " accepted is one of them, or both with the same value"
            )


def show(value: Any) -> str:
    """A value as JSON writes it, cut to fit a sentence."""
    words = {None: "null", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
