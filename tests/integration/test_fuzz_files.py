"""Thousands of damaged adapter folders: each is loaded as plain PEFT loads it, or refused by name; nothing else."""

from __future__ import annotations

import copy
import gc
import hashlib
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor

import lorafx

from .models import LLAMA, assert_close, compiled_llama, run, save_adapters, with_peft
from .mutations import MUTATIONS, mutate

EXAMPLES = 2000  # different folders
DRAWN = 2600  # some are drawn twice
SECONDS = 10  # for one
INPUTS = LLAMA.inputs(2)
ROWS = ["kept", "__base__"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folders = save_adapters(
        LLAMA,
        tmp_path_factory.mktemp("sources"),
        kept={"target_modules": ["q_proj", "up_proj"]},
        qkv={"target_modules": list(LLAMA.qkv)},
        bias={"target_modules": ["q_proj", "o_proj"], "lora_bias": True, "r": 3},
        ranks={"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 5}, "r": 2},
        pattern={"target_modules": r".*\.(q|v)_proj", "exclude_modules": r".*layers\.1.*", "use_rslora": True},
    )
    return {name: Path(folder) for name, folder in folders.items()}


class Oracle:
    """One compiled model that loads every folder, and plain PEFT on an equal base."""

    def __init__(self, sources, on_peft=False):
        kept = {"kept": sources["kept"]}
        if on_peft:
            self.model = lorafx.compile(with_peft(LLAMA.build(), kept), mode="eager")
        else:
            self.model = compiled_llama(kept, mode="eager")
        self.base = LLAMA.build()
        self.before = run(self.model, INPUTS, ROWS)
        self.seen: Counter = Counter()
        self.folders: set[bytes] = set()

    def try_folder(self, folder: Path) -> None:
        started = time.perf_counter()
        self.folders.add(fingerprint(folder))
        lora = self.model.lora
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                lora.load("fuzz", folder)
        except lorafx.LorafxError as error:
            self.seen[type(error).__name__] += 1
            note(str(error))
        else:
            self.seen["loaded"] += 1
            try:
                self.compare(folder)
            finally:
                lora.unload("fuzz")
        assert lora.names == ["kept"]
        assert torch.equal(run(self.model, INPUTS, ROWS), self.before)
        assert time.perf_counter() - started < SECONDS

    def compare(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reference = PeftModel.from_pretrained(copy.deepcopy(self.base), str(folder)).eval()
        held = self.model.lora.weights_of("fuzz").sites
        layers = {p: m for p, m in reference.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        assert held.keys() == layers.keys()
        for path, site in held.items():
            layer = layers[path]
            assert torch.equal(site.a, layer.lora_A["default"].weight)
            assert torch.equal(site.b, layer.lora_B["default"].weight)
            assert (site.bias is None) == (layer.lora_B["default"].bias is None)
            assert site.bias is None or torch.equal(site.bias, layer.lora_B["default"].bias)
            assert site.scale == pytest.approx(layer.scaling["default"], rel=1e-6)
        want, got = run(reference, INPUTS), run(self.model, INPUTS, "fuzz")
        # weights of 1e30 leave the range of float32 in any code, or make all that follows 0
        if torch.isfinite(want).all() and not torch.equal(got, want):
            assert_close(got, want)


def fingerprint(folder: Path) -> bytes:
    found = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        found.update(path.name.encode() + bytes([path.is_symlink(), path.is_file()]))
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            found.update(path.read_bytes())
    return found.digest()


def tensor_bytes() -> int:
    """Of all tensors in memory that Python knows of, each storage once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if isinstance(item, Tensor) and item.device.type == "cpu" and item.layout == torch.strided:
            storage = item.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def fuzz(sources, folder, examples, **arguments):
    oracle = Oracle(sources, **arguments)

    @settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(source=st.sampled_from(list(sources.values())), changes=MUTATIONS)
    def one(source, changes):
        mutate(source, folder, changes)
        oracle.try_folder(folder)

    try:
        one()
    finally:
        print(dict(oracle.seen), len(oracle.folders), "different folders")
    return oracle


@pytest.mark.timeout(600)
def test_damaged_folders_are_loaded_right_or_refused(sources, tmp_path):
    fuzz(sources, tmp_path / "warm", 30)
    before = tensor_bytes()
    oracle = fuzz(sources, tmp_path / "adapter", DRAWN)
    reader = oracle.model.lora._read
    assert len(reader._plans) <= 64
    assert len(oracle.folders) >= EXAMPLES
    assert oracle.seen["loaded"] >= EXAMPLES // 10
    assert oracle.seen["AdapterFormatError"] >= EXAMPLES // 10
    assert oracle.seen["AdapterMismatchError"] >= EXAMPLES // 20
    assert reader._planning.acquire(blocking=False)
    del oracle, reader
    assert tensor_bytes() <= before


@pytest.mark.timeout(600)
def test_damaged_folders_given_to_a_peft_model(sources, tmp_path):
    oracle = fuzz(sources, tmp_path / "adapter", 200, on_peft=True)
    assert oracle.seen["loaded"] >= 20
    assert set(oracle.model.peft_config) == {"kept"}
