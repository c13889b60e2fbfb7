"""Files that were made to do harm, or are broken: refused by name, at once, in little memory, the model as it was."""

from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import socket
import struct
import time
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lorafx

from .models import LLAMA, compiled_llama, run, save_adapter, save_adapters

QKV = list(LLAMA.qkv)
INPUTS = LLAMA.inputs(3)
FORMAT, MISMATCH = lorafx.AdapterFormatError, lorafx.AdapterMismatchError
MEMORY = 8 << 20  # bytes that Python may take for a refusal; the largest file here has 2 MB
PROCESS = 128 << 20  # and the process: no terabyte, no zip bomb
SECONDS = 20
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return Path(save_adapter(LLAMA, tmp_path_factory.mktemp("good"), target_modules=QKV))


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folders = save_adapters(LLAMA, tmp_path_factory.mktemp("live"), a={"target_modules": QKV}, b={"r": 2})
    return compiled_llama(folders, mode="eager")


@pytest.fixture
def folder(good, tmp_path):
    return Path(shutil.copytree(good, tmp_path / "bad"))


def config_of(folder):
    return folder / "adapter_config.json"


def weights_of(folder):
    return folder / "adapter_model.safetensors"


def peak():
    """The most bytes that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def assert_refused(model, source, error, text):
    """By load and by replace; nothing has changed, nothing large was allocated."""
    names = ["a", "__base__", "b"]
    before = run(model, INPUTS, names), model.lora.names, model.lora.nbytes
    started, resident = time.perf_counter(), peak()
    tracemalloc.start()
    try:
        for verb, name in ((model.lora.load, "bad"), (model.lora.replace, "b")):
            with pytest.raises(error, match=f"(?s){text}") as caught:
                verb(name, source)
            assert len(str(caught.value)) < 4000
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
        if "bad" in model.lora:  # a case that fails must not fail those after it
            model.lora.unload("bad")
    assert time.perf_counter() - started < SECONDS
    assert peak() - resident < PROCESS
    assert torch.equal(run(model, INPUTS, names), before[0])
    assert (model.lora.names, model.lora.nbytes) == before[1:]


# ------------------------------------------------------------------------------------------------ configs

CONFIG_BYTES = {
    "empty": (b"", r"can't be read.*Expected the JSON"),
    "no JSON": (b"{'r': 8}", r"can't be read.*Expected the JSON"),
    "no UTF-8": (b'{"peft_type": "LORA", "r": "\xff\xfe"}', r"can't be read.*utf-8"),
    "a list": (b"[1, 2]", r"got a list, expected an object"),
    "nested a million deep": (b'{"r":' + b"[" * 500_000 + b"]" * 500_000 + b"}", r"can't be read"),
    "two megabytes": (b" " * (2 << 20) + b"{}", r"more than 1,048,576 bytes; expected a few thousand"),
    "a key twice": (b'{"peft_type": "LORA", "r": 4, "r": 8}', r"'r' stands there more than once"),
    "NaN": (b'{"peft_type": "LORA", "lora_alpha": NaN}', r"NaN is no JSON number"),
    "Infinity": (b'{"peft_type": "LORA", "lora_alpha": -Infinity}', r"-Infinity is no JSON number"),
    "a number of a thousand digits": (b'{"peft_type": "LORA", "r": ' + b"9" * 1000 + b"}", r"a number of 1000 digits"),
    "no type": (b'{"r": 8}', r"has no 'peft_type'; expected 'LORA'"),
}


@pytest.mark.parametrize("case", CONFIG_BYTES.values(), ids=CONFIG_BYTES.keys())
def test_configs_that_are_none(case, folder, live):
    config_of(folder).write_bytes(case[0])
    assert_refused(live, folder, FORMAT, case[1])


FIELDS = {
    "r": [True, "8", -1, 0, 8.0, 1e308, 10**17, None, [8], {}],
    "lora_alpha": ["16", None, True, [], 1e400],
    "lora_dropout": ["0", None, -0.1, 2, []],
    "use_rslora": ["false", 1, []],
    "lora_bias": ["true", 0.5],
    "fan_in_fan_out": ["no"],
    "rank_pattern": [None, [], "q_proj", {"q_proj": "8"}, {"q_proj": 0}, {"q_proj": True}, {"q_proj": 1e9}],
    "alpha_pattern": [None, [], {"q_proj": "8"}, {"q_proj": None}, {"q_proj": 1e400}],
    "target_modules": [3, {"q_proj": 1}, ["q_proj", 3], [["q_proj"]], ["x"] * 5000, True],
    "exclude_modules": [3, [None]],
    "layers_to_transform": ["0", [True], [0.0], {}],
    "layers_pattern": [3, [1]],
    "init_lora_weights": [3, [], "nonsense", "pissa_niter_4"],
    "bias": ["all", None, 3],
    "task_type": [3, "NONSENSE"],
    "peft_type": ["IA3", None, 3, [], "lora"],
    "use_dora": ["yes", 1],
    "layer_replication": [[[0, 10**9]]],
    "modules_to_save": [".*", [3], ["(a+)+b"]],
    "megatron_config": [{"a": 1}],
    "ensure_weight_tying": [True],
}
FIELD_CASES = [(field, value) for field, values in FIELDS.items() for value in values]


@pytest.mark.parametrize(("field", "value"), FIELD_CASES, ids=[f"{f}={str(v)[:20]}" for f, v in FIELD_CASES])
def test_fields_of_the_wrong_kind(field, value, folder, live):
    settings = json.loads(config_of(folder).read_text())
    text = json.dumps({**settings, field: value}).replace("Infinity", "1e400")
    config_of(folder).write_text(text)
    assert_refused(live, folder, FORMAT, r"'(bad|b)'.*(expected|lorafx runs|does not run|can't run|not a LoraConfig)")


PATTERNS = {
    "nested repeats": "(a+)+b",
    "overlapping choices, repeated": "(.|m|mo)*x",
    "overlapping choices, in a row": "(?:.|m)" * 40,
    "five stars": ".*.*.*.*.*x",
    "optional letters": "m?" * 40 + "x",
    "a reference back": r"(.*)\1(.*)\2",
    "a class of a million": "(?i)[\\u0100-\\U0010ffff]",
    "not closed": "(((",
    "nested a thousand deep": "(" * 1000 + ")" * 1000,
    "long": "a" * 20_000,
}


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_patterns_that_would_hang(pattern, field, folder, live):
    settings = json.loads(config_of(folder).read_text())
    settings[field] = {pattern: 4} if field == "rank_pattern" else pattern
    if field == "layers_pattern":
        settings["layers_to_transform"] = [0]
    config_of(folder).write_text(json.dumps(settings))
    assert_refused(live, folder, FORMAT, f"has the pattern .* in {field}, which lorafx does not run")


def test_many_patterns_that_are_slow_together(folder, live):
    settings = json.loads(config_of(folder).read_text())
    settings["alpha_pattern"] = {f".*.*x{i}": 4 for i in range(1000)}
    config_of(folder).write_text(json.dumps(settings))
    assert_refused(live, folder, FORMAT, "together with those before it")


SCALES = {
    "alpha beyond float32": {"lora_alpha": 1e40},
    "alpha beyond float32 in a pattern": {"alpha_pattern": {"q_proj": -1e300}},
}


@pytest.mark.parametrize("fields", SCALES.values(), ids=SCALES.keys())
def test_scales_that_are_not_finite(fields, folder, live):
    settings = json.loads(config_of(folder).read_text())
    config_of(folder).write_text(json.dumps({**settings, **fields}))
    assert_refused(live, folder, FORMAT, "make its scale .*lora_alpha damaged")


DISAGREEING = {
    "a larger rank": ({"r": 8}, MISMATCH, "size mismatch"),
    "a rank of millions": ({"r": 1 << 24}, MISMATCH, "size mismatch"),
    "fewer targets": ({"target_modules": ["q_proj"]}, MISMATCH, "no layer for"),
    "more targets": ({"target_modules": [*QKV, "o_proj"]}, MISMATCH, "missing in the file"),
    "no target": ({"target_modules": ["nothing"]}, MISMATCH, "nothing"),
    "an empty list": ({"target_modules": []}, MISMATCH, "does not fit"),
    "everything excluded": ({"exclude_modules": ".*"}, MISMATCH, "excluded"),
    "no layer at all": ({"target_modules": "dummy-target-modules"}, MISMATCH, "no layer"),
    "a bias": ({"lora_bias": True}, MISMATCH, "missing in the file.*bias"),
    "a layer that is not there": ({"layers_to_transform": [99]}, MISMATCH, "does not fit"),
    "a pattern beside a list": ({"target_modules": "x", "layers_to_transform": [0]}, FORMAT, "not a LoraConfig"),
}


@pytest.mark.parametrize("case", DISAGREEING.values(), ids=DISAGREEING.keys())
def test_configs_that_disagree_with_the_tensors(case, folder, live):
    fields, error, text = case
    settings = json.loads(config_of(folder).read_text())
    config_of(folder).write_text(json.dumps({**settings, **fields}))
    assert_refused(live, folder, error, text)


# ------------------------------------------------------------------------------------------------ safetensors


def parts_of(folder):
    data = weights_of(folder).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_parts(folder, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    weights_of(folder).write_bytes(struct.pack("<Q", len(text)) + text + data)


def with_header(change):
    def make(folder):
        header, data = parts_of(folder)
        change(header)
        write_parts(folder, header, data)

    return make


def with_tensors(change):
    def make(folder):
        tensors = load_file(weights_of(folder))
        change(tensors)
        save_file(tensors, weights_of(folder))

    return make


def content(data):
    return lambda folder: weights_of(folder).write_bytes(data)


def entry(**values):
    return with_header(lambda header: header[FIRST].update(values))


def renamed(new):
    return with_header(lambda header: header.update({new: header.pop(FIRST)}))


def replaced(tensor):
    return with_tensors(lambda tensors: tensors.update({FIRST: tensor}))


def cast(dtype):
    return with_tensors(lambda tensors: tensors.update({key: value.to(dtype) for key, value in tensors.items()}))


def added(name, tensor):
    return with_tensors(lambda tensors: tensors.update({name: tensor}))


def name_twice(folder):
    header, data = parts_of(folder)
    text = json.dumps(header)
    write_parts(folder, text.replace("layers.1.self_attn.q_proj", "layers.0.self_attn.q_proj").encode(), data)


def many_tensors(folder):
    names = {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(20_000)}
    write_parts(folder, names, bytes(80_000))


READ = r"can't be read.*cut short or damaged"
FILES = {
    "no bytes": (content(b""), FORMAT, READ),
    "seven bytes": (content(b"\x01" * 7), FORMAT, READ),
    "a header of terabytes": (content(struct.pack("<Q", 1 << 42) + b"{}"), FORMAT, r"claims 4,398,046,511,104 bytes"),
    "a header of 2^64 bytes": (content(b"\xff" * 8 + b"{}"), FORMAT, READ),
    "a header that is no JSON": (lambda folder: write_parts(folder, b"{" * 40), FORMAT, READ),
    "a header that is no text": (lambda folder: write_parts(folder, b"\xff" * 40), FORMAT, READ),
    "no tensors": (lambda folder: write_parts(folder, {}), MISMATCH, "missing in the file"),
    "a tensor of terabytes": (entry(shape=[1 << 40, 32]), FORMAT, READ),
    "sizes whose product overflows": (entry(shape=[1 << 63, 1 << 63]), FORMAT, READ),
    "a negative size": (entry(shape=[-4, 32]), FORMAT, READ),
    "offsets beyond the end": (entry(data_offsets=[0, 1 << 40]), FORMAT, READ),
    "offsets backwards": (entry(data_offsets=[512, 0]), FORMAT, READ),
    "offsets that overlap": (entry(data_offsets=[4, 516]), FORMAT, READ),
    "an unknown dtype": (entry(dtype="F33"), FORMAT, READ),
    "a name twice": (name_twice, FORMAT, READ),
    "twenty thousand tensors": (many_tensors, MISMATCH, "no layer for"),
    "int8": (cast(torch.int8), FORMAT, "of dtype I8; expected float64, float32"),
    "bool": (cast(torch.bool), FORMAT, "of dtype BOOL"),
    "float8": (cast(torch.float8_e4m3fn), FORMAT, "of dtype F8_E4M3"),
    "complex": (cast(torch.complex64), FORMAT, "of dtype C64|can't be read"),
    "a number": (replaced(torch.tensor(1.0)), FORMAT, r"shape \[\]; expected a matrix"),
    "a vector": (replaced(torch.ones(128)), MISMATCH, "size mismatch"),
    "five dimensions": (replaced(torch.ones(1, 1, 1, 4, 32)), FORMAT, r"shape \[1, 1, 1, 4, 32\]"),
    "no rows": (replaced(torch.ones(0, 32)), FORMAT, r"shape \[0, 32\].*not\s+empty"),
    "terabytes without bytes": (replaced(torch.ones(0, 1 << 40)), FORMAT, "not empty"),
    "a larger rank": (replaced(torch.ones(400, 32)), MISMATCH, "size mismatch"),
    "a name that leads out": (renamed("../../../../etc/passwd"), MISMATCH, "no layer for.*etc/passwd"),
    "an empty name": (renamed(""), MISMATCH, "no layer for"),
    "another alphabet": (renamed("ключ.lora_A.weight"), MISMATCH, "no layer for"),
    "a name of kilobytes": (renamed("lora_A." * 1000), FORMAT, "at most 512 characters"),
    "a weight of the base model": (
        added("base_model.model.model.layers.0.self_attn.o_proj.weight", torch.zeros(32, 32)),
        MISMATCH,
        "weight of the base model, and it is not the model's own",
    ),
    "a buffer of the base model": (
        added("base_model.model.model.norm.weight", torch.zeros(32)),
        MISMATCH,
        "weight of the base model, and it is not the model's own",
    ),
    "a weight twice, under two names": (
        added(FIRST.removeprefix("base_model.model."), torch.zeros(4, 32)),
        MISMATCH,
        "loaded nowhere",
    ),
    "an infinity": (replaced(torch.full((4, 32), float("-inf"))), FORMAT, "A of model.layers.0.*NaN or Inf"),
    "too large for float32": (replaced(torch.full((4, 32), 1e300, dtype=torch.float64)), FORMAT, "NaN or Inf"),
}


@pytest.mark.parametrize("case", FILES.values(), ids=FILES.keys())
def test_files_of_weights(case, folder, live):
    make, error, text = case
    make(folder)
    assert_refused(live, folder, error, text)


def test_a_file_that_becomes_shorter_after_it_was_opened(folder):
    reader = compiled_llama({}, mode="eager").lora._read
    outline = reader.open("a", folder)
    os.truncate(weights_of(folder), 100)
    with pytest.raises(FORMAT, match="shorter since it was opened"):
        outline.read()


def test_a_file_that_is_replaced_after_it_was_opened(folder, good):
    """As when a new version is moved into its place: what was opened is what is read."""
    reader = compiled_llama({}, mode="eager").lora._read
    outline = reader.open("a", folder)
    weights_of(folder).rename(folder / "old")
    weights_of(folder).write_bytes(b"new")
    assert torch.equal(outline.read().flat, reader.open("a", good).read().flat)


# ------------------------------------------------------------------------------------------------ pickles


class Harm:
    """A pickle that would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def as_bin(folder, value, **options):
    weights_of(folder).unlink()
    torch.save(value, folder / "adapter_model.bin", **options)


