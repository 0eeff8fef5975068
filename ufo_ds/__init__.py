"""Unified vision models: one Task-MoE vision transformer for many tasks, and the dense models cut from it."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ufo_ds.subnets.ufo_model import UfoModel

__all__ = ["UfoModel"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Torch takes seconds to import: not before it is needed."""
    if name == "UfoModel":
        from ufo_ds.subnets.ufo_model import UfoModel

        return UfoModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
