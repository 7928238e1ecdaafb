"""
What other libraries call our tensors (LAYOUTS), what other networks have and ours do not (PARTS), and config.json.
What cannot be read ends in a ValueError: the text that goes after the file's name.
"""
import json
import os
import re
from collections import namedtuple
from pathlib import Path

import torch

# marker: a pattern of names that only this layout has; eps: of its norms, where no config.json says it (None: ours);
# names: (pattern, replacement), applied to every name in this order
Layout = namedtuple("Layout", "library marker eps names")


def torchvision_stage(found):
    """torchvision's Swin counts stages and the mergings after them in one row."""
    number = int(found[2])
    return f"{found[1]}layers.{(number - 1) // 2}.{'blocks' if number % 2 else 'downsample'}."


HUGGING_FACE = [
    # Heads stand beside these.
    (r"(^|\.)(vit|deit|dinov2|swin|beit)\.(?=(embeddings|encoder|layers|layernorm|pooler)\.)", r"\1"),
    (r"(^|\.)pooler\.layernorm\.", r"\1fc_norm."),                               # BEiT
    (r"(^|\.)encoder\.(?=relative_position_bias\.)", r"\1"),                  # BEiT's that all blocks share
    (r"(\d)\.relative_position_bias\.", r"\1.attention."),
    (r"embeddings\.norm\.", "patch_embed.norm."),                               # Swin
    (r"embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.distillation_token$", "dist_token"),
    (r"(^|\.)embeddings\.", r"\1"),                                             # cls_token, mask_token, register_tokens
    (r"(^|\.)decoder\.(decoder_layers|decoder_encoder\.layer)\.", r"\1decoder_blocks."),             # MAE
    (r"(^|\.)decoder\.(?=decoder_|mask_token$)", r"\1"),
    (r"(^|\.)encoder\.layers\.(?=\d+\.(blocks|downsample)\.)", r"\1layers."),   # Swin
    (r"(^|\.)(encoder\.layer|layers)\.(?=\d+\.(?!blocks|downsample))", r"\1blocks."),
    (r"attention\.(attention|self)\.", "attention."),                           # transformers 4, and every file on disk
    (r"attention\.([qkv])(uery|ey|alue|_proj)\.", r"attn.\1."),                 # joined below
    (r"attention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"attention\.(relative_position_bias\.)?(?=relative_position_)", "attn."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"(\d)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"layer_scale([12])\.lambda1$", r"gamma_\1"),
    (r"lambda_([12])$", r"gamma_\1"),                                           # BEiT
    (r"(^|\.)layernorm\.", r"\1norm."),
    (r"(^|\.)classifier\.", r"\1head."),
]
TORCHVISION = [
    (r"(^|\.)conv_proj\.", r"\1patch_embed.proj."),
    (r"(^|\.)class_token$", r"\1cls_token"),
    (r"(^|\.)encoder\.pos_embedding$", r"\1pos_embed"),
    (r"(^|\.)encoder\.layers\.encoder_layer_(\d+)\.", r"\1blocks.\2."),
    (r"(^|\.)encoder\.ln\.", r"\1norm."),
    (r"\.ln_([12])\.", r".norm\1."),
    (r"self_attention\.in_proj_", "attn.qkv."),                                 # joined already
    (r"self_attention\.out_proj\.", "attn.proj."),
    (r"(^|\.)heads\.", r"\1"),
    (r"(^|\.)features\.0\.0\.", r"\1patch_embed.proj."),                       # from here on Swin
    (r"(^|\.)features\.0\.2\.", r"\1patch_embed.norm."),
    (r"(^|\.)features\.(\d+)\.", torchvision_stage),
    (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
    (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
]
TIMM_SWIN = [                                           # it merges at the beginning of a stage, not at the end of one
    (r"(?<=layers\.)(\d+)(?=\.downsample\.)", lambda found: str(int(found[1]) - 1)), (r"(^|\.)head\.fc\.", r"\1head.")]
LIGHTLY = [(r"(^|\.)backbone\.vit\.", r"\1"), (r"(^|\.)decoder\.(?=decoder_|mask_token$)", r"\1")]

LAYOUTS = [
    Layout("Hugging Face's Swin", r"encoder\.layers\.0\.blocks\.0\.attention\.", 1e-5, HUGGING_FACE),
    Layout("Hugging Face's DINOv2", r"encoder\.layer\.0\.layer_scale1\.lambda1$", 1e-6, HUGGING_FACE),
    Layout("Hugging Face's ViT", r"embeddings\.patch_embeddings\.projection\.weight$", 1e-12, HUGGING_FACE),
    Layout("torchvision's ViT", r"(^|\.)encoder\.layers\.encoder_layer_0\.", None, TORCHVISION),
    Layout("torchvision's Swin", r"(^|\.)features\.1\.0\.attn\.relative_position_bias_table$", 1e-5, TORCHVISION),
    Layout("Swin's own code", r"(^|\.)layers\.0\.downsample\.", None, []),
    Layout("timm's Swin", r"(^|\.)layers\.1\.downsample\.", 1e-5, TIMM_SWIN),
    Layout("lightly's MAE", r"(^|\.)decoder\.decoder_blocks\.", None, LIGHTLY),
]

PARTS = {
    "register tokens": r"(^|\.)(reg|register|storage)_tokens?$",
    "a distillation token, DeiT's": r"(^|\.)dist_token$",
    "rotary positions, RoPE": r"(^|\.)rope",
    "a gated MLP, SwiGLU": r"mlp\.(w12|w3|fc1_g|gate_proj|weights_in)\.",
    "q/k norms": r"attn\.([qk]_norm|norm_[qk])\.",
    "a norm before its blocks, CLIP's pre-norm": r"(^|\.)(norm_pre|ln_pre|pre_layrnorm|pre_layernorm)\.",
    "pooling by attention": r"(^|\.)(attn_pool|head\.probe)",
    "a convolutional stem": r"(^|\.)patch_embed\.(proj\.)?(backbone|conv|stem|\d)",
    "Swin V2's cosine attention": r"att(n|ention)\.(self\.)?logit_scale",
}

# Of config.json: Hugging Face's model types that are read, with their default eps; what its options are called here;
# the heads of timm's entries, which it has only where they are others. FILES: what the weights beside it are called.
TYPES = dict(vit=1e-12, vit_mae=1e-12, deit=1e-12, vit_msn=1e-6, dinov2=1e-6, swin=1e-5, beit=1e-12)
OPTIONS = dict(num_attention_heads="heads", num_heads="heads", layer_norm_eps="eps", image_size="img_size",
               window_size="window", decoder_num_attention_heads="decoder_heads", norm_pix_loss="norm_pix",
               mask_ratio="mask_ratio")
TIMM_HEADS = dict(tiny=3, small=6, base=12, large=16, huge=16)
FILES = "model.safetensors", "pytorch_model.bin"
AS_TEACHER = "; a student can learn from any ViT of timm's, though: distill.py --teacher timm:NAME --teacher-file FILE"


def translate(state):
    """A state dict, behind any prefixes -> (the same tensors by the names used here, their Layout or None)."""
    text, renamed = "\n".join(state), {}
    layout = next((layout for layout in LAYOUTS if re.search(layout.marker, text, re.MULTILINE)), None)
    rules = list(layout.names) if layout else []
    if "pre_logits." in text:                                   # its head reads what another layer makes of a feature
        rules.append((r"(^|\.)head\.", r"\1pre_logits.head."))
    for name, value in state.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise ValueError(f"holds two tensors for {name}")
        renamed[name] = value
    return renamed, layout


def foreign_parts(names):
    """Which parts, in words, these names are of for which the networks here have no place; "" if there are none."""
    found = [(words, name) for words, part in PARTS.items() for name in names if re.search(part, name)]
    return " and ".join(f"{words} ({name})" for words, name in dict(reversed(found)).items())


def join_qkv(state):
    """Put queries, keys and values that are three tensors into one, in place. ValueError when they are others'."""
    keys_have_biases = any(name.endswith(".attn.k.bias") for name in state)
    for name in [name for name in state if re.search(r"\.attn\.q\.(weight|bias)$", name)]:
        letters = "qkv" if keys_have_biases or name.endswith("weight") else "qv"            # BEiT's keys have none
        parts = [name.replace(".attn.q.", f".attn.{letter}.") for letter in letters]
        for other in parts:
            t = state.get(other, torch.empty(()))
            if t.dim() == 0 or (t.shape, t.dtype) != (state[name].shape, state[name].dtype):
                raise ValueError(f"has {name} and no {other} of the same shape and type")
        if letters == "qkv":
            state[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([state.pop(part) for part in parts])
        else:
            state.update({part.replace(".bias", "_bias"): state.pop(part) for part in parts})
    for block in ("blocks.0", "layers.0.blocks.0"):
        weight, biases = f"{block}.attn.qkv.weight", {f"{block}.attn.qkv.bias", f"{block}.attn.q_bias"}
        if weight in state and not biases & state.keys():
            raise ValueError("has queries, keys and values without biases, and the network here has biases")
        inner, outer = (state.get(f"{block}.mlp.fc{i}.weight", torch.empty(1, 1)) for i in (1, 2))
        if inner.dim() == outer.dim() == 2 and len(inner) == 2 * outer.shape[1]:
            raise ValueError(f"has a gated MLP, SwiGLU ({block}.mlp), which the network here has no place "
                             f"for{AS_TEACHER}")


def settings_of(path, state):
    """The options in the config.json beside a folder's weights, by our names, or {}. ValueError if they do not fit."""
    if os.path.basename(path) not in FILES:
        return {}
    try:
        places = Path(path).with_name("config.json"), Path(path).with_name("preprocessor_config.json")
        config, images = (json.loads(place.read_text("utf-8")) if place.exists() else {} for place in places)
        if config.get("model_type"):
            return hugging_face_settings(config, images)
        return timm_settings(config, state) if config.get("architecture") else {}
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, OSError, AttributeError, TypeError):
        raise ValueError("has a damaged config.json or preprocessor_config.json beside its weights") from None


def hugging_face_settings(config, images):
    """config: what is in config.json; images: in preprocessor_config.json."""
    kind, act = config["model_type"], config.get("hidden_act", "gelu")
    if kind not in TYPES:
        raise ValueError(f"holds a {kind} of Hugging Face, and of theirs {', '.join(TYPES)} are read")
    if act not in ("gelu", "gelu_python"):
        raise ValueError(f"has hidden_act {act!r} in its config.json, and the network here has the exact gelu")
    found = dict(eps=TYPES[kind]) | {ours: config[name] for name, ours in OPTIONS.items() if name in config}
    if kind == "swin" and found["eps"] != 1e-5:
        raise ValueError(f"has layer_norm_eps {found['eps']} in its blocks and 1e-05 where it merges patches, and the "
                         "network here has one eps for all")
    labels = config.get("id2label") or {}
    classes = [labels.get(str(number)) for number in range(len(labels))]
    if classes != [f"LABEL_{number}" for number in range(len(labels))]:
        found["classes"] = classes
    if images.get("do_normalize", True):
        found |= {name: images[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in images}
    return found


def timm_settings(config, state):
    """config: what is in config.json; state: the tensors, of which some are told apart by it alone."""
    name, args, data = config["architecture"], config.get("model_args") or {}, config.get("pretrained_cfg") or config
    act, pool = args.get("act_layer", "gelu"), args.get("global_pool", config.get("global_pool"))
    unseen = re.search("rope|quickgelu", name)                  # their tensors would fit
    if unseen or act != "gelu":
        raise ValueError(f"holds timm's {name} with {unseen[0] if unseen else act}, for which there is no place here")
    if pool == "avg" and "cls_token" in state and "head.weight" in state and "fc_norm.weight" not in state:
        raise ValueError("has a head that reads a mean of normed tokens (no fc_norm): the network here norms the mean")
    entry = re.match(r"(vit|deit3?)_([a-z]+)_", name)
    found = dict(heads=args.get("num_heads", entry and TIMM_HEADS.get(entry[2])), window=args.get("window_size"),
                 img_size=args.get("img_size", (data.get("input_size") or [None])[1:]) or None, mean=data.get("mean"),
                 std=data.get("std"), classes=config.get("label_names") or data.get("label_names"))
    return {option: value for option, value in found.items() if value is not None}
