"""Adapter folders with something wrong in them, drawn by hypothesis: what ``test_fuzz_files.py`` tries."""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from .models import noise

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@dataclass
class Change:
    """Of a folder; ``what`` is shown when an example fails."""

    what: str
    apply: Callable[[Path], None]

    def __repr__(self) -> str:
        return self.what


# ------------------------------------------------------------------------------------------------ values

NUMBERS = st.sampled_from(
    [0, 1, 2, 3, 4, 5, 8, 16, -1, 0.5, 1e-9, 1e9, 1e308, 10**15, 2**63, 2**200, math.inf, math.nan]
)
TEXTS = st.sampled_from(
    [
        "",
        "q_proj",
        "all-linear",
        ".*",
        ".*q_proj",
        "(",
        "(a+)+b",
        ".*.*.*.*.*x",
        "../..",
        "none",
        "LORA",
        "gaussian",
        "\0",
        *["layers", "default", "model.layers.0.self_attn.q_proj", "lora_A", "é", "true"],
    ]
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    "r lora_alpha lora_dropout use_rslora lora_bias rank_pattern alpha_pattern target_modules exclude_modules bias"
    " layers_to_transform layers_pattern init_lora_weights task_type peft_type use_dora fan_in_fan_out modules_to_save"
    " layer_replication megatron_config inference_mode base_model_name_or_path runtime_config eva_config loftq_config"
    " alora_invocation_tokens trainable_token_indices target_parameters arrow_config corda_config auto_mapping"
    " ensure_weight_tying peft_version something_else".split()
)
FRACTIONS = st.floats(0, 1, exclude_max=True)
DTYPES = st.sampled_from(["F64", "F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "C64", "", "f32"])
SIZES = st.sampled_from([0, 1, 2, 3, 4, 5, 8, 16, 32, 48, -1, 1 << 20, 1 << 40, 1 << 63, 1 << 64, 0.5])
NAMES = st.sampled_from(
    [
        "",
        "x",
        "../../x",
        "/etc/passwd",
        "base_model.model.lm_head.weight",
        "base_model.model.model.norm.weight",
        "é.lora_A",
    ]
    + [
        f"{prefix}model.layers.{layer}.{module}.lora_{part}"
        for prefix in ("", "base_model.model.", "base_model.", "base_model.model.base_model.model.")
        for layer in (0, 1, 7)
        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
        for part in ("A.weight", "B.weight", "A.default.weight", "B.bias", "A", "embedding_A", "magnitude_vector")
    ]
)


# ------------------------------------------------------------------------------------------------ changes of tensors


def edit_tensors(what: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS)

    return Change(what, apply)


def pick(items: dict, fraction: float) -> str:
    return sorted(items)[int(fraction * len(items))]


@st.composite
def changed_tensors(draw: st.DrawFn) -> Change:
    at, name, seed = draw(FRACTIONS), draw(NAMES), draw(st.integers(0, 9))
    kind = draw(
        st.sampled_from("rename drop add base twice reshape turn cut grow cast cast-all fill swap rank scale".split())
    )
    dtype = draw(st.sampled_from([torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float32]))
    value = draw(st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30]))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        if not tensors:
            return
        key = pick(tensors, at)
        tensor = tensors[key]
        if kind == "rename":
            tensors[name] = tensors.pop(key)
        elif kind == "drop":
            del tensors[key]
        elif kind == "add":
            tensors[name] = noise(seed, 32)
        elif kind == "base":  # a weight of the base model: its own, which is 1, or another
            tensors["base_model.model.model.norm.weight"] = torch.ones(32) if seed % 2 else noise(32)
        elif kind == "twice":
            tensors[key.removeprefix("base_model.model.")] = tensor * seed
        elif kind == "reshape":
            tensors[key] = tensor.reshape([(-1,), (1, -1), (-1, 1), (1, 1, -1), (-1, 1, 1, 1, 1)][seed % 5])
        elif kind == "turn":
            tensors[key] = tensor.t() if tensor.dim() == 2 else tensor
        elif kind == "cut":
            tensors[key] = tensor[: seed % (len(tensor) + 1)]
        elif kind == "grow":
            tensors[key] = torch.cat([tensor, tensor])
        elif kind == "cast":
            tensors[key] = tensor.to(dtype)
        elif kind == "cast-all":
            tensors.update({key: value.to(dtype) for key, value in tensors.items()})
        elif kind == "fill":
            tensors[key] = tensor.clone()
            tensors[key].view(-1)[-1:] = value
        elif kind == "swap":
            other = pick(tensors, (at + 0.3) % 1)
            tensors[key], tensors[other] = tensors[other], tensors[key]
        elif kind == "rank":  # another rank throughout
            for each, old in tensors.items():
                if old.dim() == 2:
                    tensors[each] = old[: seed + 1] if "lora_A" in each else old[:, : seed + 1]
        else:
            tensors.update({key: value * (seed + 1) for key, value in tensors.items()})

    return edit_tensors(f"{kind} {at:.2f} {name!r} {seed} {dtype} {value}", change)


