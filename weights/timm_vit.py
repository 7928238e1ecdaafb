"""
A frozen ViT of timm as a teacher: the architecture by timm's name, the weights from a local official file.

timm renames the tensors of an official file (DINOv2's, DINOv3's, EUPE's, CLIP's) only if create_model is called with
pretrained=True, and a state dict in its configuration keeps it from downloading one. Its checkpoint_path= renames none.
What does not fit ends in a ValueError, or in load_file's SystemExit.
"""
import contextlib
import difflib
import io
import os
import re
from collections import namedtuple

import torch
from torch import nn

from nets.naming import ENCODER
from weights.reading import OUTER, file_and_key, load_file, weights_file

# tokens: normalised images (B, in_chans, h, w) of any size that patches tile -> (B, prefix + N, width), after the last
# norm; prefix: the number of cls and register tokens, which come first; mean, std: what its images are normalised with
FrozenViT = namedtuple("FrozenViT", "network tokens prefix has_cls patch_size width in_chans mean std licence")


def import_timm():
    """The package, which is imported only where a teacher needs it."""
    try:
        import timm
    except ImportError:
        raise ValueError("--teacher timm:NAME needs the package timm: pip install '.[teachers]'") from None
    return timm


def entry_of(name):
    """timm's configuration of NAME or NAME.TAG. Warns where a name alone has weights of several licences, means or
    stds. ValueError for a name that timm does not have."""
    timm = import_timm()
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture.lower(), timm.list_models(), 3, 0.5)
        known = f"the nearest names are {', '.join(near)}" if near else "timm.list_models() has all names"
        raise ValueError(f"timm {timm.__version__} has no model called {architecture!r}: {known}")
    entries = {other: timm.get_pretrained_cfg(other) for other in timm.list_pretrained(f"{architecture}.*")}
    if tag and name not in entries:
        raise ValueError(f"timm {timm.__version__} has no weights called {name}: of {architecture} it knows "
                         f"{', '.join(entries) or 'none'}")
    entry = timm.get_pretrained_cfg(name)
    if not tag and len({(e.license, e.mean, e.std) for e in entries.values()}) > 1:
        print(f"warning: {name} is taken as {name}.{entry.tag}, with its licence, mean and std; if the file is another "
              f"one's, give --teacher timm:NAME with its full name: {', '.join(entries)}")
    return entry


def cached_file(name):
    """Where the weights of a timm model lie in the caches of timm and torch, if they were downloaded before."""
    entry = entry_of(name)
    places = []
    if entry and entry.hf_hub_id:
        from huggingface_hub import try_to_load_from_cache
        repo, _, revision = entry.hf_hub_id.partition("@")
        files = [entry.hf_hub_filename] if entry.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        places = [try_to_load_from_cache(repo, file, revision=revision or None) for file in files]
    if entry and entry.url:
        places.append(os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(entry.url)))
    found = [place for place in places if isinstance(place, str) and os.path.isfile(place)]
    if not found:
        raise ValueError(f"--teacher timm:{name} needs --teacher-file FILE with its official weights: they are not in "
                         "timm's cache, and nothing is downloaded")
    return found[0]


def save_random_timm_vit(name, path):
    """Save timm's model `name` with random weights, always the same. Layer scale starts at 1e-5, at which the tokens
    would hardly depend on each other, so here it is 1."""
    timm = import_timm()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = timm.create_model(name, num_classes=0).state_dict()
    for key in state:
        if re.search(r"(\.gamma_[12]|\.ls[12]\.gamma)$", key):
            state[key].fill_(1.0)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    torch.save(state, f"{path}.{os.getpid()}.tmp")              # every process writes the same
    os.replace(f"{path}.{os.getpid()}.tmp", path)


@contextlib.contextmanager
def recorded_loads():
    """Within it, what each load_state_dict found missing and unexpected is kept in a list. timm only logs it."""
    found, load = [], nn.Module.load_state_dict

    def load_and_record(self, *args, **options):
        found.append(load(self, *args, **options))
        return found[-1]

    nn.Module.load_state_dict = load_and_record
    try:
        yield found
    finally:
        nn.Module.load_state_dict = load


