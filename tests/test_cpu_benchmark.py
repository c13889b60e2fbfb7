"""The CPU benchmark on a tiny model: what it checks, counts and shows. Not how fast anything is."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import cpu, cpu_cases, cpu_compiling, cpu_report, cpu_timing, turns
from benchmarks.cpu_cases import BASE, BASE_EAGER, IDLE, LORAFX, MERGED, PEFT, PEFT_COMPILED, Entry, Target, Timed
from benchmarks.cpu_contenders import ContenderError, Reference, Workshop, adapter_bytes, load_base, visible
from benchmarks.forward_pass import ALL, QKV, Case, with_adapters

MIXED = Case(3, 1, (4, 8), QKV, cache=96)


@pytest.fixture
def base():
    torch._dynamo.reset()
    return load_base("tiny", None, torch.float32)


def test_each_target_is_of_contenders_that_take_part():
    for number, case in cpu_cases.TIMED.items():
        names = [entry.name for entry in case.entries]
        assert len(set(names)) == len(names), number
        assert case.targets, number
        assert {name for target in case.targets for name in (target.of, target.to)} <= set(names), number
        assert not any(target.aim > target.must and not target.at_least for target in case.targets), number
    assert cpu_cases.numbers() == list(range(1, 11))


@pytest.mark.parametrize(
    ("at_least", "found", "must", "aim"),
    [
        (False, 1.0, True, True),
        (False, 1.02, True, False),
        (False, 1.021, False, False),
        (True, 1.2, True, True),
        (True, 1.1, True, False),
        (True, 1.0, False, False),
    ],
)
def test_verdicts(at_least, found, must, aim):
    target = Target(LORAFX, BASE, 1.02, 1.2 if at_least else 1.0, at_least)
    verdict = target.verdict(found)
    assert (verdict["must_met"], verdict["aim_met"]) == (must, aim)
    assert cpu_report.verdict(verdict, BASE).count("missed") == 2 - must - aim
    assert f"{found:.3g} x {BASE}" in cpu_report.verdict(verdict, PEFT)


def test_ratios_are_of_the_same_round():
    noise = [1.0, 50.0, 3.0, 0.1, 7.0]
    found = turns.ratios([2 * x for x in noise], noise)
    assert (found.low, found.median, found.high) == (2, 2, 2)
    assert turns.quartiles([1, 2, 3, 4, 5]) == turns.Quartiles(2, 3, 4)


def test_contenders_take_turns():
    calls = []
    seconds = turns.take_turns({name: lambda i, name=name: calls.append(name) or i for name in "abcd"}, rounds=8)
    assert seconds == {name: list(range(8)) for name in "abcd"}  # none of the rounds before
    rounds = ["".join(calls[i : i + 4]) for i in range(0, len(calls), 4)]
    assert len(rounds) == 8 + turns.WARM_UP
    assert all(sorted(one) == list("abcd") for one in rounds)
    assert len(set(rounds)) > 1, "always the same order"


def test_a_case_is_measured(base):
    kinds = (BASE, BASE_EAGER, LORAFX, IDLE, PEFT, PEFT_COMPILED)
    target = Target(PEFT, LORAFX, 1.45, 1.55, at_least=True)
    case = Timed("three rows", tuple(Entry(kind, kind, MIXED) for kind in kinds), (target,))
    found = cpu_timing.measure(case, base, rounds=2, inductor=False)
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == list(kinds)
    assert rows[BASE]["ratio"] == {"low": 1, "median": 1, "high": 1}
    assert all(row["seconds"]["median"] > 0 and row["distance"] < 1e-5 for row in rows.values())
    own = sum(p.numel() * 4 for n, p in with_adapters(base, MIXED).named_parameters() if "lora_" in n)
    assert {row["adapter_bytes"] for row in rows.values()} == {own}
    assert rows[PEFT]["bytes"] - rows[BASE]["bytes"] == own
    assert own < rows[LORAFX]["bytes"] - rows[BASE]["bytes"] < 1.1 * own
    assert [verdict["of"] for verdict in found["targets"]] == [PEFT]
    json.dumps(found)


@pytest.mark.parametrize("tokens", [1, 9])
def test_merged_weights_take_part_where_there_is_one_adapter(base, tokens):
    forward = Case(1, tokens, (8,), ALL, cache=96)
    workshop = Workshop(base, inductor=False)
    reference = Reference(workshop, forward)
    for kind in (MERGED, LORAFX, PEFT):
        entry = Entry(kind, kind, forward)
        assert reference.check(entry, workshop.make(entry).step()) < 1e-5


@pytest.mark.parametrize("kind", [LORAFX, IDLE, BASE])
def test_what_computes_something_else_is_not_timed(base, kind):
    workshop, entry = Workshop(base, inductor=False), Entry(kind, kind, MIXED)
    reference, good = Reference(workshop, MIXED), workshop.make(entry).step()
    assert reference.check(entry, good) < 1e-5
    for wrong in (good.roll(1, dims=0), good * 1.001, torch.cat([good[:2], good[2:] * float("nan")])):
        with pytest.raises(ContenderError, match=kind):
            reference.check(entry, wrong)
    other = IDLE if kind == LORAFX else LORAFX
    with pytest.raises(ContenderError):
        reference.check(Entry(other, other, MIXED), good)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_lost_adapter_is_seen(dtype):
    base = load_base("tiny", None, dtype)
    entry = Entry(LORAFX, LORAFX, visible(MIXED, base))
    workshop = Workshop(base, inductor=False)
    reference, model = Reference(workshop, entry.forward), workshop.make(entry)
    reference.check(entry, model.step())
    one_lost = model.step(adapter_names=["a0", "a1", None])
    with pytest.raises(ContenderError):
        reference.check(entry, one_lost)


def test_adapters_that_change_nothing_are_refused(base, monkeypatch):
    def silent(*args):
        model = with_adapters(*args)
        for name, parameter in model.named_parameters():
            if "lora_B.a1" in name:
                parameter.data.zero_()
        return model

    monkeypatch.setattr("benchmarks.cpu_contenders.with_adapters", silent)
    with pytest.raises(ContenderError, match="too little"):
        Reference(Workshop(base), MIXED)


def test_bytes_of_an_adapter(base):
    for forward in (MIXED, Case(1, 1, (16,), ALL)):
        peft = with_adapters(load_base("tiny", None, torch.float32), forward)
        own = sum(p.numel() * p.element_size() for n, p in peft.named_parameters() if "lora_" in n)
        assert adapter_bytes(base, forward) == own


def test_what_compiles_for_very_long_is_left_out():
    for number, case in cpu_cases.TIMED.items():
        left_out = [entry.name for entry in case.entries if cpu_cases.too_slow(entry, 30)]
        assert left_out == ([PEFT_COMPILED] if number in (3, 4) else []), number
        assert not any(cpu_cases.too_slow(entry, 2) for entry in case.entries), number


def test_lists_of_names_differ():
    lists = cpu_compiling.name_lists(8, 8)
    assert len({tuple(one) for one in lists}) == len(lists) == 64
    assert lists == cpu_compiling.name_lists(8, 8)


def results():
    rows = [
        {"contender": BASE, "bytes": 1000, "base_bytes": 1000, "adapter_bytes": 96},
        {"contender": LORAFX, "bytes": 1100, "base_bytes": 1000, "adapter_bytes": 96},
        {"contender": "polylora, eager", "bytes": None, "base_bytes": 1000, "adapter_bytes": 96},
    ]
    seconds = {BASE: [0.1, 0.2, 0.3], LORAFX: [0.12, 0.22, 0.36], "polylora, eager": [20.0, 30.0, 40.0]}
    found = cpu_timing.with_times(rows, seconds, (Target(LORAFX, BASE, 1.25, 1.15),))
    return {2: {"title": "a case", **found}, 3: {"title": "another", **found, "notes": ["a note"]}}


def test_tables():
    found = results()
    table = "\n".join(cpu_report.time_table(3, found[3]))
    assert "**3. another**" in table
    assert f"| {BASE} | 200.0 ms (150.0 to 250.0) | 1.000 |  |" in table
    assert "| 1.200 (1.150 to 1.200) | at most 1.25: met; aim 1.15: **missed** |" in table
    assert "| 30.0 s (25.0 to 35.0) |" in table
    assert table.endswith("a note")
    memory = cpu_report.memory_table(found)
    assert "| 2 | lorafx | 1,100 | 100 | 4 |" in memory
    assert "polylora" not in "\n".join(memory)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    cpu_report.plot(results(), "a machine", tmp_path / "cpu.png")
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("arguments", [["--cases", "11"], ["--cases", "1,0", "--model", "llama-8b"]])
def test_cases_that_there_are_not(arguments, capsys):
    with pytest.raises(SystemExit):
        cpu.parse(arguments)
    assert "there are 1, 2, 3" in capsys.readouterr().err


def test_from_the_command_line(tmp_path, capfd):
    command = ["--model", "tiny", "--without-inductor", "--rounds", "4", "--cases", "7", "--out", str(tmp_path)]
    assert cpu.main(command) == 0
    shown, said = capfd.readouterr()
    assert "lorafx, bank of r 8 and r 64" in shown
    assert "at most 1.05" in shown
    assert "4 rounds" in said
    saved = json.loads((tmp_path / "cpu.json").read_text())
    assert saved["machine"]["threads"] == "2"
    assert saved["machine"]["torch"] == torch.__version__
    assert saved["cases"]["7"]["rows"][0]["contender"] == "lorafx, bank of r 8"


def test_a_case_that_fails_is_said(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(cpu, "in_own_process", lambda number, arguments: None if number == 2 else results()[3])
    assert cpu.main(["--model", "tiny", "--cases", "2,3", "--out", str(tmp_path)]) == 1
    shown, said = capfd.readouterr()
    assert "another" in shown
    assert "not measured: case 2" in said
    assert list(json.loads((tmp_path / "cpu.json").read_text())["cases"]) == ["3"]


@pytest.mark.slow
def test_lists_of_names_make_no_graph(base):
    found = cpu_compiling.recompiles(base, inductor=False, count=12)
    graphs = {row["contender"]: row["graphs"] for row in found["rows"]}
    assert graphs[LORAFX] == 1
    assert graphs[PEFT] == 0
    assert graphs[PEFT_COMPILED] == torch._dynamo.config.recompile_limit
    assert found["targets"][0]["must_met"]


@pytest.mark.slow
def test_compiling_is_timed(base):
    found = cpu_compiling.compile_seconds(base)
    assert all(row["seconds"]["median"] > 0.5 for row in found["rows"])
