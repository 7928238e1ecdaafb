"""
Weights out for Hugging Face: a folder with config.json, model.safetensors and preprocessor_config.json, which
transformers opens without our code. Which of its networks computes what ours does:

    a ViT that pools cls                            ViTModel, ViTForImageClassification
    the same with the decoder of an MAE             ViTMAEForPreTraining
    a ViT that pools the mean, or a BeitViT         BeitModel, BeitForImageClassification
    a Swin                                          SwinModel, SwinForImageClassification
"""
import re

import torch

from nets.beit import BeitViT, TwoHeads
from vit import Swin
from weights.reading import DECODER_HEADS, refuse

# Our names -> those on disk, by (pattern, replacement), applied in this order. layouts.HUGGING_FACE is the way back.
NAMES = [
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^pos_embed$", "embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
    (r"^patch_embed\.norm\.", "embeddings.norm."),                              # Swin
    (r"^blocks\.", "encoder.layer."),
    (r"^layers\.", "encoder.layers."),                                          # Swin
    (r"^norm\.", "layernorm."),
    (r"^fc_norm\.", "pooler.layernorm."),                                       # BEiT
    (r"^head\.", "classifier."),
    (r"^decoder_blocks\.", "decoder.decoder_layers."),                          # MAE
    (r"^(?=decoder_|mask_token)", "decoder."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.gamma_", ".lambda_"),
    (r"\.attn\.q_bias$", ".attn.query.bias"),
    (r"\.attn\.v_bias$", ".attn.value.bias"),
]


def unfit(model):
    """What of a network transformers' have no place for, in words, or None."""
    c = model.config
    if isinstance(model, TwoHeads):
        return "two heads"
    if not isinstance(model, Swin):
        flat = kind_of(model) == "beit" and c["img_size"][0] != c["img_size"][1]
        return "images that are not square, with a pooled mean or relative positions" if flat else None
    for stage, (grid, layer) in enumerate(zip(model.maps(*c["img_size"]), model.layers)):
        # There the map that is seen decides whether windows move; here the first map, halved and rounded down.
        moves = any(block.attn.shift for block in layer.blocks)
        side, would_move = layer.blocks[0].attn.side, min(grid) > c["window"] and len(layer.blocks) > 1
        if side != c["window"] or moves != would_move:
            return f"windows of {side} on a map of {grid[0]} x {grid[1]} tokens in stage {stage + 1}"
    return None


def kind_of(model):
    """The model type of transformers that computes the same; an MAE's encoder counts as a ViT."""
    if isinstance(model, Swin):
        return "swin"
    return "beit" if isinstance(model, BeitViT) or model.pool == "avg" else "vit"


def decoder_of(weights, model):
    """The decoder of an MAE -> (its tensors, its options by the names of transformers), or two empty dicts. SystemExit
    when the file does not tell what ViTMAEForPreTraining has to know."""
    state, stored = weights.state, weights.config
    if "decoder_pred.weight" not in state or kind_of(model) != "vit" or model.config["num_classes"]:
        return {}, {}
    state = {name: t for name, t in state.items() if name.startswith(("decoder_", "mask_token"))}
    depth = len({name.split(".")[1] for name in state if name.startswith("decoder_blocks.")})
    parts = [f"decoder_blocks.{n}.{part}" for n in range(depth) for part in model.blocks[0].state_dict()]
    parts += [f"decoder_{part}.{kind}" for part in ("embed", "norm", "pred") for kind in ("weight", "bias")]
    parts += ["mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight"]
    missing = [name for name in parts if name not in state]
    if missing:
        refuse(weights.path, f"has a decoder without {missing[0]}")
    instead = "give encoder.pt, or first --to safetensors, which leaves the decoder behind"
    width, (h, w) = len(state["decoder_embed.weight"]), model.config["img_size"]
    heads = stored.get("decoder_heads") or DECODER_HEADS.get(width)
    if not heads:
        refuse(weights.path, f"has a decoder that is {width} wide and does not say how many heads that has: {instead}")
    if h != w or state["decoder_pos_embed"].shape[1] != model.pos_embed.shape[1]:
        refuse(weights.path, f"has a decoder, and ViTMAE's takes square images of the encoder's size only: {instead}")
    options = dict(decoder_hidden_size=width, decoder_num_hidden_layers=depth, decoder_num_attention_heads=heads,
                   decoder_intermediate_size=len(state["decoder_blocks.0.mlp.fc1.weight"]))
    known = dict(mask_ratio=stored.get("mask_ratio"), norm_pix_loss=stored.get("norm_pix", stored.get("norm_pix_loss")))
    return state, options | {name: value for name, value in known.items() if value is not None}


def renamed(state, kind):
    """A state dict of ours -> the same tensors by the names of transformers, queries, keys and values apart."""
    inner = "self" if kind == "swin" else "attention"
    relative = "" if kind == "swin" else "relative_position_bias."
    found = {}
    for name, t in state.items():
        for pattern, replacement in NAMES:
            name = re.sub(pattern, replacement, name)
        name = name.replace(".attn.relative_", f".attn.{relative}relative_")
        name = name.replace(".attn.", f".attention.{inner}.")
        if ".qkv." in name:
            found |= {name.replace("qkv", part): rows for part, rows in zip(("query", "key", "value"), t.chunk(3))}
        else:
            found[name] = t
    if kind == "beit":                                          # its keys have no bias: that cancels in the softmax
        found = {name: t for name, t in found.items() if not name.endswith(".key.bias")}
    return found


def size_of(model):
    """The part of config.json that says how large a network is, and what of its kind's options it has."""
    c, kind = model.config, kind_of(model)
    if kind == "swin":
        return dict(embed_dim=c["dim"], depths=c["depths"], num_heads=c["heads"], window_size=c["window"],
                    mlp_ratio=c["mlp_ratio"], drop_path_rate=0.0)
    size = dict(hidden_size=c["dim"], num_hidden_layers=c["depth"], num_attention_heads=c["heads"],
                intermediate_size=int(c["dim"] * c["mlp_ratio"]))
    if kind == "beit":
        size.update(use_mean_pooling=model.pool == "avg", use_absolute_position_embeddings=True, drop_path_rate=0.0,
                    use_relative_position_bias=c.get("relative", False),
                    layer_scale_init_value=float(c.get("layer_scale", 0)))
    return size


def folder(weights, model, state, facts, left):
    """-> (the JSON files of the folder by name, its tensors, which names of `left` are still left out). state: the
    model's tensors, for the eps in facts."""
    c, kind, (h, w) = model.config, kind_of(model), model.config["img_size"]
    name = dict(vit="ViT", beit="Beit", swin="Swin")[kind]
    decoder, decoder_options = decoder_of(weights, model)
    tensors = renamed({**state, **decoder}, kind)
    config = dict(model_type=kind, image_size=h if h == w else [h, w], patch_size=c["patch_size"],
                  num_channels=c["in_chans"], layer_norm_eps=facts["eps"], hidden_act="gelu", **size_of(model))
    if decoder:
        config.update(decoder_options, model_type="vit_mae", architectures=["ViTMAEForPreTraining"])
    elif c["num_classes"]:
        labels = facts.get("classes") or [f"LABEL_{number}" for number in range(c["num_classes"])]
        config.update(architectures=[f"{name}ForImageClassification"], id2label=dict(enumerate(labels)),
                      label2id={label: number for number, label in enumerate(labels)})
    else:
        config["architectures"] = [f"{name}Model"]
        if kind == "vit":                                       # its pooler has a layer: here one that changes nothing
            config["pooler_act"] = "linear"
            tensors |= {"pooler.dense.weight": torch.eye(c["dim"]), "pooler.dense.bias": torch.zeros(c["dim"])}
    if decoder or c["num_classes"]:                             # heads stand beside the network
        tensors = {key if key.startswith(("classifier.", "decoder.")) else f"{kind}.{key}": t
                   for key, t in tensors.items()}
    pages = dict(config=config, preprocessor_config=preprocessor(model, facts))
    return pages, tensors, [name for name in left if name not in decoder]


def preprocessor(model, facts):
    """What goes into preprocessor_config.json: the crops that CenterCrops in data.py makes, for square ones."""
    (h, w), channels = model.config["img_size"], model.config["in_chans"]
    shorter = int(max(h, w) / (0.875 if max(h, w) <= 224 else 1.0))
    return dict(image_processor_type="BitImageProcessor", do_convert_rgb=channels == 3, do_resize=True, resample=3,
                size=dict(shortest_edge=shorter), do_center_crop=True, crop_size=dict(height=h, width=w),
                do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=facts["mean"],
                image_std=facts["std"])
