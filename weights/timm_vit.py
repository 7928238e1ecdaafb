"""
A frozen ViT of timm as a teacher: the architecture by timm's name, the weights from a local official file.

timm renames the tensors of an official file (DINOv2's, DINOv3's, EUPE's, CLIP's) only if create_model is called with
pretrained=True, and a `file` in its configuration keeps it from downloading another. Its checkpoint_path= renames none.
"""
import difflib
import os
import re
from collections import namedtuple
from contextlib import contextmanager

import torch
from torch import nn

from nets.naming import ENCODER

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
    """timm's default configuration of an architecture. ValueError for a name that it does not have."""
    timm = import_timm()
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), 3, 0.5)
        raise ValueError(f"timm {timm.__version__} has no model called {name}: the nearest names are {', '.join(near)}")
    return timm.get_pretrained_cfg(name)


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
    os.makedirs(os.path.dirname(path), exist_ok=True)
    torch.save(state, f"{path}.{os.getpid()}.tmp")              # every process writes the same
    os.replace(f"{path}.{os.getpid()}.tmp", path)


@contextmanager
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


def load_timm_vit(name, file, grid=(2, 2)):
    """timm's model `name` with the weights in `file`, official or timm's own -> FrozenViT, in fp32 on the CPU.

    grid: (h, w), the patches of an image that it will see. ValueError for a name, file or network that does not fit.
    """
    entry, timm = entry_of(name), import_timm()
    if not os.path.isfile(file):
        raise ValueError(f"--teacher-file {file} does not exist: the official weights of {name} are expected there")
    # .npz is Google's own layout, which the network reads itself; other files are renamed and then loaded.
    source = dict(file=file, custom_load=file.endswith(".npz"))
    try:
        with recorded_loads() as loads:
            network = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=source, num_classes=0,
                                        dynamic_img_size=True)
    except Exception as error:                                  # timm, torch and safetensors raise many kinds
        if "dynamic_img_size" in str(error):                    # a network that does not know this option
            raise ValueError(f"timm's {name} is no plain ViT with patch tokens for images of any size, which --distill "
                             "tokens needs: give one, such as vit_small_patch14_reg4_dinov2") from None
        raise ValueError(f"{file} does not fit timm's {name}: {first_words(error)}") from None
    for found in loads:
        check_names(name, file, found)
    check_tokens(name, network.eval(), grid)
    has_cls = getattr(network, "cls_token", None) is not None
    return FrozenViT(network, network.forward_features, network.num_prefix_tokens, has_cls,
                     network.patch_embed.patch_size[0], network.num_features, 3, tuple(entry.mean), tuple(entry.std),
                     entry.license)


def first_words(error):
    """The first two lines of an error, shortened: torch lists each tensor that does not fit."""
    return re.sub(r"\s+", " ", " ".join(str(error).splitlines()[:2]))[:200] or type(error).__name__


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
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", (0, 0))
    wanted = f"its prefix tokens and {grid[0]} x {grid[1]} patch tokens"
    try:
        tokens = network.forward_features(torch.zeros(1, 3, grid[0] * patch[0], grid[1] * patch[1]))
        count = network.num_prefix_tokens + grid[0] * grid[1]
        fits = patch[0] == patch[1] and tokens.dim() == 3 and tokens.shape[1] == count
        wanted += f", not {tuple(tokens.shape)}"
    except Exception as error:
        fits, wanted = False, f"{wanted} ({first_words(error)})"
    if not fits:
        raise ValueError(f"timm's {name} cannot see the grid of the student's patches: expected were {wanted}")
