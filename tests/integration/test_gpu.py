"""What only a GPU can show: the kernels inside Inductor's code, CUDA graphs, generate, and moving between devices.

Skipped where there is none. Each result is compared with plain PEFT's on the same GPU.
"""

from __future__ import annotations

import threading

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lorafx

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

CONFIGS = {
    "one": {"r": 8, "target_modules": "all-linear"},
    "two": {"r": 40, "lora_alpha": 20, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "three": {"r": 3, "rank_pattern": {"k_proj": 17}, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
NAMES = ["one", None, "three", "two", "two"]
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2}  # a layer's rounding in bfloat16 is 4e-3


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=208,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        pad_token_id=0,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval().to("cuda", dtype)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Adapters on disk; "again" has the layers of "one" and other weights."""
    found = {}
    for seed, (name, config) in enumerate([*CONFIGS.items(), ("again", CONFIGS["one"])]):
        model = llama().cpu()
        torch.manual_seed(seed + 1)
        found[name] = str(tmp_path_factory.mktemp(name))
        get_peft_model(model, LoraConfig(**config, init_lora_weights=False)).save_pretrained(found[name])
    return found


def peft(folders: dict[str, str], dtype: torch.dtype = torch.float32, **names: str) -> PeftModel:
    """Plain PEFT with the adapters of CONFIGS; ``names``: another folder for one of them."""
    model = None
    for name in CONFIGS:
        path = folders[names.get(name, name)]
        if model is None:
            model = PeftModel.from_pretrained(llama(dtype), path, adapter_name=name)
        else:
            model.load_adapter(path, adapter_name=name)
    return model.eval()


def tokens(rows: int, columns: int) -> torch.Tensor:
    return torch.randint(3, 96, (rows, columns), generator=torch.Generator().manual_seed(1)).cuda()


def logits(model, ids: torch.Tensor, names=NAMES) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, adapter_names=["__base__" if n is None else n for n in names]).logits.clone()


def assert_close(got: torch.Tensor, want: torch.Tensor, bound: float) -> None:
    for row, (one, other) in enumerate(zip(got.double(), want.double(), strict=True)):
        assert (one - other).norm() <= bound * other.norm(), f"row {row}"


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_mixed_batches_and_swaps(mode, dtype, folders):
    """Prefill and decode shapes; names, then weights, change between calls, and nothing recompiles."""
    plain, other = peft(folders, dtype), peft(folders, dtype, one="again")
    model = lorafx.compile(llama(dtype), {name: folders[name] for name in CONFIGS}, mode=mode)
    for ids in (tokens(5, 9), tokens(5, 1)):
        for _ in range(3):  # a CUDA graph is recorded at the second call, and run at the third
            assert_close(logits(model, ids), logits(plain, ids), BOUNDS[dtype])
    compiled = len(lorafx.explain(model).graphs)
    turned = [*NAMES[2:], *NAMES[:2]]
    for ids in (tokens(5, 9), tokens(5, 1)):
        assert_close(logits(model, ids, turned), logits(plain, ids, turned), BOUNDS[dtype])
        base = [None] * 5
        assert_close(logits(model, ids, base), logits(plain, ids, base), BOUNDS[dtype])
    model.lora.replace("one", folders["again"])
    for ids in (tokens(5, 9), tokens(5, 1)):
        assert_close(logits(model, ids), logits(other, ids), BOUNDS[dtype])
    report = lorafx.explain(model)
    assert len(report.graphs) == compiled
    assert {group.lowering for group in report.groups} == {"triton"}
    assert report.graphs[0].passes.after["lorafx.routed_lora"] == 8


@pytest.mark.parametrize("sizes", [(1, 5, 3, 8), (5, 70, 2)], ids=str)
def test_batches_of_several_sizes(sizes, folders):
    """A decode step in 16 bits has the layers folded in, also where one graph serves every size."""
    plain = peft(folders, torch.bfloat16)
    model = lorafx.compile(llama(torch.bfloat16), {name: folders[name] for name in CONFIGS})
    for rows in sizes:
        names = (NAMES * rows)[:rows]
        ids = tokens(rows, 1)
        assert_close(logits(model, ids, names), logits(plain, ids, names), BOUNDS[torch.bfloat16])
    report = lorafx.explain(model)
    assert len(report.graphs) <= 2
    assert all(graph.passes.folded == 14 for graph in report.graphs)


def test_peft_model(folders):
    """Adapters that PEFT holds: its parameters become views of the bank."""
    plain, model = peft(folders), lorafx.compile(peft(folders))
    ids = tokens(3, 6)
    for name in (*CONFIGS, "one"):
        plain.set_adapter(name)
        model.set_adapter(name)
        with torch.no_grad():
            assert_close(model(ids).logits, plain(ids).logits, BOUNDS[torch.float32])
    with torch.no_grad(), plain.disable_adapter(), model.disable_adapter():
        assert_close(model(ids).logits, plain(ids).logits, BOUNDS[torch.float32])
    assert lorafx.explain(model).recompiles == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(cache, folders):
    """The tokens of each row are those of the row alone under its own adapter with plain PEFT."""
    model = lorafx.compile(llama(), {name: folders[name] for name in CONFIGS})
    ids = tokens(5, 6)
    settings = {"max_new_tokens": 8, "do_sample": False}
    extra = {"cache_implementation": "static"} if cache == "static" else {}
    got = model.generate(ids, adapter_names=NAMES, **settings, **extra)
    plain = peft(folders)
    for row, name in enumerate(NAMES):
        alone = ids[row : row + 1]
        if name is None:
            with plain.disable_adapter():
                want = plain.generate(input_ids=alone, **settings)
        else:
            plain.set_adapter(name)
            want = plain.generate(input_ids=alone, **settings)
        assert torch.equal(got[row], want[0]), name
    report = lorafx.explain(model)
    assert report.graphs, "generate ran nothing that was compiled"


def test_there_and_back(folders):
    """To the CPU, where ATen takes over, and back to the kernels."""
    model = lorafx.compile(llama(), {name: folders[name] for name in CONFIGS})
    plain, ids = peft(folders), tokens(5, 4)
    want = logits(plain, ids)
    assert_close(logits(model, ids), want, 1e-5)
    model.cpu()
    assert_close(logits(model, ids.cpu()).cuda(), want, 1e-5)
    assert model.lora.store.storage.device.type == "cpu"
    model.cuda()
    assert_close(logits(model, ids), want, 1e-5)


def test_captured_by_hand(folders):
    """A CUDA graph around the call: what is in use is fixed, what the weights are is not."""
    model = lorafx.compile(llama(), {name: folders[name] for name in CONFIGS})
    ids = tokens(5, 1)
    model.lora.use(NAMES)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model(ids)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(ids).logits
    graph.replay()
    assert_close(out, logits(peft(folders), ids), 1e-5)
    model.lora.replace("one", folders["again"])
    graph.replay()
    assert_close(out, logits(peft(folders, one="again"), ids), 1e-5)


@pytest.mark.parametrize("streams", [False, True], ids=["one stream", "a stream each"])
def test_threads(streams, folders):
    """Four threads, each with names of its own, while an adapter is replaced: old or new, never a mix."""
    model = lorafx.compile(llama(), {name: folders[name] for name in CONFIGS})
    ids, lists = tokens(5, 3), [NAMES[i:] + NAMES[:i] for i in range(4)]
    before, after = peft(folders), peft(folders, one="again")
    want = [(logits(before, ids, names), logits(after, ids, names)) for names in lists]
    logits(model, ids)
    torch.cuda.synchronize()  # the threads' streams wait for nothing
    wrong: list[str] = []

    def work(i: int) -> None:
        stream = torch.cuda.Stream() if streams else torch.cuda.current_stream()
        with torch.cuda.stream(stream):
            for _ in range(40):
                got = logits(model, ids, lists[i])
                if not any((got - w).norm() <= 1e-5 * w.norm() for w in want[i]):
                    wrong.append(f"thread {i}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for turn in range(20):
        model.lora.replace("one", folders["again" if turn % 2 == 0 else "one"])
    for thread in threads:
        thread.join()
    assert not wrong


def test_static_cache_with_cuda_graphs(folders):
    """Decode as serving does it: a static cache, CUDA graphs, and another adapter each time."""
    model = lorafx.compile(llama(), {name: folders[name] for name in CONFIGS}, mode="reduce-overhead")
    plain, ids = peft(folders), tokens(2, 1)
    for name in ("one", "two", None, "three", "one"):
        outs = []
        for one in (model, plain):
            config = one.config
            cache = StaticCache(config=config, max_cache_len=32)
            cache.early_initialization(2, 2, 32, torch.float32, torch.device("cuda"))
            names = [name or "__base__"] * 2
            with torch.no_grad():
                for _ in range(3):
                    out = one(input_ids=ids, past_key_values=cache, adapter_names=names).logits.clone()
            outs.append(out)
        assert_close(outs[0], outs[1], 1e-5)
