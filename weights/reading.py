"""
Public checkpoints in, safely. Every layout in use is a state dict under some key, behind some prefixes; the networks
here have the published names. So reading is: find the dict, strip the prefixes, resize the positions, say what matched.
"""
import argparse
import hashlib
import json
import math
import os
import re
import struct
from collections import namedtuple

import numpy as np
import torch

from nets.beit import BeitViT, TwoHeads, resize_relative
from vit import Swin, ViT, pair, resize_positions

# state: tensors by published names; config: the options that the file stores, maybe none; layout: where it all was
Weights = namedtuple("Weights", "state config layout path")

# Official files hold an argparse.Namespace and NumPy scalars, both plain data. What needs other code is refused.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(c)) for c in "?bBhHiIlLqQefd"),
        np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]

# Heads leave no trace in the shapes of tensors. These widths have one published answer; 192 and 384 have two.
HEADS = {768: 12, 1024: 16, 1280: 16}

# What safetensors calls the types.
TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
             I32=torch.int32, U8=torch.uint8, BOOL=torch.bool)

# What a file may lack: a task's own layers, and what relative positions and layer scale add to a plain network.
FRESH = re.compile(r"head\.|fc_norm\.|head_dist\.|dist_norm\.|decoder_|mask_token|"
                   r".*\.(gamma_[12]|[qv]_bias|relative_position_bias_table)$")


def refuse(path, reason):
    raise SystemExit(f"{path} {reason}") from None


# ----------------------------------------------------------------------------------------------------------------
# Files

def file_and_key(path):
    """Split FILE:KEY, where KEY names one network of several -> (file, key); of a plain FILE the key is ""."""
    if os.path.exists(path) or ":" not in path:
        return path, ""
    file, key = path.rsplit(":", 1)
    return file, key