@st.composite
def changed_header(draw: st.DrawFn) -> Change:
    at, field = (
        draw(FRACTIONS),
        draw(st.sampled_from(["dtype", "shape", "data_offsets", "name", "__metadata__", "entry"])),
    )
    value = {
        "dtype": DTYPES,
        "shape": st.lists(SIZES, max_size=5),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
        "name": NAMES,
    }.get(field, JSON)
    value = draw(st.one_of(value, value, JSON))
    data_change = draw(st.sampled_from([b"", b"", b"\0" * 64]))

    def apply(folder: Path) -> None:
        data = (folder / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + size])
        key = pick(header, at)
        if field == "name":
            header[str(value)] = header.pop(key)
        elif field in ("__metadata__", "entry"):
            header[field if field != "entry" else key] = value
        elif isinstance(header[key], dict):
            header[key][field] = value
        text = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :] + data_change)

    return Change(f"header {field} {at:.2f} {value!r}", apply)


@st.composite
def shuffled(draw: st.DrawFn) -> Change:
    """The same tensors in another order, which PEFT does not see."""
    seed = draw(st.integers(0, 99))

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        order = sorted(tensors, key=lambda key: sha256(f"{key}{seed}".encode()).digest())
        header, end = {}, 0
        for key in order:
            start, end = end, end + tensors[key].numel() * 4
            header[key] = {"dtype": "F32", "shape": list(tensors[key].shape), "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        data = b"".join(tensors[key].float().contiguous().numpy().tobytes() for key in order)
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + data)

    return Change(f"shuffled {seed}", apply)


@st.composite
def as_pickle(draw: st.DrawFn) -> Change:
    kind = draw(st.sampled_from(["plain", "legacy", "nested", "list", "expanded", "numbers"]))

    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        first = next(iter(tensors), "x")
        if kind == "expanded":
            tensors[first] = torch.zeros(1).expand(1 << 30, 32)
        elif kind == "numbers":
            tensors[first] = 3
        value = {"nested": {"state": tensors}, "list": list(tensors.items())}.get(kind, tensors)
        torch.save(value, folder / PICKLE, _use_new_zipfile_serialization=kind != "legacy")

    return Change(f"pickle {kind}", apply)


# ------------------------------------------------------------------------------------------------ changes of configs


