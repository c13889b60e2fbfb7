"""llama.cpp's LoRA adapter: ``blk.0.attn_q.weight.lora_a`` and ``.lora_b``, and one alpha for the whole file.

    delta of a layer = adapter.lora.alpha / rank * B @ A, rank being B's; an alpha of 0, or none: B @ A

(``llama_adapter_lora_init_impl`` and ``get_scale`` in src/llama-adapter.cpp and .h of ggml-org/llama.cpp)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorafx.config_fields import FIELDS, show
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.formats.base import Base
from lorafx.formats.conversion import Conversion, Layer
from lorafx.formats.gguf_layout import layout_for

TYPE, ARCHITECTURE, KIND, ALPHA = "general.type", "general.architecture", "adapter.type", "adapter.lora.alpha"
INVOCATION = "adapter.alora.invocation_tokens"  # of an aLoRA adapter
ENDS = {".weight.lora_a": "a", ".weight.lora_b": "b"}


def convert(name: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, Any], base: Base) -> Conversion:
    """Where its tensors belong on ``base``.

    AdapterFormatError: no LoRA adapter, or more than LoRA. AdapterMismatchError: an adapter of another model
    """
    for key, expected in ((TYPE, "adapter"), (KIND, "lora")):
        if metadata.get(key) != expected:
            raise AdapterFormatError(
                f"adapter {name!r}: the GGUF file has {key}={show(metadata.get(key))}; expected {expected!r}, as in an"
                " adapter that llama.cpp's convert_lora_to_gguf.py wrote."
            )
    invocation = metadata.get(INVOCATION, [])
    is_right, expected = FIELDS["alora_invocation_tokens"]
    if invocation is None or not is_right(invocation):
        raise AdapterFormatError(f"adapter {name!r}: it has {INVOCATION}={show(invocation)}; expected {expected}.")
    alpha = metadata.get(ALPHA, 0.0)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise AdapterFormatError(f"adapter {name!r}: it has {ALPHA}={show(alpha)}; expected a number.")
    layout = layout_for(name, base)
    if metadata.get(ARCHITECTURE) != layout.arch:
        raise AdapterMismatchError(
            f"adapter {name!r} is for the architecture {show(metadata.get(ARCHITECTURE))}, {base.kind} is"
            f" {layout.arch!r} in llama.cpp. Expected an adapter of the same model."
        )
    paths: dict[str, list[str]] = {}
    for path, text in layout.names.items():
        paths.setdefault(text, []).append(path)
    layers: dict[str, Layer] = {}
    for key in shapes:
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is None:
            raise AdapterFormatError(
                f"adapter {name!r} has a tensor {show(key)}; expected names that end in {' or '.join(ENDS)}. Of"
                " a GGUF file lorafx reads LoRA and aLoRA on linear layers, nothing else."
            )
        there = paths.get(key.removesuffix(end), [])
        if len(there) != 1:
            raise AdapterMismatchError(
                f"adapter {name!r} adapts {show(key.removesuffix(end))}, for which {base.kind} has"
                f" {' and '.join(there) if there else 'no linear layer'}. Expected names of its layers, such as"
                f" {', '.join(map(show, list(paths)[:3])) or 'none'}. Is it an adapter of another model?"
            )
        layers.setdefault(there[0], Layer(alpha=alpha or None)).put(name, ENDS[end], key)
    if not layers:
        raise AdapterFormatError(f"adapter {name!r}: the GGUF file has no tensors; expected those of an adapter.")
    return Conversion(layers, turn=layout.turns(), invocation=tuple(invocation))
