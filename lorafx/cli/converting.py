"""``lorafx convert``: an adapter in another format."""

from __future__ import annotations

from pathlib import Path

from lorafx.cli.models import load_skeleton
from lorafx.cli.output import print_lines
from lorafx.errors import LorafxError


def run(source: str, out: Path, *, to: str, model: str | None, dtype: str | None, overwrite: bool) -> int:
    """Write ``source`` to ``out``. LorafxError: it can't be read, or written in that format"""
    try:
        from lorafx import formats
    except ImportError as error:
        raise LorafxError(f"this lorafx converts nothing yet: {error}") from error
    if model is None and formats.detect(source) in ("gguf", "kohya"):
        raise LorafxError(
            f"{source!r} names its layers in a way that means something with the base model only: --model"
        )
    base = load_skeleton(model, "meta") if model is not None else None
    if to == "gguf":
        formats.to_gguf(source, out, model=base, dtype=dtype or "f16", overwrite=overwrite)
    else:
        formats.to_peft(source, out, model=base, overwrite=overwrite)
    print_lines(f"wrote {out}")
    return 0
