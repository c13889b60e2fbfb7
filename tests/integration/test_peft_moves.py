"""Whatever moves or copies weights is followed, or refused by name; plain models and PeftModels."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import get_peft_model
from torch import nn

import lorafx

from .lockstep import INPUTS, assert_equal_now, assert_one_copy, lora_layers, nothing_traced
from .models import EAGER_GRAPH, LLAMA, assert_close, compiled_llama, config, run, three_adapters, with_peft

pytestmark = pytest.mark.filterwarnings("ignore:lorafx. the adapters are")
NAMES = ["a", "b", "__base__", "b"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = three_adapters(LLAMA, tmp_path_factory.mktemp("adapters"))
    return {name: made[name] for name in "ab"}


@pytest.fixture(params=["plain", "peft"])
def pair(request, folders):
    """(compiled, plain PeftModel), with b active on both."""
    reference = with_peft(LLAMA.build(), folders)
    reference.set_adapter("b")
    if request.param == "plain":
        model = compiled_llama(folders)
        model.lora.use("b")
    else:
        model = lorafx.compile(with_peft(LLAMA.build(), folders), options=EAGER_GRAPH)
        model.set_adapter("b")
    for each in (model, reference):
        each.requires_grad_(False)
    run(model, INPUTS)
    return model, reference


def is_peft(model):
    return bool(lora_layers(model))


def check(pair, tolerance=1e-5):
    assert_equal_now(pair, tolerance=tolerance)
    assert_equal_now(pair, NAMES, tolerance)
    if is_peft(pair[0]):
        assert_one_copy(pair[0])


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize(
    ("dtypes", "tolerance"),
    [
        ((torch.float64,), 1e-6),
        ((torch.float64, torch.float32), 1e-5),
        ((torch.float16,), 3e-3),
        ((torch.bfloat16,), 2e-2),
        ((torch.bfloat16, torch.float32), 1e-5),
    ],
    ids=str,
)
def test_another_dtype(dtypes, tolerance, pair):
    """PEFT's layers are cast with the model, and the bank with them; adapters of a plain model stay as they are."""
    for dtype in dtypes:
        for each in pair:
            each.to(dtype)
        if is_peft(pair[0]) or dtype != dtypes[-1]:
            run(pair[0], INPUTS)
    got = run(pair[0], INPUTS, NAMES)
    assert got.dtype == dtypes[-1]
    if is_peft(pair[0]):
        check(pair, tolerance)
        assert pair[0].lora.store.storage.dtype == dtypes[-1]
        mine, theirs = pair[0].state_dict(), pair[1].state_dict()
        for key, value in theirs.items():
            assert torch.equal(mine[key], value)
        lorafx.uncompile(pair[0])
        assert_equal_now(pair, NAMES, tolerance)
    else:
        assert_close(got, run(pair[1], INPUTS, NAMES), max(tolerance, 4e-2 if torch.bfloat16 in dtypes else 0))


# ------------------------------------------------------------------------------------------------ copies


def saved(model):
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
def test_copies_have_adapters_of_their_own(way, pair):
    made = COPIES[way](pair[0])
    check((made, pair[1]))
    for parameter in made.parameters():
        parameter.data.zero_()
    assert float(run(made, INPUTS).abs().sum()) == 0
    check(pair)
    lorafx.uncompile(made)
    check(pair)


def test_shallow_copy(pair):
    """Shares everything: modules, bank, what is in use; of a plain model all but the compiled call."""
    model, reference = pair
    made = copy.copy(model)
    made.lora.use("a")
    reference.set_adapter("a")
    assert_equal_now((made, reference))
    if is_peft(model):
        check((made, reference))
    else:
        with pytest.raises(lorafx.UnsupportedModelError, match=r"copy\.copy.*deepcopy"):
            run(made, INPUTS, NAMES)
    check(pair)


# ------------------------------------------------------------------------------------------------ moves


def test_base_weights_replaced(pair):
    generator = torch.Generator().manual_seed(5)
    new = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in LLAMA.build().state_dict().items()}
    with nothing_traced(pair[0]):
        for each in pair:
            root = each.get_base_model() if is_peft(each) else each
            names = {name.replace(".base_layer", ""): name for name in root.state_dict() if ".lora_" not in name}
            root.load_state_dict({names[k]: v.clone() for k, v in new.items()}, strict=False, assign=True)
        check(pair)


