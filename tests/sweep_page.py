"""Writes docs/sweep.md from docs/sweep.json. `python -m tests.sweep_page`"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.coverage_page import table
from tests.sweep_case import WAYS

DOCS = Path(__file__).parent.parent / "docs"
Entry = Mapping[str, Any]

HEAD = """# Swept

What `python -m tests.sweep --out docs/sweep.json` found on
{versions}: model types, made tiny from
their config classes alone by rules on the names of fields, with two adapters of different rank on every linear layer
(PEFT's `all-linear`; where PEFT can't run that, every `nn.Linear`), whose B is random. Held against PEFT, run eagerly
in float32: each adapter, a batch whose rows have one, the other or none, and idle; once as a PeftModel compiled in
place and once from the adapter's files. Every rewrite was proved (`validate=True`), and the graphs ran without
Inductor. What is compared is what adapters change: errors are rel-L2 of that, over every output of the model.

The families on [What is covered](coverage.md) are tested in many more ways; this page is breadth. Model types that
transformers lists only as parts of others come last, and the run ends before them where it takes too long: what is not
listed was not tried. Entries are kept from run to run, so not all are of one state of lorafx. No model here has real
weights, and none is larger than some millions of parameters.
"""


def written(found: Mapping[str, Entry], versions: str) -> str:
    compared = {name: entry for name, entry in found.items() if entry["stage"] == "compared"}
    odd = {name: notes(entry) for name, entry in compared.items() if notes(entry)}
    parts = [
        HEAD.format(versions=versions),
        table(("", "model types"), counts(found)),
        "\n## Not equal, or not all fused, and why\n",
        table(("why", "model types", "which"), reasons(odd)),
        "\n## Each that was compared\n",
        "`layers`: that a call of PEFT's model went through, and weights of experts and routers; `fused`: in how many"
        " groups, in place. `error`: the worst of one adapter and of a mixed batch, in both ways.\n",
        table(("type", "model", "layers", "fused", "groups", "error", "left"), rows(compared, odd)),
        "\n## Not compared\n",
        "Not lorafx's doing: the rules don't make a tiny model of it, or its inputs; or it, or PEFT, does not run.\n",
        table(("how far it came", "why", "model types", "which"), failures(found)),
    ]
    return "\n".join(parts) + "\n"


def counts(found: Mapping[str, Entry]) -> list[tuple[str, str]]:
    stages = Counter(entry["stage"] for entry in found.values())
    compared = [entry for entry in found.values() if entry["stage"] == "compared"]
    said = [notes(entry) for entry in compared]
    return [
        ("tried", str(len(found))),
        ("built, and called", str(len(found) - stages["not built"] - stages["stopped"])),
        ("run by PEFT, and compared", str(len(compared))),
        ("every result equal", str(sum(not any(note.startswith(WRONG) for note in notes) for notes in said))),
        (
            "equal, and every layer fused, in place and from files, row by row too",
            str(sum(not notes for notes in said)),
        ),
    ]


WRONG = ("differs", "raises")


def notes(entry: Entry) -> list[str]:
    """What is not as it should be, each as one reason that other types may share."""
    found: dict[str, None] = {}
    for way in (entry[name] for name in WAYS):
        if (said := way.get("raised")) is not None:
            found[f"raises: {short(said)}"] = None
        if (said := way.get("refused")) is not None:
            found["from files: " + ("the adapter has a router" if is_router(said) else short(said))] = None
        for call, result in way.get("calls", {}).items():
            if isinstance(result, str):
                found[_of_call(entry, call, result)] = None
        for reason in way.get("skipped", {}):
            found["left to PEFT: " + ("a router" if is_router(reason) else short(reason))] = None
        if any(not path.endswith(".weight") for path in way.get("missing", ())):
            found["a layer is in no graph"] = None
        if way.get("apart"):
            found["layers with one input are apart"] = None
        if way.get("retraces"):
            found[f"traced anew: {short(way['retraces'][0])}"] = None
        if "torch.compile alone" in entry and way.get("graphs", 0) > entry["torch.compile alone"].get("graphs", 0):
            found["more graphs than torch.compile makes alone"] = None
    return list(found)


def _of_call(entry: Entry, call: str, result: str) -> str:
    if call == "mixed" and entry["peft"]["mixed"]:
        if "ParamWrapper" in result:
            return "mixed batches: PEFT refuses them where a parameter is adapted, and runs such layers"
        if "can't take different adapters" in result:
            return "mixed batches: refused by PEFT and lorafx, an input has no rows of the batch in front"
    if entry.get("torch.compile alone", {}).get("differs"):
        return "torch.compile alone gives other results, without adapters"
    return f"{'differs' if 'off by' in result else 'raises'}: {short(result)}"


def is_router(said: str) -> bool:
    return "target_parameters" in said


def short(said: str) -> str:
    """The first sentence, without names of layers' numbers."""
    return said.partition(". ")[0][:160].replace("|", "/")


def reasons(odd: Mapping[str, list[str]]) -> Iterable[tuple[str, str, str]]:
    by_reason: dict[str, list[str]] = {}
    for name, said in odd.items():
        for note in said:
            by_reason.setdefault(note, []).append(name)
    for note, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        yield note, str(len(names)), ", ".join(names)


def rows(compared: Mapping[str, Entry], odd: Mapping[str, list[str]]) -> Iterable[tuple[str, ...]]:
    for name, entry in compared.items():
        place = entry["in place"]
        errors = [e for way in WAYS for e in entry[way].get("calls", {}).values() if isinstance(e, float)]
        worst = f"{max(errors):.0e}" if errors else ""
        layers = max(place.get("called", 0), place.get("branches", 0))
        layers += sum(place.get("skipped", {}).values()) if not place.get("missing") else 0
        fused = str(place.get("branches", 0)), str(place.get("groups", 0))
        yield (
            name,
            entry["model"],
            str(layers),
            *fused,
            worst,
            "; ".join(sorted({n.partition(":")[0] for n in odd.get(name, ())})),
        )


def failures(found: Mapping[str, Entry]) -> Iterable[tuple[str, str, str, str]]:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for name, entry in found.items():
        if entry["stage"] != "compared":
            by_reason.setdefault((entry["stage"], kind_of(entry["reason"])), []).append(name)
    for (stage, reason), names in sorted(by_reason.items(), key=lambda item: (item[0][0], -len(item[1]))):
        yield stage, reason, str(len(names)), ", ".join(names)


def kind_of(reason: str) -> str:
    """Reasons that are alike as one."""
    if "requires the" in reason:
        return f"needs the package {reason.partition('requires the ')[2].partition(' ')[0]}"
    if "parameters; expected" in reason and not reason.startswith("calling"):
        return "not tiny by these rules"
    if reason.startswith("building"):
        return "its config does not fit itself, made tiny by these rules"
    if reason.startswith(("calling", "inputs", "no rule")):
        return "no rule for its inputs"
    if "No `target_modules`" in reason:
        return "it has no linear layers"
    return short(reason)


def main() -> None:
    import diffusers
    import peft
    import torch
    import transformers

    from tests import tiny_diffusers, tiny_models

    versions = (
        f"transformers {transformers.__version__} ({len(tiny_models.types())} types that have a model), diffusers"
        f" {diffusers.__version__} ({len(tiny_diffusers.types())} models), PEFT {peft.__version__} and torch"
        f" {torch.__version__}"
    )
    found = json.loads((DOCS / "sweep.json").read_text(encoding="utf-8"))
    (DOCS / "sweep.md").write_text(written(found, versions), encoding="utf-8")
    print(DOCS / "sweep.md")


if __name__ == "__main__":
    main()
