"""
Public checkpoints in, safely. Every layout in use is a state dict under some key, behind some prefixes; the networks
here have the published names, so reading is: find the dict, strip the prefixes, resize the positions, say what matched.
And out again: the encoder or classifier of any of them for timm, as safetensors, or as ONNX.

python weights.py FILE     says what a file is
python weights.py export FILE --to timm|safetensors|onnx [--out PATH] [--heads N]
"""
import argparse
import json
import os
import re
import struct
import sys
from collections import namedtuple

import numpy as np
import torch

from vit import Swin, TwoHeads, ViT, pair, resize_positions, resize_relative

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
            heads = ("head.", "head_dense.") if prefix == "backbone." else ()                   # DINO's, beside it
            state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith((prefix, *heads))}
            layout.append(f"behind {prefix!r}")
    if "dist_token" in state:
        refuse(path, "has a distillation token: DeiT's distilled networks are not supported, use the plain DeiT file")
    if "patch_embed.proj.weight" not in state:
        refuse(path, f"is no network known here: no patch_embed.proj.weight, but {', '.join(list(state)[:3])}, ...")
    found = Weights(state, config, ", ".join(layout), path)
    if not is_swin(found) and ("pos_embed" not in state or not any(k.startswith("blocks.") for k in state)):
        refuse(path, f"is no plain vision transformer and no Swin: it holds {summary(state)}")
    return found


def is_swin(weights):
    return "layers.0.blocks.0.attn.relative_position_bias_table" in weights.state


def side_of(table):
    """Of a Swin's table of relative positions: the side of the window it is for."""
    return (round(len(table) ** 0.5) + 1) // 2


def swin_shape_of(weights):
    """The Swin options of a file. Without a stored image size, that at which the last stage is one window, as in all
    that are published; without a stored eps 1e-5 for official supervised files, which have masks, else 1e-6."""
    state, config = weights.state, weights.config
    tables = {}
    for name, table in state.items():
        if found := re.fullmatch(r"layers\.(\d+)\.blocks\.\d+\.attn\.relative_position_bias_table", name):
            tables.setdefault(int(found[1]), []).append(table)
    stages = [tables[s] for s in sorted(tables)]
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    usual = side_of(stages[-1][0]) * patch * 2 ** (len(stages) - 1)
    masked = any(k.endswith(".attn_mask") for k in state)
    return dict(dim=dim, depths=tuple(map(len, stages)), heads=tuple(blocks[0].shape[1] for blocks in stages),
                window=config.get("window") or side_of(stages[0][0]), patch_size=patch, in_chans=in_chans,
                img_size=pair(config.get("img_size") or usual), eps=config.get("eps", 1e-5 if masked else 1e-6))


def shape_of(weights, heads=None, flag="--heads"):
    """The ViT options of a file: dim, depth, heads, patch_size, in_chans, img_size, and what its attention has beside
    the usual. heads, if given (by the option `flag`), wins over stored ones. Ends in a sentence when nothing tells the
    heads or the grid."""
    state, config = weights.state, weights.config
    if is_swin(weights):
        refuse(weights.path, "is a Swin, and here a plain vision transformer is expected")
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
    if isinstance(stored, int) and stored != heads:             # a Swin's are seen in its tensors
        refuse(path, f"was trained with {stored} heads and the network here has {heads}: its tensors would fit and "
                     f"mean something else; use --heads {stored}")
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state and name in want and state[name].shape[-1] == want[name].shape[-1]:
            state[name] = resize_positions(state[name], grid_of(weights, state[name]), model.grid)
    tables = [k for k in state if k.endswith("position_bias_table")]
    if is_swin(weights):
        for k in (k for k in tables if k in want and len(state[k]) != len(want[k])):
            old, new, three = side_of(state[k]), side_of(want[k]), state[k].new_zeros(3, state[k].shape[1])
            say(f"{path}: {k} is resized from windows of {old} to {new}")
            state[k] = resize_relative(torch.cat([state[k], three]), (old, old), (new, new))[:-3]    # three for a cls
    elif tables:
        old = grid_of(weights, weights.state["pos_embed"])
        if len(state[tables[0]]) == (2 * old[0] - 1) * (2 * old[1] - 1) + 3:
            state.update({k: resize_relative(state[k], old, model.grid) for k in tables})
    # What belongs to a grid and is not learned.
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
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
    """A ViT of the file's own shape, with its weights, in eval mode. options of ViT (readout, num_classes, ...) win.
    Of a Swin's file a Swin, which has one readout and no options of that name."""
    weights = read(path)
    if is_swin(weights):
        options.pop("readout", None)
        model = Swin(**{**swin_shape_of(weights), **options})
    else:
        model = ViT(**{**shape_of(weights, heads), "positions": "learned", **options})
    load_into(model, weights, say)
    return model.eval()


def whole(weights, heads=None, flag="--heads", **options):
    """What a file holds, with its head if it has one, as a network in eval mode, and the names of the tensors that are
    no part of it. options of ViT or Swin win. Ends in a sentence when a tensor is missing, or the blocks hold some that
    mean nothing here."""
    state, config, kind = weights.state, weights.config, TwoHeads if "head_dist.weight" in weights.state else ViT
    if is_swin(weights):
        shape, kind = swin_shape_of(weights), Swin
        width = shape["dim"] * 2 ** (len(shape["depths"]) - 1)
    else:
        shape = shape_of(weights, heads, flag)
        shape.update(readout="avg" if "fc_norm.weight" in state else "cls", positions="learned",
                     **{k: config[k] for k in ("eps", "resize_offset") if k in config})
        width = shape["dim"]
    # A head of another width reads more than this network's feature: several blocks, or what a projector projects.
    head = state.get("head.weight") if "head.bias" in state else None
    fits = head is not None and head.shape[1:] == (width,)
    try:
        model = kind(**{**shape, "num_classes": len(head) if fits else 0, **options})
    except ValueError as error:
        refuse(weights.path, f"makes no network: {error}")
    missing = load_into(model, weights, lambda text: None)
    ours = model.state_dict()
    left = [k for k in state if k not in ours]
    odd = [k for k in left if k.startswith(("blocks.", "layers.", "patch_embed.")) and not k.endswith("attn_mask")]
    if missing or odd:
        refuse(weights.path, f"lacks {missing[0]}" if missing else f"holds {odd[0]}, which no network here has")
    return model.eval(), left


def tell(argv):
    if argv[:1] == ["export"]:
        # Not at the top, because it imports this file.
        import export
        return export.main(argv[1:])
    if len(argv) != 1 or argv[0].startswith("-"):
        raise SystemExit("\n".join(__doc__.strip().splitlines()[-2:]))
    found = read(argv[0])
    shape = swin_shape_of(found) if is_swin(found) else shape_of(found, heads=1) | dict(heads="see above")
    print(f"{found.path}: {found.layout}; method {found.config['method'] or 'not stored'}; "
          f"heads {found.config.get('heads') or 'not stored'}\n{shape}\n"
          f"tensors: {summary(found.state)}")


if __name__ == "__main__":
    tell(sys.argv[1:])