def test_emptied_and_filled_again(pair):
    for each in pair:
        state = {key: value.clone() for key, value in each.state_dict().items()}
        each.to_empty(device="cpu")
        root = each.get_base_model() if is_peft(each) else each
        rotary = LLAMA.build().model.rotary_emb
        root.model.rotary_emb.load_state_dict(rotary.state_dict())
        for name, buffer in rotary.named_buffers():
            root.model.rotary_emb.get_buffer(name).copy_(buffer)
        each.load_state_dict(state)
    check(pair)


def test_moved_to_meta(pair):
    pair[0].to("meta")
    with pytest.raises(lorafx.UnsupportedModelError, match=r"meta device.*uncompile"):
        run(pair[0], INPUTS)


def test_shared_memory_grad_flags_and_modes(pair):
    with nothing_traced(pair[0]):
        for each in pair:
            each.share_memory()
        check(pair)
        for each in pair:
            each.requires_grad_(False)
            each.train()
            each.eval()
        check(pair)
    for each in pair:
        root = each.get_base_model() if is_peft(each) else each
        root.gradient_checkpointing_enable({"use_reentrant": False})
    check(pair)


def test_device_map_of_one_device(folders, tmp_path):
    LLAMA.build().save_pretrained(tmp_path)
    kind = type(LLAMA.build())
    model, reference = (kind.from_pretrained(tmp_path, device_map={"": "cpu"}).eval() for _ in range(2))
    lorafx.compile(model, folders, options=EAGER_GRAPH)
    assert_equal_now((model, with_peft(reference, folders)), NAMES)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, execution_device=torch.device("cpu")),
    "disk": lambda model, folder: disk_offload(model, str(folder), execution_device=torch.device("cpu")),
    "dispatch": lambda model, folder: dispatch_model(
        model,
        {name: "cpu" if name.endswith("0") else "disk" for name in ("model.layers.0", "model.layers.1")}
        | {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"},
        main_device="cpu",
        offload_dir=str(folder),
    ),
}
REFUSED = r"(?s)offload.*one device"


@pytest.mark.parametrize("way", OFFLOADS)
def test_offloaded_before_compiling(way, folders, tmp_path):
    model = LLAMA.build()
    OFFLOADS[way](model, tmp_path)
    for given in (model, get_peft_model(model, config(target_modules=["q_proj"]))):
        with pytest.raises(lorafx.UnsupportedModelError, match=REFUSED):
            lorafx.compile(given, options=EAGER_GRAPH)
        assert not hasattr(given, "lora")
        assert model._compiled_call_impl is None


@pytest.mark.parametrize("way", OFFLOADS)
def test_offloaded_after_compiling(way, pair, tmp_path):
    model = pair[0]
    root = model.get_base_model() if is_peft(model) else model
    if is_peft(model) and way == "dispatch":
        pytest.skip("its map names no modules of PEFT's")
    OFFLOADS[way](root, tmp_path)
    with pytest.raises(lorafx.UnsupportedModelError, match=REFUSED):
        run(model, INPUTS)
    with pytest.raises(lorafx.UnsupportedModelError, match=REFUSED):
        run(model, INPUTS, NAMES)


# ------------------------------------------------------------------------------------------------ shared modules


class Shared(nn.Module):
    """One linear layer at two places."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.other = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.other(self.second(self.first(inputs).tanh()).tanh())


@pytest.mark.parametrize("target", ["first", "second"])
def test_one_module_at_two_places(target, tmp_path):
    """PEFT adapts the first of them only; hooks can't tell which is meant, so on a plain model that is refused."""
    settings, inputs = config(target_modules=[target, "other"]), torch.randn(3, 8)
    try:
        torch.manual_seed(1)
        reference = get_peft_model(Shared(), settings).eval()
    except ValueError:
        pytest.skip("PEFT refuses it")
    reference.save_pretrained(tmp_path)
    model = lorafx.compile(copy.deepcopy(reference), options=EAGER_GRAPH)
    with torch.no_grad():
        assert_close(model(inputs), reference(inputs))
        plain = Shared()
        adapted = [name for name, module in reference.get_base_model().named_modules() if hasattr(module, "lora_A")]
        if "first" in adapted:
            with pytest.raises(lorafx.UnsupportedModelError, match=r"first.*second.*same module"):
                lorafx.compile(plain, str(tmp_path), options=EAGER_GRAPH)
            assert not hasattr(plain, "lora")
            assert plain._compiled_call_impl is None
        else:
            lorafx.compile(plain, str(tmp_path), options=EAGER_GRAPH)
            assert_close(plain(inputs), reference(inputs))