def in_bin(folder, change):
    tensors = load_file(weights_of(folder))
    change(tensors)
    as_bin(folder, tensors)


def harmful(folder):
    as_bin(folder, {"x": Harm(folder / "harm")})


def bare_pickle(folder):
    weights_of(folder).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps({"x": Harm(folder / "harm")}))


def legacy(folder):
    as_bin(folder, load_file(weights_of(folder)), _use_new_zipfile_serialization=False)


def compressed(folder):
    """A zip bomb: a few kilobytes that become a hundred megabytes."""
    as_bin(folder, {FIRST: torch.zeros(1, 32)})
    plain = folder / "adapter_model.bin"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(folder / "new", "w", zipfile.ZIP_DEFLATED) as target:
        for record in source.infolist():
            target.writestr(record.filename, source.read(record))
        target.writestr("archive/data/9", bytes(100 << 20))
    (folder / "new").rename(plain)


def large_allocation(folder):
    """Allowed by torch's weights_only: a bytearray of a terabyte."""

    class Large:
        def __reduce__(self):
            return bytearray, (1 << 40,)

    as_bin(folder, {"x": Large()})


def cut(folder):
    in_bin(folder, lambda tensors: None)
    data = (folder / "adapter_model.bin").read_bytes()
    (folder / "adapter_model.bin").write_bytes(data[: len(data) // 2])


def expanded(folder):
    """4 bytes that say that they are 4 * 10^12."""
    in_bin(folder, lambda tensors: tensors.update({FIRST: torch.zeros(1).expand(10**9, 1000)}))


def shared(folder):
    """All tensors are views of one, the file is small."""
    memory = torch.randn(32 * 32)

    in_bin(folder, lambda tensors: tensors.update({f"x{i}.lora_A.weight": memory.view(32, 32) for i in range(50)}))


PICKLES = {
    "a call": (harmful, READ),
    "a call, no zip": (bare_pickle, "no zip file.*save it as adapter_model.safetensors"),
    "the format before 1.6": (legacy, "no zip file.*save it as adapter_model.safetensors"),
    "compressed": (compressed, "compressed"),
    "a terabyte by a call": (large_allocation, "its pickle uses"),
    "cut short": (cut, "can't be read"),
    "expanded": (expanded, "expanded"),
    "shared memory": (shared, "share memory"),
    "a list": (lambda folder: as_bin(folder, [torch.zeros(2)]), "holds a list; expected a dict"),
    "a number": (lambda folder: in_bin(folder, lambda t: t.update({"x": 3})), "'x' is a builtins.int"),
    "nested": (lambda folder: in_bin(folder, lambda t: t.update({"x": {"y": torch.zeros(2)}})), "'x' is a"),
    "a number as a name": (lambda folder: in_bin(folder, lambda t: t.update({3: torch.zeros(2)})), "tensor called '3'"),
    "sparse": (lambda folder: in_bin(folder, lambda t: t.update({FIRST: t[FIRST].to_sparse()})), "its pickle uses"),
    "whole numbers": (lambda folder: in_bin(folder, lambda t: t.update({FIRST: t[FIRST].int()})), "its pickle uses"),
}


@pytest.mark.parametrize("case", PICKLES.values(), ids=PICKLES.keys())
def test_pickles(case, folder, live):
    make, text = case
    make(folder)
    assert_refused(live, folder, FORMAT, text)
    assert not (folder / "harm").exists()


# ------------------------------------------------------------------------------------------------ paths


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def loop(path):
    path.unlink()
    path.symlink_to(path)


def dangling(path):
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def directory(path):
    path.unlink()
    path.mkdir()


def device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def endless(path):
    path.unlink()
    path.symlink_to("/dev/full")


def listening(path):
    path.unlink()
    here = os.getcwd()
    os.chdir(path.parent)  # the name of a socket may have 107 characters
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def forbidden(path):
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")


PATHS = {
    "a named pipe": (pipe, "is a named pipe; expected a regular file"),
    "a loop of links": (loop, "can't be reached"),
    "a dangling link": (dangling, "is a link to .*nowhere.*not there"),
    "a folder": (directory, "is a folder; expected a regular file"),
    "a device": (device, "is a device; expected a regular file"),
    "a device that is always full": (endless, "is a device"),
    "a socket": (listening, "is a socket"),
    "no permission": (forbidden, "can't be read"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="these are POSIX's")
@pytest.mark.parametrize("which", [config_of, weights_of], ids=["config", "weights"])
@pytest.mark.parametrize("case", PATHS.values(), ids=PATHS.keys())
def test_what_is_no_file(case, which, folder, live):
    make, text = case
    make(which(folder))
    assert_refused(live, folder, FORMAT, text)


@pytest.mark.parametrize("path", ["", "\0", "x" * 300, "\udcff"])
def test_paths_that_lead_nowhere(path, live):
    assert_refused(live, path, FORMAT, "is not an adapter.*Expected a folder")


@pytest.mark.parametrize(("path", "text"), [("/dev/null", "is a device"), ("/proc/self/mem", "can't be read")])
def test_files_that_are_none(path, text, live):
    assert_refused(live, path, FORMAT, text)


def test_links_to_files_are_followed(folder, good, live):
    """As in the cache of Hugging Face's hub, where each file is a link to a blob."""
    want = run(compiled_llama({"a": good}, mode="eager"), INPUTS)
    for file in (config_of(folder), weights_of(folder)):
        file.rename(folder.parent / file.name)
        file.symlink_to(folder.parent / file.name)
    assert torch.equal(run(compiled_llama({"a": folder}, mode="eager"), INPUTS), want)


# ------------------------------------------------------------------------------------------------ in memory


class Subclass(torch.Tensor):
    pass


MEMORY_CASES = {
    "meta": (lambda t: t.to("meta"), FORMAT, "meta device, without numbers"),
    "sparse": (lambda t: t.to_sparse(), FORMAT, "layout torch.sparse"),
    "complex": (lambda t: t.to(torch.complex64), FORMAT, "of dtype torch.complex64"),
    "int": (lambda t: t.int(), FORMAT, "of dtype torch.int32"),
    "a subclass": (lambda t: t.as_subclass(Subclass), FORMAT, "Subclass; expected a plain tensor"),
    "expanded": (lambda t: t[:1, :1].clone().expand(t.shape), FORMAT, "expanded"),
    "expanded to terabytes": (lambda t: t[:1, :1].expand(10**9, 10**3), FORMAT, "expanded"),
    "NaN": (lambda t: t * float("nan"), FORMAT, "NaN or Inf"),
    "quantized": (lambda t: torch.quantize_per_tensor(t.detach(), 0.1, 0, torch.qint8), FORMAT, "quantized"),
    "a vector": (lambda t: t.flatten(), MISMATCH, "size mismatch"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", MEMORY_CASES.values(), ids=MEMORY_CASES.keys())
def test_state_dicts(case, folder, live):
    change, error, text = case
    tensors = load_file(weights_of(folder))
    tensors[FIRST] = change(tensors[FIRST])
    assert_refused(live, (tensors, json.loads(config_of(folder).read_text())), error, text)


def test_state_dicts_that_are_unusual_but_right(folder, live):
    """Parameters, other strides, mixed dtypes: the same numbers."""
    tensors, settings = load_file(weights_of(folder)), json.loads(config_of(folder).read_text())
    want = run(compiled_llama({"a": (tensors, settings)}, mode="eager"), INPUTS)
    unusual = {key: value.t().contiguous().t() for key, value in tensors.items()}
    unusual[FIRST] = torch.nn.Parameter(tensors[FIRST].double())
    got = compiled_llama({"a": (copy.copy(unusual), settings)}, mode="eager")
    assert torch.equal(run(got, INPUTS), want)
    assert unusual[FIRST].requires_grad
