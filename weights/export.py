"""
Weights out: the encoder or classifier of any readable file, for timm, as safetensors, or as an ONNX graph.

python -m weights.export FILE --to timm          a folder for timm.create_model("local-dir:FOLDER", pretrained=True)
python -m weights.export FILE --to safetensors   one file; heads, image size, mean and std in its metadata
python -m weights.export FILE --to onnx          a graph with a free batch size (pip install '.[onnx]')
"""
import argparse
import importlib.util
import json
import os
import shutil

import numpy as np
import torch

from nets.beit import BeitViT, TwoHeads
from vit import Swin
from weights.reading import import_safetensors, load_classifier, read, refuse, run_as_tool, summary

# timm's entries of these widths, depths and patches. Any other shape is a ViT-Base with every option overridden.
TIMM = {(192, 12, 16): "vit_tiny_patch16_224", (384, 12, 16): "vit_small_patch16_224",
        (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 14): "vit_huge_patch14_224"}

ENDINGS = dict(timm="-timm", safetensors=".safetensors", onnx=".onnx")          # of a file's name, without --out


def facts_of(weights, model):
    """What must not get lost beside the tensors. mean and std, if not stored: ImageNet's, or 0 and 1 if not RGB."""
    channels = model.config["in_chans"]
    kept = ("heads", "window", "img_size", "num_classes", "eps")
    facts = dict({k: model.config[k] for k in kept if k in model.config}, pool=model.pool)
    facts["mean"] = (0.485, 0.456, 0.406) if channels == 3 else (0.0,) * channels
    facts["std"] = (0.229, 0.224, 0.225) if channels == 3 else (1.0,) * channels
    for name in ("method", "mean", "std", "classes", "resize_offset", "final_norm"):
        if weights.config.get(name):
            facts[name] = weights.config[name]
    return facts


def write_safetensors(path, state, facts):
    """All tensors in one file, and the facts as strings in its metadata."""
    package = import_safetensors()
    facts = {k: v if isinstance(v, str) else json.dumps(v, default=np.generic.item) for k, v in facts.items()}
    try:
        package.torch.save_file({k: t.contiguous() for k, t in state.items()}, path, {"format": "pt", **facts})
    except package.SafetensorError as error:                    # a full disk, say
        raise OSError(str(error)) from None


def unfit_for_timm(model):
    """What of a network timm's have no place for, or None."""
    c, swin = model.config, isinstance(model, Swin)
    if isinstance(model, TwoHeads):
        return "two heads"
    if c["eps"] != (1e-5 if swin else 1e-6):
        return f"an eps of {c['eps']}"
    for (h, w), layer in zip(model.maps(*c["img_size"]), model.layers) if swin else ():
        side = layer.blocks[0].attn.side                        # timm rolls before it pads, and cuts other windows
        if (h, w) != (side, side) and (side < c["window"] or h % side or w % side or side in (h, w)):
            return f"a map of {h} x {w} tokens and windows of {side}"
    return None


def write_timm(path, model, facts):
    """A folder as timm's create_model reads it. num_heads is what its own default gets wrong without a word."""
    c, state, pool = model.config, model.state_dict(), "token" if model.pool == "cls" else "avg"
    args = dict(img_size=c["img_size"], patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["dim"],
                num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], global_pool=pool)
    if isinstance(model, Swin):                                 # timm renames its tensors by itself
        name = "swin_tiny_patch4_window7_224"
        args.update(depths=c["depths"], window_size=c["window"])
    elif isinstance(model, BeitViT):
        name = "beit_base_patch16_224"
        args.update(depth=c["depth"], use_abs_pos_emb=True, use_rel_pos_bias=c["relative"],
                    init_values=c["layer_scale"] or None)
        state = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
        for key in [k for k in state if k.endswith("attn.qkv.bias")]:       # a key's bias cancels in the softmax
            q, _, v = state.pop(key).chunk(3)
            state.update({key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v})
    else:
        name = TIMM.get((c["dim"], c["depth"], c["patch_size"]), "vit_base_patch16_224")
        args.update(depth=c["depth"])
    data = dict(input_size=[c["in_chans"], *c["img_size"]], fixed_input_size=True, interpolation="bicubic",
                crop_pct=0.875 if max(c["img_size"]) <= 224 else 1.0, mean=facts["mean"], std=facts["std"],
                num_classes=c["num_classes"], classifier="head.fc" if isinstance(model, Swin) else "head",
                first_conv="patch_embed.proj")
    config = dict(architecture=name, num_classes=c["num_classes"], num_features=model.width, global_pool=pool,
                  model_args=args, pretrained_cfg=data)
    if "classes" in facts:
        config["label_names"] = facts["classes"]
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f, indent=2, default=np.generic.item)
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
    """Write the encoder of any readable file, or its classifier if it has a head, as "timm", "safetensors" or "onnx".
    out: default FILE with another ending; written beside, then renamed; what exists is refused. Returns where it is."""
    if to == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise SystemExit("--to onnx needs the packages onnx and onnxscript: pip install '.[onnx]'")
    weights = read(path)
    out = os.path.normpath(out or os.path.splitext(weights.path)[0] + ENDINGS[to])
    if os.path.lexists(out):
        refuse(out, "exists: move it away, or give another --out")
    model, left = load_classifier(weights, heads)
    c, state, facts = model.config, model.state_dict(), facts_of(weights, model)
    unfit = unfit_for_timm(model)
    if to == "timm" and unfit:
        refuse(weights.path, f"has {unfit}, which timm does not support: use --to safetensors or onnx")
    if to == "onnx" and sum(t.nbytes for t in state.values()) >= 2 ** 31:
        refuse(weights.path, "has more weights than the 2 GiB that one ONNX file can hold")
    half = f"{out}.tmp"
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        write = dict(timm=write_timm, onnx=write_onnx, safetensors=write_safetensors)[to]
        write(half, state if to == "safetensors" else model, facts)
        os.rename(half, out)
    except (OSError, RuntimeError) as error:
        refuse(out, f"cannot be written: {str(error).split(chr(10))[0]}")
    finally:                                                    # what is there now is not whole
        shutil.rmtree(half, ignore_errors=True)
        if os.path.isfile(half):
            os.remove(half)
    size = " x ".join(map(str, c["img_size"]))
    usual = "" if weights.config.get("mean") else " (not stored: the usual)"
    print(f"{weights.path} -> {out}: width {model.width}, {model.depth} layers, {c['heads']} heads, patches of "
          f"{c['patch_size']}, images of {size} and {c['in_chans']} channels, pool {model.pool}, "
          f"{c['num_classes'] or 'no'} classes, mean {facts['mean']}, std {facts['std']}{usual}; "
          f"left out: {summary(left)}")
    if to == "timm":
        print(f'timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m weights.export", allow_abbrev=False)
    parser.error = lambda message: refuse("python -m weights.export:", f"{message} (--help lists the options)")
    parser.add_argument("path", metavar="FILE", help="a checkpoint of any layout; FILE:KEY for one network of it")
    parser.add_argument("--to", required=True, choices=ENDINGS)
    parser.add_argument("--out", help="file, or folder for timm, to make (default: FILE with another ending)")
    parser.add_argument("--heads", type=int, help="attention heads, where the file does not say")
    options = vars(parser.parse_args(argv))
    if options["heads"] is not None and options["heads"] < 1:
        parser.error("--heads must be at least 1")
    return export(**options)


if __name__ == "__main__":
    run_as_tool(main)