@st.composite
def changed_config(draw: st.DrawFn) -> Change:
    field = draw(FIELDS)
    value = draw(
        st.one_of(SCALARS, SCALARS, st.lists(TEXTS, max_size=3), st.dictionaries(TEXTS, NUMBERS, max_size=2), JSON)
    )
    remove = draw(st.integers(0, 5)) == 0

    def apply(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        settings[field] = value
        if remove:
            del settings[field]
        (folder / CONFIG).write_text(json.dumps(settings))

    return Change(f"config {field} {'gone' if remove else repr(value)}", apply)


@st.composite
def harmless(draw: st.DrawFn) -> Change:
    """What leaves an adapter that can be loaded, and mostly another one."""
    fields = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "lora_alpha": st.sampled_from([0, 1, 7, 0.25, -3]),
                "use_rslora": st.booleans(),
                "alpha_pattern": st.dictionaries(
                    st.sampled_from(["q_proj", r".*\.1\..*", "self_attn.v_proj"]), st.just(5)
                ),
                "lora_dropout": st.sampled_from([0, 0.5]),
                "base_model_name_or_path": st.sampled_from([None, "somewhere/else"]),
                "a_field_of_the_future": st.just({"a": [1]}),
            },
        )
    )

    def apply(folder: Path) -> None:
        settings = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**settings, **fields}))

    return Change(f"config {fields}", apply)


# ------------------------------------------------------------------------------------------------ bytes and paths


@st.composite
def changed_bytes(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from([CONFIG, WEIGHTS, WEIGHTS, PICKLE]))
    kind = draw(st.sampled_from(["flip", "flip", "cut", "insert", "double"]))
    near = draw(st.booleans())  # the beginning is where the structure is
    places, new = draw(st.lists(FRACTIONS, min_size=1, max_size=4)), draw(st.binary(min_size=1, max_size=8))

    def apply(folder: Path) -> None:
        if not (folder / name).is_file():
            return
        data = bytearray((folder / name).read_bytes())
        for place in places if data else ():
            at = int(place * (min(len(data), 2000) if near else len(data)))
            if kind == "flip":
                data[at % len(data)] = new[0]
            elif kind == "cut":
                del data[at:]
                break
            elif kind == "insert":
                data[at:at] = new
            else:
                data[at:at] = data[at : at + 100]
        (folder / name).write_bytes(data)

    return Change(f"bytes {kind} {name} {places} {new!r} {near}", apply)


@st.composite
def changed_paths(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from([CONFIG, WEIGHTS]))
    kind = draw(st.sampled_from(["pipe", "loop", "dangling", "folder", "device", "other", "empty", "gone", "linked"]))

    def apply(folder: Path) -> None:
        path, other = folder / name, folder / (CONFIG if name == WEIGHTS else WEIGHTS)
        if not path.is_file():
            return
        aside = folder / "aside"
        path.rename(aside)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "empty":
            path.touch()
        elif kind != "gone":
            target = {"loop": path, "dangling": "nowhere", "device": "/dev/zero", "other": other, "linked": aside}[kind]
            path.symlink_to(target)

    return Change(f"path {kind} {name}", apply)


def some(*kinds: Callable[[], st.SearchStrategy[Change]]) -> st.SearchStrategy[list[Change]]:
    return st.tuples(*(kind() for kind in kinds)).map(list)


# One change finds what many would hide. In several, what keeps a file whole comes first.
MUTATIONS = st.one_of(
    *[some(changed_tensors)] * 4,
    *[some(changed_header)] * 3,
    *[some(harmless, changed_tensors), some(harmless, changed_config), some(harmless, as_pickle)] * 2,
    *[some(changed_config)] * 3,
    *[some(changed_bytes)] * 4,
    some(as_pickle, changed_bytes),
    some(changed_paths),
    some(shuffled),
    some(changed_tensors, shuffled),
    some(shuffled, harmless),
    some(changed_tensors, changed_config),
    some(changed_tensors, changed_header, changed_bytes),
    some(changed_tensors, harmless, changed_paths),
    some(changed_config, changed_config, changed_bytes),
)


def mutate(source: Path, folder: Path, changes: list[Change]) -> None:
    """``folder`` becomes ``source`` with these changes."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    for change in changes:
        with suppress(Exception):  # one that does not apply to what another has left
            change.apply(folder)
