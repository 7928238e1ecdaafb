"""
Public checkpoints in, safely. Every layout in use is a state dict under some key, behind some prefixes, with published
names (layouts.py). So reading is: find the dict, rename, strip prefixes, resize the positions, say what matched.
"""
import argparse
import hashlib
import json
import math
import os
import re
import signal
import sys
import zipfile
from collections import namedtuple
from numbers import Integral

import numpy as np
import torch

from nets import naming
from nets.beit import TwoHeads
from nets.cvt import CvT
from nets.vil import ViL
from vit import pair, resize_positions
from weights import layouts

# state: tensors by published names; config: the options that the file stores, maybe none; layout: where it all was
Weights = namedtuple("Weights", "state config layout path")

# Official files hold an argparse.Namespace and NumPy scalars, both plain data. What needs other code is refused.
SAFE = [argparse.Namespace, np.dtype, *(type(np.dtype(c)) for c in "?bBhHiIlLqQefd"),
        np._core.multiarray.scalar, (np._core.multiarray.scalar, "numpy.core.multiarray.scalar")]

# Heads leave no trace in the shapes of tensors. These widths have one published answer; 192 and 384 have two.
HEADS = {768: 12, 1024: 16, 1280: 16}
DECODER_HEADS = {96: 3, 192: 6, 512: 16}                        # of published decoders, by their width

# Parts of names that stand before the weights of the one network that is meant, where a file holds several.
OUTER = {"module", "_orig_mod", "base_encoder", "backbone", "model", "encoder"}


