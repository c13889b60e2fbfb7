"""The models that commands name."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from lorafx.errors import UnsupportedModelError

DEMO = "demo"


def load(name: str) -> nn.Module:
    """The model with its weights, in eval mode. UnsupportedModelError: there is none, or transformers can't read it"""
    _quiet()
    if name == DEMO:
        return _demo().load()[0]
    config = _config(name)
    try:
        return _class_of(config).from_pretrained(name, dtype="auto").eval()
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(name, error) from error


def load_skeleton(name: str, device: str = "cpu") -> nn.Module:
    """The model of this config, without its weights. On a CPU its memory is asked for and never written, so that the
    system gives it none; on "meta" there is none to ask for.

    UnsupportedModelError: no such model
    """
    _quiet()
    config = _config(name)
    try:
        with torch.device("meta"):
            model = _class_of(config)(config).eval()
    except (ValueError, KeyError, TypeError) as error:
        raise _no_model(name, error) from error
    if device != "meta":
        model.to_empty(device=device).tie_weights()
    return model.requires_grad_(False)


def _quiet() -> None:
    """What transformers says to its developers is no concern of who types a command."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()


def _config(name: str) -> transformers.PretrainedConfig:
    if name == DEMO:
        demo = _demo()
        return transformers.AutoConfig.from_pretrained(str(demo.folder()), gguf_file=demo.GGUF)
    if name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise UnsupportedModelError(
            f"no model at {name!r}; expected a folder with a config.json, a name on the hub, or {DEMO!r}"
        )
    try:
        return transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(name, error) from error


def _class_of(config: transformers.PretrainedConfig) -> Any:
    """What the config says it is of, if transformers has that."""
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (transformers.MODEL_FOR_CAUSAL_LM_MAPPING, transformers.MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise UnsupportedModelError(f"transformers has no model for a {type(config).__name__}")


def _no_model(name: str, error: Exception) -> UnsupportedModelError:
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return UnsupportedModelError(f"the model {name!r} can't be loaded: {first[:300]}")


def checkout() -> Path | None:
    """The root of the repository that this lorafx runs from; None where it is installed without one."""
    root = Path(__file__).resolve().parent.parent.parent
    return root if (root / "demo" / "__main__.py").is_file() else None


def _demo() -> Any:
    root = checkout()
    if root is None:
        raise UnsupportedModelError(
            "the demo's model is read by code in lorafx's repository, which is not in the installed package: run this"
            " in a checkout, installed with pip install --editable"
        )
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        import demo.model

        demo.model.folder()
    except (ImportError, FileNotFoundError) as error:
        raise UnsupportedModelError(str(error)) from error
    return demo.model
