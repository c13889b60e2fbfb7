"""A few of the types that ``python -m tests.sweep`` goes through, and its page."""

from __future__ import annotations

import json
import re

import pytest
import torch
from transformers import LlamaConfig, Wav2Vec2Config

from tests import sweep_case, sweep_page, tiny_models
from tests.integration.families import FAMILIES

TYPES = ("granite", "mamba2", "segformer", "detr")


@pytest.mark.parametrize("name", TYPES)
def test_a_type_in_few_seconds(name):
    assert name not in FAMILIES
    torch._dynamo.reset()
    entry = sweep_case.run_case(name)
    assert entry["stage"] == "compared", entry
    assert sweep_page.notes(entry) == []
    for way in sweep_case.WAYS:
        assert entry[way]["branches"] == entry[way]["called"] > 0
        assert {type(result) for result in entry[way]["calls"].values()} == {float}


def test_what_cannot_be_built_is_said():
    entry = sweep_case.run_case("timm_wrapper")
    assert entry["stage"] == "not built"
    assert "timm" in entry["reason"]


def test_configs_are_cut_in_proportion():
    small = tiny_models.shrunk(LlamaConfig(num_key_value_heads=8).to_dict())
    widths = {"hidden_size": 64, "intermediate_size": 176, "num_attention_heads": 4, "num_key_value_heads": 1}
    assert {key: small[key] for key in widths} == widths
    assert small["head_dim"] == small["hidden_size"] // small["num_attention_heads"]
    sound = tiny_models.shrunk(Wav2Vec2Config().to_dict())
    assert len(sound["conv_dim"]) == len(sound["conv_stride"]) == len(sound["conv_kernel"])


def test_a_wrong_result_is_seen():
    """The comparison is of what adapters change, not of the whole."""
    base = {"logits": torch.randn(3, 5) * 100}
    truth = {"base": base, "a": {"logits": base["logits"] + 0.1}, "rows": {}, "mixed": None}
    assert sweep_case.compared(truth["a"], "a", truth) == 0.0
    assert "off by" in sweep_case.compared(base, "a", truth)
    assert "got nothing" in sweep_case.compared({}, "a", truth)


def test_the_page_is_what_the_file_says():
    page = (sweep_page.DOCS / "sweep.md").read_text(encoding="utf-8")
    versions = re.search(r"found on\s([^:]*):", page)[1]
    found = json.loads((sweep_page.DOCS / "sweep.json").read_text(encoding="utf-8"))
    assert page == sweep_page.written(found, versions)
