import json
import resource
import shutil

import pytest

from lorafx.cli.models import checkout, load_skeleton
from tests.cli.conftest import save_adapter


def test_the_report_of_two_adapters_without_weights(lorafx_command, model, sql, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(model / "config.json", bare)
    other = save_adapter(tmp_path / "json", target_modules="all-linear")
    code, out, _ = lorafx_command("explain", bare, "-a", f"sql={sql}", "-a", f"json={other}", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["source"] == "modules"
    assert sum(len(group["branches"]) for group in report["groups"]) == 14
    code, out, _ = lorafx_command("explain", bare, "-a", f"sql={sql}")
    assert code == 0
    assert "2 group(s) of 4 LoRA branch(es), 0 skipped" in out
    assert "sql   4     q_proj, v_proj" in out


def test_html_to_a_file(lorafx_command, model, sql, tmp_path):
    code, _, _ = lorafx_command("explain", model, "-a", sql, "--html", tmp_path / "r.html")
    assert code == 0
    assert "q_proj, v_proj" in (tmp_path / "r.html").read_text(encoding="utf-8")
    code, _, err = lorafx_command("explain", model, "-a", sql, "--html", tmp_path / "no" / "r.html")
    assert code == 1
    assert "No such file" in err


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_svg_to_a_file(lorafx_command, model, sql, tmp_path):
    code, _, _ = lorafx_command("explain", model, "-a", sql, "--svg", tmp_path / "r.svg")
    assert code == 0
    assert "<svg" in (tmp_path / "r.svg").read_text()


@pytest.mark.parametrize("name", ["./no-such", "/no/such", "~nobody/x"])
def test_no_such_model(lorafx_command, sql, name):
    code, _, err = lorafx_command("explain", name, "-a", sql)
    assert code == 1
    assert f"no model at {name!r}" in err


def test_a_folder_that_holds_no_model(lorafx_command, sql):
    code, _, err = lorafx_command("explain", sql, "-a", sql)
    assert code == 1
    assert "can't be loaded" in err
    assert err.count("\n") == 1


def test_an_adapter_of_another_model(lorafx_command, model, tmp_path, sql):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    code, _, err = lorafx_command("explain", tmp_path, "-a", f"sql={sql}")
    assert code == 1
    assert "adapter 'sql' does not fit LlamaForCausalLM" in err


def test_a_skeleton_takes_no_memory(model, tmp_path):
    """3 GiB of weights, of which nothing is ever touched."""
    config = json.loads((model / "config.json").read_text())
    large = {"hidden_size": 4096, "intermediate_size": 16384, "num_attention_heads": 32, "num_key_value_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(config | large | {"num_hidden_layers": 4}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton = load_skeleton(str(tmp_path))
    assert sum(parameter.nbytes for parameter in skeleton.parameters()) > 3 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"cpu"}
    assert load_skeleton(str(tmp_path), "meta").device.type == "meta"


def test_tied_weights_stay_tied(model, tmp_path):
    config = json.loads((model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    skeleton = load_skeleton(str(tmp_path))
    assert skeleton.lm_head.weight is skeleton.model.embed_tokens.weight


def test_the_demo_runs_from_this_checkout():
    assert (checkout() / "demo" / "model.py").is_file()
