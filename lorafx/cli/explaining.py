"""``lorafx explain``: what lorafx makes of a model with these adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

import lorafx
from lorafx.cli.models import load, load_skeleton
from lorafx.cli.output import console, print_json, printable
from lorafx.errors import UnsupportedModelError

TOKENS = 8  # of the one call that is compiled


def run(
    model_name: str,
    adapters: Mapping[str, str],
    *,
    svg: Path | None,
    html: Path | None,
    as_json: bool,
    compiled: bool,
    skeleton: bool,
) -> int:
    """Print the report, and write it where that is asked for. LorafxError: the model or an adapter won't do"""
    model = load_skeleton(model_name) if skeleton else load(model_name)
    lorafx.compile(model, adapters, mode=None if compiled else "eager")
    if compiled:
        _call_once(model, next(iter(adapters)))
    report = lorafx.explain(model)
    if svg is not None:
        report.svg(svg)
    if html is not None:
        html.write_text(
            f"<!doctype html>\n<meta charset='utf-8'>\n<title>lorafx</title>\n{report._repr_html_()}\n",
            encoding="utf-8",
        )
    if as_json:
        print_json(report.to_dict())
    else:
        print("\n".join(printable(line, limit=None) for line in str(report).splitlines()))
    for path in filter(None, (svg, html)):
        console(stderr=True).print(f"wrote {path}", style="dim", markup=False, highlight=False)
    return 0


def _call_once(model: torch.nn.Module, name: str) -> None:
    """Compiles; what comes out is of no interest, so weights that were never read do as well."""
    if getattr(model, "main_input_name", None) != "input_ids":
        raise UnsupportedModelError(
            f"{type(model).__name__} takes other input than token ids, which --compiled would need: use --eager"
        )
    ids = torch.ones(1, TOKENS, dtype=torch.long, device=next(model.parameters()).device)
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids
    with torch.inference_mode():
        model(**inputs, adapter_names=[name])
