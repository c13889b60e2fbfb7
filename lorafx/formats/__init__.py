"""Adapters in the formats of other programs: llama.cpp's GGUF, kohya's and diffusers' safetensors.

``lorafx.compile`` and ``model.lora.load`` read them as they read PEFT folders. Here is what turns one into another.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafx.formats.opening import detect

if TYPE_CHECKING:
    from lorafx.formats.gguf_writing import to_gguf
    from lorafx.formats.peft_folder import to_peft

LATER = {"to_gguf": "gguf_writing", "to_peft": "peft_folder"}

__all__ = ["detect", "to_gguf", "to_peft"]


def __getattr__(name: str) -> Any:
    # writing asks the reader of adapters, which asks this package: loaded when it is first needed
    if name in LATER:
        from importlib import import_module

        return getattr(import_module(f"lorafx.formats.{LATER[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
