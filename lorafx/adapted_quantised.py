"""PEFT's LoRA layers on quantised layers: the same as on a linear one, as only what the base layer returns is used.

PEFT defines these classes where bitsandbytes, torchao or GPT-QModel is installed. Nothing of that is imported here: a
class of ours is made when the first layer of PEFT's is met.

PEFT rounds the delta to the base output's dtype before it adds it; lorafx adds in float32 and rounds once, which is
never farther from what the numbers say.
"""

from __future__ import annotations

import importlib
from typing import Any

KINDS = {  # ours, and whose it is
    "AdaptedLinear4bit": ("peft.tuners.lora.bnb", "Linear4bit"),
    "AdaptedLinear8bitLt": ("peft.tuners.lora.bnb", "Linear8bitLt"),
    "AdaptedTorchaoLoraLinear": ("peft.tuners.lora.torchao", "TorchaoLoraLinear"),
    "AdaptedGPTQLoraLinear": ("peft.tuners.lora.gptq", "GPTQLoraLinear"),
    "AdaptedAwqLoraLinear": ("peft.tuners.lora.awq", "AwqLoraLinear"),
}
NAMES = {theirs: ours for ours, theirs in KINDS.items()}


def learn(theirs: type) -> None:
    """Enter ``theirs`` into ``adapted.ADAPTED``, if it is one of these classes."""
    name = NAMES.get((theirs.__module__, theirs.__qualname__))
    if name is not None:
        _class_for(name, theirs)


def _class_for(name: str, theirs: type) -> type:
    from lorafx import adapted

    if theirs not in adapted.ADAPTED:
        ours = type(name, (adapted.Adapted, theirs), {"__module__": __name__, "__doc__": theirs.__doc__})
        adapted.ADAPTED[theirs], adapted.PLAIN[ours] = ours, theirs
    return adapted.ADAPTED[theirs]


def __getattr__(name: str) -> Any:
    """Where a pickled model looks for its layers' classes."""
    if name not in KINDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, theirs = KINDS[name]
    return _class_for(name, getattr(importlib.import_module(module), theirs))
