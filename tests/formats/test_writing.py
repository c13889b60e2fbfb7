"""What is written is there whole or not at all, and nothing that was there goes without being asked."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import gguf
import pytest
import torch

import lorafx
from lorafx.formats import detect, peft_folder, to_gguf, to_peft
from tests.integration.models import LLAMA, run, with_peft

from .files import assert_same, deltas
from .files import peft_folder as save_adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(LLAMA.build(), tmp_path_factory.mktemp("made") / "a", target_modules="all-linear")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return save_adapter(LLAMA.build(), tmp_path_factory.mktemp("made") / "b", seed=1, target_modules=["q_proj"], r=2)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_a_folder_is_not_overwritten_unasked(folder, other, tmp_path):
    model, out = LLAMA.build(), tmp_path / "new" / "out"
    to_peft(folder, out, model)
    assert stat.S_IMODE(out.stat().st_mode) == stat.S_IMODE((tmp_path / "new").stat().st_mode)
    (out / "README.md").write_text("mine")
    (out / "adapter_model.bin").write_bytes(b"of an older adapter")
    before = content(tmp_path)
    with pytest.raises(lorafx.LorafxError, match="overwrite=True"):
        to_peft(other, out, model)
    assert content(tmp_path) == before
    to_peft(other, out, model, overwrite=True)
    assert {path.name for path in out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert_same(deltas(model, str(out)), deltas(model, other))
    want = run(with_peft(LLAMA.build(), {"a": other}), LLAMA.inputs(2))
    assert torch.equal(run(with_peft(LLAMA.build(), {"a": str(out)}), LLAMA.inputs(2)), want)  # PEFT reads it


def test_a_folder_with_other_things_in_it_is_written_into(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    to_peft(folder, tmp_path)
    assert detect(tmp_path) == "peft"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_is_not_overwritten_unasked(folder, other, tmp_path):
    model, out = LLAMA.build(), tmp_path / "a.gguf"
    to_gguf(folder, out, model)
    before = content(tmp_path)
    with pytest.raises(lorafx.LorafxError, match="overwrite=True"):
        to_gguf(other, out, model)
    assert content(tmp_path) == before
    to_gguf(other, out, model, overwrite=True)
    assert_same(deltas(model, out), deltas(model, other))
    to_gguf(out, out, model, overwrite=True)  # from itself
    assert_same(deltas(model, out), deltas(model, other))
    assert os.listdir(tmp_path) == ["a.gguf"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_nothing_half_done_remains(folder, other, tmp_path, monkeypatch, error, there):
    model = LLAMA.build()
    if there:
        to_gguf(other, tmp_path / "a.gguf", model)
        to_peft(other, tmp_path / "a", model)
    before = content(tmp_path)

    def fail(*_, **__):
        raise error

    wanted = lorafx.LorafxError if isinstance(error, OSError) else KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
        with pytest.raises(wanted):
            to_gguf(folder, tmp_path / "a.gguf", model, overwrite=there)
    with monkeypatch.context() as patch:
        patch.setattr(peft_folder, "save_file", fail)
        with pytest.raises(wanted):
            to_peft(folder, tmp_path / "a", model, overwrite=there)
    assert content(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == ({"a", "a.gguf"} if there else set())


def test_places_that_can_t_be_written(folder, tmp_path):
    model = LLAMA.build()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "in it", Path("/proc/none"), tmp_path / ("a" * 300)):
        with pytest.raises(lorafx.LorafxError):
            to_peft(folder, out, model)
        with pytest.raises(lorafx.LorafxError):
            to_gguf(folder, out, model)
    for use in (to_peft, to_gguf):
        with pytest.raises(lorafx.LorafxError):
            use(folder, tmp_path / "file", model)
    (tmp_path / "folder").mkdir()
    with pytest.raises(lorafx.LorafxError):
        to_gguf(folder, tmp_path / "folder", model, overwrite=True)
    assert content(tmp_path) == {"file": b"mine"}


def test_arguments_that_are_wrong(folder, tmp_path):
    with pytest.raises(lorafx.LorafxError, match="f32, f16"):
        to_gguf(folder, tmp_path / "a.gguf", LLAMA.build(), dtype="q8_0")
    to_gguf(folder, tmp_path / "a.gguf", LLAMA.build())
    with pytest.raises(lorafx.UnsupportedModelError, match="Pass the model"):
        to_peft(tmp_path / "a.gguf", tmp_path / "out")
    with pytest.raises(lorafx.LorafxError):
        to_gguf(object(), tmp_path / "b.gguf", LLAMA.build())


def test_detect(folder, tmp_path):
    assert detect(folder) == "peft"
    assert detect(Path(folder) / "adapter_model.safetensors") == "peft"
    with pytest.raises(lorafx.AdapterFormatError, match="pass the folder"):
        deltas(LLAMA.build(), Path(folder) / "adapter_model.safetensors")
    for name in ("a.gguf", "b.gguf"):
        to_gguf(folder, tmp_path / name, LLAMA.build())
    with pytest.raises(lorafx.AdapterFormatError, match=r"a\.gguf and b\.gguf"):
        detect(tmp_path)
    (tmp_path / "b.gguf").rename(tmp_path / "b.safetensors")
    assert detect(tmp_path / "b.safetensors") == "gguf"
    (tmp_path / "c").write_text("nothing of the kind")
    (tmp_path / "empty").mkdir()
    for path in ("c", "empty", "missing", "nul\0"):
        with pytest.raises(lorafx.AdapterFormatError):
            detect(tmp_path / path)


def test_gguf_without_the_model_is_refused(tmp_path):
    with pytest.raises(lorafx.LorafxError, match="expected the adapter's base model"):
        to_gguf(tmp_path, tmp_path / "a.gguf", None)
