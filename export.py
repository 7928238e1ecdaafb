"""
Weights out: a checkpoint for timm, as safetensors, or as an ONNX graph. Whatever weights.py reads can be exported.

python weights.py export FILE --to timm            a folder for timm.create_model("local-dir:FOLDER", pretrained=True)
python weights.py export FILE --to safetensors     one file; heads, image size, mean and std in its metadata
python weights.py export FILE --to onnx            a graph with a free batch size (pip install '.[onnx]')
"""
import argparse
import importlib.util
import json
import os
import struct

import torch

from vit import Swin
from weights import TYPES, read, refuse, summary, whole

# timm's entries of these widths, depths and patches. Any other shape is a ViT-Base with every option overridden.
TIMM = {(192, 12, 16): "vit_tiny_patch16_224", (384, 12, 16): "vit_small_patch16_224",
        (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 14): "vit_huge_patch14_224"}


def facts_of(weights, model):
    """What must not get lost beside the tensors. mean and std, if not stored, are ImageNet's, or 0 and 1 where the
    channels are not three."""
    config, n = weights.config, model.config["in_chans"]
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if n == 3 else ((0.0,) * n, (1.0,) * n)
    stored = ("method", "mean", "std", "classes", "resize_offset", "final_norm")
    kept = ("heads", "window", "img_size", "num_classes", "eps")
    return {**{k: model.config[k] for k in kept if k in model.config}, "readout": model.readout,
            **dict(zip(("mean", "std"), usual)), **{k: config[k] for k in stored if config.get(k)}}


def write_safetensors(path, state, facts):
    """8 bytes that count the header; the header in JSON: facts as strings, each tensor's type, shape and place; then
    the tensors, wide types first, so that all are aligned."""
    facts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}
    header, end = {"__metadata__": {"format": "pt", **facts}}, 0
    state = dict(sorted(state.items(), key=lambda item: -item[1].element_size()))
    for name, t in state.items():
        begin, end = end, end + t.nbytes
        kind = next(kind for kind, dtype in TYPES.items() if dtype == t.dtype)
        header[name] = dict(dtype=kind, shape=list(t.shape), data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for t in state.values():
            f.write(t.flatten().view(torch.uint8).numpy())


def write_timm(path, model, facts):
    """A folder as timm's create_model reads it; num_heads is what its own default gets wrong without a word. What has
    relative positions, layer scale or no key bias is a BEiT there."""
    c, pool, swin = model.config, "token" if model.readout == "cls" else "avg", isinstance(model, Swin)
    args = dict(img_size=c["img_size"], patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["dim"],
                num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], global_pool=pool)
    name, state = "swin_tiny_patch4_window7_224", model.state_dict()
    if swin:                                                    # of which timm renames the tensors by itself
        args |= dict(depths=c["depths"], window_size=c["window"])
    else:
        args["depth"] = c["depth"]
        name = TIMM.get((c["dim"], c["depth"], c["patch_size"]), "vit_base_patch16_224")
    if not swin and (c["relative"] or c["layer_scale"] or not c["key_bias"]):
        name = "beit_base_patch16_224"
        args |= dict(use_abs_pos_emb=True, use_rel_pos_bias=c["relative"], init_values=c["layer_scale"] or None)
        for key in [k for k in state if k.endswith("attn.qkv.bias")]:       # a key's bias cancels in the softmax
            q, _, v = state.pop(key).chunk(3)
            state |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        state = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
    data = dict(input_size=[c["in_chans"], *c["img_size"]], fixed_input_size=True, interpolation="bicubic",
                crop_pct=0.875 if max(c["img_size"]) <= 224 else 1.0, mean=facts["mean"], std=facts["std"],
                num_classes=c["num_classes"], classifier="head.fc" if swin else "head", first_conv="patch_embed.proj")
    names = {"label_names": facts["classes"]} if "classes" in facts else {}
    config = dict(architecture=name, num_classes=c["num_classes"], num_features=model.width, global_pool=pool,
                  model_args=args, pretrained_cfg=data, **names)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    write_safetensors(os.path.join(path, "model.safetensors"), state, facts)