def digest(path):
    """The sha256 of a file, FILE or FILE:KEY, as 64 hexadecimal digits: what a run remembers a file by."""
    with open(file_and_key(path)[0], "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def load_file(path):
    """Load any .pt, .pth, .tar or .safetensors file as plain data. SystemExit if absent, damaged or holding code."""
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


def config_of(file):
    """The options that a loaded file stores, and the method that made it, or None."""
    config = file.get("config") or file.get("args")
    config = vars(config) if isinstance(config, argparse.Namespace) else config
    config = {**config} if isinstance(config, dict) else {}
    if "readout" in config:                                     # what earlier files call the pool
        config["pool"] = config.pop("readout")
    return {**config, "method": file.get("method")}


def read(path, key=None):
    """Read a file of any known layout -> Weights. SystemExit when it holds no network that is known here.

    key: which network, where a file holds several: DINO's "student" or "teacher" (default), MoCo v3's "base_encoder"
    (default) or "momentum_encoder", timm's "state_dict_ema". FILE:KEY as path means the same.
    """
    path, key_in_path = file_and_key(path)
    key = key_in_path or key
    file = load_file(path)
    if not isinstance(file, dict):
        refuse(path, f"is no checkpoint: it holds a {type(file).__name__}")
    places = [name for name in (key, "model", "state_dict", "teacher", "student") if name in file]
    state = file[places[0]] if places else file
    state = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    keys = ", ".join(map(str, list(file)[:8]))
    if not state:
        refuse(path, f"holds no weights: its keys are {keys}")
    layout = [f"under {places[0]!r}" if places else "a bare state dict"]

    inner = ["base_encoder.", "backbone.", "model.", "encoder."]
    if key and key not in file:                                 # then it is a prefix: MoCo's "momentum_encoder"
        inner = [f"{key}."]
        if not any(f"{outer}{key}.patch_embed.proj.weight" in state for outer in ("", "module.")):
            refuse(path, f"has nothing called {key!r}: its keys are {keys}")
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
    weights = Weights(state, config_of(file), ", ".join(layout), path)
    is_vit = "pos_embed" in state and any(k.startswith("blocks.") for k in state)
    if not is_vit and not is_swin(weights):
        refuse(path, f"is no plain vision transformer and no Swin: it holds {summary(state)}")
    return weights


def summary(names):
    """decoder_blocks.0.norm1.weight, ... -> decoder_blocks (12), ..."""
    stems = [name.split(".")[0] for name in names]
    return ", ".join(f"{stem} ({stems.count(stem)})" for stem in dict.fromkeys(stems)) or "none"


# ----------------------------------------------------------------------------------------------------------------
# What network a file holds

def is_swin(weights):
    return "layers.0.blocks.0.attn.relative_position_bias_table" in weights.state


def mlp_ratio_of(weights, block="blocks.0"):
    """How many times wider than a token a block's MLP is ("decoder_blocks.0": a decoder's); 4 if the file has none."""
    rows, dim = weights.state.get(f"{block}.mlp.fc1.weight", torch.empty(4, 1)).shape
    ratio = rows / dim
    return ratio if int(dim * ratio) == rows else math.nextafter(ratio, math.inf)               # 49 * (1 / 49) < 1


def vit_options(weights, heads=None, flag="--heads"):
    """The options of ViT, or of BeitViT, that a file shows. heads, if given (by the option `flag`), wins over those
    stored. SystemExit when nothing tells the heads or the grid."""
    state = weights.state
    if is_swin(weights):
        refuse(weights.path, "is a Swin, and here a plain vision transformer is expected")
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    table = state.get("blocks.0.attn.relative_position_bias_table")
    usual_heads = HEADS.get(dim) if table is None else table.shape[1]
    heads = heads or weights.config.get("heads") or usual_heads
    if not heads:
        known = {192: "; MAE-Lite's have 12, DeiT's 3", 384: "; MAE-Lite's and MoCo-v3's have 12, DeiT's 6"}
        refuse(weights.path, f"is {dim} wide and does not say how many heads it has, and its tensors look the same for "
                             f"any number: give {flag}{known.get(dim, '')}")
    h, w = grid_of(weights, state["pos_embed"])
    depth = 1 + max(int(k.split(".")[1]) for k in state if re.match(r"blocks\.\d+\.", k))
    options = dict(dim=dim, depth=depth, heads=heads, mlp_ratio=mlp_ratio_of(weights), patch_size=patch,
                   in_chans=in_chans, img_size=(h * patch, w * patch))
    if table is not None:
        options["relative"] = True
    if "blocks.0.gamma_1" in state:
        options["layer_scale"] = 0.1
    if "blocks.0.attn.q_bias" in state:
        options["key_bias"] = False
    return options


def side_of(table):
    """The side of the window that a Swin's table of relative positions is for."""
    return (round(len(table) ** 0.5) + 1) // 2


def swin_options(weights):
    """The options of Swin that a file shows. Without a stored image size, that at which the last stage is one window,
    as in all that are published; without a stored eps 1e-5 for official supervised files, which have masks, else 1e-6.
    """
    state, config = weights.state, weights.config
    name = "attn.relative_position_bias_table"
    blocks = [k.split(".")[1] for k in state if re.fullmatch(rf"layers\.\d+\.blocks\.\d+\.{name}", k)]
    stages = sorted(set(blocks), key=int)
    tables = [state[f"layers.{stage}.blocks.0.{name}"] for stage in stages]     # that of each stage's first block
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    usual_size = side_of(tables[-1]) * patch * 2 ** (len(stages) - 1)
    has_masks = any(k.endswith(".attn_mask") for k in state)
    return dict(dim=dim, depths=tuple(blocks.count(stage) for stage in stages),
                heads=tuple(table.shape[1] for table in tables), mlp_ratio=mlp_ratio_of(weights, "layers.0.blocks.0"),
                window=config.get("window") or side_of(tables[0]), patch_size=patch, in_chans=in_chans,
                img_size=pair(config.get("img_size") or usual_size), eps=config.get("eps", 1e-5 if has_masks else 1e-6))


def encoder_options(weights, heads=None, flag="--heads"):
    """swin_options of a Swin's file, else vit_options."""
    return swin_options(weights) if is_swin(weights) else vit_options(weights, heads, flag)


def build(options):
    """A network with random weights: a Swin, BeitViT or ViT, whichever has these options. ValueError as there."""
    if "depths" in options:
        return Swin(**options)
    return BeitViT(**options) if options.keys() & {"relative", "layer_scale", "key_bias"} else ViT(**options)


def grid_of(weights, table):
    """The grid of patches (h, w) of a table of positions: that of the stored image size if it fits, else a square."""
    patch, count = weights.state["patch_embed.proj.weight"].shape[-1], table.shape[1] - 1
    if isinstance(weights.config.get("img_size"), (tuple, list)):
        height, width = pair(weights.config["img_size"])
        if (height // patch) * (width // patch) == count:
            return height // patch, width // patch
    side = round(count ** 0.5)
    if side * side != count:
        refuse(weights.path, f"has positions for {count} patches, which is no square, and stores no image size")
    return side, side


def layer_of(model, name):
    """The layer that a parameter of a ViT or Swin belongs to: 0 before the blocks, then the block's number from 1, then
    depth + 1. A Swin's blocks count through its stages, and a merging belongs to the block before it."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    found = re.match(r"(?:layers\.(\d+)\.)?(?:blocks\.(\d+)|downsample)", name)
    if not found:
        return model.depth + 1
    depths = model.config.get("depths", (model.depth,))
    stage = int(found[1] or 0)
    return sum(depths[:stage]) + (int(found[2]) + 1 if found[2] else depths[stage])


# ----------------------------------------------------------------------------------------------------------------
# Into a network

def fitted_positions(weights, model, say):
    """The file's tensors, with all positions, absolute and relative, resized to the model's grid or windows."""
    state, want = dict(weights.state), model.state_dict()
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state and name in want and state[name].shape[-1] == want[name].shape[-1]:
            state[name] = resize_positions(state[name], grid_of(weights, state[name]), model.grid)
    for name in [k for k in state if k.endswith("relative_position_bias_table")]:
        if not is_swin(weights):
            h, w = grid_of(weights, weights.state["pos_embed"])
            if len(state[name]) == (2 * h - 1) * (2 * w - 1) + 3:
                state[name] = resize_relative(state[name], (h, w), model.grid)
        elif name in want and len(state[name]) != len(want[name]):
            old, new = side_of(state[name]), side_of(want[name])
            say(f"{weights.path}: {name} is resized from windows of {old} to {new}")
            state[name] = resize_relative(state[name], (old, old), (new, new))
    return state


def load_into(model, weights, say=print):
    """Copy weights into a model, positions resized to its grid, and say what matched, what is missing (and keeps its
    fresh start) and what was not expected. Returns the names of the missing.

    SystemExit when a shape or the stored heads differ, or a tensor of the encoder is missing: only heads, decoders, the
    pooled classifier's fc_norm, and what relative positions and layer scale add to a plain network, may be fresh.
    """
    want, path = model.state_dict(), weights.path
    stored, heads = weights.config.get("heads"), model.config["heads"]
    if isinstance(stored, int) and stored != heads:             # a Swin's are seen in its tensors
        refuse(path, f"was trained with {stored} heads and the network here has {heads}: its tensors would fit and "
                     f"mean something else; use --heads {stored}")
    state = fitted_positions(weights, model, say)
    # These follow from the grid and are not learned.
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    # A head of another shape is another task's, or a projector, which MoCo v3 calls head: not wanted here.
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


def load_encoder(path, heads=None, say=print, **options):
    """The encoder in a file, with its weights, in eval mode. options of ViT or Swin (pool, num_classes, img_size, ...)
    win over the file's; a Swin has one pool, so that option is ignored there."""
    weights = read(path)
    found = encoder_options(weights, heads)
    if is_swin(weights):
        options.pop("pool", None)
    else:
        found["positions"] = "learned"
    model = build({**found, **options})
    load_into(model, weights, say)
    return model.eval()


def load_classifier(weights, heads=None, flag="--heads", **options):
    """What a file holds, with its head if it has one -> (network in eval mode, names of the tensors it has no use for).
    options of ViT or Swin win over the file's. SystemExit when a tensor is missing, or one of a block is unknown."""
    state, config, swin = weights.state, weights.config, is_swin(weights)
    found = encoder_options(weights, heads, flag)
    if not swin:
        found.update(pool="avg" if "fc_norm.weight" in state else "cls", positions="learned")
        found.update({k: config[k] for k in ("eps", "resize_offset") if k in config})
    # A head of another width reads more than this network's feature: several blocks, or what a projector projects.
    width = found["dim"] * 2 ** (len(found["depths"]) - 1) if swin else found["dim"]
    head = state.get("head.weight") if "head.bias" in state else None
    found["num_classes"] = len(head) if head is not None and head.shape[1:] == (width,) else 0
    try:
        found.update(options)
        model = TwoHeads(**found) if "head_dist.weight" in state and not swin else build(found)
    except ValueError as error:
        refuse(weights.path, f"makes no network: {error}")
    missing = load_into(model, weights, say=lambda text: None)
    ours = model.state_dict()
    left = [k for k in state if k not in ours]
    odd = [k for k in left if k.startswith(("blocks.", "layers.", "patch_embed.")) and not k.endswith("attn_mask")]
    if missing:
        refuse(weights.path, f"lacks {missing[0]}")
    if odd:
        refuse(weights.path, f"holds {odd[0]}, which no network here has")
    return model.eval(), left
