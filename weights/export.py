"""
Weights out: the encoder or classifier of any readable file, for Hugging Face's transformers, for timm, as safetensors,
or as an ONNX graph; beside it, a model card.

python -m weights.export FILE --to hf            a folder for transformers.AutoModel.from_pretrained("FOLDER")
python -m weights.export FILE --to timm          a folder for timm.create_model("local-dir:FOLDER", pretrained=True)
python -m weights.export FILE --to safetensors   one file; heads, image size, mean and std in its metadata
python -m weights.export FILE --to onnx          a graph with a free batch size (pip install '.[onnx]')
"""
import argparse
import importlib.util
import json
import os
import re
import shutil

import numpy as np
import torch

from nets.beit import BeitViT, TwoHeads
from nets.cvt import CvT
from nets.hiera import Hiera
from nets.vil import ViL
from vit import Swin
from weights import hugging_face
from weights.card import card
from weights.reading import import_safetensors, load_classifier, read, refuse, run_as_tool, summary

# timm's entries of these widths, depths and patches. Any other shape is a ViT-Base with every option overridden.
TIMM = {(192, 12, 16): "vit_tiny_patch16_224", (384, 12, 16): "vit_small_patch16_224",
        (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 14): "vit_huge_patch14_224"}

FOLDERS = dict(hf="transformers", timm="timm")                  # formats that are folders, and whose they are
ENDINGS = dict(hf="-hf", timm="-timm", safetensors=".safetensors", onnx=".onnx")      # of a file's name, without --out


def facts_of(weights, model):
    """What must not get lost beside the tensors. mean and std, if not stored: ImageNet's, or 0 and 1 if not RGB."""
    channels = model.config["in_chans"]
    kept = ("heads", "window", "img_size", "num_classes", "eps", "mode", "exact", "avg_pool")
    facts = dict({k: model.config[k] for k in kept if k in model.config}, pool=model.pool)
    facts["mean"] = (0.485, 0.456, 0.406) if channels == 3 else (0.0,) * channels
    facts["std"] = (0.229, 0.224, 0.225) if channels == 3 else (1.0,) * channels
    for name in ("method", "mean", "std", "classes", "resize_offset", "final_norm", "teacher"):
        if weights.config.get(name):
            facts[name] = weights.config[name]
    if len(facts.get("classes", "")) != model.config["num_classes"]:
        facts.pop("classes", None)                              # of another head
    return facts


def write_safetensors(path, state, facts):
    """All tensors in one file, and the facts as strings in its metadata."""
    package = import_safetensors()
    facts = {k: v if isinstance(v, str) else json.dumps(v, default=np.generic.item) for k, v in facts.items()}
    try:
        package.torch.save_file({k: t.contiguous() for k, t in state.items()}, path, {"format": "pt", **facts})
    except package.SafetensorError as error:                    # a full disk, say
        raise OSError(str(error)) from None


# All tensors whose results are added up to tokens, and the patch projection of a Swin, which a norm follows.
ADDED = re.compile(r"cls_token|pos_embed|patch_embed\..*|.*\.(attn\.proj|mlp\.fc2|downsample\.reduction|\d+\.proj)\..*")


def with_eps(model, to):
    """Give a network the eps of a format's library -> (its tensors, the eps, the factor s of its tokens, mostly 1).

    timm has an eps of 1e-6 in a ViT and 1e-5 in a Swin, and transformers 1e-5 where a Swin merges patches: no folder
    can say another one. A norm divides by sqrt(var(x) + eps). So tokens that are s times as large are normed to the
    same numbers if eps is s^2 times as large; and they become that large if everything that is added up to them does.
    """
    state, eps = model.state_dict(), model.config["eps"]
    wanted = eps
    if isinstance(model, Swin) and to in FOLDERS:
        wanted = 1e-5
    elif to == "timm":
        wanted = 1e-6
    if wanted == eps:
        return state, eps, 1.0
    scale = (wanted / eps) ** 0.5
    return {name: t * scale if ADDED.fullmatch(name) else t for name, t in state.items()}, wanted, scale