def run_as_tool(main):
    """Run a command line: `| head` ends it quietly, a name that the terminal cannot print is escaped, and output that
    cannot be written ends in a sentence."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")
    try:
        main(sys.argv[1:])
        sys.stdout.flush()
    except OSError as error:
        sys.stderr.write(f"the output cannot be written: {error}\n")
        os._exit(1)                                             # Python would try once more, and print a traceback


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


def weights_file(path):
    """The file with the weights in a folder of Hugging Face's or timm's; of a file the file itself."""
    found = [name for name in layouts.FILES if os.path.isfile(os.path.join(path, name))]
    if os.path.isdir(path) and not found:
        refuse(path, f"is a folder without {' or '.join(layouts.FILES)}: give a file, or a folder with one of these")
    return os.path.join(path, found[0]) if found else path


def digest(path):
    """The sha256 of a FILE, FILE:KEY or FOLDER's weights, as 64 hexadecimal digits: what a run remembers a file by."""
    with open(weights_file(file_and_key(path)[0]), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def damage_in(path):
    """Compare a file with the checksums that torch.save stores in it -> what is damaged, in words, or None. torch.load
    does not look at them. None also for the kinds of file that have none: older torch.save's, and safetensors."""
    if not os.path.isfile(path):
        return "it is no file"
    with open(path, "rb") as f:
        if f.read(4) != b"PK\x03\x04":
            return None
    try:
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            if not any(record.CRC for record in records):       # saved with set_crc32_options(False)
                return None
            # Torch reads something else where a file is marked as a folder, or where its two sizes are not the same.
            wrong = [r.filename for r in records if not r.is_dir() and not r.compress_type
                     and (r.external_attr & 16 or r.file_size != r.compress_size)] or [file.testzip()]
    except Exception as error:                                  # damage shows as zip, struct, zlib or unicode errors
        return f"its list of contents cannot be read ({type(error).__name__})"
    return wrong[0] and f"the size or the checksum of {wrong[0]!r} is wrong"


def load_file(path):
    """Load any .pt, .pth, .tar or .safetensors file as plain data. SystemExit if absent, damaged or holding code."""
    if not os.path.isfile(path):                                # to open a pipe would be to wait
        refuse(path, f"{'is no file' if os.path.exists(path) else 'does not exist'}: a checkpoint was expected")
    try:
        if path.endswith(".safetensors"):
            return read_safetensors(path)
        damage = damage_in(path)
        if damage:
            refuse(path, f"is damaged: {damage}; copy or download it again")
        with torch.serialization.safe_globals(SAFE):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # other damage shows as pickle, EOF or unicode errors
        code = re.search(r"GLOBAL (\S+)", str(error))
        if code:
            refuse(path, f"is refused, because loading it would run code ({code[1]}): re-save it as plain tensors")
        refuse(path, f"cannot be read: it is damaged or no checkpoint ({type(error).__name__})")


def import_safetensors():
    """The package, which is imported only where a file needs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise SystemExit("safetensors files need the package safetensors: pip install '.[safetensors]'") from None
    return safetensors


def read_safetensors(path):
    """The tensors, and the metadata under "config": strings in the file, numbers and lists here where they are JSON."""
    with import_safetensors().safe_open(path, "pt") as file:
        tensors, config = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    for name, text in config.items():
        try:
            config[name] = json.loads(text)
        except ValueError:
            pass                                                # it is text
    return {**tensors, "config": config, "method": config.get("method")}


def config_of(path, file, beside):
    """The options stored in a file, over those `beside` it, and its method or None. SystemExit for what is none."""
    config = dict(beside)
    for place in ("args", "config"):                            # the second one wins
        found = file.get(place)
        found = vars(found) if isinstance(found, argparse.Namespace) else found
        if not isinstance(found, (dict, type(None))):
            refuse(path, f"stores its options under {place!r} as a {type(found).__name__}, and a dict was expected")
        config |= found or {}
    if "readout" in config:                                     # what earlier files call the pool
        config["pool"] = config.pop("readout")
    if isinstance(file.get("teacher"), dict) and "sha256" in file["teacher"]:               # of a last.pt
        config["teacher"] = file["teacher"]
    config["method"] = file.get("method")
    for name in naming.STORED:
        expected = naming.wrong_option(name, config.get(name))
        if expected:
            refuse(path, f"stores {name} as {str(config[name])[:60]!r}, and {expected} expected")
    return config


def read(path, key=None):
    """Read a file of any known layout -> Weights. SystemExit when it holds no network that is known here.

    key: which network, where a file holds several: DINO's "student" or "teacher" (default), MoCo v3's "base_encoder"
    (default) or "momentum_encoder", timm's "state_dict_ema". FILE:KEY as path means the same.
    """
    path, key_in_path = file_and_key(path)
    place, key = weights_file(path), key_in_path or key
    file = load_file(place)
    if not isinstance(file, dict):
        refuse(path, f"is no checkpoint: it holds a {type(file).__name__}")
    places = [name for name in (key, "model", "state_dict", "teacher", "student") if isinstance(file.get(name), dict)]
    bare = any(map(torch.is_tensor, file.values()))
    others = [k for k, v in file.items() if isinstance(v, dict) and any(map(torch.is_tensor, v.values()))]
    if not places and not bare and len(others) > 1:
        refuse(path, f"holds several networks: give {path}:KEY with one of {', '.join(map(str, others))}")
    places = places or ([] if bare else others)                 # "net", "model_state_dict", ...
    state = file[places[0]] if places else file
    keys = ", ".join(repr(k)[:60].strip("'") for k in list(file)[:8])
    if not all(isinstance(k, str) for k in state) or not any(map(torch.is_tensor, state.values())):
        refuse(path, f"holds no weights by name: its keys are {keys}")
    try:
        state, library = layouts.translate(state)
        prefix = prefix_of(path, state, "" if key in places else key, keys)
        # DINO's heads stand beside its backbone, and are kept. ls1.gamma is what timm and DINOv2 call BEiT's gamma_1.
        outer = re.sub(r"(^|\.)backbone\.$", r"\1", prefix)
        state = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", k.removeprefix(prefix).removeprefix(outer)): v
                 for k, v in state.items() if k.startswith((prefix, f"{outer}head.", f"{outer}head_dense."))}
        foreign = layouts.foreign_parts([name for name in state if naming.ENCODER.match(name)])
        if foreign:
            refuse(path, f"has {foreign}, which the network here has no place for{layouts.as_teacher(foreign)}")
        layout = (f"under {places[0]!r}" if places else "a bare state dict") + (prefix and f", behind {prefix!r}")
        weights = Weights(state, {}, f"{layout}, named as in {library.library}" if library else layout, path)
        for part in NEEDED.get(kind_of(weights), ()):
            if not any(k.startswith(part.split()[0]) for k in state):
                refuse(path, f"is no plain vision transformer, Swin, Hiera, ViL or CvT: it has no {part}; it has "
                             f"{summary(state)}")
        state = checked_tensors(path, state)
        layouts.join_qkv(state)
        beside = dict(eps=library and library.eps) | layouts.settings_of(place, state)
    except ValueError as error:
        refuse(path, str(error))
    return weights._replace(state=state, config=config_of(path, file, beside))


def prefix_of(path, state, key, keys):
    """What stands before a network's names: "module.backbone.", say. key: a part of it; keys: what the file has."""
    found = [k.removesuffix(stem) for stem in naming.STEMS for k in state if f".{k}".endswith(f".{stem}")]
    if not found:
        foreign = layouts.foreign_parts(state)
        refuse(path, f"is no network known here: it has {foreign or 'no patch_embed.proj.weight'}, and holds "
                     f"{', '.join(list(state)[:3])}, ...{layouts.as_teacher(foreign)}")
    fitting = [prefix for prefix in found if not key or f".{key}." in f".{prefix}"]
    if not fitting:
        refuse(path, f"has nothing called {key!r}: its keys are {keys}")
    usual = [prefix for prefix in fitting if set(prefix.split(".")[:-1]) <= OUTER]
    fitting = usual if len(usual) == 1 else fitting             # the others are teachers, averages, ...
    if len(fitting) > 1:
        refuse(path, f"holds several networks: give {path}:KEY with one of {', '.join(p[:-1] for p in fitting if p)}")
    return fitting[0]


def checked_tensors(path, state):
    """A state dict without what is no tensor. SystemExit for what cannot be a weight."""
    for name, value in state.items():
        flaw = naming.wrong_tensor(name, value)
        if flaw:
            refuse(path, f"holds {flaw}")
    return {name: t for name, t in state.items() if isinstance(t, torch.Tensor)}


def summary(names):
    """decoder_blocks.0.norm1.weight, ... -> decoder_blocks (12), ..."""
    stems = [name.split(".")[0] for name in names]
    return ", ".join(f"{stem} ({stems.count(stem)})" for stem in dict.fromkeys(stems)) or "none"


# ----------------------------------------------------------------------------------------------------------------
# What network a file holds

# What a file of each kind of network has, beside patch_embed; a Swin, ViL and CvT are known by what else they have.
NEEDED = dict(ViT=("blocks", "pos_embed (positions)", "cls_token"), Hiera=("pos_embed (positions)",))


def kind_of(weights):
    """The kind of network that a file holds: "ViT", "Swin", "Hiera", "ViL" or "CvT"."""
    kind = naming.STEMS[naming.stem_of(weights.state)]
    if kind:
        return kind
    if naming.stage_starts(weights.state):
        return "Hiera"
    return "Swin" if is_swin(weights) else "ViT"


def is_swin(weights):
    return "layers.0.blocks.0.attn.relative_position_bias_table" in weights.state


def is_pyramid(weights):
    """Whether it is a Swin, ViL or CvT, which a file shows with their heads, if at all."""
    return kind_of(weights) not in ("ViT", "Hiera")


def mlp_ratio_of(weights, block="blocks.0"):
    """How many times wider than a token a block's MLP is ("decoder_blocks.0": a decoder's); 4 if the file has none."""
    rows, dim = weights.state.get(f"{block}.mlp.fc1.weight", torch.empty(4, 1)).shape
    ratio = rows / dim
    return ratio if int(dim * ratio) == rows else math.nextafter(ratio, math.inf)               # 49 * (1 / 49) < 1


def depth_of(weights, stem, dim):
    """Count the blocks `stem`.0, `stem`.1, ... SystemExit when a number is left out or a block's weights are not for
    `dim` channels: so the network that is built from this is not much larger than the file."""
    numbers = {found[1] for found in (re.match(rf"{stem}\.([0-9]+)\.", name) for name in weights.state) if found}
    for name in [f"{stem}.{n}.{part}.weight" for n in range(len(numbers)) for part in ("attn.qkv", "mlp.fc1")]:
        if name not in weights.state or weights.state[name].shape[1:] != (dim,):
            refuse(weights.path, f"has no {name} of width {dim}: it is another network, or only a part of one")
    return len(numbers)


def vit_options(weights, heads=None, flag="--heads"):
    """The options of ViT, or of BeitViT, that a file shows. heads, if given (by the option `flag`), wins over those
    stored. SystemExit when nothing tells the heads or the grid."""
    state = weights.state
    if kind_of(weights) != "ViT":
        refuse(weights.path, f"is a {kind_of(weights)}, and here a plain vision transformer is expected")
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    table = state.get("blocks.0.attn.relative_position_bias_table")
    usual_heads = HEADS.get(dim) if table is None else table.shape[1]
    heads = heads or weights.config.get("heads") or usual_heads
    if heads and not isinstance(heads, Integral):
        refuse(weights.path, f"stores heads as {heads}, and one number was expected")
    if not heads:
        known = {192: "; MAE-Lite's have 12, DeiT's 3", 384: "; MAE-Lite's and MoCo-v3's have 12, DeiT's 6"}
        refuse(weights.path, f"is {dim} wide and does not say how many heads it has, and its tensors look the same for "
                             f"any number: give {flag}{known.get(dim, '')}")
    h, w = grid_of(weights, state["pos_embed"])
    depth, ratio = depth_of(weights, "blocks", dim), mlp_ratio_of(weights)
    # A decoder has the same ratio, and its width may tell it more exactly: 40 of 24 channels may be 1.7, rounded down.
    finer = max(ratio, mlp_ratio_of(weights, "decoder_blocks.0"))
    ratio = finer if int(dim * finer) == int(dim * ratio) else ratio
    options = dict(dim=dim, depth=depth, heads=heads, mlp_ratio=ratio, patch_size=patch,
                   in_chans=in_chans, img_size=(h * patch, w * patch), eps=weights.config.get("eps") or 1e-6)
    if table is not None:
        options["relative"] = True
    if "blocks.0.gamma_1" in state:
        options["layer_scale"] = 0.1
    if "blocks.0.attn.q_bias" in state:
        options["key_bias"] = False
    return options


def swin_options(weights):
    """The options of Swin that a file shows. Without a stored image size, that of the masks, or the smallest with these
    windows; without a stored eps 1e-5 for official supervised files, which have masks, else 1e-6."""
    state, config = weights.state, weights.config
    dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
    stages = range(len({k.split(".")[1] for k in state if k.startswith("layers.")}))
    depths = tuple(depth_of(weights, f"layers.{stage}.blocks", dim * 2 ** stage) for stage in stages)
    names = [f"layers.{stage}.blocks.0.attn.relative_position_bias_table" for stage in stages]
    tables = [state[name] for name in names if name in state]
    sides, masks = [naming.side_of(table) for table in tables], [k for k in state if k.endswith(".attn_mask")]
    window, mask = config.get("window") or sides[0], state.get("layers.0.blocks.1.attn_mask")
    patches = naming.fewest_patches(sides, window)
    if mask is not None and mask.dim() == 3:                    # one for each window of the first stage
        patches = sides[0] * round(len(mask) ** 0.5)
    size = pair(config.get("img_size") or patch * patches)
    if sides != naming.window_sides(min(size) // patch, window, len(stages)):
        refuse(weights.path, f"has windows of {sides}, which no Swin with a window of {window} has at its image size")
    return dict(dim=dim, depths=depths, heads=tuple(table.shape[1] for table in tables), window=window,
                mlp_ratio=mlp_ratio_of(weights, "layers.0.blocks.0"), patch_size=patch, in_chans=in_chans,
                img_size=size, eps=config.get("eps") or (1e-5 if masks else 1e-6))


def hiera_options(weights, heads=None, flag="--heads"):
    """The options of Hiera that a file shows, see naming.hiera_shape. SystemExit when it is none."""
    if kind_of(weights) != "Hiera":
        refuse(weights.path, f"is a {kind_of(weights)}, and here a Hiera is expected")
    try:
        return naming.hiera_shape(weights.state, weights.config, heads, flag) | dict(mlp_ratio=mlp_ratio_of(weights))
    except ValueError as error:
        refuse(weights.path, str(error))


def encoder_options(weights, heads=None, flag="--heads"):
    """The options of the network in a file, whatever its kind."""
    kind = kind_of(weights)
    if kind == "Swin":
        return swin_options(weights)
    if kind not in naming.OPTIONS_OF:
        return (hiera_options if kind == "Hiera" else vit_options)(weights, heads, flag)
    try:
        return naming.OPTIONS_OF[kind](weights.state, weights.config)
    except KeyError as error:
        refuse(weights.path, f"lacks {error.args[0]}: it is another network, or only a part of a {kind}")
    except (ValueError, IndexError, ZeroDivisionError) as error:
        refuse(weights.path, f"is not a network that is known here: {error}")


def init_mlp_ratio(cfg):
    """The MLP ratio of the encoder in the file of --init; where that is gone, of the encoder.pt of the run that goes
    on; else 4."""
    for path in (cfg.init, os.path.join(cfg.out, "encoder.pt")):
        if os.path.exists(file_and_key(path)[0]):
            return encoder_options(read(path), heads=1)["mlp_ratio"]
    return 4.0


def grid_of(weights, table):
    """The grid of patches (h, w) of a table of positions: that of the stored image size if it fits, else a square."""
    patch, count = weights.state["patch_embed.proj.weight"].shape[-1], table.shape[1] - 1
    height, width = pair(weights.config.get("img_size") or 0)
    if (height // patch) * (width // patch) == count > 0:
        return height // patch, width // patch
    side = round(max(count, 0) ** 0.5)
    if count > 0 and side * side != count and math.isqrt(count + 1) ** 2 == count + 1:
        refuse(weights.path, f"has positions for {count + 1} patches and none for cls, no_embed_class, which is not "
                             f"supported{layouts.AS_TEACHER}")
    if side * side != count or not count:
        refuse(weights.path, f"has positions for {count} patches, which is no square, and stores no image size")
    return side, side


# ----------------------------------------------------------------------------------------------------------------
# Into a network

def fitted(weights, model, say):
    """The file's tensors, with all positions, absolute and relative, resized to the model's grid or windows, and the
    patch projection of RGB made one of the model's channels."""
    state, want = dict(weights.state), model.state_dict()
    stem, kind = naming.stem_of(want), kind_of(weights)
    if stem in state:
        state[stem] = naming.projection_for(want[stem].shape[1], state[stem])
    if kind == "Hiera":
        for line in naming.fit_hiera(state, hiera_options(weights, heads=1)["img_size"], model):
            say(f"{weights.path}: {line}")
        return state
    for name in ("pos_embed", "decoder_pos_embed"):
        if name in state and name in want and state[name].shape[::2] == want[name].shape[::2]:
            state[name] = resize_positions(state[name], grid_of(weights, state[name]), model.grid)
    if isinstance(model, ViL) and stem in state:
        if model.config["share"]:                               # files have shared weights under both names
            state = {k: t for k, t in state.items() if "_global." not in k}
        options = encoder_options(weights)
        if options["patch_size"] == model.patch_size:
            old, new = (model.maps(*size) for size in (options["img_size"], model.config["img_size"]))
            naming.resize_vil_tables(state, old, new)
    elif kind == "Swin":
        simmim = weights.config.get("method") == "simmim" or "mask_token" in state          # ours, or the official
        for line in naming.resize_swin_tables(state, want, simmim):
            say(f"{weights.path}: {line}")
    elif kind == "ViT":
        naming.resize_vit_tables(state, grid_of(weights, weights.state["pos_embed"]), model.grid)
    return state


def load_into(model, weights, say=print):
    """Copy weights into a model, positions resized to its grid, and say what matched, what is missing (and keeps its
    fresh start) and what was not expected. Returns the names of the missing.

    SystemExit when a shape or the stored heads differ, when the encoder misses a tensor (only heads, decoders, a pooled
    classifier's fc_norm, all relative positions and all layer scale may be fresh) or has no place for one of the file.
    """
    want, path = model.state_dict(), weights.path
    stored, heads = weights.config.get("heads"), model.config["heads"]
    if isinstance(model, CvT) and stored and tuple(stored) != heads:
        refuse(path, f"was trained with {tuple(stored)} heads and the network here has {heads}: its tensors would fit "
                     "and mean something else")
    if isinstance(stored, Integral) and stored != heads:             # those of others are seen in their tensors
        refuse(path, f"was trained with {stored} heads and the network here has {heads}: its tensors would fit and "
                     f"mean something else; use --heads {stored}")
    state = fitted(weights, model, say)
    # These follow from the grid and are not learned.
    state = {k: v for k, v in state.items() if not k.endswith(("relative_position_index", "attn_mask", "rel_pos_idx"))}
    # A head of another shape is another task's, or a projector, which MoCo v3 calls head: not wanted here.
    wrong = [k for k in want if k in state and state[k].shape != want[k].shape and not k.startswith("head.")]
    if wrong:
        refuse(path, f"does not fit: {wrong[0]} is {tuple(state[wrong[0]].shape)} in the file and "
                     f"{tuple(want[wrong[0]].shape)} in the network ({len(wrong)} of {len(want)} tensors differ)")
    matched = {k: v for k, v in state.items() if k in want and v.shape == want[k].shape}
    for k in matched:
        if want[k].is_floating_point() and not matched[k].is_floating_point():
            refuse(path, f"holds {k} as {matched[k].dtype}, and floating-point numbers were expected")
    missing = [k for k in want if k not in matched and not k.endswith("relative_position_index")]
    unused = [k for k in state if k not in matched]
    stem = naming.stem_of(weights.state)
    channels, stored = model.config["in_chans"], weights.state[stem].shape[1]
    rgb = f", {stem} made from that of RGB for --in-chans {channels}" if stored != channels else ""
    say(f"{path}: {len(matched)} tensors matched{rgb}; missing, so fresh: "
        f"{', '.join(missing) or 'none'}; not expected: {summary(unused)}")
    # What other blocks have, a block may not start afresh.
    kinds = {k.split(".")[-1].rstrip("12") for k in matched if k.startswith(("blocks.", "layers."))}
    lost = [k for k in missing if not naming.FRESH.match(k)
            or k.startswith(("blocks.", "layers.")) and k.split(".")[-1].rstrip("12") in kinds]
    if lost:
        refuse(path, f"lacks {len(lost)} tensors of the encoder ({', '.join(lost[:3])}, ...): it is another network, "
                     "or the last.pt of a distilled student, whose encoder.pt is what to give")
    # A network that pools without `norm` has no use for it.
    left = [k for k in unused if naming.ENCODER.match(k) and k not in ("norm.weight", "norm.bias")]
    if left:
        names = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in left})
        refuse(path, f"holds {', '.join(names[:4])}, which the network here has no place for: without that it "
                     "would compute something else")
    model.load_state_dict({**want, **matched})
    return missing


def load_encoder(path, heads=None, say=print, **options):
    """The encoder in a file, with its weights, in eval mode. options of the network (pool, num_classes, img_size, ...)
    win over the file's; a network of several stages has one pool, so that option is ignored there."""
    weights = read(path)
    found = encoder_options(weights, heads)
    if kind_of(weights) == "ViT":
        found["positions"] = "learned"
    else:
        options.pop("pool", None)
    try:
        model = naming.build({**found, **options})
    except ValueError as error:
        refuse(path, f"makes no network: {error}")
    load_into(model, weights, say)
    return model.eval()


def load_classifier(weights, heads=None, flag="--heads", **options):
    """What a file holds, with its head if it has one -> (network in eval mode, names of the tensors it has no use for).
    options of the network win over the file's. SystemExit when a tensor is missing, or as in load_into."""
    state, config, kind = weights.state, weights.config, kind_of(weights)
    found = encoder_options(weights, heads, flag)
    if kind == "ViT":
        found.update(pool="avg" if "fc_norm.weight" in state else "cls", positions="learned",
                     resize_offset=config.get("resize_offset") or 0.0)
    # A head of another width reads more than this network's feature: several blocks, or what a projector projects.
    name = "head.projection" if kind == "Hiera" else "head"
    head = state.get(f"{name}.weight") if f"{name}.bias" in state else None
    fits = head is not None and head.shape[1:] == (naming.width_of(found),)
    found["num_classes"] = len(head) if fits else 0
    try:
        found.update(options)
        model = TwoHeads(**found) if "head_dist.weight" in state and kind == "ViT" else naming.build(found)
    except ValueError as error:
        refuse(weights.path, f"makes no network: {error}")
    missing = load_into(model, weights, say=lambda text: None)
    if missing:
        refuse(weights.path, f"lacks {missing[0]}")
    return model.eval(), sorted(state.keys() - model.state_dict().keys())
