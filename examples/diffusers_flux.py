"""A diffusers pipeline with its transformer compiled in place: LoRAs come, go, are weighted and fused as ever."""

import torch
from common import mode, scratch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.utils import logging
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import lorafx

logging.set_verbosity_error()
QKV = ["to_q", "to_k", "to_v"]
LORAS = {"ink": (4, QKV), "oil": (8, [*QKV, "proj_mlp"]), "pixel": (6, ["to_q"])}


def tiny_pipeline() -> FluxPipeline:
    torch.manual_seed(0)
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
    widths = {"patch_size": 1, "in_channels": 4, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    parts = dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    parts["transformer"] = FluxTransformer2DModel(num_layers=1, num_single_layers=1, **heads, **widths).eval()
    parts["vae"] = AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1).eval()
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


for seed, (name, (rank, layers)) in enumerate(LORAS.items()):
    transformer = tiny_pipeline().transformer
    torch.manual_seed(seed)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False))
    FluxPipeline.save_lora_weights(f"{scratch.name}/{name}", get_peft_model_state_dict(transformer))

torch.manual_seed(1)
prompt = {"prompt_embeds": torch.randn(2, 6, 32), "pooled_prompt_embeds": torch.randn(2, 32)}
size = {"height": 8, "width": 8, "num_inference_steps": 2, "output_type": "latent"}
pipe, reference = tiny_pipeline(), tiny_pipeline()


def draw(pipe: FluxPipeline, **scale: dict) -> torch.Tensor:
    return pipe(**prompt, **size, **scale, generator=torch.Generator().manual_seed(2)).images


base = draw(reference)
for each in (pipe, reference):
    for name in ("ink", "oil"):
        each.load_lora_weights(f"{scratch.name}/{name}", adapter_name=name)
lorafx.compile(pipe.transformer, max_adapters=3, max_rank=8, mode=mode())

STEPS = {
    "set_adapters": lambda p: p.set_adapters(["ink", "oil"], adapter_weights=[0.5, 0.7]),
    "one of them": lambda p: p.set_adapters("ink"),
    "load_lora_weights": lambda p: p.load_lora_weights(f"{scratch.name}/pixel", adapter_name="pixel"),
    "disable_lora": lambda p: p.disable_lora(),
    "enable_lora": lambda p: p.enable_lora(),
    "delete_adapters": lambda p: p.delete_adapters("oil"),
    "fuse_lora": lambda p: p.fuse_lora(),
    "unfuse_lora": lambda p: p.unfuse_lora(),
}
for step, apply in STEPS.items():
    scale = {"joint_attention_kwargs": {"scale": 0.6}} if step == "one of them" else {}
    for each in (pipe, reference):
        apply(each)
    got, want = draw(pipe, **scale), draw(reference, **scale)
    assert torch.allclose(got, want, atol=1e-4)
    assert (step == "disable_lora") == torch.allclose(got, base, atol=1e-4)
    report = lorafx.explain(pipe.transformer)
    print(f"{step:18} {abs(got - base).max():.2f} from the base's; {len(report.graphs)} graph(s); {report.uncompiled}")
assert len(report.graphs) <= 1
assert not report.retraces

lorafx.uncompile(pipe.transformer)
assert torch.equal(draw(pipe), draw(reference))
print("uncompiled, the pipeline goes on, with diffusers' LoRAs")