def unfit_for_timm(model):
    """What of a network timm's have no place for, or None."""
    c, swin = model.config, isinstance(model, Swin)
    if isinstance(model, TwoHeads):
        return "two heads"
    for (h, w), layer in zip(model.maps(*c["img_size"]), model.layers) if swin else ():
        side = layer.blocks[0].attn.side                        # timm rolls before it pads, and cuts other windows
        if (h, w) != (side, side) and (side < c["window"] or h % side or w % side or side in (h, w)):
            return f"a map of {h} x {w} tokens and windows of {side}"
    return None


def timm_folder(model, state, facts):
    """What timm's create_model reads: the JSON file of a folder, and its tensors. state: of timm's eps."""
    c, pool = model.config, "token" if model.pool == "cls" else "avg"
    # num_heads is what timm's own default gets wrong without a word.
    args = dict(img_size=c["img_size"], patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["dim"],
                num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], global_pool=pool)
    if isinstance(model, Swin):                                 # timm renames its tensors by itself
        name = "swin_tiny_patch4_window7_224"
        args.update(depths=c["depths"], window_size=c["window"])
    elif isinstance(model, Hiera):                              # timm renames these, too
        name, p = "hiera_tiny_224", c["patch_size"]
        args = {k: args[k] for k in ("img_size", "in_chans", "embed_dim", "num_heads", "mlp_ratio", "global_pool")}
        args.update(stages=c["stages"], q_pool=c["q_pool"], mask_unit_attn=c["mask_unit_attn"],
                    mask_unit_size=(2 ** model.rounds,) * 2, patch_stride=(p, p), patch_kernel=(2 * p - 1,) * 2,
                    patch_padding=(p - 1, p - 1))
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
                num_classes=c["num_classes"], classifier="head.fc" if isinstance(model, (Swin, Hiera)) else "head",
                first_conv="patch_embed.proj")
    config = dict(architecture=name, num_classes=c["num_classes"], num_features=model.width, global_pool=pool,
                  model_args=args, pretrained_cfg=data)
    if "classes" in facts:
        config["label_names"] = facts["classes"]
    return dict(config=config), state


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


def flaw(weights, model, to, scale):
    """Why a format cannot hold a network, as the text that goes after the file's name, or None. scale: see with_eps."""
    reason = None
    if to == "hf" and isinstance(model, Hiera):
        return "is a Hiera, which is not written for transformers here: use --to timm, safetensors or onnx"
    if to in FOLDERS and isinstance(model, (CvT, ViL)):
        reason = f"the network {type(model).__name__}"
    elif to in FOLDERS:
        reason = unfit_for_timm(model) if to == "timm" else hugging_face.unfit(model)
    if not 0.25 <= scale <= 4:                                  # in half precision such tokens would overflow
        reason = f"an eps of {model.config['eps']}"
    if reason:
        return f"has {reason}, which {FOLDERS[to]} does not support: use --to safetensors or onnx"
    if to == "onnx" and sum(t.nbytes for t in model.state_dict().values()) >= 2 ** 31:
        return "has more weights than the 2 GiB that one ONNX file can hold"
    if weights.config.get("distill_tap"):
        return "is of a D2-MAE run, and its final norm that of an inner block: give encoder.pt of that run"


def notes_of(to, out, model, pages, scale):
    """Lines for screen and card: how to open an export, and what is special about it."""
    if to not in FOLDERS:
        return []
    if to == "timm":
        notes = [f'timm.create_model("local-dir:{out}", pretrained=True)']
    else:
        network, = pages["config"]["architectures"]
        notes = [f'transformers.{network}.from_pretrained("{out}")']
        if network == "ViTMAEForPreTraining":
            notes.append("AutoModel opens its encoder, which hides patches too, unless config.mask_ratio is set to 0")
        if network.startswith("Beit") and not isinstance(model, BeitViT):
            notes.append("written as BEiT, because the ViT of transformers does not pool the mean")
    if scale != 1:
        notes.append(f"its tokens are {scale:.3g} times as large as in the checkpoint, which with the eps of "
                     f"{FOLDERS[to]} gives the same features")
    return notes


