"""
Public checkpoints in, safely. Every layout in use is a state dict under some key, behind some prefixes; the networks
here have the published names, so reading is: find the dict, strip the prefixes, resize the positions, say what matched.
And out again: the encoder or classifier of any of them for timm, as safetensors, or as ONNX.

python weights.py FILE     says what a file is
python weights.py export FILE --to timm|safetensors|onnx [--out PATH] [--heads N]
"""
import argparse
import importlib.util
import json
import os
import re
import struct
import sys
from collections import namedtuple

import numpy as np
import torch
from torch import nn

from vit import ViT, pair, resize_positions, resize_relative

# state: tensors by published names; config: what the file stores of its options, maybe nothing; layout: where it was
Weights = namedtuple("Weights", "state config layout path")

# Official files hold an argparse.Namespace and NumPy scalars, both plain data. What needs other code is refused.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(c)) for c in "?bBhHiIlLqQefd"),
        np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]

# Heads leave no trace in tensor shapes. These widths have one published answer; 192 and 384 have two.
HEADS = {768: 12, 1024: 16, 1280: 16}

# What safetensors calls the types.
TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
             I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)

# What a file may lack: a task's own, and what relative positions and layer scale add to a plain network.
FRESH = re.compile(r"head\.|fc_norm\.|head_dist\.|dist_norm\.|decoder_|mask_token|"
                   r".*\.(gamma_[12]|[qv]_bias|relative_position_bias_table)$")


def refuse(path, why):
    raise SystemExit(f"{path} {why}") from None


def load_file(path):
    """Any .pt, .pth, .tar or .safetensors file as plain data. If absent, damaged or holding code: a sentence."""
    if not os.path.exists(path):
        refuse(path, "does not exist: a checkpoint was expected")
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # damage shows as zip, pickle, EOF or unicode errors
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            refuse(path, f"is refused, because loading it would run code ({code[1]}): re-save it as plain tensors")
        refuse(path, f"cannot be read: it is damaged or no checkpoint ({type(error).__name__})")


def read_safetensors(path):
    """The tensors, and the metadata under "config": strings in the file, numbers and lists here where they are JSON."""
    with open(path, "rb") as f:
        header = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        body = torch.frombuffer(bytearray(f.read()), dtype=torch.uint8)
    config = {}
    for name, text in header.pop("__metadata__", {}).items():
        try:
            config[name] = json.loads(text)
        except ValueError:
            config[name] = text
    tensors = {name: body[slice(*t["data_offsets"])].clone().view(TYPES[t["dtype"]]).view(t["shape"])
               for name, t in header.items()}
    return {**tensors, "config": config, "method": config.get("method")}


def read(path, key=None):
    """Read any known layout -> Weights.

    key chooses where a file holds several networks: DINO's "student" or "teacher" (default), MoCo-v3's "base_encoder"
    (default) or "momentum_encoder", timm's "state_dict_ema". FILE:KEY as path means the same.
    """
    if not os.path.exists(path) and ":" in path:
        path, key = path.rsplit(":", 1)
    file = load_file(path)
    if not isinstance(file, dict):
        refuse(path, f"is no checkpoint: it holds a {type(file).__name__}")
    config = file.get("config") or file.get("args") or {}
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    config = {**(config if isinstance(config, dict) else {}), "method": file.get("method")}
    where = [name for name in (key, "model", "state_dict", "teacher", "student") if name in file]
    state = file[where[0]] if where else file
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not state:
        refuse(path, f"holds no weights: its keys are {', '.join(map(str, list(file)[:8]))}")
    layout = [f"under {where[0]!r}" if where else "a bare state dict"]
    inner = ["base_encoder.", "backbone.", "model.", "encoder."]
    if key and key not in file:
        inner = [f"{key}."]
        if not any(f"{wrap}{key}.patch_embed.proj.weight" in state for wrap in ("", "module.")):
            refuse(path, f"has nothing called {key!r}: its keys are {', '.join(map(str, list(file)[:8]))}")
    # Only whole prefixes count: "model." inside a name would also hit MAE-Lite's teacher, "tch_model.".
    for prefix in ("module.", "_orig_mod.", *inner):
        if all(k.startswith(prefix) for k in state) or prefix + "patch_embed.proj.weight" in state:
            state = {k[len(prefix):]: v for k, v in state.items() if k.startswith(prefix)}
            layout.append(f"behind {prefix!r}")
    if "dist_token" in state:
        refuse(path, "has a distillation token: DeiT's distilled networks are not supported, use the plain DeiT file")
    if "patch_embed.proj.weight" not in state:
        refuse(path, f"is no network known here: no patch_embed.proj.weight, but {', '.join(list(state)[:3])}, ...")
    if "pos_embed" not in state or not any(k.startswith("blocks.") for k in state):
        refuse(path, f"is no plain vision transformer: it holds {summary(state)}")
    return Weights(state, config, ", ".join(layout), path)


