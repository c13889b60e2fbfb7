"""More adapters than room: every output is plain PEFT's, whatever has come and gone before."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import pytest
import torch

import lorafx
from tests.integration.many_adapters import LAYERS, Made, Maker
from tests.integration.models import EAGER_GRAPH, LLAMA, assert_close, difference, run, tokens, with_peft

ROOM = 16
ROWS = 4
INPUTS = {"input_ids": tokens(ROWS)}
ids = INPUTS["input_ids"]


@pytest.fixture(scope="module")
def maker() -> Maker:
    return Maker(INPUTS, largest_rank=8, structures=12)


@pytest.fixture(scope="module")
def few(maker, tmp_path_factory) -> tuple[Path, dict[str, Made]]:
    """40 adapters in one folder."""
    folder = tmp_path_factory.mktemp("few")
    made = {f"a{i}": maker.make(i) for i in range(40)}
    for name, one in made.items():
        one.save(folder / name)
    return folder, made


@pytest.fixture(scope="module")
def base() -> torch.Tensor:
    return run(LLAMA.build(LAYERS), INPUTS)


def compiled(store: lorafx.AdapterStore, room: int = ROOM, **arguments):
    return lorafx.compile(LLAMA.build(LAYERS), store, max_adapters=room, options=EAGER_GRAPH, **arguments)


def expected(names, made, base) -> torch.Tensor:
    return torch.stack([made[name].expected[row] if name else base[row] for row, name in enumerate(names)])


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_with_room_for_16(count, maker, base, tmp_path):
    made = {f"adapter-{i:04}": maker.make(i) for i in range(count)}
    for name, one in made.items():
        one.save(tmp_path / name)
    store = lorafx.AdapterStore(tmp_path, host_bytes=64 * 1024)
    model = compiled(store)
    size, address = model.lora.nbytes, model.lora.store.storage.data_ptr()
    rng = random.Random(0)
    order = list(made)
    rng.shuffle(order)
    for start in range(0, count, ROWS):
        names = [name if rng.random() < 0.9 else None for name in order[start : start + ROWS]]
        assert_close(run(model, INPUTS, names), expected(names, made, base))
        again = [rng.choice(order[: start + ROWS]) for _ in range(ROWS)]
        if start % 3 == 0:
            store.use(again)
            assert_close(run(model, INPUTS), expected(again, made, base))
        else:
            assert_close(run(model, INPUTS, again), expected(again, made, base))
    report = lorafx.explain(model)
    assert (len(report.graphs), report.recompiles, report.retraces) == (1, 0, [])
    assert (model.lora.nbytes, model.lora.store.storage.data_ptr()) == (size, address)
    assert len(model.lora) <= ROOM
    stats = store.stats
    assert stats.misses >= count * 0.8
    assert stats.evictions == stats.misses - len(store.resident)
    assert stats.bytes_copied > stats.bytes_read * 0.9
    assert min(stats.hits, stats.seconds_reading, stats.seconds_copying) > 0
    assert store._host.nbytes <= 64 * 1024


def test_room_is_what_the_largest_adapters_need(few):
    """Any 16 fit without packing anew, and no row more is kept than the 16 largest of a layer take."""
    folder, made = few
    model = compiled(lorafx.AdapterStore(folder))
    for g in model.lora.store.geometry:
        ranks = sorted(
            (
                value.shape[0]
                for one in made.values()
                for key, value in one.state.items()
                if key.endswith(f"{g.name}.lora_A.weight")
            ),
            reverse=True,
        )
        assert g.capacity == sum(ranks[:ROOM])


def test_room_by_max_rank_and_targets_reads_nothing_ahead(few, base):
    folder, made = few
    store = lorafx.AdapterStore(folder)
    model = compiled(store, room=3, max_rank=8, target_modules="all-linear")
    names = ["a3", None, "a9", "a20"]
    assert_close(run(model, INPUTS, names), expected(names, made, base))
    assert store.stats.misses == 3


def test_a_dict_of_sources(few, base):
    folder, made = few
    sources = {name: (one.state, one.config) for name, one in list(made.items())[:20]}
    sources["a0"] = str(folder / "a0")
    model = compiled(lorafx.AdapterStore(sources), room=3)
    for names in (["a0", "a1", "a2", None], ["a19", "a18", None, "a0"], ["a7"] * 4):
        assert_close(run(model, INPUTS, names), expected(names, made, base))


def test_least_recently_used_leave_first(few):
    model = compiled(store := lorafx.AdapterStore(few[0]), room=3)
    for name in ("a1", "a2", "a3", "a1", "a4"):
        run(model, INPUTS, [name] * ROWS)
    assert store.resident == ["a3", "a1", "a4"]
    assert sorted(model.lora.names) == ["a1", "a3", "a4"]
    assert (store.stats.hits, store.stats.misses, store.stats.evictions) == (1, 4, 1)
    run(model, INPUTS, ["a2"] * ROWS)
    assert store.stats.host_hits == 1


def test_without_host_memory_everything_is_read_again(few):
    model = compiled(store := lorafx.AdapterStore(few[0], host_bytes=0), room=1)
    for name in ("a1", "a2", "a1"):
        run(model, INPUTS, [name] * ROWS)
    assert (store.stats.misses, store.stats.host_hits) == (3, 0)
    assert len(store._host) == 0


def test_prefetch_reads_in_the_background(few, base):
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=2)
    store.prefetch(["a5", "a6"], wait=True)
    read = store.stats.bytes_read
    assert read > 0
    assert store.resident == []
    assert_close(run(model, INPUTS, ["a5", "a6", None, "a5"]), expected(["a5", "a6", None, "a5"], made, base))
    assert (store.stats.bytes_read, store.stats.host_hits) == (read, 2)
    with pytest.raises(lorafx.AdapterMismatchError, match="'nobody'"):
        store.prefetch(["nobody"])


def test_use_and_using_bring_in_and_give_back(few, base):
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=2)
    store.use("a1")
    assert_close(run(model, INPUTS), expected(["a1"] * 4, made, base))
    with model.lora.using(["a2", "a3", "a2", None]):  # all the room: the one in use leaves, and comes back
        assert_close(run(model, INPUTS), expected(["a2", "a3", "a2", None], made, base))
    assert_close(run(model, INPUTS), expected(["a1"] * 4, made, base))
    with pytest.raises(lorafx.CapacityError, match="that have to stay"):
        run(model, INPUTS, ["a2", "a3", "a2", "a3"])  # what use() chose stays on the device
    assert_close(run(model, INPUTS, ["a4"] * 4), expected(["a4"] * 4, made, base))
    store.use({"a2": 0.5, "a3": 0.25})
    run(model, INPUTS)
    store.use(None)
    assert_close(run(model, INPUTS), base)


def test_generate(few):
    folder, _ = few
    model = compiled(store := lorafx.AdapterStore(folder), room=2)
    names = ["a2", None, "a2", "a11"]
    settings = {"max_new_tokens": 5, "do_sample": False}
    got = model.generate(ids, adapter_names=names, **settings)
    for row, name in enumerate(names):
        alone = with_peft(LLAMA.build(LAYERS), {name: str(folder / name)}) if name else LLAMA.build(LAYERS)
        assert torch.equal(alone.generate(input_ids=ids[row : row + 1], **settings)[0], got[row])
    assert store.resident == ["a11", "a2"] or store.resident == ["a2", "a11"]


def test_too_many_at_once_and_unknown_names(few, base):
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=3)
    names = ["a1", "a2", "a3", None]
    run(model, INPUTS, names)
    for wrong, error, text in (
        (["a4", "a5", "a6", "a7"], lorafx.CapacityError, "max_adapters is 3"),
        (["a1", "nobody", None, None], lorafx.AdapterMismatchError, "no adapter 'nobody'"),
        (["../few/a1"] * 4, lorafx.AdapterMismatchError, "without '..'"),
        ([str(folder / "a1")] * 4, lorafx.AdapterMismatchError, "relative"),
    ):
        with pytest.raises(error, match=text):
            run(model, INPUTS, wrong)
        with pytest.raises(error, match=text):
            model.generate(ids, adapter_names=wrong, max_new_tokens=1)
        with pytest.raises(error, match=text):
            store.use(wrong)
    assert store.resident == ["a1", "a2", "a3"]
    assert not store._pinned
    assert_close(run(model, INPUTS, names), expected(names, made, base))


def test_links_out_of_the_folder_are_refused(few, tmp_path):
    folder, _ = few
    (tmp_path / "inside").mkdir()
    shutil.copytree(folder / "a1", tmp_path / "inside" / "good")
    (tmp_path / "inside" / "outside").symlink_to(folder / "a2")
    (tmp_path / "inside" / "file").mkdir()
    shutil.copy(folder / "a3" / "adapter_config.json", tmp_path / "inside" / "file")
    (tmp_path / "inside" / "file" / "adapter_model.safetensors").symlink_to(folder / "a3" / "adapter_model.safetensors")
    model = compiled(store := lorafx.AdapterStore(tmp_path / "inside"), room=2)
    run(model, INPUTS, ["good"] * ROWS)
    for name in ("outside", "file"):
        with pytest.raises(lorafx.AdapterMismatchError, match="link out of"):
            run(model, INPUTS, [name] * ROWS)
        assert name not in store


def test_one_broken_adapter_harms_no_other(few, base, tmp_path):
    folder, made = few
    for name in ("a1", "a2", "a3"):
        shutil.copytree(folder / name, tmp_path / name)
    broken = tmp_path / "a2" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-20])
    model = compiled(store := lorafx.AdapterStore(tmp_path), room=2)
    names = ["a1", None, "a3", "a1"]
    run(model, INPUTS, names)
    for _ in range(2):
        with pytest.raises(lorafx.AdapterFormatError, match="'a2'"):
            run(model, INPUTS, ["a1", "a2", None, None])
        assert_close(run(model, INPUTS, names), expected(names, made, base))
    shutil.copy(folder / "a2" / "adapter_model.safetensors", broken)  # mended: nothing bad was kept
    assert_close(run(model, INPUTS, ["a2"] * 4), expected(["a2"] * 4, made, base))
    assert store.resident[-1] == "a2"


def test_refresh_takes_new_files(few, base, tmp_path):
    folder, made = few
    shutil.copytree(folder / "a1", tmp_path / "x")
    model = compiled(store := lorafx.AdapterStore(tmp_path), room=1, max_rank=8, target_modules="all-linear")
    assert_close(run(model, INPUTS, ["x"] * 4), expected(["a1"] * 4, made, base))
    shutil.rmtree(tmp_path / "x")
    shutil.copytree(folder / "a2", tmp_path / "x")
    assert_close(run(model, INPUTS, ["x"] * 4), expected(["a1"] * 4, made, base))
    store.refresh("x")
    assert_close(run(model, INPUTS, ["x"] * 4), expected(["a2"] * 4, made, base))


def test_refresh_while_the_old_files_are_on_their_way_in(few, base, tmp_path, monkeypatch):
    """What a call had read before the refresh is not what it puts on the device."""
    folder, made = few
    shutil.copytree(folder / "a1", tmp_path / "x")
    model = compiled(store := lorafx.AdapterStore(tmp_path), room=1, max_rank=8, target_modules="all-linear")
    read = store._from_host

    def read_then_changed(name):
        weights = read(name)
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "x")
        shutil.copytree(folder / "a2", tmp_path / "x")
        store.refresh("x")
        return weights

    monkeypatch.setattr(store, "_from_host", read_then_changed)
    for _ in range(2):
        assert_close(run(model, INPUTS, ["x"] * 4), expected(["a2"] * 4, made, base))


def test_threads_that_need_each_others_room(few, base):
    """Four threads name three adapters each, there is room for five: they wait for one another, and none for ever."""
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=5)
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(25):
                names = [*rng.sample(list(made), 3), None]
                rng.shuffle(names)
                if difference(run(model, INPUTS, names), expected(names, made, base)) > 1e-5:
                    wrong.append(names)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not any(thread.is_alive() for thread in threads)
    assert not wrong
    assert not store._pinned
    assert store.stats.hits + store.stats.misses == 4 * 25 * 3


def test_what_a_call_has_named_stays_until_it_ends(few, base):
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=2)
    got = []
    with store.holding(["a1", "a2"]):
        thread = threading.Thread(target=lambda: got.append(run(model, INPUTS, ["a3"] * 4)), daemon=True)
        thread.start()
        thread.join(timeout=2)
        assert thread.is_alive()  # it waits, and takes nothing
        assert store.resident == ["a1", "a2"]
    thread.join(timeout=60)
    assert_close(got[0], expected(["a3"] * 4, made, base))
    assert store.resident == ["a2", "a3"]
    assert store.stats.seconds_waiting > 1


def test_an_exchange_that_fails_puts_everything_back(few, base, monkeypatch):
    folder, made = few
    model = compiled(store := lorafx.AdapterStore(folder), room=2)
    run(model, INPUTS, ["a1", "a2", None, "a1"])
    put, calls = lorafx.store.PackedStore.put, []

    def failing(self, slot, adapter):
        calls.append(adapter.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(self, slot, adapter)

    monkeypatch.setattr(lorafx.store.PackedStore, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, INPUTS, ["a3", "a4", None, None])
    assert calls == ["a3", "a4", "a1", "a2"] or sorted(calls[:2]) == ["a3", "a4"]
    assert sorted(model.lora.names) == sorted(store.resident) == ["a1", "a2"]
    assert_close(run(model, INPUTS, ["a1", "a2", None, "a1"]), expected(["a1", "a2", None, "a1"], made, base))


def test_who_is_refused(few, tmp_path):
    folder, _ = few
    store = lorafx.AdapterStore(folder)
    with pytest.raises(lorafx.UnsupportedModelError, match="serves no model yet"):
        store.use("a1")
    with pytest.raises(lorafx.LorafxError, match="needs max_adapters"):
        lorafx.compile(LLAMA.build(LAYERS), store)
    with pytest.raises(lorafx.UnsupportedModelError, match="PEFT's layers"):
        lorafx.compile(with_peft(LLAMA.build(LAYERS), {"a1": str(folder / "a1")}), store, max_adapters=2)
    with pytest.raises(lorafx.AdapterMismatchError, match="expected a folder"):
        lorafx.AdapterStore(tmp_path / "nowhere")
    model = compiled(store, room=2)
    with pytest.raises(lorafx.UnsupportedModelError, match="serves a model already"):
        compiled(store, room=2)
    other = lorafx.compile(LLAMA.build(LAYERS), str(folder / "a1"), mode="eager")
    with pytest.raises(lorafx.UnsupportedModelError, match="without max_adapters"):
        lorafx.AdapterStore(folder).attach(other)
    lorafx.uncompile(model)
    assert store.model is None
    model = compiled(store, room=2)  # free for another one
    assert "a1" in store
    assert "a99" not in store
    assert len(store) == 40
    assert "misses: 0" in repr(store)
    assert "<table>" in store._repr_html_()
