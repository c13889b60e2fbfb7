"""GGUF files that are broken, or claim what is not there: refused by name, at once, in little memory."""

from __future__ import annotations

import os
import resource
import struct
import time

import numpy as np
import pytest

import lorafx
from lorafx.formats import detect
from lorafx.reading import AdapterReader
from tests.integration.models import LLAMA

from .files import matrices, write_gguf
from .test_gguf import ALL, tensors_of

MEMORY = 96 << 20  # bytes that the process may grow by; the largest file here has 12 MB
SECONDS = 10
UINT8, FLOAT32, STRING, ARRAY = 0, 6, 8, 9
HUGE = (2**63, 2**64 - 1, 2**40, 2**32)


@pytest.fixture(scope="module")
def reader():
    import torch

    return AdapterReader(LLAMA.build(), torch.float32)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    model = LLAMA.build()
    return write_gguf(tmp_path_factory.mktemp("good") / "a.gguf", tensors_of(matrices(model, ALL[:4]))).read_bytes()


@pytest.fixture
def refused(reader, tmp_path):
    def check(content, text=None):
        path = tmp_path / "bad.gguf"
        path.write_bytes(content)
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10, time.perf_counter()
        with pytest.raises(lorafx.LorafxError, match=text):
            reader.open("a", path).read()
        assert time.perf_counter() - started < SECONDS
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY

    return check


def text(value):
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def field(key, kind, value):
    return text(key) + struct.pack("<I", kind) + value


def tensor(name, dims, kind=0, offset=0):
    sizes = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + sizes + struct.pack("<IQ", kind, offset)


ADAPTER = [
    field("general.type", STRING, text("adapter")),
    field("adapter.type", STRING, text("lora")),
    field("general.architecture", STRING, text("llama")),
]


def file(fields=ADAPTER, tensors=(), data=b"", counts=None, version=3):
    tensor_count, field_count = counts or (len(tensors), len(fields))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, field_count) + b"".join((*fields, *tensors))
    return head + b"\0" * (-len(head) % 32) + data


A, B = "blk.0.attn_v.weight.lora_a", "blk.0.attn_v.weight.lora_b"
PAIR = [tensor(A, [32, 1]), tensor(B, [1, 16], offset=128)]


def test_these_bytes_make_a_good_file(reader, tmp_path):
    (tmp_path / "a.gguf").write_bytes(file(tensors=PAIR, data=np.ones(48, "<f4").tobytes()))
    assert list(reader.open("a", tmp_path / "a.gguf").read().sites) == ["model.layers.0.self_attn.v_proj"]