def write_onnx(path, model, facts):
    """One file: image (B, C, height, width), normalised, B free -> logits or features."""
    c, batch = model.config, {0: torch.export.Dim("batch")}
    # Traced strictly: the looser way takes len(x) for a number and would fix B without a word. Decomposed here, because
    # the exporter's own way of it cannot follow the strides of attention with relative positions.
    graph = torch.export.export(model, (torch.zeros(2, c["in_chans"], *c["img_size"]),), dynamic_shapes=(batch,),
                                strict=True)
    program = torch.onnx.export(graph.run_decompositions(), dynamo=True, verbose=False, dynamic_shapes=(batch,),
                                input_names=["image"], output_names=["logits" if c["num_classes"] else "features"])
    program.model.metadata_props.update({k: str(v) for k, v in facts.items()})
    program.save(path, external_data=False)


def export(path, to, out=None, heads=None):
    """Write the encoder of any readable file, or its classifier if it has a head, for others, and say what. Returns
    where.

    to    "timm": a folder for timm.create_model("local-dir:FOLDER", pretrained=True); "safetensors": one file in
          published names, with heads, image size, mean and std in its metadata; "onnx": see write_onnx
    out   default: FILE with another ending. Written beside, then renamed; what exists is refused
    """
    if to == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise SystemExit("--to onnx needs the packages onnx and onnxscript: pip install '.[onnx]'")
    weights = read(path)
    endings = dict(timm="-timm", safetensors=".safetensors", onnx=".onnx")
    out = os.path.normpath(out or os.path.splitext(weights.path)[0] + endings[to])
    if os.path.lexists(out):
        refuse(out, "exists: move it away, or give another --out")
    model, left = whole(weights, heads)
    c, state, facts = model.config, model.state_dict(), facts_of(weights, model)
    two, swin = "head_dist.weight" in state, isinstance(model, Swin)
    if to == "timm" and (two or c["eps"] != (1e-5 if swin else 1e-6)):
        refuse(weights.path, f"has {'two heads' if two else 'an eps of ' + str(c['eps'])}, for which timm's networks "
                             "have no place: --to safetensors and onnx keep it")
    maps = model.maps(*c["img_size"]) if swin else []
    if to == "timm" and any(h != w and min(h, w) <= c["window"] for h, w in maps):
        refuse(weights.path, f"sees images of {' x '.join(map(str, c['img_size']))}, where one of its maps is no "
                             "larger than a window and not square: timm would cut it otherwise. --to safetensors keeps "
                             "it")
    if to == "onnx" and sum(t.nbytes for t in state.values()) >= 2 ** 31:
        refuse(weights.path, "has more weights than the 2 GiB that one ONNX file can hold")
    try:
        os.makedirs(f"{out}.tmp" if to == "timm" else os.path.dirname(out) or ".", exist_ok=True)
        if to == "timm":
            write_timm(f"{out}.tmp", model, facts)
        elif to == "onnx":
            write_onnx(f"{out}.tmp", model, facts)
        else:
            write_safetensors(f"{out}.tmp", state, facts)
        os.rename(f"{out}.tmp", out)
    except OSError as error:
        refuse(out, f"cannot be written: {error}")
    print(f"{weights.path} -> {out}: width {model.width}, {model.depth} layers, {c['heads']} heads, patches of "
          f"{c['patch_size']}, images of {' x '.join(map(str, c['img_size']))} and {c['in_chans']} channels, readout "
          f"{model.readout}, {c['num_classes'] or 'no'} classes, mean {facts['mean']}, std {facts['std']}"
          f"{'' if weights.config.get('mean') else ' (not stored: the usual)'}; left out: {summary(left)}")
    if to == "timm":
        print(f'timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def main(argv):
    parser = argparse.ArgumentParser(prog="weights.py export", allow_abbrev=False)
    parser.error = lambda message: refuse("weights.py export:", f"{message} (--help lists the options)")
    parser.add_argument("path", metavar="FILE", help="a checkpoint of any layout; FILE:KEY for one network of it")
    parser.add_argument("--to", required=True, choices=["timm", "safetensors", "onnx"])
    parser.add_argument("--out", help="file, or folder for timm, to make (default: FILE with another ending)")
    parser.add_argument("--heads", type=int, help="attention heads, where the file does not say")
    options = vars(parser.parse_args(argv))
    if options["heads"] is not None and options["heads"] < 1:
        parser.error("--heads must be at least 1")
    return export(**options)
