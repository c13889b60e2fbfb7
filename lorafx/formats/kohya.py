"""kohya's files: ``lora_unet_down_blocks_0_attn_to_q.lora_down.weight``, ``.lora_up.weight`` and ``.alpha``.

The dots of the path are underscores there, and a path has underscores of its own. So a name is looked up among the
model's modules, spelled the same way; it is never taken apart.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lorafx.config_fields import show
from lorafx.errors import AdapterFormatError, AdapterMismatchError
from lorafx.formats.base import Base
from lorafx.formats.conversion import Conversion, Layer
from lorafx.formats.parts import choose_part

NAME = re.compile(r"lora_([a-z]+[0-9]*)_([^.]+)\.(lora_down\.weight|lora_up\.weight|alpha)")
ROLES = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha"}


def is_kohya(keys: Mapping[str, object]) -> bool:
    """Whether these are names of such a file, by its down matrices."""
    return any(key.endswith(".lora_down.weight") and NAME.fullmatch(key) for key in keys)


def convert(name: str, shapes: Mapping[str, tuple[int, ...]], base: Base) -> Conversion:
    """Where its tensors belong on ``base``.

    AdapterFormatError: it holds more than LoRA. AdapterMismatchError: its names are not those of the model's modules
    """
    parts: dict[str, dict[str, Layer]] = {}
    strange = []
    for key in shapes:
        found = NAME.fullmatch(key)
        if found is None:
            strange.append(key)
        else:
            part, layer, role = found.groups()
            parts.setdefault(part, {}).setdefault(layer, Layer()).put(name, ROLES[role], key)
    if strange:
        raise AdapterFormatError(
            f"adapter {name!r}: {len(strange)} of its {len(shapes)} tensors are not of plain LoRA in kohya's format,"
            f" for example {', '.join(map(show, strange[:3]))}. Expected '....lora_down.weight', '....lora_up.weight'"
            " and '....alpha': lorafx does not run DoRA, LoHa, LoKr and the like from a file."
        )

    def resolve(layer: str) -> str | None:
        paths = next(filter(None, map(base.flattened.get, base.without_prefix(layer, "_"))), [])
        if len(paths) > 1:
            raise AdapterMismatchError(
                f"adapter {name!r}: {show(layer)} may be any of {', '.join(map(show, paths[:3]))}, which are one name"
                " where dots are underscores. Convert the file to PEFT's or diffusers' format, which keep the dots."
            )
        return paths[0] if paths else None

    return Conversion(choose_part(name, parts, resolve, base, shapes)[1])
