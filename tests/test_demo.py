"""The demo's adapters: their files, their prompts, and that they do on unseen prompts what they are for."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from demo.checks import CHECKS, PROMPTS, unseen
from demo.train import ADAPTERS

FILES = {name: ADAPTERS / name / "adapter_model.safetensors" for name in CHECKS}


def test_four_small_adapters_of_different_ranks() -> None:
    assert sum(path.stat().st_size for path in FILES.values()) <= 12_000_000
    configs = [json.loads((ADAPTERS / name / "adapter_config.json").read_text()) for name in CHECKS]
    assert sorted(config["r"] for config in configs) == [4, 8, 16, 32]
    targets = [frozenset(config["target_modules"]) for config in configs]
    assert frozenset({"q_proj", "v_proj"}) in targets
    assert frozenset({"q_proj", "k_proj", "v_proj"}) in targets
    assert max(map(len, targets)) == 7
    for path in FILES.values():
        with safe_open(path, "pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_the_built_in_prompts_were_never_trained_on() -> None:
    assert len(PROMPTS) >= 8
    assert all(unseen(prompt) for prompt in PROMPTS)
    assert not unseen("what is the capital of FRANCE")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("json", '{"answer": "Rome"}', "Rome"),
        ("upper", "ROME.", "Rome."),
        ("french", "La capitale de l'Italie est Rome.", "The capital of Italy is Rome."),
        ("pirate", "Arr, matey! That be Rome.", "That is Rome."),
    ],
)
def test_checks_tell_styles_apart(name: str, good: str, bad: str) -> None:
    assert CHECKS[name](good)
    assert not CHECKS[name](bad)
