import json

import pytest

pytest.importorskip("lorafx.formats")
pytest.importorskip("gguf")


def test_to_gguf_and_back(lorafx_command, model, sql, tmp_path):
    out, back = tmp_path / "sql.gguf", tmp_path / "back"
    assert lorafx_command("convert", sql, out, "--to", "gguf", "--model", model, "--dtype", "f32")[0] == 0
    code, _, err = lorafx_command("convert", sql, out, "--to", "gguf", "--model", model)
    assert code == 1
    assert err.startswith("error: ")
    assert lorafx_command("convert", out, back, "--to", "peft", "--model", model)[0] == 0
    before, after = (json.loads(lorafx_command("inspect", folder, "--json")[1]) for folder in (sql, back))
    assert [(layer["path"], layer["rank"], layer["scale"]) for layer in before["layers"]] == [
        (layer["path"], layer["rank"], layer["scale"]) for layer in after["layers"]
    ]
