"""
What names, shapes and options tell of the networks of vit.py and of this folder: which tensors are the encoder's, which
network has these options, which layer a parameter is of, for which window a table of relative positions is. No files:
those are read in weights/.
"""
import math
import re
from numbers import Integral, Real

import torch

from nets.beit import BeitViT, resize_relative
from nets.cvt import CVTS, CvT, cvt_options
from nets.hiera import HIERAS, Hiera, resize_unit_positions
from nets.vil import VILS, ViL, vil_options
from vit import MODELS, SWINS, Swin, ViT, pair

# Networks of several stages: name of the model -> its class and options.
PYRAMIDS = {name: (Swin, options) for name, options in SWINS.items()}
PYRAMIDS |= {name: (Hiera, options) for name, options in HIERAS.items()}
PYRAMIDS |= {name: (ViL, options) for name, options in VILS.items()}
PYRAMIDS |= {name: (CvT, options) for name, options in CVTS.items()}

# The projection of patches, which every network begins with, and the kind of network that its name tells, if any.
STEM = "patch_embed.proj.weight"
STEMS = {STEM: None, "layer1.0.proj.weight": "ViL", "stage0.0.proj.weight": "CvT"}
OPTIONS_OF = dict(ViL=vil_options, CvT=cvt_options)             # what finds their options in a file

# Tensors of an encoder. Whatever of these a network has no place for would be missing in what it computes.
ENCODER = re.compile(r"(blocks|layers?\d*|stage\d+|patch_embed|stem|attn_pool|norm(_\w+|\d*)|ln_\w+|rel_pos\w*|rope\w*|"
                     r"(?!de_|dec|pred)\w*pos(ition)?_(emb|bias)\w*|(?!mask|dec|pred)\w*_tokens?)(\.|$)")

# What may be missing: a task's own layers, and what relative positions and layer scale add to a plain network.
FRESH = re.compile(r"head\.|fc_norm\.|head_dist\.|dist_norm\.|decoder_|mask_token|encoder_norm\.|multi_scale_fusion_|"
                   r".*\.(gamma_[12]|[qv]_bias|relative_position_bias_table)$")

# How many dimensions the tensors have that tell what the network is.
DIMENSIONS = {r"(patch_embed|layer\d+\.0|stage\d+\.0)\.proj\.weight": 4,
              r"((decoder_)?pos_embed|(.*\.)?cls_token|.*\.x_pos_embed)": 3,
              r"((decoder_)?blocks|layers)\..*\.proj\.weight": 2,
              r"((decoder_)?blocks|layers?\d*|stage\d+)\..*(fc1\.weight|\w+_bias_table)|decoder_embed\.weight": 2}

# What the options are that a file may store: "one" of a kind, a "list" of them, or "either".
STORED = dict(heads=(Integral, "either"), img_size=(Integral, "either"), window=(Integral, "one"), eps=(Real, "one"),
              resize_offset=(Real, "one"), mean=(Real, "list"), std=(Real, "list"), classes=(str, "list"),
              method=(str, "one"), final_norm=(str, "one"), decoder_heads=(Integral, "one"), mask_ratio=(Real, "one"),
              q_pool=(Integral, "one"))
IN_WORDS = {Integral: "whole numbers above 0 were", Real: "finite numbers were", str: "text was"}


def wrong_option(name, value):
    """What was expected, in words, of an option that a file stores, if it has something else there; else None."""
    kind, form = STORED[name]
    listed = isinstance(value, (list, tuple))
    for item in value if listed else [value]:
        right = isinstance(item, kind) and not isinstance(item, bool)
        if kind is not str and right:
            right = math.isfinite(item) and (item > 0 or kind is Real)
        if not right and value is not None:
            return IN_WORDS[kind]
    if form not in ("either", "list" if listed else "one") and value is not None:
        return "a list was" if form == "list" else "one value was"
    if name == "img_size" and listed and len(value) not in (1, 2):
        return "height and width were"


