import json

import pytest

pytest.importorskip("lorafx.formats")
pytest.importorskip("gguf")


def test_to_gguf_and_back(lorafx_command, model, sql, tmp_path):
    out, back = tmp_path / "sql.gguf", tmp_path / "back"
    assert lorafx_command("convert", sql, out, "--to", "gguf", "--model", model, "--dtype", "f32")[0] == 0
    code, _, err = lorafx_command("convert", sql, out, "--to", "gguf", "--model", model)
    assert code == 2
    assert "--overwrite replaces it" in err
    assert lorafx_command("convert", out, back, "--to", "peft", "--model", model)[0] == 0
    before, after = (json.loads(lorafx_command("inspect", folder, "--json")[1]) for folder in (sql, back))
    assert [(layer["path"], layer["rank"], layer["scale"]) for layer in before["layers"]] == [
        (layer["path"], layer["rank"], layer["scale"]) for layer in after["layers"]
    ]


def test_what_needs_the_base_model_says_so(lorafx_command, model, sql, tmp_path):
    out, back = tmp_path / "sql.gguf", tmp_path / "back"
    code, _, err = lorafx_command("convert", sql, out, "--to", "gguf")
    assert (code, err) == (2, "error: --to gguf needs --model: the file is laid out by the base model's config\n")
    assert not out.exists()
    assert lorafx_command("convert", sql, out, "--to", "gguf", "--model", model)[0] == 0
    code, _, err = lorafx_command("convert", out, back, "--to", "peft")
    assert code == 1
    assert "--model" in err
    assert not back.exists()
    code, _, err = lorafx_command("inspect", out)
    assert code == 1
    assert "is a gguf file; inspect reads PEFT folders" in err
