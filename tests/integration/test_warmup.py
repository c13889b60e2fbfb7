"""After ``lorafx.warmup`` real calls of its shapes compile nothing, and the model is as it was."""

from __future__ import annotations

import pytest
import torch
from transformers.utils import logging as transformers_logging

import lorafx

from .models import EAGER_GRAPH, FAMILIES, LLAMA, compiled_llama, noise, run, save_adapters, tokens, with_peft

BERT, VIT = FAMILIES["bert"], FAMILIES["vit"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_adapters(LLAMA, tmp_path_factory.mktemp("adapters"), 1, a={"target_modules": ["q_proj"]}, b={"r": 7})


def generate(model, rows, length, **settings):
    ids = tokens(rows, length)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **settings)


def graphs(model):
    return len(lorafx.explain(model).graphs)


@pytest.mark.parametrize("peft", [False, True])
def test_generate_compiles_nothing_more(peft, folders):
    rows, lengths = ([2], [5, 9]) if peft else ([1, 3], [5])
    if peft:
        model = lorafx.compile(with_peft(LLAMA.build(1), folders), options=EAGER_GRAPH)
    else:
        model = compiled_llama(folders, 1)
    seconds = lorafx.warmup(model, rows, lengths)
    assert sorted(seconds) == [(row, length) for row in rows for length in lengths]
    assert all(value > 0 for value in seconds.values())
    before = graphs(model)
    assert before >= 2
    for batch, length in seconds:
        generate(model, batch, length, adapter_names=["b", "__base__", "a"][:batch])
        generate(model, batch, length, do_sample=True)
    assert graphs(model) == before
    generate(model, 3, 5, num_beams=2, cache_implementation="static", disable_compile=True)
    assert graphs(model) > before, "the count would show a shape that was not warm"


def test_static_caches(folders):
    model = compiled_llama(folders, 1)
    static = {"cache_implementation": "static", "disable_compile": True, "max_new_tokens": 20}
    lorafx.warmup(model, 2, [4, 8], **static)
    before = graphs(model)
    for length in (4, 8):
        generate(model, 2, length, **static)
    assert graphs(model) == before


def test_models_that_do_not_generate(tmp_path):
    model = lorafx.compile(
        BERT.build(1), save_adapters(BERT, tmp_path, 1, a={"target_modules": ["query"]}), options=EAGER_GRAPH
    )
    lorafx.warmup(model, (2,), range(4, 7))
    before = graphs(model)
    for length in range(4, 7):
        ids = tokens(2, length)
        run(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ["a", None])
    assert graphs(model) == before > 0
    with pytest.raises(lorafx.LorafxError, match="num_beams, which are for generate; BertModel does not"):
        lorafx.warmup(model, 1, 4, num_beams=2)
    with pytest.raises(lorafx.LorafxError, match="length 65; BertModel has 64 positions"):
        lorafx.warmup(model, 1, [3, 65])


def test_inputs_of_ones_own(tmp_path):
    adapters = save_adapters(VIT, tmp_path, 1, a={"target_modules": ["q_proj"]})
    model = lorafx.compile(VIT.build(1), adapters, options=EAGER_GRAPH)
    with pytest.raises(lorafx.LorafxError, match="main input is pixel_values, not input_ids"):
        lorafx.warmup(model, 1, 1)
    lorafx.warmup(model, [1, 2], 1, inputs=lambda rows, _: {"pixel_values": noise(rows, 3, 16, 16)})
    before = graphs(model)
    for rows in (1, 2):
        run(model, {"pixel_values": noise(rows, 3, 16, 16)})
    assert graphs(model) == before > 0


def test_leaves_the_model_as_it_was(folders):
    model = compiled_llama(folders, 1, mode="eager", options=None)
    model.lora.use(["a", None])  # which fits no batch of three
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    attributes, settings = set(vars(model)), model.generation_config.to_dict()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    lorafx.warmup(model, 3, 4, do_sample=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert model.lora.in_use == ((("a", 1.0),), ())
    assert set(vars(model)) == attributes
    assert model.generation_config.to_dict() == settings
    assert torch.is_grad_enabled()
    assert graphs(model) == 0

    with pytest.raises(ZeroDivisionError):
        lorafx.warmup(model, 3, 4, inputs=lambda rows, length: 1 // 0)
    assert [module.training for module in model.modules()] == modes
    assert model.lora.in_use == ((("a", 1.0),), ())


def test_progress_bar(folders, capsys):
    model = compiled_llama(folders, 1, mode="eager", options=None)
    shown = transformers_logging.is_progress_bar_enabled()
    try:
        transformers_logging.disable_progress_bar()
        lorafx.warmup(model, 1, 2)
        assert "lorafx.warmup" not in capsys.readouterr().err
        transformers_logging.enable_progress_bar()
        lorafx.warmup(model, 1, 2)
        assert "lorafx.warmup" in capsys.readouterr().err
    finally:
        (transformers_logging.enable_progress_bar if shown else transformers_logging.disable_progress_bar)()


@pytest.mark.parametrize("wrong", [0, -1, [], [2, 0], True, 2.0, "4", None, [[1]]])
def test_wrong_sizes(wrong, folders):
    model = compiled_llama(folders, 1, mode="eager", options=None)
    for name, arguments in {"batch_sizes": (wrong, 3), "lengths": (3, wrong)}.items():
        with pytest.raises(lorafx.LorafxError, match=f"for {name}; expected a whole number"):
            lorafx.warmup(model, *arguments)


def test_a_model_of_somebody_else():
    with pytest.raises(lorafx.LorafxError, match=r"lorafx\.compile first"):
        lorafx.warmup(LLAMA.build(1), 1, 4)
