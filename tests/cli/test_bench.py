import json

import pytest
import torch

import lorafx
from lorafx.cli.benching import Stopwatch, _compare
from tests.cli.conftest import save_adapter


def logits(difference: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base, delta, noise = (torch.randn(2, 64, generator=generator, dtype=torch.float64) for _ in range(3))
    noise *= difference * delta.norm() / noise.norm()
    return {"base": base, "peft": base + delta, "lorafx": base + delta + noise}


def test_deltas_are_compared_not_logits():
    assert _compare(logits(1e-3), torch.float32) == pytest.approx(1e-3)
    with pytest.raises(lorafx.LorafxError, match=r"2\.0e-02 apart.*Nothing was timed"):
        _compare(logits(2e-2), torch.float32)
    assert _compare(logits(2e-2), torch.bfloat16) == pytest.approx(2e-2)
    with pytest.raises(lorafx.LorafxError, match="nan apart"):
        _compare(logits(float("nan")), torch.float32)


def test_an_adapter_that_is_lost_is_noticed():
    found = logits(0.0)
    with pytest.raises(lorafx.LorafxError, match="disagree"):
        _compare(found | {"lorafx": found["base"]}, torch.float32)


def test_untrained_adapters_agree_where_nothing_changes():
    found = logits(0.0)
    assert _compare(dict.fromkeys(found, found["base"]), torch.float32) == 0


def test_a_step_is_the_median_between_two_tokens():
    assert Stopwatch(torch.device("cpu"), [0.0, 1.0, 3.0, 13.0]).step() == 2.0


@pytest.mark.slow
def test_the_whole_of_it(lorafx_command, model, sql, tmp_path):
    other = save_adapter(tmp_path / "json", target_modules="all-linear", r=6)
    arguments = ("-a", f"sql={sql}", "-a", f"json={other}", "--batch", "2", "--tokens", "6", "--rounds", "2", "--json")
    code, out, _ = lorafx_command("bench", model, *arguments)
    assert code == 0
    found = json.loads(out)
    assert [row["what"] for row in found["results"]] == ["base model, compiled", "PEFT, eager", "lorafx, compiled"]
    assert all(row["tokens/s"] > 0 for row in found["results"])
    assert found["delta_difference"] < 1e-4
    assert {"machine", "torch", "threads", "dtype"} <= found.keys()
