"""diffusers' models: adapters of their own verbs, and the scale that a call gives."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig

import lorafx

from .models import EAGER_GRAPH, assert_close, difference

diffusers = pytest.importorskip("diffusers", reason="the diffusers package is not installed")
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "conv"]
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


def bare():
    torch.manual_seed(0)
    return (
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            layers_per_block=1,
            block_out_channels=(16,),
            norm_num_groups=8,
            cross_attention_dim=16,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("CrossAttnUpBlock2D",),
        )
        .eval()
        .double()
    )  # so that a small delta stands clear of rounding


def unet(*targets):
    """With an adapter of diffusers' for each list of targets: a, b, ..."""
    model = bare()
    torch.manual_seed(1)
    for name, layers in zip("ab", targets, strict=False):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False)
        model.add_adapter(config, adapter_name=name)
    return model


@torch.no_grad()
def sample(model, scale=None):
    noise = torch.Generator().manual_seed(3)
    latents, text = (torch.randn(2, *size, generator=noise).double() for size in ((4, 8, 8), (5, 16)))
    scales = {"cross_attention_kwargs": None if scale is None else {"scale": scale}}  # as a pipeline does
    return model(latents, torch.tensor([3, 9]), encoder_hidden_states=text, **scales).sample


def assert_same_delta(model, reference, base, scale=None):
    assert_close(sample(model, scale) - base, sample(reference, scale) - base, 1e-7)


@pytest.fixture(scope="module")
def base():
    return sample(bare())


@pytest.fixture(scope="module")
def pair():
    reference, model = (unet(ATTENTION, ["to_k"]) for _ in range(2))
    return lorafx.compile(model, options=EAGER_GRAPH), reference


def test_verbs_and_scales_compile_one_graph(pair, base):
    """Dynamo guards on nothing that they change, though diffusers leaves its layers in training mode."""
    model, reference = pair
    for names, weights in ((["a", "b"], [0.5, -0.7]), (["b"], [0.3]), (["a"], [1.5])):
        for each in pair:
            each.set_adapters(names, weights)
        for scale in (None, 0.2, 1.0, -3):
            assert_same_delta(model, reference, base, scale)
        assert difference(sample(model, 0.2), sample(model)) > 1e-3
    for each in pair:
        each.delete_adapters("a")
        each.set_adapters(["b"], [0.8])
    assert_same_delta(model, reference, base)
    assert len(lorafx.explain(model).graphs) == 1


def test_scale_of_nothing_leaves_the_weights(pair, base):
    model, _ = pair
    before = sample(model)
    assert_close(sample(model, 0.0), base, 1e-12)
    assert torch.equal(sample(model), before)


def test_scale_of_a_list_of_rows():
    """Weights that model.lora.use gave are scaled too, on a model that PEFT knows nothing of."""
    made = unet(ATTENTION)
    state = {k: v for k, v in made.state_dict().items() if "lora_" in k}
    state = {f"base_model.model.{k.replace('.a.weight', '.weight')}": v for k, v in state.items()}
    model = lorafx.compile(bare(), {"a": (state, made.peft_config["a"])}, mode="eager")
    base = sample(bare())
    model.lora.use([None, "a"])
    assert_close(sample(model, 0.3)[1] - base[1], (sample(made, 0.3) - base)[1], 1e-7)
    assert_close(sample(model, 0.3)[0], base[0], 1e-12)


def test_convolutions(base):
    """All that kohya's and LyCORIS' "conv" targets: one graph, whatever the adapter and the scale."""
    model, reference = (unet([*ATTENTION, *CONVOLUTIONS], ["conv_in", "to_k"]) for _ in range(2))
    lorafx.compile(model, options=EAGER_GRAPH)
    for names, weights in ((["a"], [1.0]), (["a", "b"], [0.5, -0.7])):
        for each in (model, reference):
            each.set_adapters(names, weights)
        for scale in (None, 0.4):
            assert_same_delta(model, reference, base, scale)
    report = lorafx.explain(model)
    assert not report.skipped
    assert len(report.graphs) == 1
    assert sum(group.op == "routed_conv2d" for group in report.groups) >= 10


def test_files_with_convolutions(base, tmp_path):
    """diffusers' own file on a plain model, a row of each."""
    made = unet([*ATTENTION, *CONVOLUTIONS])
    made.save_lora_adapter(str(tmp_path), adapter_name="a", weight_name="a.safetensors")
    model = lorafx.compile(bare(), {"a": str(tmp_path / "a.safetensors")}, mode="eager")
    model.lora.use([None, "a"])
    got = sample(model)
    assert_close(got[1] - base[1], (sample(made) - base)[1], 1e-7)
    assert_close(got[0], base[0], 1e-12)


def test_scale_with_layers_left_to_peft(base):
    """Adapters of another dtype are PEFT's, so diffusers itself scales all of them, uncompiled."""
    model, reference = (unet([*ATTENTION, "conv1"]) for _ in range(2))
    for each in (model, reference):
        for path, layer in each.named_modules():
            if path.endswith("conv1"):
                layer.lora_A.float(), layer.lora_B.float()
    lorafx.compile(model, options=EAGER_GRAPH)
    assert lorafx.explain(model).skipped
    for scale in (None, 0.4):
        assert_same_delta(model, reference, base, scale)


def test_scale_of_a_fused_adapter(base):
    model, reference = (unet(ATTENTION) for _ in range(2))
    lorafx.compile(model, mode="eager")
    for each in (model, reference):
        each.fuse_lora()
    assert_same_delta(model, reference, base, 0.4)
    for each in (model, reference):
        each.unfuse_lora()
    assert_same_delta(model, reference, base, 0.4)


def test_adapters_of_both_kinds_are_refused(tmp_path):
    made = unet(ATTENTION)
    state = {f"base_model.model.{k.replace('.a.weight', '.weight')}": v for k, v in made.state_dict().items()}
    state = {k: v for k, v in state.items() if "lora_" in k}
    model = lorafx.compile(bare(), {"a": (state, made.peft_config["a"])}, mode="eager")
    with pytest.raises(lorafx.UnsupportedModelError, match="load_lora_adapter would put PEFT's layers"):
        model.load_lora_adapter(str(tmp_path))