def wrong_tensor(name, t):
    """Why a value that a file has under a tensor's name cannot be a weight, in words; else None."""
    dimensions = next((count for pattern, count in DIMENSIONS.items() if re.fullmatch(pattern, name)), None)
    if not isinstance(t, torch.Tensor):
        return f"a {type(t).__name__} called {name}, and a tensor was expected" if ENCODER.match(name) else None
    if t.layout != torch.strided or t.is_quantized or t.is_nested or t.is_meta or t.is_complex():
        return f"{name} as a sparse, quantised, nested, meta or complex tensor: re-save it as a plain one"
    if dimensions and (t.dim() != dimensions or 0 in t.shape):
        return f"{name} of shape {tuple(t.shape)}, and {dimensions} dimensions were expected"
    if t.nbytes > t.untyped_storage().nbytes():                 # a copy might not fit into memory
        return f"{name} as a view that repeats its numbers: re-save a copy of it"
    if t.is_floating_point() and not name.endswith("attn_mask") and not t.float().isfinite().all():
        return f"NaN or infinite weights in {name}: the run has diverged, or the file is damaged"


def stem_of(state):
    """The name of the patch projection among the tensors of a network."""
    return next(name for name in STEMS if name in state)


def class_of(options):
    """The class of a network of several stages that has these options."""
    if "dims" not in options:
        return Hiera if "stages" in options else Swin
    return ViL if "sparse" in options else CvT


def width_of(options):
    """The width of the tokens that a network with these options ends with."""
    if "dims" in options:
        return options["dims"][-1]
    depths = options.get("depths") or options.get("stages") or (options["depth"],)
    return options["dim"] * 2 ** (len(depths) - 1)


def models_with(options):
    """The names of the models whose class, widths and depths are those of these options."""
    if "depth" in options:
        wanted = options["dim"], options["depth"]
        return [name for name, m in MODELS.items() if (m["dim"], m["depth"]) == wanted]

    def shape(m):
        return [m.get(option) for option in ("dim", "dims", "depths", "stages")]
    return [name for name, (kind, m) in PYRAMIDS.items() if kind is class_of(options) and shape(m) == shape(options)]


def build(options):
    """A network with random weights, of the class that has these options. ValueError as there."""
    if options.keys() & {"depths", "stages"}:
        return class_of(options)(**options)
    return BeitViT(**options) if options.keys() & {"relative", "layer_scale", "key_bias"} else ViT(**options)


# A parameter's stage and its place in it, by network; embeddings and mergings between stages have no place.
PLACES = {Swin: r"layers\.(\d+)\.(?:blocks\.(\d+)\.|downsample)", ViL: r"layer(\d+)\.(\d+)\.",
          CvT: r"stage(\d+)\.(?:0|1\.layers\.(\d+))\."}


def layer_of(model, name):
    """The layer that a parameter belongs to: 0 before the blocks, then the block's number from 1, then depth + 1.
    Blocks count through stages, and what joins two stages belongs to the block before it."""
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    kind = type(model)
    found = re.match(PLACES.get(kind, r"()blocks\.(\d+)\."), name)
    if not found:
        return model.depth + 1
    stage, place = int(found[1] or 0), found[2]
    if kind is ViL:                                             # embedding, attention, MLP, attention, MLP, ...
        stage, place = stage - 1, (int(place) - 1) // 2 if int(place) else None
    depths = model.config.get("depths", (model.depth,))
    if place is None:
        return sum(depths[:stage + (kind is Swin)])
    return sum(depths[:stage]) + int(place) + 1


def projection_for(channels, weight):
    """A patch projection (D, 3, p, p) of RGB for another number of channels, as timm makes it: for grey the sum, for
    others R, G and B in turn, times 3 / channels. One that is not of RGB stays as it is."""
    if weight.shape[1] != 3 or channels == 3:
        return weight
    if channels == 1:
        return weight.float().sum(1, keepdim=True)
    return weight.float().repeat(1, math.ceil(channels / 3), 1, 1)[:, :channels] * (3 / channels)


# ----------------------------------------------------------------------------------------------------------------
# Tables of relative positions

