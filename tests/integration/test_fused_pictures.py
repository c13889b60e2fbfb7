"""diffusers' ``fuse_qkv_projections``, which by itself drops adapters that are live, before and after compiling."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict

import lorafx

from .models import EAGER_GRAPH, assert_close, difference
from .test_diffusers import bare, sample

diffusers = pytest.importorskip("diffusers", reason="the diffusers package is not installed")
UNET = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=["to_q", "to_k", "to_v", "to_out.0"],
    init_lora_weights=False,
    rank_pattern={"to_k": 2, "to_v": 7},
)
FLUX = LoraConfig(
    r=3,
    target_modules=["to_q", "to_k", "to_v", "add_q_proj", "add_v_proj", "proj_mlp"],
    init_lora_weights=False,
    rank_pattern={"add_q_proj": 5},
)


def flux():
    torch.manual_seed(0)
    return (
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )
        .eval()
        .double()
    )


@torch.no_grad()
def draw(model):
    noise = torch.Generator().manual_seed(3)
    latents, text, pooled = (torch.randn(2, *size, generator=noise).double() for size in ((16, 4), (8, 32), (32,)))
    return model(
        hidden_states=latents,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=torch.tensor([0.3, 0.7]).double(),
        img_ids=torch.randn(16, 3, generator=noise),
        txt_ids=torch.zeros(8, 3),
        return_dict=False,
    )[0]


EAGER = {"mode": "eager"}
HOW = {"before": EAGER, "after": EAGER, "between calls": {"options": EAGER_GRAPH}}  # tracing takes seconds
KINDS = {"unet": (bare, UNET, sample), "flux": (flux, FLUX, draw)}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


def with_adapters(kind):
    """PEFT's layers on the model, by diffusers' own verb; two adapters, the first active."""
    build, config, _ = kind
    model = build()
    torch.manual_seed(1)
    for name in "ab":
        model.add_adapter(copy.deepcopy(config), adapter_name=name)
    model.set_adapters(["a"], [1.0])
    return model


def weights(kind, name):
    model = with_adapters(kind)
    config = copy.deepcopy(kind[1])
    return get_peft_model_state_dict(model, adapter_name=name), config


def delta(kind, name):
    """What the adapter adds, unfused, in double precision, as PEFT computes it."""
    build, _, call = kind
    reference = with_adapters(kind)
    reference.set_adapters([name], [1.0])
    return call(reference) - call(build())


def test_diffusers_itself_drops_them(kind):
    """What this is about: should it end, the tests below can't tell anything."""
    model, call = with_adapters(kind), kind[2]
    before = call(model)
    model.fuse_qkv_projections()
    assert difference(call(model), before) > 1e-3


@pytest.mark.parametrize("when", HOW)
def test_files_of_a_plain_model(kind, when):
    build, _, call = kind
    base, model = call(build()), build()
    if when == "before":
        model.fuse_qkv_projections()
    lorafx.compile(model, {name: weights(kind, name) for name in "ab"}, **HOW[when])
    if when == "between calls":
        model.lora.use("a")
        assert_close(call(model) - base, delta(kind, "a"), 1e-6)
    if when != "before":
        model.fuse_qkv_projections()
    for name in "ab":
        model.lora.use(name)
        assert_close(call(model) - base, delta(kind, name), 1e-6)
    model.lora.use(["a", None])
    got = call(model)
    model.lora.use(None)
    assert torch.equal(got[1], call(model)[1])
    assert_close(got[0] - base[0], delta(kind, "a")[0], 1e-6)
    if HOW[when] is not EAGER:
        return
    model.unfuse_qkv_projections()
    model.lora.use("b")
    assert_close(call(model) - base, delta(kind, "b"), 1e-6)


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_of_peft(kind, when):
    """PEFT's own verbs keep working; its parameters are views of the bank."""
    build, _, call = kind
    base, model = call(build()), with_adapters(kind)
    if when == "before":
        model.fuse_qkv_projections()
    lorafx.compile(model, mode="eager")
    if when == "after":
        assert_close(call(model) - base, delta(kind, "a"), 1e-6)
        model.fuse_qkv_projections()
    for name in "ab":
        model.set_adapters([name], [1.0])
        assert_close(call(model) - base, delta(kind, name), 1e-6)
    model.disable_adapters()
    assert_close(call(model), base, 1e-9)
    model.enable_adapters()
    assert_close(call(model) - base, delta(kind, "b"), 1e-6)
    copied = copy.deepcopy(model)
    assert_close(call(copied) - base, delta(kind, "b"), 1e-6)
    lorafx.uncompile(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("when", ["before", "after"])
def test_dora_on_parts_that_are_modules_too(kind, when):
    check_dora(kind, when)


@pytest.mark.parametrize("when", ["before", "after"])
def test_dora_of_pefts_layers_on_fused_parts(kind, when):
    build, config, call = kind
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(build())
        models[-1].add_adapter(LoraConfig(**{**config.to_dict(), "use_dora": True}), adapter_name="a")
        with torch.no_grad():
            for name, parameter in models[-1].named_parameters():
                if "magnitude" in name:
                    parameter.mul_(torch.linspace(0.7, 1.6, parameter.numel()))
    model, reference = models
    base = call(build())
    if when == "before":
        model.fuse_qkv_projections()
    lorafx.compile(model, mode="eager")
    if when == "after":
        model.fuse_qkv_projections()
    assert_close(call(model) - base, call(reference) - base, 1e-6)


def test_dora_on_parts_in_a_graph():
    check_dora(KINDS["flux"], "between calls")


def check_dora(kind, when):
    """Norms are those of the part's own weight, which stands beside the fused one."""
    build, config, call = kind
    config = copy.deepcopy(config)
    config.use_dora = True
    reference = build()
    torch.manual_seed(1)
    reference.add_adapter(config, adapter_name="a")
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "magnitude" in name:
                parameter.mul_(torch.linspace(0.7, 1.6, parameter.numel()))
    base, source = call(build()), (get_peft_model_state_dict(reference, adapter_name="a"), config)
    model, want = build(), call(reference) - base
    if when == "before":
        model.fuse_qkv_projections()
    lorafx.compile(model, {"a": source, "b": weights(kind, "b")}, **HOW[when])
    if when != "before":
        model.lora.use("a")
        assert_close(call(model) - base, want, 1e-6)
        model.fuse_qkv_projections()
    model.lora.use("a")
    assert_close(call(model) - base, want, 1e-6)
    model.lora.use(["a", None])
    got = call(model)
    assert_close(got[0] - base[0], want[0], 1e-6)
    assert_close(got[1], base[1], 1e-9)
    model.unfuse_qkv_projections()
    model.lora.use("b")
    assert_close(call(model) - base, delta(kind, "b"), 1e-6)


def test_a_copy_notices_too(kind):
    build, _, call = kind
    base = call(build())
    model = copy.deepcopy(lorafx.compile(build(), {"a": weights(kind, "a")}, mode="eager"))
    model.fuse_qkv_projections()
    assert_close(call(model) - base, delta(kind, "a"), 1e-6)


def test_what_only_peft_computes_is_refused_beside_fused_layers(kind):
    call = kind[2]
    model = with_adapters(kind)
    lorafx.compile(model, mode="eager")
    model.fuse_qkv_projections()
    call(model)
    with pytest.raises(lorafx.UnsupportedModelError, match="its adapters are being trained"), torch.enable_grad():
        call.__wrapped__(model)
    model.fuse_lora(adapter_names=["a"])
    with pytest.raises(lorafx.UnsupportedModelError, match="merged into the base weights"):
        call(model)
    model.unfuse_lora()
    call(model)
