"""What lorafx says: bars, logs, and warnings, each of which names its cure; and nothing where all is well."""

import io
import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import lorafx
from lorafx import logs, progress
from lorafx.logs import switch_on
from lorafx.recompiles import MANY, advice
from tests.cli.conftest import CONFIG, save_adapter

ROOT = Path(__file__).parent.parent
UNCOMPILED = {"inductor": False}  # traced and rewritten, not compiled


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        "sql": save_adapter(folder / "sql"),
        "json": save_adapter(folder / "json", target_modules="all-linear", r=6),
        "words": save_adapter(folder / "words", target_modules=["embed_tokens", "q_proj"]),
    }


@pytest.fixture
def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


@pytest.fixture(autouse=True)
def forget_what_was_said():
    """Each warning comes once in a process."""
    logs.warn_once.__defaults__[0].clear()
    torch.compiler.reset()


def two(sources: dict[str, Path]) -> dict[str, Path]:
    return {name: sources[name] for name in ("sql", "json")}


IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


def test_the_normal_path_says_nothing(plain, sources, caplog):
    out, err = io.StringIO(), io.StringIO()
    with warnings.catch_warnings(record=True) as said, redirect_stdout(out), redirect_stderr(err):
        warnings.simplefilter("always")
        lorafx.compile(plain, two(sources), max_adapters=3, max_rank=8, options=UNCOMPILED)
        with torch.inference_mode():
            plain(IDS, adapter_names=["sql", None])
        plain.lora.load("third", sources["sql"])
        plain.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            adapter_names=["third", "json"],
            max_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )
    assert [str(w.message) for w in said if "lorafx" in f"{w.message} {w.filename}"] == []
    assert [r for r in caplog.records if r.name.startswith("lorafx") and r.levelno > logging.INFO] == []
    assert (out.getvalue(), err.getvalue()) == ("", "")


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x)


