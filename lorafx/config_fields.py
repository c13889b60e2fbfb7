"""The fields of an adapter's config: what each may be, and which of them lorafx can't run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

RANK_LIMIT = 1 << 24
NAMES_LIMIT = 4096  # of a list: PEFT compares each with each
TOKEN_LIMIT = 1 << 31
ROWS_LIMIT = 1 << 20  # of an embedding, that an adapter may have as its own

# Fields of LoraConfig that change what a layer computes or which weights it has, with what they are when unused.
UNSUPPORTED = {
    "arrow_config": "Arrow",
    "use_bdlora": "BD-LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
    "use_qalora": "QALoRA",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron",
    "ensure_weight_tying": "ensure_weight_tying",
    "_custom_modules": "custom modules",
}
# Initialisations that rewrite the base weight: the file alone does not say what the base has become.
REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
OTHER_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # what they drew is in the file


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and 1 <= value <= RANK_LIMIT


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(float(value))
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _is_names(value: Any) -> bool:
    if value is None or isinstance(value, str):
        return True
    is_list = isinstance(value, (list, tuple, set, frozenset)) and len(value) <= NAMES_LIMIT
    return is_list and all(isinstance(item, str) for item in value)


def _is_list(value: Any) -> bool:
    return _is_names(value) and not isinstance(value, str)


def _is_indices(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= NAMES_LIMIT and all(map(_is_whole, value))
    return value is None or _is_whole(value)


def _is_pattern_of(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def is_pattern(value: Any) -> bool:
        if not isinstance(value, dict) or len(value) > NAMES_LIMIT:
            return False
        return all(isinstance(key, str) and check(item) for key, item in value.items())

    return is_pattern


def _is_tokens(value: Any) -> bool:
    if value is None:
        return True
    is_list = isinstance(value, (list, tuple)) and len(value) <= NAMES_LIMIT
    return is_list and all(_is_whole(item) and 0 <= item < TOKEN_LIMIT for item in value)


def _is_rows(value: Any) -> bool:
    """Tokens of the input embedding, or of each module that is named; a vocabulary may have grown by thousands."""
    if isinstance(value, dict):
        return len(value) <= NAMES_LIMIT and all(isinstance(k, str) and _is_list_of_rows(v) for k, v in value.items())
    return value is None or _is_list_of_rows(value)


def _is_list_of_rows(value: Any) -> bool:
    is_list = isinstance(value, (list, tuple)) and 0 < len(value) <= ROWS_LIMIT
    return is_list and all(_is_whole(item) and 0 <= item < TOKEN_LIMIT for item in value)


def _is_switch(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return value is None or isinstance(value, str)


NAMES = f"a text, or a list of at most {NAMES_LIMIT:,} texts"
# What a field may be, and how that is said. PEFT looks at no other field of an adapter that lorafx runs.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, "a whole number of at least 1"),
    "lora_alpha": (_is_number, "a finite number"),
    "lora_dropout": (lambda value: _is_number(value) and 0 <= value <= 1, "a number from 0 to 1"),
    "rank_pattern": (_is_pattern_of(_is_rank), "an object of whole numbers of at least 1, by layer"),
    "alpha_pattern": (_is_pattern_of(_is_number), "an object of finite numbers, by layer"),
    "target_modules": (_is_names, NAMES),
    "exclude_modules": (_is_names, NAMES),
    "target_parameters": (_is_list, f"a list of at most {NAMES_LIMIT:,} texts"),
    "layers_pattern": (_is_names, NAMES),
    "layers_to_transform": (_is_indices, f"a whole number, or a list of at most {NAMES_LIMIT:,}"),
    "use_rslora": (_is_switch, "true or false"),
    "use_dora": (_is_switch, "true or false"),
    "lora_bias": (_is_switch, "true or false"),
    "fan_in_fan_out": (_is_switch, "true or false"),
    "init_lora_weights": (lambda value: value is None or isinstance(value, (bool, str)), "true, false or a text"),
    "bias": (_is_text, "a text"),
    "alora_invocation_tokens": (_is_tokens, f"a list of at most {NAMES_LIMIT:,} token ids"),
    "trainable_token_indices": (_is_rows, "a list of token ids, or an object of such lists, by module"),
    "modules_to_save": (_is_list, f"a list of at most {NAMES_LIMIT:,} texts"),
    "task_type": (_is_text, "a text"),
    "base_model_name_or_path": (_is_text, "a text"),
    "revision": (_is_text, "a text"),
}


def show(value: Any) -> str:
    """A value in a message: a config may have megabytes in one field, or a number too long to print."""
    if _is_whole(value) and value.bit_length() > 128:
        return f"a whole number of {value.bit_length():,} bits"
    try:
        text = repr(value)
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:100]}..."