def shape_of(weights, heads=None, flag="--heads"):
    """The ViT options of a file: dim, depth, heads, patch_size, in_chans, img_size, and what its attention has beside
    the usual. heads, if given (by the option `flag`), wins over stored ones. Ends in a sentence when nothing tells the
    heads or the grid."""
    state, config = weights.state, weights.config
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    table = state.get("blocks.0.attn.relative_position_bias_table")
    heads = heads or config.get("heads") or (table.shape[1] if table is not None else HEADS.get(dim))
    if not heads:
        known = {192: "; MAE-Lite's have 12, DeiT's 3", 384: "; MAE-Lite's and MoCo-v3's have 12, DeiT's 6"}
        refuse(weights.path, f"is {dim} wide and does not say how many heads it has, and its tensors look the same for "
                             f"any number: give {flag}{known.get(dim, '')}")
    found = dict(relative=(True, table is not None), layer_scale=(0.1, "blocks.0.gamma_1" in state),
                 key_bias=(False, "blocks.0.attn.q_bias" in state))
    return dict(dim=dim, depth=1 + max(int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k)),
                heads=heads, patch_size=patch, in_chans=in_chans,
                img_size=[side * patch for side in grid_of(weights, state["pos_embed"])],
                **{option: value for option, (value, there) in found.items() if there})


def grid_of(weights, table):
    """The patch grid (h, w) of a position table: that of the stored image size if it fits, else a square."""
    patch, count = weights.state["patch_embed.proj.weight"].shape[-1], table.shape[1] - 1
    if isinstance(weights.config.get("img_size"), (tuple, list)):
        h, w = (side // patch for side in pair(weights.config["img_size"]))
        if h * w == count:
            return h, w
    side = round(count ** 0.5)
    if side * side != count:
        refuse(weights.path, f"has positions for {count} patches, which is no square, and stores no image size")
    return side, side


def load_into(model, weights, say=print):
    """Copy weights into a model, positions resized to its grid; says what matched, what is missing (and keeps its
    fresh start) and what was not expected. Ends in a sentence when a shape or the stored heads differ, or a tensor of
    the encoder is missing: only heads, decoders, the readout's fc_norm, and what a network with relative positions or
    layer scale has beside a plain one may be fresh. Returns the missing."""
    state, want, path = dict(weights.state), model.state_dict(), weights.path
    stored, heads = weights.config.get("heads"), model.config["heads"]
    if stored and stored != heads:
        refuse(path, f"was trained with {stored} heads and the network here has {heads}: its tensors would fit and "
                     f"mean something else; use --heads {stored}")
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state and name in want and state[name].shape[-1] == want[name].shape[-1]:
            state[name] = resize_positions(state[name], grid_of(weights, state[name]), model.grid)
    old, tables = grid_of(weights, weights.state["pos_embed"]), [k for k in state if k.endswith("position_bias_table")]
    if tables and len(state[tables[0]]) == (2 * old[0] - 1) * (2 * old[1] - 1) + 3:
        state.update({k: resize_relative(state[k], old, model.grid) for k in tables})
    state = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}    # a grid's, not learned
    # A head of another shape is another task's, or a projector, which MoCo-v3 calls head: not wanted here.
    wrong = [k for k in want if k in state and state[k].shape != want[k].shape and not k.startswith("head.")]
    if wrong:
        refuse(path, f"does not fit: {wrong[0]} is {tuple(state[wrong[0]].shape)} in the file and "
                     f"{tuple(want[wrong[0]].shape)} in the network ({len(wrong)} of {len(want)} tensors differ)")
    matched = {k: v for k, v in state.items() if k in want and v.shape == want[k].shape}
    missing = [k for k in want if k not in matched and not k.endswith("relative_position_index")]
    say(f"{path}: {len(matched)} tensors matched; missing, so fresh: {', '.join(missing) or 'none'}; "
        f"not expected: {summary(k for k in state if k not in matched)}")
    lost = [k for k in missing if not FRESH.match(k)]
    if lost:
        refuse(path, f"lacks {len(lost)} tensors of the encoder ({', '.join(lost[:3])}, ...): it is another network, "
                     "or the last.pt of a distilled student, whose encoder.pt is what to give")
    model.load_state_dict({**want, **matched})
    return missing