def test_many_graphs_name_the_input_and_the_cure():
    tensors = {"q.lora_A.weight": torch.randn(2, 8), "q.lora_B.weight": torch.randn(8, 2)}
    toy = Toy().eval()
    lorafx.compile(toy, {"a": (tensors, {"r": 2, "target_modules": ["q"]})}, options=UNCOMPILED, dynamic=False)
    with torch.inference_mode(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for length in range(2, 2 + MANY - 1):
            toy(x=torch.ones(length, 8))
        assert [w for w in said if "lorafx:" in str(w.message)] == []
        for length in range(1 + MANY, 4 + MANY):
            toy(x=torch.ones(length, 8))
    mine = [str(w.message) for w in said if "lorafx:" in str(w.message)]
    assert len(mine) == 1
    assert f"{MANY} graphs were compiled for one frame of Toy" in mine[0]
    assert "the shape of x ([2, 8], [3, 8], [4, 8], ...) changes" in mine[0]
    assert "dynamic=True" in mine[0]
    assert lorafx.explain(toy).graphs[3].shapes == {"x": "[5, 8]"}


class Breaking(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        torch._dynamo.graph_break()
        return y.relu()


def test_graphs_of_many_layers_are_no_reason_to_pad_inputs():
    """Where each layer breaks Dynamo's graph (bitsandbytes' 8 bits), each of another size has graphs of its own."""
    toy = nn.Sequential(*(Breaking(n, n + 1) for n in range(8, 10 + MANY))).eval()
    a, b = torch.randn(2, 8), torch.randn(9, 2)
    lorafx.compile(
        toy,
        {"a": ({"0.lora_A.weight": a, "0.lora_B.weight": b}, {"r": 2, "target_modules": ["0"]})},
        options=UNCOMPILED,
    )
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        toy(torch.ones(2, 8))
    frames = [graph.frame for graph in lorafx.explain(toy).graphs]
    assert max(map(frames.count, frames)) >= MANY
    assert [str(w.message) for w in said if "lorafx:" in str(w.message)] == []


def test_graphs_that_differ_in_other_than_shapes():
    assert "TORCH_LOGS=recompiles" in advice("Model", [{"x": "[1]"}] * MANY)


def test_a_bank_that_grows_names_what_reserves_room(plain, sources):
    lorafx.compile(plain, {"sql": sources["sql"]}, options=UNCOMPILED)
    with torch.inference_mode():
        plain(IDS)
    with pytest.warns(UserWarning, match=r"packed anew.*compiles once") as said:
        plain.lora.load("json", sources["json"])
    assert any("target_modules" in str(w.message) for w in said)


def test_layers_left_to_peft_are_said_once(plain, sources):
    from peft import PeftModel

    plain.model.embed_tokens.max_norm = 100.0
    model = PeftModel.from_pretrained(plain, sources["words"]).eval()
    with pytest.warns(UserWarning, match=r"1 layer\(s\) are left to PEFT, such as .*embed_tokens") as said:
        lorafx.compile(model, mode="eager")
    assert sum("left to PEFT" in str(w.message) for w in said) == 1
    with torch.inference_mode(), pytest.warns(UserWarning, match=r"adapter_names on a model with 1 layer\(s\)"):
        model(IDS, adapter_names=["default", "__base__"])


def test_logs_say_what_was_packed_and_compiled(plain, sources, caplog):
    with caplog.at_level(logging.DEBUG, "lorafx"):
        lorafx.compile(plain, two(sources), options=UNCOMPILED)
        with torch.inference_mode():
            plain(IDS, adapter_names=["sql", None], use_cache=False)
    assert re.search(r"2 adapter\(s\) packed in \d", caplog.text)
    assert re.search(r"graph compiled: 8 group\(s\) fused, 0 branch", caplog.text)
    graphs = {r.getMessage().partition(":")[0]: r.getMessage() for r in caplog.records if r.name == "lorafx.graphs"}
    assert "= torch.ops.lorafx.site" in graphs["as traced"]
    assert "= torch.ops.lorafx.routed_lora" in graphs["as rewritten"]
    assert "= torch.ops.lorafx.site" not in graphs["as rewritten"]


@pytest.mark.parametrize(
    ("setting", "levels"),
    [("info", (20, 20)), ("graph", (30, 10)), ("debug", (10, 10)), (" Info, graph,", (20, 10)), ("", (30, 30))],
)
def test_words_of_the_variable(setting, levels):
    loggers = [logging.getLogger(name) for name in ("lorafx", "lorafx.graphs")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
        switch_on(setting)
        assert tuple(logger.getEffectiveLevel() for logger in loggers) == levels
        assert len(loggers[0].handlers) - len(before[0][1]) == bool(setting)
    finally:
        for logger, (level, handlers) in zip(loggers, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers


def test_an_unknown_word_is_said():
    with pytest.warns(UserWarning, match="LORAFX_LOGS has 'graphs'; expected info, debug, graph"):
        switch_on("graphs")


FUSES = (
    "import torch, lorafx\n"
    "class M(torch.nn.Module):\n"
    "    def __init__(self):\n"
    "        super().__init__()\n"
    "        self.q, self.a, self.b = (torch.nn.Linear(*s, bias=False) for s in ((8, 8), (8, 2), (2, 8)))\n"
    "    def forward(self, x):\n"
    "        return self.q(x) + 2.0 * self.b(self.a(x))\n"
    "torch.compile(M(), backend='lorafx', options={'inductor': False})(torch.randn(3, 8))\n"
    "print('done')\n"
)


@pytest.mark.parametrize("variable", [{"LORAFX_LOGS": "graph"}, {"TORCH_LOGS": "+lorafx"}], ids=str)
def test_graphs_on_stderr_by_either_switch(variable):
    done = subprocess.run(
        [sys.executable, "-c", FUSES],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={**os.environ, **variable},
    )
    assert done.stdout == "done\n"
    assert "as traced" in done.stderr
    assert done.stderr.count("lorafx.fused_lora") == 1


class TestBars:
    @pytest.fixture(autouse=True)
    def at_once(self, monkeypatch):
        monkeypatch.setattr(progress, "DELAY", 0)

    def compiling(self, sources: dict[str, Path], model: LlamaForCausalLM) -> str:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            lorafx.compile(model, sources, mode="eager")
        assert out.getvalue() == ""
        return err.getvalue()

    def test_on_stderr_for_several_adapters(self, plain, sources):
        said = self.compiling(two(sources), plain)
        assert "lorafx: reading adapters:" in said
        assert "lorafx: packing adapters:" in said
        assert said.endswith("\r")  # gone when done

    def test_not_for_one(self, plain, sources):
        assert self.compiling({"sql": sources["sql"]}, plain) == ""

    def test_off_with_transformers_switch(self, plain, sources):
        transformers_logging.disable_progress_bar()
        try:
            assert self.compiling(two(sources), plain) == ""
        finally:
            transformers_logging.enable_progress_bar()

    def test_delayed(self, plain, sources, monkeypatch):
        monkeypatch.setattr(progress, "DELAY", 60)
        assert self.compiling(two(sources), plain) == ""

    def test_off_by_environment(self):
        code = (
            "from lorafx import progress\nprogress.DELAY = 0\nimport time\n"
            "for _ in progress.bar([1, 2, 3], 'x'): time.sleep(0.01)\n"
        )
        environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_gone_when_reading_fails(self, plain, sources):
        err = io.StringIO()
        with redirect_stderr(err), pytest.raises(lorafx.AdapterFormatError):
            lorafx.compile(plain, {"sql": sources["sql"], "bad": ROOT / "nowhere"}, mode="eager")
        assert not hasattr(plain, "lora")
        assert err.getvalue().endswith("\r")  # cleared
