"""What ``lorafx.explain`` says and draws: counts that can be made by hand, and pictures whose boxes are checked."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from xml.etree import ElementTree

import pytest
import torch
from peft import get_peft_model

import lorafx
from lorafx import drawing
from lorafx.passes.naming import told_apart
from lorafx.passes.record import Box, Sketch
from tests.integration.groups import unless_first
from tests.integration.models import EAGER_GRAPH, FAMILIES, config, run, save_adapter, tokens
from tests.passes.toys import siblings

LLAMA = FAMILIES["llama"]
INPUTS = {"input_ids": tokens(1)}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def compiled(tmp_path, layers=2, called=True, options=None, **fields):
    folder = save_adapter(LLAMA, tmp_path, target_modules=ALL, **fields) if layers == 2 else None
    room = {} if folder else {"max_adapters": 1, "max_rank": 4, "target_modules": ALL}
    adapters = {"a": folder} if folder else None
    model = lorafx.compile(LLAMA.build(layers), adapters, options={**EAGER_GRAPH, **(options or {})}, **room)
    if called:
        run(model, INPUTS)
    return model


def labels(sketch, kind):
    return Counter(box.label.partition("\n")[0] for box in sketch.boxes if box.kind == kind)


def reached(sketch, start, end):
    """Whether the data of box ``start`` gets to box ``end``."""
    behind = {start}
    for i, box in enumerate(sketch.boxes):
        if behind.intersection(box.inputs):
            behind.add(i)
    return end in behind


@pytest.mark.parametrize("folded", [False, True])
def test_the_layer_is_drawn_as_it_was_traced_and_as_it_is(tmp_path, folded):
    report = lorafx.explain(compiled(tmp_path, options={"fold": folded}))
    (before, after), alike = report._picture()
    assert alike == 2
    assert before.layer == after.layer == "model.layers.0"
    assert labels(before, "base") == Counter(ALL)
    assert labels(before, "lora") == {"lora_A": 7, "lora_B": 7, "* scale": 7, "+": 7}
    assert labels(before, "fused") == labels(after, "lora") == {}
    assert labels(after, "fused") == {"lorafx.routed_lora": 4}
    folds = {group.lowering for group in report.groups} == {"cpp"} and folded
    assert labels(after, "base") == ({} if folds else Counter(ALL))
    fused = [box.label for box in after.boxes if box.kind == "fused"]
    assert ["q_proj, k_proj, v_proj" in label for label in fused] == [True, False, False, False]
    assert all(("and the layers themselves" in label) == folds for label in fused)
    # what a layer does besides: two norms, attention, two sums, the gate and its product
    others = {"input_layernorm": 1, "self_attn": 1, "post_attention_layernorm": 1, "layers.0": 2, "act_fn": 1, "mlp": 1}
    assert labels(before, "other") == labels(after, "other") == others


def test_boxes_stand_behind_what_they_read_and_all_lead_from_input_to_output(tmp_path):
    (before, after), _ = lorafx.explain(compiled(tmp_path))._picture()
    for sketch in (before, after):
        assert [sketch.boxes[i].label for i in (0, -1)] == ["input", "output"]
        # of what leaves the layer, the next one's input alone: keys and values go to the cache
        assert [sketch.boxes[i].label for i in sketch.boxes[-1].inputs] == ["layers.0\nadd"]
        for i, box in enumerate(sketch.boxes):
            assert all(j < i for j in box.inputs)
            assert reached(sketch, 0, i), box
            assert reached(sketch, i, len(sketch.boxes) - 1), box


@pytest.mark.parametrize("name", unless_first(sorted(FAMILIES)))
def test_every_family_is_drawn_whole(name, tmp_path):
    """Each op of the layer is in one box, whatever the modules are called."""
    family = FAMILIES[name]
    folder = save_adapter(family, tmp_path, target_modules=list(family.qkv))
    model = lorafx.compile(family.build(), {"a": folder}, options=EAGER_GRAPH)
    run(model, family.inputs(2))
    report = lorafx.explain(model)
    (before, after), _ = report._picture()
    here = [g for g in report.groups if not before.layer or f"{g.parent}.".startswith(f"{before.layer}.")]
    assert sum(labels(after, "fused").values()) == len(here) > 0
    assert labels(before, "lora")["lora_A"] == sum(len(g.branches) for g in here)
    assert sum(len(box.inputs) == 0 for box in before.boxes) >= 1
    assert any(reached(before, 0, i) for i, box in enumerate(before.boxes) if box.kind == "lora")
    assert len(before.boxes) < 80
    ElementTree.fromstring(drawing.draw((before, after)))


def test_graph_of_the_backend_without_a_bank():
    """Branches that PEFT wrote are drawn as branches, not as the ops they were found in."""
    model = get_peft_model(LLAMA.build(), config(target_modules=["q_proj", "v_proj"])).eval().requires_grad_(False)
    with torch.no_grad():
        torch.compile(model, backend="lorafx", options=EAGER_GRAPH)(**INPUTS)
    (before, after), alike = lorafx.explain(model)._picture()
    assert labels(before, "lora") == {"lora_A": 2, "lora_B": 2, "* scale": 2, "+": 2}
    assert labels(after, "fused") == {"lorafx.fused_lora": 1}
    assert alike == 2


def test_branches_that_were_marked_are_drawn_once():
    """What a branch was made of stands in the graph until it is cleaned up: it is not drawn beside the branch."""
    _, report = lorafx.fuse(torch.fx.symbolic_trace(siblings(3)))
    (before, _), _ = report._picture()
    assert labels(before, "base") == {"q": 1, "k": 1, "v": 1}
    assert labels(before, "lora") == {"lora_A": 3, "lora_B": 3, "* scale": 3, "+": 3}


def test_layers_of_one_name_are_told_apart():
    class Adapted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = torch.nn.Linear(8, 8)
            self.a, self.b = torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 8, bias=False)

        def forward(self, x):
            return self.base(x) + self.b(self.a(x)) * 2.0

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = Adapted(), Adapted()

        def forward(self, x):
            return self.q(x), self.k(x)

    _, report = lorafx.fuse(torch.fx.symbolic_trace(Pair()))
    assert report.table()[0]["branches"] == "q.base, k.base"
    (before, after), _ = report._picture()
    assert labels(before, "base") == labels(after, "base") == {"q.base": 1, "k.base": 1}
    assert "q.base, k.base" in next(box.label for box in after.boxes if box.kind == "fused")


@pytest.mark.parametrize(
    ("paths", "shown"),
    [
        ((), []),
        (("layers.0.attn.q", "layers.0.attn.k"), ["q", "k"]),
        (("a.q.base", "a.k.base", "a.o"), ["q.base", "k.base", "o"]),
        (("base", "q.base"), ["base", "q.base"]),
        (("q", "q"), ["q", "q"]),
    ],
)
def test_names_are_as_long_as_it_takes(paths, shown):
    assert told_apart(paths) == shown


@pytest.mark.parametrize("program", ["Graphviz", "lorafx"])
@pytest.mark.parametrize("layers", [1, 2, 30])
def test_pictures_are_well_formed_and_no_larger_with_more_layers(tmp_path, monkeypatch, program, layers):
    if program == "lorafx":
        monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    elif drawing.shutil.which("dot") is None:
        pytest.skip("Graphviz is not installed")
    report = lorafx.explain(compiled(tmp_path, layers))
    path = report.svg(tmp_path / "layer.svg")
    picture = ElementTree.parse(path).getroot()
    assert picture.tag.endswith("svg")
    texts = Counter("".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text"))
    assert texts["lora_A"] == 7
    assert texts["lorafx.routed_lora"] == 4
    more = f" (and {layers - 1} more like it)" if layers > 1 else ""
    assert f"before: model.layers.0{more}" in texts
    assert float(re.match(r"[\d.]+", picture.get("width")).group()) < 1200
    assert not list(tmp_path.glob("tmp*"))


def test_no_boxes_overlap_in_our_own_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(drawing.shutil, "which", lambda name: None)
    text = drawing.draw(*lorafx.explain(compiled(tmp_path))._picture())
    for side in ElementTree.fromstring(text).findall("{*}g"):
        rects = [
            [float(rect.get(key)) for key in ("x", "y", "width", "height")] for rect in side.findall("{*}g/{*}rect")
        ]
        assert len(rects) > 10
        for i, (x, y, width, height) in enumerate(rects):
            assert x >= -0.1
            for x2, y2, width2, height2 in rects[:i]:
                apart = x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
                assert apart


def test_names_are_no_markup(tmp_path):
    """A module may be called anything."""
    nasty = '"];<script>\\n\n&'
    pair = (Sketch(nasty, (Box(nasty, "base", ()), Box("x", "fused", (0,)))),) * 2
    for text in (drawing.draw(pair), drawing.svg_of([pair[0].boxes], [nasty], drawing.FILLS)):
        assert "<script>" not in text
        ElementTree.fromstring(text)
    if program := drawing.shutil.which("dot"):
        subprocess.run([program, "-Tplain"], input=drawing.dot_of(pair).encode(), check=True, capture_output=True)


def test_a_drawing_that_fails_leaves_nothing(tmp_path):
    report = lorafx.explain(compiled(tmp_path, called=False))
    with pytest.raises(lorafx.LorafxError, match=r"No such file or directory\. Name a file in a folder that is there"):
        report.svg(tmp_path / "no" / "layer.svg")
    (tmp_path / "folder.svg").mkdir()
    with pytest.raises(lorafx.LorafxError, match="can't write"):
        report.svg(tmp_path / "folder.svg")
    assert not list(tmp_path.glob("tmp*"))


def test_before_the_first_call_modules_are_drawn(tmp_path):
    report = lorafx.explain(compiled(tmp_path, called=False))
    assert report.source == "modules"
    (before, after), alike = report._picture()
    assert alike == 2
    assert labels(before, "lora")["lora_A"] == 7
    assert labels(after, "base") == Counter(ALL)


def test_counts_of_work_and_memory(tmp_path):
    """Llama of 32 wide, 48 between, 4 heads and 2 of keys: counted here by hand."""
    model = compiled(tmp_path, r=2)
    report = lorafx.explain(model, tokens=3)
    widths = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 48), (32, 48), (48, 32)]
    own = 2 * 3 * sum(k * n for k, n in widths) * 2
    lora = sum(2 * 3 * 2 * (k + n) + 2 * 3 * n for k, n in widths) * 2
    assert report.work.without.flops == own
    assert report.work.separate.flops == report.work.fused.flops == own + lora
    assert report.work.without.launches == 14
    assert report.work.separate.launches == 14 + 4 * 14
    memory = report.memory
    assert memory.weights == 4 * 2 * 2 * sum(k + n for k, n in widths)
    assert memory.total == model.lora.nbytes == memory.weights + memory.tables + memory.room
    assert memory.room == model.lora.reserved
    # q, k, v in one B of 6 rank rows and 64 columns; gate and up in one of 4 and 96
    zeros = 2 * 4 * ((6 * 64 - 2 * 64) + (4 * 96 - 2 * 96))
    assert memory.padded == memory.weights + zeros
    assert "no zero stored" in str(report)


def test_ranks_are_those_that_are_loaded(tmp_path):
    model = compiled(tmp_path, r=2, rank_pattern={"v_proj": 3})
    rows = {row["branches"]: row["ranks"] for row in lorafx.explain(model).table()}
    assert rows["q_proj, k_proj, v_proj"] == "2, 3"
    assert rows["down_proj"] == "2"
    model.lora.use(None)
    model.lora.unload("a")
    assert {row["ranks"] for row in lorafx.explain(model).table()} == {"-"}
    data = json.loads(json.dumps(lorafx.explain(model).to_dict()))
    assert data["memory"]["adapters"] == data["memory"]["weights"] == 0
    assert data["work"]["separate"]["flops"] == data["work"]["without"]["flops"]


def test_why_this_lowering(tmp_path):
    reasons = {group.lowering: group.reason for group in lorafx.explain(compiled(tmp_path)).groups}
    assert reasons in ({"cpp": "on a CPU"}, {"aten": "no C++20 compiler"})
    forced = lorafx.explain(compiled(tmp_path, options={"lowering": "aten"}))
    assert {(group.lowering, group.reason) for group in forced.groups} == {("aten", "asked for")}
    assert "ATen: asked for" in str(forced)
    double = lorafx.compile(LLAMA.build(dtype=torch.float64), max_adapters=1, max_rank=2, target_modules=ALL)
    assert {group.reason for group in lorafx.explain(double).groups} == {"double precision"}


def test_a_gpus_roofline_is_called_what_it_is(tmp_path):
    model = compiled(tmp_path)
    text = str(lorafx.explain(model, gpu="h100", tokens=8))
    assert "roofline of one H100" in text
    assert "not measured" in text
    assert "least time" not in str(lorafx.explain(model))
    for wrong in ({"gpu": "abacus"}, {"tokens": 0}, {"tokens": True}, {"tokens": 1.5}):
        with pytest.raises(lorafx.LorafxError, match="expected"):
            lorafx.explain(model, **wrong)


def test_html_holds_the_tables_and_the_picture(tmp_path):
    html = lorafx.explain(compiled(tmp_path))._repr_html_()
    page = ElementTree.fromstring(f"<div>{html.replace('<details open>', '<details>').replace('<br>', '<br/>')}</div>")
    assert len(page.findall(".//table")) == 2
    assert page.find(".//{http://www.w3.org/2000/svg}svg") is not None
    assert "color" not in html.partition("<svg")[0]  # the page's own, light or dark