def summary(names):
    """decoder_blocks.0.norm1.weight, ... -> decoder_blocks (12), ..."""
    stems = [name.split(".")[0] for name in names]
    return ", ".join(f"{stem} ({stems.count(stem)})" for stem in dict.fromkeys(stems)) or "none"


def build_vit(path, heads=None, say=print, **options):
    """A ViT of the file's own shape, with its weights, in eval mode. options of ViT (readout, num_classes, ...) win."""
    weights = read(path)
    model = ViT(**{**shape_of(weights, heads), "positions": "learned", **options})
    load_into(model, weights, say)
    return model.eval()


# ----------------------------------------------------------------------------------------------------------------
# Export

# timm's entries of these widths, depths and patches. Any other shape is a ViT-Base with every option overridden.
TIMM = {(192, 12, 16): "vit_tiny_patch16_224", (384, 12, 16): "vit_small_patch16_224",
        (1024, 24, 16): "vit_large_patch16_224", (1280, 32, 14): "vit_huge_patch14_224"}


class TwoHeads(ViT):
    """A classifier with a head on its patches and one on its cls token (MAE-Lite's label distillation): image -> their
    mean, (B, num_classes)."""

    def __init__(self, **options):
        super().__init__(**options)
        self.dist_norm = nn.LayerNorm(options["dim"], eps=self.fc_norm.eps)
        self.head_dist = nn.Linear(options["dim"], options["num_classes"])

    def forward(self, img):
        x = self.encode(img)
        return (self.head(self.fc_norm(x[:, 1:].mean(1))) + self.head_dist(self.dist_norm(x[:, 0]))) / 2


def whole(weights, heads=None):
    """What a file holds, with its head if it has one, as a network in eval mode, and the names of the tensors that are
    no part of it. Ends in a sentence when one is missing, or its blocks hold some that mean nothing here."""
    state, config = weights.state, weights.config
    options = dict(num_classes=len(state["head.weight"]) if {"head.weight", "head.bias"} <= set(state) else 0,
                   readout="avg" if "fc_norm.weight" in state else "cls", positions="learned",
                   **{k: config[k] for k in ("eps", "resize_offset") if k in config})
    try:
        model = (TwoHeads if "dist_norm.weight" in state else ViT)(**shape_of(weights, heads), **options)
    except ValueError as error:
        refuse(weights.path, f"makes no network: {error}")
    missing = load_into(model, weights, lambda text: None)
    left = [k for k in state if k not in model.state_dict()]
    odd = [k for k in left if k.startswith(("blocks.", "patch_embed."))]
    if missing or odd:
        refuse(weights.path, f"lacks {missing[0]}" if missing else f"holds {odd[0]}, which no network here has")
    return model.eval(), left


