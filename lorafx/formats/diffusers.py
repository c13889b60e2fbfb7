"""diffusers' files, ``pytorch_lora_weights.safetensors``: ``unet.down_blocks.0.attn1.to_q.lora_A.weight`` and the like.

Before PEFT they had spellings of their own, which are still about:

    unet.….attn1.to_q.lora.down.weight                       .up.weight
    unet.….attn1.processor.to_q_lora.down.weight             to_out_lora means to_out.0
    text_encoder.….self_attn.q_proj.lora_linear_layer.down.weight
    text_encoder.….self_attn.to_q_lora.down.weight           means q_proj; to_out_lora means out_proj

Newer ones carry each part's LoraConfig in the header of the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from peft import LoraConfig

from lorafx.adapter_config import check_config, parse_object
from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.formats.base import Base
from lorafx.formats.conversion import Conversion, Layer
from lorafx.formats.parts import choose_part

METADATA = "lora_adapter_metadata"
PART = re.compile(r"(?:(unet|transformer(?:_\d)?|text_encoder(?:_\d)?|prior|decoder)\.)?(.+)")
ENDS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "bias",
    ".lora.down.weight": "a",
    ".lora.up.weight": "b",
    ".lora_linear_layer.down.weight": "a",
    ".lora_linear_layer.up.weight": "b",
    ".lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    "_lora.down.weight": "a",
    "_lora.up.weight": "b",
    "_lora.alpha": "alpha",
    ".alpha": "alpha",
}
OF_IMAGE = {"to_out": "to_out.0"}
OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def is_diffusers(keys: Mapping[str, object]) -> bool:
    """Whether these are names of such a file: with its matrices' ends, and none with PEFT's prefix."""
    return any((_taken_apart(key) or ("", "", ""))[2] == "a" for key in keys)


def convert(
    name: str, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str], base: Base | None
) -> Conversion:
    """Where its tensors belong on ``base``; without it, a file of one part is taken by its names.

    AdapterFormatError: it holds more than LoRA. AdapterMismatchError: its names are not those of the model's modules
    """
    parts: dict[str, dict[str, Layer]] = {}
    strange = []
    for key in shapes:
        found = _taken_apart(key)
        if found is None:
            strange.append(key)
        else:
            part, layer, role = found
            parts.setdefault(part, {}).setdefault(layer, Layer()).put(name, role, key)
    if strange:
        raise AdapterFormatError(
            f"adapter {name!r}: {len(strange)} of its {len(shapes)} tensors are not of plain LoRA in diffusers' format,"
            f" for example {', '.join(map(show, strange[:3]))}. Expected names that end in .lora_A.weight and"
            " .lora_B.weight, or .lora.down.weight and .lora.up.weight: lorafx does not run DoRA and the like from a"
            " file."
        )
    if base is not None:

        def resolve(layer: str) -> str | None:
            return next((name for name in base.without_prefix(layer, ".") if name in base.layers), None)

        part, layers = choose_part(name, parts, resolve, base, shapes)
    elif len(parts) == 1:
        ((part, layers),) = parts.items()
    else:
        raise AdapterMismatchError(
            f"adapter {name!r} has parts for several models: {', '.join(map(show, parts))}. Pass the model that it is"
            " to be for."
        )
    return Conversion(layers, _config(name, metadata, part))


def _taken_apart(key: str) -> tuple[str, str, str] | None:
    """Part, layer and role of a tensor's name."""
    found = PART.fullmatch(key)
    if found is None:
        return None
    part, rest = found[1] or "", found[2]
    for end, role in ENDS.items():
        if rest.endswith(end):
            layer = rest.removesuffix(end)
            if end.startswith("_lora"):
                before, _, last = layer.removesuffix(".").rpartition(".")
                before = before.removesuffix(".processor")
                last = (OF_TEXT if part.startswith("text_encoder") else OF_IMAGE).get(last, last)
                layer = f"{before}.{last}" if before else last
            return (part, layer, role) if layer else None
    return None


def _config(name: str, metadata: Mapping[str, str], part: str) -> LoraConfig | None:
    """The part's config, which diffusers writes with the part's name before each field."""
    if METADATA not in metadata:
        return None
    try:
        values = parse_object(metadata[METADATA])
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"adapter {name!r}: the {METADATA} in its header can't be read: {error}. Expected the JSON that diffusers"
            " writes."
        ) from error
    start = f"{part}." if part else ""
    fields = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    return check_config(name, fields) if fields else None
