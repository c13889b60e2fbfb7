"""Where aLoRA adapters begin, held to PEFT's own search."""

from __future__ import annotations

import numpy
import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.variants import calculate_alora_offsets

import lorafx
from lorafx.config_fields import FIELDS
from lorafx.invocations import Prompt, read_offsets, row_by_row
from lorafx.routing import EVERYWHERE


@pytest.mark.parametrize("tokens", [[1], [1, 2], [1, 1], [2, 1, 2], [0, 1, 0, 1], [1] * 9])
def test_the_last_place_is_pefts(tokens):
    ids = torch.randint(0, 3, (200, 8), generator=torch.Generator().manual_seed(len(tokens)))
    config = LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=tokens)
    want = calculate_alora_offsets({"a": config}, "a", ids)
    assert len(tokens) > 8 or None in want or len(tokens) == 1
    prompt = Prompt.of_call((ids,), {})
    assert [prompt.last(row, 200, tuple(tokens)) for row in range(200)] == [offset or 0 for offset in want]


def test_rows_of_beams_and_of_other_adapters():
    prompt = Prompt.of_call((), {"input_ids": torch.tensor([[5, 6, 7], [7, 5, 6]])})
    late, plain, base = (("late", 0.5),), (("plain", 1.0),), ()
    chosen, last = row_by_row((late, plain), 4, {"late": (5, 6)}, prompt)
    assert (chosen, last) == ((late, late, plain, plain), (3, 3, EVERYWHERE, EVERYWHERE))
    chosen, last = row_by_row((base, late), 2, {"late": (5, 6)}, prompt)
    assert (chosen, last) == ((base, late), (EVERYWHERE, 2))
    assert row_by_row((late,), 2, {"late": (9,)}, prompt)[1] == (0, 0)
    assert row_by_row((late,), 4, {"late": (9,)}, Prompt(offsets=[None, 2]))[1] == (0, 0, 2, 2)
    assert row_by_row((late,), 2, {"late": (9,)}, Prompt(offsets=()))[1] == (0, 0)


ARRAYS = [numpy.array([0.5, 1.0]), torch.tensor([0.5, 1.0]), torch.tensor([[1], [2]]), torch.tensor(2)]


@pytest.mark.parametrize("wrong", [[1, "2"], [True, 1], 7, "12", {1: 2}, [0.5, 1], *ARRAYS])
def test_offsets_that_are_none(wrong):
    with pytest.raises(lorafx.AdapterMismatchError, match="for a batch of 2 rows"):
        read_offsets(wrong, 2)
    with pytest.raises(lorafx.AdapterMismatchError, match="alora_offsets"):
        Prompt(offsets=wrong)


@pytest.mark.parametrize("wrong", [[], [1], [1, None, 3]])
def test_offsets_for_another_number_of_rows(wrong):
    assert read_offsets(wrong) == wrong
    with pytest.raises(lorafx.AdapterMismatchError, match="for a batch of 2 rows"):
        read_offsets(wrong, 2)


@pytest.mark.parametrize("right", [(3, 4), numpy.array([3, 4]), torch.tensor([3, 4]), [*numpy.array([3, 4])]])
def test_offsets_of_other_types(right):
    assert read_offsets(right, 2) == [3, 4]
    assert all(type(one) is int for one in read_offsets(right))
    assert read_offsets([None, right[1]], 2) == [None, 4]


def test_tokens_of_a_config():
    is_right, _ = FIELDS["alora_invocation_tokens"]
    assert all(map(is_right, (None, [], [0], [5, 6], [(1 << 31) - 1])))
    for wrong in ("56", 5, [-1], [1 << 31], [1.0], [True], ["5"], [None], [[5]], {"5": 6}, [0] * 4097):
        assert not is_right(wrong)