def facts_of(weights, model):
    """What must not get lost beside the tensors. mean and std, if not stored, are ImageNet's, or 0 and 1 where the
    channels are not three."""
    config, n = weights.config, model.config["in_chans"]
    usual = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if n == 3 else ((0.0,) * n, (1.0,) * n)
    return {**{k: model.config[k] for k in ("heads", "img_size", "readout", "num_classes", "eps")},
            **dict(zip(("mean", "std"), usual)),
            **{k: config[k] for k in ("method", "mean", "std", "classes", "resize_offset") if config.get(k)}}


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
    """A folder as timm's create_model reads it; num_heads is what its own default gets wrong without a word."""
    c, pool = model.config, "token" if model.readout == "cls" else "avg"
    args = dict(img_size=c["img_size"], patch_size=c["patch_size"], in_chans=c["in_chans"], embed_dim=c["dim"],
                depth=c["depth"], num_heads=c["heads"], mlp_ratio=c["mlp_ratio"], global_pool=pool)
    data = dict(input_size=[c["in_chans"], *c["img_size"]], fixed_input_size=True, interpolation="bicubic",
                crop_pct=0.875 if max(c["img_size"]) <= 224 else 1.0, mean=facts["mean"], std=facts["std"],
                num_classes=c["num_classes"], classifier="head", first_conv="patch_embed.proj")
    config = dict(architecture=TIMM.get((c["dim"], c["depth"], c["patch_size"]), "vit_base_patch16_224"),
                  num_classes=c["num_classes"], num_features=c["dim"], global_pool=pool, model_args=args,
                  pretrained_cfg=data, **({"label_names": facts["classes"]} if "classes" in facts else {}))
    with open(os.path.join(path, "config.json"), "w") as f:
        json.dump(config, f, indent=2)
    write_safetensors(os.path.join(path, "model.safetensors"), model.state_dict(), facts)


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
    strange = [k for k in state if re.search("relative_position_bias|gamma_|[qv]_bias|head_dist", k)]
    if to == "timm" and (strange or c["eps"] != 1e-6):
        refuse(weights.path, f"has {strange[0] if strange else 'an eps of ' + str(c['eps'])}, for which timm's plain "
                             "ViT has no place: --to safetensors and onnx keep it")
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
    print(f"{weights.path} -> {out}: width {c['dim']}, {c['depth']} layers, {c['heads']} heads, patches of "
          f"{c['patch_size']}, images of {' x '.join(map(str, c['img_size']))} and {c['in_chans']} channels, readout "
          f"{c['readout']}, {c['num_classes'] or 'no'} classes, mean {facts['mean']}, std {facts['std']}"
          f"{'' if weights.config.get('mean') else ' (not stored: the usual)'}; left out: {summary(left)}")
    if to == "timm":
        print(f'timm.create_model("local-dir:{out}", pretrained=True)')
    return out


def main(argv):
    if argv[:1] == ["export"]:
        parser = argparse.ArgumentParser(prog="weights.py export", allow_abbrev=False)
        parser.error = lambda message: refuse("weights.py export:", f"{message} (--help lists the options)")
        parser.add_argument("path", metavar="FILE", help="a checkpoint of any layout; FILE:KEY for one network of it")
        parser.add_argument("--to", required=True, choices=["timm", "safetensors", "onnx"])
        parser.add_argument("--out", help="file, or folder for timm, to make (default: FILE with another ending)")
        parser.add_argument("--heads", type=int, help="attention heads, where the file does not say")
        options = vars(parser.parse_args(argv[1:]))
        if options["heads"] is not None and options["heads"] < 1:
            parser.error("--heads must be at least 1")
        return export(**options)
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("\n".join(__doc__.strip().splitlines()[-2:]))
    found = read(argv[0])
    print(f"{found.path}: {found.layout}; method {found.config['method'] or 'not stored'}; "
          f"heads {found.config.get('heads') or 'not stored'}\n{shape_of(found, heads=1) | dict(heads='see above')}\n"
          f"tensors: {summary(found.state)}")


if __name__ == "__main__":
    main(sys.argv[1:])
