"""The CUDA back end: one program as one persistent kernel that makes many tokens per launch.

Needs the extra `tilert[cuda]`; nothing here is imported before a GPU is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tilert.errors import UserError

if TYPE_CHECKING:
    from tilert.backends.cuda.device import Device

__all__ = ["open_device"]


def open_device(progress: Callable[[str], None] | None = None) -> Device:
    """The GPU of this process; `progress` is told before something is compiled.

    Raises UserError without a GPU that the kernels run on, and without the packages that they need.
    """
    try:
        from tilert.backends.cuda.device import Device
    except ImportError as error:
        if (error.name or "").startswith("tilert"):
            raise
        raise UserError(
            f"the back end 'cuda' needs the package {error.name}; install tilert with its extra:"
            " pip install 'tilert[cuda]'"
        ) from error
    return Device(progress)
