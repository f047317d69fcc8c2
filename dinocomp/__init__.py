"""DINOv2 self-supervised training of vision models from your own images, on MosaicML Composer."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    # Deferred, so that the command line does not import torch to print its help.
    if name in __all__:
        from dinocomp import interop

        return getattr(interop, name)
    raise AttributeError(f"module 'dinocomp' has no attribute '{name}'")