def write(out, to, text, model, state, pages, facts):
    """Write an export and the text of its card, all of it or nothing: beside, then renamed."""
    half, half_card = f"{out}.tmp", f"{out}.md.tmp"
    try:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
        if to in FOLDERS:
            os.makedirs(half, exist_ok=True)
            for name, content in pages.items():
                with open(os.path.join(half, f"{name}.json"), "w") as f:
                    json.dump(content, f, indent=2, default=np.generic.item)
            write_safetensors(os.path.join(half, "model.safetensors"), state, facts)
        elif to == "onnx":
            write_onnx(half, model, facts)
        else:
            write_safetensors(half, state, facts)
        with open(os.path.join(half, "README.md") if to in FOLDERS else half_card, "w", encoding="utf-8") as f:
            f.write(text)
        os.rename(half, out)
        if to not in FOLDERS:
            os.rename(half_card, f"{out}.md")
    except (OSError, RuntimeError) as error:
        refuse(out, f"cannot be written: {str(error).split(chr(10))[0]}")
    finally:                                                    # what is there now is not whole
        shutil.rmtree(half, ignore_errors=True)
        for path in (half, half_card):
            if os.path.isfile(path):
                os.remove(path)


def export(path, to, out=None, heads=None):
    """Write the encoder of any readable file, or its classifier if it has a head, as "hf" (an MAE with its decoder),
    "timm", "safetensors" or "onnx", with a model card. out: default FILE with another ending; what exists is refused.
    Returns where it is."""
    if to == "onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise SystemExit("--to onnx needs the packages onnx and onnxscript: pip install '.[onnx]'")
    weights = read(path)
    out = os.path.normpath(out or os.path.splitext(weights.path)[0] + ENDINGS[to])
    for there in [out] if to in FOLDERS else [out, f"{out}.md"]:
        if os.path.lexists(there):
            refuse(there, "exists: move it away, or give another --out")
    model, left = load_classifier(weights, heads)
    state, eps, scale = with_eps(model, to)
    reason = flaw(weights, model, to, scale)
    if reason:
        refuse(weights.path, reason)
    c, facts, pages = model.config, dict(facts_of(weights, model), eps=eps), {}
    if to == "timm":
        pages, state = timm_folder(model, state, facts)
    elif to == "hf":
        pages, state, left = hugging_face.folder(weights, model, state, facts, left)
    notes = notes_of(to, os.path.basename(out), model, pages, scale)        # a card says nothing of folders here
    write(out, to, card(weights, model, facts, to, notes), model, state, pages, facts)
    size = " x ".join(map(str, c["img_size"]))
    usual = "" if weights.config.get("mean") else " (not stored: the usual)"
    print(f"{weights.path} -> {out}: width {model.width}, {model.depth} layers, {c['heads']} heads, patches of "
          f"{c['patch_size']}, images of {size} and {c['in_chans']} channels, pool {model.pool}, "
          f"{c['num_classes'] or 'no'} classes, mean {facts['mean']}, std {facts['std']}{usual}; "
          f"left out: {summary(left)}")
    for note in notes_of(to, out, model, pages, scale):
        print(note)
    return out


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m weights.export", allow_abbrev=False)
    parser.error = lambda message: refuse("python -m weights.export:", f"{message} (--help lists the options)")
    parser.add_argument("path", metavar="FILE", help="a checkpoint of any layout; FILE:KEY for one network of it")
    parser.add_argument("--to", required=True, choices=ENDINGS)
    parser.add_argument("--out", help="file or folder to make (default: FILE with another ending)")
    parser.add_argument("--heads", type=int, help="attention heads, where the file does not say")
    options = vars(parser.parse_args(argv))
    if options["heads"] is not None and options["heads"] < 1:
        parser.error("--heads must be at least 1")
    return export(**options)


if __name__ == "__main__":
    run_as_tool(main)
