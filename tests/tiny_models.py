"""Tiny models of any type that transformers knows, from its config class alone, and what to feed them.

No code per model: rules on the names of config fields and of forward's arguments, and one small table of values.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, ROWS, TOKENS, HEADS, HEAD_DIM, WIDTH = 256, 3, 12, 4, 16, 64
MOST_PARAMETERS = 80_000_000
# the mappings that are asked for a model's class, in this order; the rest of transformers' after them
FIRST = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "IMAGE_TEXT_TO_TEXT", "")

FIXED: Mapping[str, Any] = {  # fields that no rule below gets right
    "num_kv_shared_layers": 0,
    "n_group": 2,
    "topk_group": 1,
    "n_groups": 1,
    "first_k_dense_replace": 0,
    "num_codebooks": 2,
    "max_source_positions": 20,
    "num_frames": 2,
    "image_embedding_size": 4,
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "use_mamba_kernels": False,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_ssm": 128,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_eos_token_id": None,
}
RESNET = {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 16, 16, 16], "depths": [1, 1, 1, 1]}
RESNET |= {"out_features": ["stage2", "stage3", "stage4"]}  # for backbones of the package timm
MISSING: Mapping[str, Any] = {  # what large models' configs leave out, though a model needs it
    "vocab_size": VOCABULARY,
    "head_dim": HEAD_DIM,
    "num_key_value_heads": HEADS,
    "num_experts_per_tok": 2,
    "prediction_length": 8,
    "attn_layer_indices": [1],
    "n_routed_experts": 4,
    "pad_token_id": 0,
    "mask_token_id": 9,
    "image_token_index": VOCABULARY - 6,
    "default_language": "en_XX",
}
COUNT = re.compile(r"(^|_)(n_layers?|layers?|depth|blocks|num_layers\w*)$")
COUNTS = re.compile(r"(^|_)(depths?|layers|blocks|num_blocks|layer_nums|num_layers)$")
KINDS_EVERY = re.compile(r"(period|interval|every_n\w*|frequency|_freq|pattern|_step)$")
IS_HEADS = re.compile(r"(^|_)(n?_?heads?|num_heads|nhead)($|_)(?!.*(dim|size|width))")
OF_HEAD = re.compile(
    r"head_(dim|size|width)|_headdim|^d_kv$|^attention_(key|value)_length$|mrope_section|axes_dim|^key_dim"
)
IS_WIDTH = re.compile(
    r"(hidden|embd|embed|emb|dim|dims|width|size|sizes|channels?|inner|ffn?|model|rank|features|filters)(_|$|s$)"
)
NO_WIDTH = re.compile(
    r"(image|patch|tile|window|kernel|chunk|crop|grid|stride|conv_width|d?conv_size|group|block_size|sample|batch|pool|"
    r"tubelet|cache|stft|spec_size|type_vocab|shortest|longest|temporal|vote|num_mel|input_channels|in_channels|in_chans|"
    r"num_channels|out_channels_rgb|context_size|size_divis|buffer|look|local_size|feature_layer|depth_multiplier|factor)"
)
OF_TEXT = re.compile(r"^out_|proj|output|text|llm|encoder_hidden|visual")
IS_EXPERTS = re.compile(r"(num|n)_(\w*_)?experts$|num_experts\w*(?<!tok)$")
IS_TOP_K = re.compile(
    r"experts_per_tok|^(moe_)?top_?k$|num_selected_experts|experts_top_k|num_experts_per_tok|moe_k$|experts_per_token"
)


# ------------------------------------------------------------------------------------------------ configs


def types() -> list[str]:
    """Every model type that has a config and that an automatic class of transformers can make a model of."""
    return [name for name in CONFIG_MAPPING if class_names(name)]


def class_names(model_type: str) -> list[str]:
    """Names of classes for this type, the most telling first."""
    mappings = [f"MODEL_FOR_{kind}_MAPPING_NAMES" if kind else "MODEL_MAPPING_NAMES" for kind in FIRST]
    mappings += [n for n in vars(modeling_auto) if re.fullmatch("MODEL_.*MAPPING_NAMES", n) and n not in mappings]
    found = [getattr(modeling_auto, name, {}).get(model_type) for name in mappings]
    return list(dict.fromkeys(n for name in found if name for n in ([name] if isinstance(name, str) else name)))


def shrunk(
    config: Mapping[str, Any], recipe: int = 0, layers: int = 0, text: tuple[int, int] | None = None
) -> dict[str, Any]:
    """These fields of a config, and of those inside it, as those of a tiny model that is cut as the large one is.

    recipe: 0, widths and heads keep their proportions; 1, every width is the same; 2, the size of a head stays
    text: the width of the language model beside this part, before and now
    """
    layers = layers or (2 if recipe else 1)
    words = config.get("text_config") or config.get("llm_config")
    if isinstance(words, Mapping) and _is_int(words.get("hidden_size")):
        text = (words["hidden_size"], shrunk(words, recipe)["hidden_size"])
    lengths = {value for key, value in config.items() if COUNT.search(key) and _is_int(value) and value > 3}
    listed = [v for k, v in config.items() if len_of(k, v) in lengths]
    kinds = next((v for v in listed if isinstance(v[0], str)), [])
    cycles = [len(v) for k, v in config.items() if k.endswith("_types") and 1 < (len_of(k, v) or 0) < 5]
    layers = max([layers, min(len(set(kinds)), 4), *cycles])
    kept = _one_of_each(kinds, layers)  # the places of these layers, where they differ
    scale = _Scale(config, recipe)
    made: dict[str, Any] = {}
    token = itertools.count(VOCABULARY - 1, -1)
    for key, value in config.items():
        if key in ("transformers_version", "architectures", "id2label", "label2id", "dtype", "torch_dtype"):
            continue
        if key in ("out_features", "stage_names", "out_indices"):  # of stages that are no more
            continue
        if key in FIXED and value is not None:
            made[key] = FIXED[key]
        elif value is None and key in MISSING:
            made[key] = MISSING[key]
        elif key == "per_layer_config":
            made[key] = {
                new: shrunk(value.get(old) or value.get(str(old)) or {}, recipe) for new, old in enumerate(kept)
            }
        elif isinstance(value, Mapping) and value.get("model_type") == "timm_backbone":
            made[key] = RESNET
        elif isinstance(value, Mapping) and (value.get("model_type") or "config" in key):
            made[key] = shrunk(value, recipe, layers, text)
        elif isinstance(value, Mapping):
            made[key] = _of_rope(value, scale)
        elif text and value == text[0] and OF_TEXT.search(key):
            made[key] = text[1]
        elif isinstance(value, (list, tuple)) and value and all(map(_is_int, value)) and COUNTS.search(key):
            made[key] = [min(v, 1) for v in value[: layers if len(value) in lengths else None]]
        elif len_of(key, value) in lengths:
            places = kept if len(value) == len(kinds) else _one_of_each(value, layers)
            made[key] = [_field(key, value[i], scale, layers, token) for i in places]
            made[key] = "".join(made[key]) if isinstance(value, str) else made[key]
        elif isinstance(value, (list, tuple)):
            made[key] = [_field(key, v, scale, layers, token, inside=True) for v in value]
        else:
            made[key] = _field(key, value, scale, layers, token)
    if recipe == 1 and "use_cache" in made:
        made["use_cache"] = False
    return made


class _Scale:
    """By how much a config's widths are divided, so that heads times head size still is the width."""

    def __init__(self, config: Mapping[str, Any], recipe: int) -> None:
        self.recipe = recipe
        numbers = {k: v for k, v in config.items() if _is_int(v)}
        names = ("embed_dim", "hidden_size", "d_model", "n_embd", "dim", "hidden_dim", "width", "encoder_hidden_size")
        hidden = next((numbers[name] for name in names if name in numbers), None)
        heads = [v for k, v in numbers.items() if IS_HEADS.search(k) and not re.search("kv|key|value|shared", k)]
        self.heads = max(heads[0] / HEADS, 1) if heads and heads[0] else 1
        size = next((v for k, v in numbers.items() if k in ("head_dim", "d_kv", "attention_head_dim")), None)
        size = size or (hidden // heads[0] if heads and hidden and heads[0] else None)
        self.of_head = max(size / HEAD_DIM, 1) if size and recipe < 2 else 1
        self.width = self.heads * self.of_head if heads and size else max((hidden or WIDTH) / WIDTH, 1)
        stages = any(IS_HEADS.search(k) and isinstance(v, (list, tuple)) for k, v in config.items())
        if stages or not (heads or hidden):
            self.width = self.of_head = 4  # widths that grow from stage to stage, as the numbers of heads do


def _field(key: str, value: Any, scale: _Scale, layers: int, token: Iterator[int], inside: bool = False) -> Any:
    """One field's value for a tiny model."""
    if not _is_int(value) or value < 0:
        return value
    if re.search(r"(token|start|end|begin|eos|bos|pad)\w*_(id|index|ids)$|_token_id|_token$", key):
        return value if value < 10 else next(token)
    if re.search(r"vocab\w*size|^vocabulary|num_embeddings$", key) and value > VOCABULARY:
        return VOCABULARY
    if COUNT.search(key) and not inside:
        return min(value, layers)
    if re.search(r"position|n_ctx|max_(seq|text|len)|seq_?len", key):
        return min(value, 512)
    if IS_TOP_K.search(key):
        return min(value, 2)
    if IS_EXPERTS.search(key):
        return min(value, 4)
    if KINDS_EVERY.search(key):
        return min(value, layers)
    if key.endswith("_offset"):
        return min(value, layers - 1)
    if key == "image_size":
        return min(value, 64)
    if key == "window_size" and value < 20:
        return min(value, 2)
    if re.search(r"state_size|ssm_state|d_state|mamba_d_state", key):
        return min(value, 16)
    if IS_HEADS.search(key) and not OF_HEAD.search(key):
        return value if inside else max(1, round(value / scale.heads))
    if OF_HEAD.search(key):
        least = 1 if inside else 8
        return _even(value / scale.of_head, least)
    if re.search(r"num_groups|norm_groups", key):
        return min(value, 4)
    if IS_WIDTH.search(key) and not NO_WIDTH.search(key) and value >= 32:
        return WIDTH if scale.recipe == 1 and not inside else _even(value / scale.width, 8)
    return value


def _of_rope(fields: Mapping[str, Any], scale: _Scale) -> dict[str, Any]:
    """A dict that is no config: rope's sections are cut as a head is."""
    return {
        k: [max(1, round(i / scale.of_head)) for i in v]
        if k == "mrope_section"
        else _of_rope(v, scale)
        if isinstance(v, Mapping)
        else v
        for k, v in fields.items()
    }


def _one_of_each(values: Sequence[Any], count: int) -> list[int]:
    """Where ``count`` of these are, with as many different ones as there is room for, in their order."""
    first = sorted({str(v): i for i, v in reversed(list(enumerate(values)))}.values())[:count]
    first += [i for i in range(len(values)) if i not in first][: count - len(first)]
    return sorted(first)


def len_of(key: str, value: Any) -> int | None:
    """How many items it has that may be one for each layer; letters count where they are a pattern."""
    if isinstance(value, str):
        return len(value) if "pattern" in key else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _even(value: float, least: int) -> int:
    """The next multiple of ``least``, at least one."""
    return max(least, round(value / least) * least)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ models


def build(model_type: str, name: str, recipe: int, seed: int = 0) -> nn.Module:
    """The model, the same weights each time, in eval mode. Whatever transformers raises; ValueError: not tiny"""
    import transformers

    wanted = CONFIG_MAPPING[model_type]
    config = wanted(**shrunk(wanted().to_dict(), recipe))
    with torch.device("meta"):
        count = sum(p.numel() for p in getattr(transformers, name)(copy.deepcopy(config)).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count:,} parameters; expected at most {MOST_PARAMETERS:,}")
    torch.manual_seed(seed)
    model = getattr(transformers, name)(config).eval()
    return filled(model)


def filled(model: nn.Module) -> nn.Module:
    """With noise where weights were made zero, or not set at all: nothing behind those would be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.ndim > 1 and _is_flat(parameter):
                parameter.normal_(std=0.05)
    return model.float()


def _is_flat(parameter: Tensor) -> bool:
    if parameter.numel() < 2:
        return False
    return not bool(parameter.isfinite().all()) or bool((parameter == parameter.flatten()[0]).all())


# ------------------------------------------------------------------------------------------------ inputs


def inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What forward may take, the fullest first, by the names of its arguments; whether it does is to be tried."""
    arguments = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    main = main if main in arguments else next((name for name in arguments if name in MAKERS), main)
    required = [
        name
        for name, p in arguments.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    needed = list(dict.fromkeys([main, *required]))
    needed = [name for name in needed if isinstance(name, str)]
    text = ["decoder_input_ids"] if "decoder_input_ids" in arguments else []
    also = [
        name for name in ("bbox", "input_ids", "pixel_values", "input_features", "input_values") if name in arguments
    ]
    config = model.config
    grid = next((name for name in ("image_grid_thw", "grid_thw") if name in arguments), None)
    if grid:
        yield from _in_patches(model, grid, arguments)
    sets = [[*needed, *also, *text], [*needed, *also], [*needed, *text], needed, ["input_ids"], ["input_ids", *text]]
    seen: set[tuple[str, ...]] = set()
    for names in sets:
        names = list(dict.fromkeys(n for n in names if n in arguments))
        if tuple(names) in seen or not names or any(name not in MAKERS for name in names):
            continue
        seen.add(tuple(names))
        for shapes in itertools.islice(itertools.product(*(MAKERS[name](config) for name in names)), 24):
            made = dict(zip(names, shapes, strict=True))
            yield made
            if "pixel_values" in made and "input_ids" in made:
                yield from _with_image_tokens(model, made)


def _with_image_tokens(model: nn.Module, made: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The same with as many places for a picture in the text as the model makes features of it."""
    token = getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)
    if token is None or not hasattr(model, "get_image_features"):
        return
    try:
        with torch.no_grad():
            found = model.get_image_features(made["pixel_values"])
    except Exception:  # it wants more than pictures
        return
    found = getattr(found, "pooler_output", found)
    places = sum(item.numel() // item.shape[-1] for item in (found if isinstance(found, (list, tuple)) else [found]))
    ids = made["input_ids"]
    pictures = torch.full((ROWS, places // ROWS), token)
    yield {**made, "input_ids": torch.cat([ids[:, :2], pictures, ids[:, 2:]], 1)}


def _in_patches(model: nn.Module, grid: str, arguments: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Pictures as rows of patches, one picture a row of the batch, with a grid that says how many, as Qwen2-VL's."""
    config = model.config
    vision = getattr(config, "vision_config", config)
    side = 2 * asked(vision, "spatial_merge_size", default=2)
    size = (
        asked(vision, "in_channels", "in_chans", "num_channels", default=3)
        * asked(vision, "patch_size", default=14) ** 2
    )
    size *= asked(vision, "temporal_patch_size", default=1)
    patches = {"grid": torch.tensor([[1, side, side]] * ROWS), "patches": noise(ROWS * side * side, size)}
    if "input_ids" not in arguments:
        first = next(name for name in arguments)
        yield {first: patches["patches"], grid: patches["grid"]}
        return
    token = asked(config, "image_token_id", default=VOCABULARY - 1)
    pictures = torch.full((ROWS, 4), token)
    start = torch.full((ROWS, 1), asked(config, "vision_start_token_id", default=9))
    text = torch.cat([ids(TOKENS)[:, :2], start, pictures, ids(TOKENS)[:, 2:]], 1)
    made = {"input_ids": text, "pixel_values": patches["patches"], grid: patches["grid"]}
    yield {**made, "mm_token_type_ids": (text == token).int()} if "mm_token_type_ids" in arguments else made


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def ids(columns: int, seed: int = 1) -> Tensor:
    return torch.randint(10, 100, (ROWS, columns), generator=torch.Generator().manual_seed(seed))


def asked(config: Any, *names: str, default: int) -> int:
    """A number that the config, or one inside it, has under one of these names."""
    inside = [value for value in vars(config).values() if hasattr(value, "to_dict")]
    for each in (config, *inside):
        for name in names:
            value = getattr(each, name, None)
            value = value[0] if isinstance(value, (list, tuple)) and value else value
            if _is_int(value):
                return value
    return default


def _pixels(config: Any) -> list[Tensor]:
    channels = asked(config, "num_channels", "in_channels", "in_chans", "num_input_channels", default=3)
    size = asked(config, "image_size", "img_size", "input_size", default=64)
    frames = asked(config, "num_frames", "frames_per_clip", default=2)
    return [
        noise(ROWS, channels, size, size),
        noise(ROWS, 1, channels, size, size),
        noise(ROWS, frames, channels, size, size),
        noise(ROWS, channels, 64, 64),
        noise(ROWS, channels, 224, 224),
    ]


def _sound_features(config: Any) -> list[Tensor]:
    bins = asked(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_projection_input_dim", default=80)
    long = asked(config, "max_source_positions", default=20) * 2
    return [noise(ROWS, bins, long), noise(ROWS, long, bins), noise(ROWS, 1, bins, 64), noise(ROWS, 64, bins)]


def _sound(config: Any) -> list[Tensor]:
    bins = asked(config, "num_mel_bins", default=80)
    long = asked(config, "max_length", default=64)
    return [noise(ROWS, 4000), noise(ROWS, 1, 4000), noise(ROWS, long, bins)]


MAKERS: Mapping[str, Any] = {
    "input_ids": lambda config: [ids(TOKENS)],
    "decoder_input_ids": lambda config: [ids(5, seed=3)],
    "attention_mask": lambda config: [torch.ones(ROWS, TOKENS, dtype=torch.long)],
    "bbox": lambda config: [torch.zeros(ROWS, TOKENS, 4, dtype=torch.long), torch.zeros(ROWS, TOKENS, 4)],
    "pixel_values": _pixels,
    "pixel_values_videos": _pixels,
    "input_features": _sound_features,
    "input_values": _sound,
}
