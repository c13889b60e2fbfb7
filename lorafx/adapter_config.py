"""The config of an adapter: read as plain JSON, every field that matters checked, then given to PEFT's LoraConfig.

PEFT's own reader is not used for files: it asks a hub for what is not there, and takes what Python's json takes (NaN,
the last of two equal keys). Fields that PEFT of this version does not know are left out, as PEFT leaves them out.
"""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig

from lorafx.config_fields import FIELDS, OTHER_INITIALISATIONS, REWRITES_BASE, UNSUPPORTED, show
from lorafx.errors import AdapterFormatError
from lorafx.file_paths import find_regular, read_bytes
from lorafx.name_patterns import STEPS_LIMIT, count_steps

CONFIG_NAME = "adapter_config.json"
SIZE_LIMIT = 1 << 20
DIGITS_LIMIT = 18


def read_config(name: str, folder: Path) -> LoraConfig:
    """The config in a PEFT folder. AdapterFormatError: there is none, or none that lorafx can run."""
    return check_config(name, read_fields(name, folder))


def read_fields(name: str, folder: Path) -> dict[str, Any]:
    """What stands in the config of a PEFT folder, not looked at yet. AdapterFormatError: there is none to be read."""
    path = folder / CONFIG_NAME
    if not os.path.isdir(folder) or find_regular(name, path) is None:
        what = f"there is no {CONFIG_NAME} in it" if os.path.exists(folder) else "no such folder"
        raise AdapterFormatError(
            f"adapter {name!r}: {str(folder)!r} is not an adapter: {what}. Expected a folder that PEFT's"
            f" save_pretrained wrote: {CONFIG_NAME} and adapter_model.safetensors."
        )
    content = read_bytes(name, path, SIZE_LIMIT)
    try:
        values = parse_object(content.decode("utf-8"))
        if "peft_type" not in values:
            raise ValueError("it has no 'peft_type'; expected 'LORA'")
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(
            f"adapter {name!r}: {path} can't be read: {error}. Expected the JSON that PEFT's save_pretrained writes."
        ) from error
    return values


def parse_object(text: str) -> dict[str, Any]:
    """The JSON object in ``text``. ValueError, RecursionError: there is none, or one that says a thing twice"""
    values = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_whole)
    if not isinstance(values, dict):
        raise ValueError(f"got a {type(values).__name__}, expected an object")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise ValueError(f"{show(twice[0])} stands there more than once")
    return dict(pairs)


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _whole(text: str) -> int:
    if len(text) > DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def check_config(name: str, values: Mapping[str, Any]) -> LoraConfig:
    """The LoraConfig of a config's fields. AdapterFormatError: a field is not of its kind, or asks for other than LoRA.

    values: as in adapter_config.json, or ``vars`` of a LoraConfig
    """
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise AdapterFormatError(f"adapter {name!r} is of type {show(kind)}; lorafx runs LORA adapters.")
    for field, (is_right, expected) in FIELDS.items():
        if field in values and not is_right(values[field]):
            raise AdapterFormatError(
                f"adapter {name!r}: its config has {field}={show(values[field])}; expected {expected}."
            )
    _check_supported(name, values)
    # fields that only PEFT of another version knows are left out, as PEFT leaves them out
    known = {key: value for key, value in values.items() if key in LoraConfig.__dataclass_fields__}
    known.pop("runtime_config", None)
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        if isinstance(known.get(field), (tuple, set, frozenset)):
            known[field] = sorted(known[field])
    _check_patterns(name, known)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = LoraConfig(**known)
    except Exception as error:  # what was not checked here is handed to the classes of PEFT's other fields
        raise AdapterFormatError(f"adapter {name!r}: its config is not a LoraConfig: {str(error)[:500]}") from error
    _check_supported(name, vars(config))
    return config


def unsupported(values: Mapping[str, Any]) -> dict[str, str]:
    """What a config asks for that lorafx does not run from a file, in words, by the field that asks for it."""
    reasons = {field: label for field, label in UNSUPPORTED.items() if values.get(field)}
    bias, init = values.get("bias", "none"), values.get("init_lora_weights", True)
    if bias != "none":
        reasons["bias"] = f"bias={show(bias)}, which replaces biases of the base model"
    if isinstance(init, str) and init.startswith(REWRITES_BASE):
        reasons["init_lora_weights"] = f"init_lora_weights={show(init)}, which rewrites the base weights"
    elif isinstance(init, str) and init not in OTHER_INITIALISATIONS:
        reasons["init_lora_weights"] = f"init_lora_weights={show(init)}"
    return reasons


def _check_supported(name: str, values: Mapping[str, Any]) -> None:
    reasons = unsupported(values)
    if reasons:
        raise AdapterFormatError(
            f"adapter {name!r} uses {', '.join(reasons.values())}: lorafx can't run that from a file yet. Load it with"
            " PEFT and pass the PeftModel: such layers then stay exactly as PEFT computes them."
        )


def _check_patterns(name: str, known: Mapping[str, Any]) -> None:
    """Every regular expression that PEFT will run, as PEFT puts it together."""
    layers = known.get("layers_pattern") or ()
    for field, template, patterns in (
        ("target_modules", "{}", [known["target_modules"]] if isinstance(known.get("target_modules"), str) else ()),
        ("exclude_modules", "{}", [known["exclude_modules"]] if isinstance(known.get("exclude_modules"), str) else ()),
        ("layers_pattern", r"(?:^|.*?\.){}\.(?P<idx>\d+)\.", [layers] if isinstance(layers, str) else layers),
        ("modules_to_save", r"(^|.*\.){}($|\..*)", known.get("modules_to_save") or ()),
        ("rank_pattern", r"(.*\.)?({})$", known.get("rank_pattern", ())),
        ("alpha_pattern", r"(.*\.)?({})$", known.get("alpha_pattern", ())),
    ):
        _check_regexes(name, field, template, patterns)


def _check_regexes(name: str, field: str, template: str, patterns: Collection[str]) -> None:
    steps = 0
    for pattern in patterns:
        try:
            steps += count_steps(template.replace("{}", pattern))
            if steps > STEPS_LIMIT:
                raise ValueError(f"together with those before it, it takes over {STEPS_LIMIT:,} steps for each layer")
        except ValueError as error:
            raise AdapterFormatError(
                f"adapter {name!r}: its config has the pattern {show(pattern)} in {field}, which lorafx does not run:"
                f" {error}"
            ) from error