def side_of(table):
    """The side of the window that a Swin's table of relative positions (rows, H) is for."""
    return (round(len(table) ** 0.5) + 1) // 2


def window_sides(patches, window, stages):
    """The sides of a Swin's windows in each stage, for images of `patches` patches on the shorter side. As in the
    official code a stage's map, which decides, is the first one halved and rounded down."""
    return [min(window, max(1, patches >> stage)) for stage in range(stages)]


def fewest_patches(sides, window):
    """The smallest image, in patches on a side, at which a Swin has windows of these sides; 0 if at none."""
    most = (sides[-1] + 1) << len(sides) - 1
    return next((n for n in range(1, most) if window_sides(n, window, len(sides)) == sides), 0)


def cubic_through(x, at):
    """The cubic spline through values at the points x (n,), rising, n > 3, without knots at the second and the last but
    one -> the matrix (m, n) that takes these values to its values at the points `at` (m,), within x."""
    knots = torch.cat([x[:1].repeat(4), x[2:-2], x[-1:].repeat(4)])                             # (n + 4,)

    def basis(t):                                               # Cox and de Boor's recursion, (len(t), n)
        t = t.clamp(x[0], x[-1]).unsqueeze(1)
        b = ((knots[:-1] <= t) & (t < knots[1:])).double()
        b[:, len(x) - 1] += (t == x[-1]).squeeze(1)             # the last piece includes its end
        for k in range(1, 4):
            rising = (t - knots[:-k - 1]) / (knots[k:-1] - knots[:-k - 1])
            falling = (knots[k + 1:] - t) / (knots[k + 1:] - knots[1:-k])
            b = rising.nan_to_num(0, 0, 0) * b[:, :-1] + falling.nan_to_num(0, 0, 0) * b[:, 1:]
        return b
    return basis(at) @ torch.linalg.inv(basis(x))


def resize_geometric(table, old, new):
    """Resize a Swin's table (rows, H) of windows with `old` tokens on a side to `new`, as SimMIM's fine-tuning does:
    offsets near 0 keep their places, the others move apart by a ratio, so that the last ones fit, on a spline."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:                                    # 1 + q + q^2 + ... should reach the new last offset
        q = (low + high) / 2
        if (1 - q ** (old - 1)) / (1 - q) > new - 1:
            high = q
        else:
            low = q
    place = torch.cumsum(q ** torch.arange(old - 1, dtype=torch.float64), 0)
    x = torch.cat([-place.flip(0), torch.zeros(1), place])                                      # (2 * old - 1,)
    spline = cubic_through(x, torch.arange(1 - new, new, dtype=torch.float64))
    values = table.double().view(2 * old - 1, 2 * old - 1, -1)
    return torch.einsum("pi,qj,ijh->pqh", spline, spline, values).flatten(0, 1).to(table.dtype)


def resize_swin_tables(state, want, geometric=False):
    """Bring a Swin's tables of relative positions in `state`, by name, to the windows of those in `want`, in place, as
    the official code does it; geometric: as SimMIM's code does. Returns a line for each that was resized."""
    lines = []
    for name in [k for k in state if k.endswith("relative_position_bias_table") and k in want]:
        old, new = side_of(state[name]), side_of(want[name])
        if len(state[name]) == (2 * old - 1) ** 2 and old != new:           # else it is of no square window
            if geometric and old > 2:
                state[name] = resize_geometric(state[name], old, new)
            else:
                state[name] = resize_relative(state[name], (old, old), (new, new))
            lines.append(f"{name} is resized from windows of {old} to {new}")
    return lines


def resize_vil_tables(state, old, new):
    """The same for a ViL whose stages had maps (h, w) `old` and have `new`, where all of a map is attended to."""
    for stage, grids in enumerate(zip(old, new), 1):
        for name in [k for k in state if re.match(rf"layer{stage}\.\d+\.attn\.qkv\.weight", k)]:
            table = name.replace("qkv.weight", "local_relative_position_bias_table")
            if table in state:
                state[table] = resize_relative(state[table], *grids)


