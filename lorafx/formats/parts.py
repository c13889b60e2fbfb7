"""Which part of a file belongs to a model: files for pictures hold the image model and its text encoders in one.

The rule: of a file's parts that one is read all of whose names are modules of the model. Where two are (two text
encoders of one family), it is the one whose matrices also have the sizes of the model's layers. The others are for
other models of the pipeline and are left out.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping

from lorafx.config_fields import show
from lorafx.errors import AdapterMismatchError
from lorafx.formats.base import Base
from lorafx.formats.conversion import Layer

log = logging.getLogger("lorafx")

Part = Mapping[str, Layer]  # by the layer's name in the file


def choose_part(
    name: str,
    parts: Mapping[str, Part],
    resolve: Callable[[str], str | None],
    base: Base,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[str, dict[str, Layer]]:
    """The name of the part that is for ``base``, and its layers by the path of the module.

    resolve: the module that a name in the file means; None: there is none

    AdapterMismatchError: no part is, or more than one
    """
    paths = {part: {layer: resolve(layer) for layer in layers} for part, layers in parts.items()}
    whole = [part for part in parts if None not in paths[part].values()]
    if not whole:
        raise _no_part(name, paths, base)
    if len(whole) > 1:
        whole = [part for part in whole if _has_sizes(parts[part], paths[part], base, shapes)]
    if len(whole) != 1:
        raise AdapterMismatchError(
            f"adapter {name!r}: the names in {', '.join(map(show, parts))} are all layers of {base.kind}, and"
            f" {'the sizes of several fit' if whole else 'no sizes fit'}. Expected one part that does: save it in a"
            " file of its own."
        )
    part = whole[0]
    ignored = {other: len(layers) for other, layers in parts.items() if other != part}
    if ignored:
        log.info("adapter %r: its part %r is read; left out: %s (layers)", name, part, ignored)
    found: dict[str, Layer] = {}
    for layer, path in paths[part].items():
        if path in found:
            for role in ("a", "b", "bias", "alpha"):
                if getattr(parts[part][layer], role) is not None:
                    found[path].put(name, role, getattr(parts[part][layer], role))
        else:
            found[path] = parts[part][layer]
    return part, found


def _has_sizes(part: Part, paths: Mapping[str, str], base: Base, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    for name, layer in part.items():
        sizes = base.layers[paths[name]]
        if sizes is None or layer.a is None or layer.b is None:
            return False
        if (math.prod(shapes[layer.a][1:]), shapes[layer.b][:1]) != (sizes[0], sizes[1:]):
            return False
    return True


def _no_part(name: str, paths: Mapping[str, Mapping[str, str | None]], base: Base) -> AdapterMismatchError:
    nearest = max(paths, key=lambda part: sum(path is not None for path in paths[part].values()) / len(paths[part]))
    missing = [layer for layer, path in paths[nearest].items() if path is None]
    some = ", ".join(map(show, missing[:3]))
    what = f"{len(missing)} of the {len(paths[nearest])} layers of its part {show(nearest)}"
    if len(missing) == len(paths[nearest]):
        what = f"none of its layers ({', '.join(f'{show(part)}: {len(layers)}' for part, layers in paths.items())})"
        what += " is one of this model's"
    else:
        what += " are none of this model's"
    return AdapterMismatchError(
        f"adapter {name!r} does not fit {base.kind}: {what}, for example {some}. Expected names of its modules, such"
        f" as {', '.join(show(path) for path, sizes in base.layers.items() if sizes)[:200] or 'none: it has none'}. Is"
        " it an adapter of another model, or does it name the layers as another library does?"
    )