def official_state(path):
    """The tensors in FILE, FILE:KEY or FOLDER, without prefixes such as "module.backbone."."""
    file, key = file_and_key(path)
    content = load_file(weights_file(file))
    places = (key, "model", "state_dict", "teacher", "student", "net") if isinstance(content, dict) else ()
    place = next((place for place in places if isinstance(content.get(place), dict)), None)
    state = content[place] if place else content
    state = {name: t for name, t in state.items() if torch.is_tensor(t)} if isinstance(state, dict) else {}
    if not state or key and place != key:
        raise ValueError(f"{path} holds no weights by name: a file with the official ones is expected")
    bad = [name for name, t in state.items() if t.is_floating_point() and not t.float().isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds NaN or infinite weights in {bad[0]}: the file is damaged, or its run diverged")
    found = [name.removesuffix("patch_embed.proj.weight") for name in state if name.endswith("patch_embed.proj.weight")]
    usual = [prefix for prefix in found if set(prefix.split(".")[:-1]) <= OUTER]
    prefix = usual[0] if usual else ""
    return {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}


def load_timm_vit(name, path, grid=(2, 2)):
    """timm's model `name` with the weights in `path`, official or timm's own -> FrozenViT, in fp32 on the CPU.

    grid: (h, w), the patches of an image that it will see. ValueError for a name, file or network that does not fit.
    """
    entry, timm, state = entry_of(name), import_timm(), {}
    if path.endswith(".npz"):                                   # Google's own layout, which the network reads itself
        source = dict(file=path, custom_load=True)
    else:
        state = official_state(path)
        source = dict(state_dict=dict(state), custom_load=False)
    try:
        with recorded_loads() as loads, contextlib.redirect_stdout(io.StringIO()):
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0,
                                        dynamic_img_size=True)
    except Exception as error:                                  # timm and torch raise many kinds
        if "dynamic_img_size" in str(error):                    # a network that does not know this option
            raise ValueError(f"timm's {name} is no plain ViT with patch tokens for images of any size, which --distill "
                             "tokens needs: give one, such as vit_small_patch14_reg4_dinov2") from None
        raise ValueError(f"{path} does not fit timm's {name}: {first_words(error)}") from None
    network.pretrained_cfg.pop("state_dict", None)              # else it would keep the weights twice
    check_tokens(name, network.eval(), grid)
    check_silent_changes(name, path, network, state)
    for found in loads:
        check_names(name, path, found)
    return FrozenViT(network, network.forward_features, network.num_prefix_tokens,
                     getattr(network, "cls_token", None) is not None, network.patch_embed.patch_size[0],
                     network.num_features, 3, tuple(entry.mean), tuple(entry.std), entry.license)


def check_silent_changes(name, path, network, state):
    """Refuse what timm's reading changes without a word: it resizes patches, and drops biases without a place."""
    weight, side = state.get("patch_embed.proj.weight"), network.patch_embed.patch_size[0]
    if weight is not None and weight.dim() == 4 and weight.shape[-1] != side:
        raise ValueError(f"{path} has patches of {weight.shape[-1]} pixels, and timm's {name} of {side}: give the name "
                         "of that network")
    bias, attention = state.get("blocks.0.attn.qkv.bias"), network.blocks[0].attn.state_dict()
    if bias is not None and bias.any() and not attention.keys() & {"qkv.bias", "q_bias"}:
        raise ValueError(f"{path} has biases of queries and values, for which timm's {name} has no place: give the "
                         "name with _qkvb")


def first_words(error):
    """The first lines of an error, shortened: torch lists each tensor that does not fit."""
    text = re.sub(r"\s+", " ", " ".join(str(error).splitlines()[:2])) or type(error).__name__
    return text if len(text) <= 160 else f"{text[:160].rsplit(' ', 1)[0]} ..."


def check_names(name, file, found):
    """Refuse a file without some of the network's weights, or with weights of a network that has more parts."""
    left = [key for key in found.unexpected_keys if ENCODER.match(key)]
    if found.missing_keys:
        raise ValueError(f"{file} lacks {len(found.missing_keys)} tensors of timm's {name} "
                         f"({', '.join(found.missing_keys[:3])}): it holds another network")
    if left:
        raise ValueError(f"{file} holds {', '.join(left[:3])}, which timm's {name} has no place for: it is another "
                         "network (DINOv2 with registers has reg4 in its name)")


@torch.no_grad()
def check_tokens(name, network, grid):
    """Run a network once -> a ValueError unless it gives one token for each patch of the grid (h, w)."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if not hasattr(network, "num_prefix_tokens") or patch is None or patch[0] != patch[1]:
        raise ValueError(f"timm's {name} gives no patch tokens as a plain ViT does, which --distill tokens needs")
    tokens = network.forward_features(torch.zeros(1, 3, grid[0] * patch[0], grid[1] * patch[0]))
    count = network.num_prefix_tokens + grid[0] * grid[1]
    if tokens.dim() != 3 or tokens.shape[1] != count:
        raise ValueError(f"timm's {name} cannot see the grid of the student's patches: {count} tokens of {grid[0]} x "
                         f"{grid[1]} patches and a prefix were expected, and it gives {tuple(tokens.shape)}")