def resize_vit_tables(state, old, new):
    """The same for a BeitViT, from the grid (h, w) `old` to `new`."""
    rows = (2 * old[0] - 1) * (2 * old[1] - 1) + 3
    for name in [k for k in state if k.endswith("relative_position_bias_table") and len(state[k]) == rows]:
        state[name] = resize_relative(state[name], old, new)


# ----------------------------------------------------------------------------------------------------------------
# Hiera

# The heads of a Hiera's first stage, which leave no trace either, by its width: the official ones, and ours.
HIERA_HEADS = {32: 1, 46: 1, 96: 1, 112: 2, 144: 2, 256: 4}


def stage_starts(state):
    """The blocks that widen the tokens, at which the stages of a Hiera but the first begin; [] of other networks."""
    found = [re.fullmatch(r"blocks\.(\d+)\.proj\.weight", name) for name in state]
    return sorted(int(match[1]) for match in found if match)


def hiera_shape(state, config, heads=None, flag="--heads"):
    """The options of a Hiera that its tensors and its stored options show; heads, if given (by `flag`), win.
    The last stage does not pool in the network of an MAE, which has convolutions for all stages that are pooled after.
    ValueError when the tensors are none of a Hiera's, or nothing tells the heads or the image size."""
    dim, in_chans, kernel, _ = state["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    edges, width = [0, *stage_starts(state), depth], dim
    for n in range(depth):                                      # so that what is built is no larger than the file
        before, width = width, width * 2 if n in edges[1:] else width
        for part, inputs in (("attn.qkv", before), ("mlp.fc1", width)):
            name = f"blocks.{n}.{part}.weight"
            if name not in state or state[name].shape[1:] != (inputs,):
                raise ValueError(f"has no {name} of width {inputs}: it is another network, or only a part of one")
    heads = heads or config.get("heads") or HIERA_HEADS.get(dim)
    if not isinstance(heads, Integral):
        raise ValueError(f"is a Hiera of width {dim} and does not say how many heads its first stage has: give {flag}")
    patch, tokens = (kernel + 1) // 2, state["pos_embed"].shape[1]
    size = pair(config.get("img_size") or 0)
    if (size[0] // patch) * (size[1] // patch) != tokens:
        size = (math.isqrt(tokens) * patch,) * 2                # no size is stored, or one that does not fit
    if (size[0] // patch) * (size[1] // patch) != tokens or not tokens:
        raise ValueError(f"has positions for {tokens} tokens, which is no square, and stores no image size")
    pooled = len({name.split(".")[1] for name in state if name.startswith("multi_scale_fusion_heads.")})
    return dict(dim=dim, stages=tuple(end - start for start, end in zip(edges, edges[1:])), heads=heads,
                patch_size=patch, in_chans=in_chans, img_size=size, eps=config.get("eps") or 1e-6,
                q_pool=pooled or config.get("q_pool") or len(edges) - 2)


def fit_hiera(state, size, model):
    """Bring the positions of a Hiera, and of an MAE's decoder, from images of `size` to those of the model, in place,
    and give it a fresh final norm if it has none. Returns a line for each change."""
    lines, want = [], model.state_dict()
    for name, stage in (("pos_embed", 0), ("decoder_pos_embed", -1)):
        if name in state and name in want and state[name].shape[::2] == want[name].shape[::2]:
            new = model.maps(*model.config["img_size"])[stage]
            step = model.config["img_size"][0] // new[0]        # pixels from one token to the next
            old = size[0] // step, size[1] // step
            if old[0] * old[1] == state[name].shape[1] and old != new:
                state[name] = resize_unit_positions(state[name], old, new, model.unit // step)
                lines.append(f"{name} is resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} tokens")
    if "norm.weight" in want and "norm.weight" not in state:
        state |= {"norm.weight": torch.ones(model.width), "norm.bias": torch.zeros(model.width)}
        lines.append("it has no final norm, as an MAE never reads the mean token: a fresh one, weight 1 and bias 0")
    return lines