def test_cut_short_anywhere(refused, good):
    ends = {*range(0, 400, 7), *range(0, len(good) - 32, len(good) // 60)}
    for end in sorted(ends):
        refused(good[:end])


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_the_header_changed(reader, good, tmp_path, seed):
    """Whatever stands there: read, or refused by name."""
    generator = np.random.default_rng(seed)
    data = good.index(b"blk.1.attn_q") if b"blk.1.attn_q" in good else 900
    path, outcomes = tmp_path / "a.gguf", set()
    for _ in range(60):
        content = bytearray(good)
        for place in generator.integers(4, data, size=generator.integers(1, 4)):
            content[place] = generator.integers(256)
        path.write_bytes(content)
        try:
            reader.open("a", path).read()
            outcomes.add("read")
        except lorafx.LorafxError:
            outcomes.add("refused")
    assert "refused" in outcomes


@pytest.mark.parametrize("huge", HUGE)
def test_counts_that_are_not_there(refused, huge):
    data = np.ones(48, "<f4").tobytes()
    refused(file(tensors=PAIR, data=data, counts=(huge, 3)))
    refused(file(tensors=PAIR, data=data, counts=(2, huge)))
    refused(file([*ADAPTER, field("x", ARRAY, struct.pack("<IQ", UINT8, huge))], PAIR, data))
    refused(file([*ADAPTER, field("x", ARRAY, struct.pack("<IQ", STRING, huge))], PAIR, data))
    refused(file([*ADAPTER, field("x", STRING, struct.pack("<Q", huge))], PAIR, data))
    refused(file([*ADAPTER, struct.pack("<Q", huge)], PAIR, data))
    refused(file(tensors=[tensor(A, [huge, 1]), PAIR[1]], data=data))
    refused(file(tensors=[tensor(A, [2**32, 2**32]), PAIR[1]], data=data))
    refused(file(tensors=[tensor(A, [32, 1], offset=huge), PAIR[1]], data=data))
    refused(file(tensors=[text(A) + struct.pack("<I", 2**32 - 1), PAIR[1]], data=data))


def test_a_long_list_that_is_there(refused):
    count = 12 << 20
    fields = [*ADAPTER, field("x", ARRAY, struct.pack("<IQ", UINT8, count) + bytes(count))]
    refused(file(fields, PAIR, np.ones(48, "<f4").tobytes()), "longer than any adapter's")


def test_a_long_text_in_a_file_of_holes(reader, tmp_path):
    path, size = tmp_path / "a.gguf", 1 << 34
    path.write_bytes(file([*ADAPTER, field("x", STRING, struct.pack("<Q", size))], counts=(0, 4)))
    os.truncate(path, size + 4096)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    with pytest.raises(lorafx.AdapterFormatError, match="longer than any adapter's"):
        reader.open("a", path)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before < MEMORY


def test_lists_in_lists(refused):
    nested = struct.pack("<IQ", ARRAY, 1) * 5000
    refused(file([*ADAPTER, field("x", ARRAY, nested)], PAIR))


def test_other_things_that_are_wrong(refused):
    data = np.ones(48, "<f4").tobytes()
    refused(b"", "can't be read")
    refused(b"GGUF")
    refused(b"GGML" + bytes(100))
    refused(file(tensors=PAIR, data=data, version=7))
    refused(file(tensors=PAIR, data=data, version=0))
    refused(file([*ADAPTER, field(b"\xff\xfe", UINT8, b"\0")], PAIR, data), "utf-8")
    refused(file([*ADAPTER[1:], field("general.type", STRING, text(b"\xff\xfe"))], PAIR, data), "utf-8")
    refused(file([*ADAPTER, ADAPTER[0]], PAIR, data), "[Dd]uplicate")
    refused(file(tensors=[PAIR[0], PAIR[0]], data=data), "[Dd]uplicate")
    refused(file(tensors=[tensor(b"\xff" + A.encode(), [32, 1]), PAIR[1]], data=data), "utf-8")
    refused(file(tensors=[tensor(A, [32, 1], kind=999), PAIR[1]], data=data), "999")
    refused(file(tensors=[tensor(A, [32, 1], kind=26), PAIR[1]], data=data), "I32")  # whole numbers
    refused(file(tensors=[tensor(A, [32, 1], kind=2), PAIR[1]], data=data[:10]))  # Q4_0, cut
    refused(file(tensors=[tensor(A, [33, 1], kind=2), PAIR[1]], data=data), "33|block")
    refused(file(tensors=[tensor(A, []), PAIR[1]], data=data), "matrix")
    refused(file(tensors=[tensor(A, [32, 0]), PAIR[1]], data=data), "not empty")
    refused(file(tensors=[tensor(A, [32, 1, 1]), PAIR[1]], data=data), "matrix")
    refused(file(tensors=[tensor("blk." + "0" * 600, [32, 1]), PAIR[1]], data=data), "characters")
    refused(file(tensors=[tensor(A, [32, 1], offset=2**64 - 64), PAIR[1]], data=data))
    refused(file(), "no tensors")
    refused(file([], PAIR, data), "general.type")
    refused(file([*ADAPTER, field("adapter.lora.alpha", STRING, text("8"))], PAIR, data), "alpha")
    refused(file([*ADAPTER, field("general.alignment", 4, bytes(4))], PAIR, data), "alignment")
    for kind, content in (
        (ARRAY, struct.pack("<IQi", 5, 1, -7)),  # a negative id
        (ARRAY, struct.pack("<IQf", 6, 1, 7.0)),
        (ARRAY, struct.pack("<IQ", UINT8, 5000) + bytes(5000)),
        (ARRAY, struct.pack("<IQ", STRING, 1) + text("7")),
        (ARRAY, struct.pack("<IQIQI", ARRAY, 1, 4, 1, 7)),
        (4, struct.pack("<I", 7)),
        (STRING, text("7")),
    ):
        invocation = field("adapter.alora.invocation_tokens", kind, content)
        refused(file([*ADAPTER, invocation], PAIR, data), "adapter.alora.invocation_tokens|Arrays")
    nan = np.ones(48, "<f4")
    nan[40] = np.nan
    refused(file(tensors=PAIR, data=nan.tobytes()), "NaN")


def test_tensors_that_share_bytes_don_t_multiply(refused):
    """A small file whose every tensor is all of it would be a large adapter."""
    data = np.ones(512 * 16, "<f4").tobytes()
    shared = [tensor(f"blk.{i}.ffn_up.weight.lora_a", [32, 256]) for i in range(400)]
    refused(file(tensors=shared, data=data), "share")


def test_no_regular_file(reader, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    os.symlink("nowhere", tmp_path / "link.gguf")
    for path in (tmp_path / "pipe.gguf", tmp_path / "link.gguf", "/dev/zero", tmp_path / "none.gguf", tmp_path):
        for use in (lambda path: reader.open("a", path), detect):
            with pytest.raises(lorafx.AdapterFormatError):
                use(path)


def test_cut_after_it_was_opened(reader, good, tmp_path):
    (tmp_path / "a.gguf").write_bytes(good)
    outline = reader.open("a", tmp_path / "a.gguf")
    os.truncate(tmp_path / "a.gguf", 4096)
    with pytest.raises(lorafx.AdapterFormatError, match="shorter"):
        outline.read()


def test_without_the_gguf_package(reader, good, tmp_path, monkeypatch):
    import sys

    (tmp_path / "a.gguf").write_bytes(good)
    monkeypatch.setitem(sys.modules, "gguf", None)
    for module in ("gguf_file", "gguf_adapter", "gguf_layout"):
        monkeypatch.delitem(sys.modules, f"lorafx.formats.{module}", raising=False)
        monkeypatch.delattr(f"lorafx.formats.{module}", raising=False)
    assert detect(tmp_path / "a.gguf") == "gguf"
    with pytest.raises(lorafx.AdapterFormatError, match=r"pip install 'lorafx\[formats\]'"):
        reader.open("a", tmp_path / "a.gguf")
    with pytest.raises(lorafx.LorafxError, match=r"pip install 'lorafx\[formats\]'"):
        lorafx.formats.to_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", LLAMA.build())
