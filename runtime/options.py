"""
The command line. An option is a field of a dataclass: opt(default, help, bounds, choices, what it needs). What scripts
share is declared here once, a script's Config adds its own; values left open come from the demo and from the recipe.
"""
import argparse
import operator
import os
import re
import sys
import typing
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace

from nets.hiera import Hiera
from nets.naming import MODELS, PYRAMIDS
from weights import init_mlp_ratio


def fail(message):
    """End the run with one sentence, printed by one process: for mistakes that all processes see alike."""
    raise SystemExit(message if os.environ.get("RANK", "0") == "0" else 1)


@contextmanager
def value_errors_exit():
    """Turn a network's ValueError (patches that do not tile, heads that do not divide) into such a sentence."""
    try:
        yield
    except ValueError as error:
        fail(str(error))


# An option has a default (None: from the recipe) and a help text with the unit. least, most and above are bounds of all
# its numbers, choices the values allowed; needs is another option without which it means nothing. shrinks: it counts
# epochs, and in a run shorter than its recipe it is at most a tenth of them. old: an earlier name, which still works.
def opt(default, help, least=None, most=None, above=None, choices=None, needs=None, shrinks=False, old=None):
    return field(default=default, metadata=dict(help=help, least=least, most=most, above=above, choices=choices,
                                                needs=needs, shrinks=shrinks, old=old))


@dataclass
class Options:
    """Options of every script that runs over images."""
    data: str = opt("imagenet", "folder or tar (imagenet: ./imagenet or $IMAGENET), torchvision set by name, or shapes")
    fraction: float = opt(1.0, "share of the training images used, the same of each class, chosen by the seed")
    heads: int | None = opt(None, "attention heads of a ViT or a Hiera's first stage, if not its own", least=1)
    img_size: tuple[int, ...] | None = opt((224,), "pixels: one number, or height and width", least=1)
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: ImageNet's; 0.5 if not 3 channels)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: ImageNet's; 0.25)")
    bits: int | None = opt(None, "values are 0 to 2^N-1 in files of more than 8 bits (default: their range)", 1, 32)
    value_range: tuple[float, ...] | None = opt(None, "values that become black and white (default: the file's range)")
    batch_size: int | None = opt(None, "images per optimizer step, over all processes and passes", least=1)
    accum: int = opt(1, "forward-backward passes per optimizer step, each on a part of the batch", least=1)
    epochs: float | None = opt(None, "passes over the training set", least=0)
    warmup_epochs: float | None = opt(None, "epochs of linear warm-up", least=0, shrinks=True)
    blr: float | None = opt(None, "peak learning rate per 256 images of the batch", least=0)
    lr: float | None = opt(None, "peak learning rate itself, instead of blr (default: from blr)", least=0)
    out: str | None = opt(None, "folder of the run: checkpoints, log, pictures (default: out/<script>)")
    dtype: str = opt("auto", "precision of products; auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16",
                     choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool | None = opt(None, "torch.compile the network (default: on a GPU only)")
    resume: str = opt("auto", "auto: continue from last.pt in --out; none: stop if there is one; FILE: start from it")
    seed: int = opt(0, "everything random follows from it", least=0)
    device: str = opt("auto", "auto, cpu, cuda or mps")
    workers: int | None = opt(None, "processes that decode images, per training process (default: its cores)", least=0)
    decode: str = opt("workers", "where JPEGs are decoded; device: if cores are few", choices=("workers", "device"))
    download: bool = opt(False, "fetch --data if it is a torchvision set that is not there yet")
    log_every: int = opt(20, "steps between rows of the log; a row also comes at least every 30 seconds", least=1)
    tensorboard: bool = opt(False, "write the log as event files of TensorBoard, too (pip install tensorboard)")
    wandb: str | None = opt(None, "write the log to this project of Weights & Biases, too (pip install wandb)")
    save_every: int = opt(500, "steps between checkpoints; one also comes at least every 10 minutes", least=1)
    keep_every: int = opt(0, "epochs between checkpoints that are kept for good; 0: none is", least=0)
    max_unreadable: float = opt(0.05, "share of unreadable images above which the run stops", least=0)
    max_skipped: int = opt(20, "steps in a row with a non-finite gradient after which the run stops", least=1)
    demo: bool = opt(False, "a small run on images made on the fly, minutes on a CPU")


@dataclass
class NetworkOptions(Options):
    """Further options of the scripts that train a whole network."""
    model: str = opt("vit_tiny", "the network")
    patch_size: int | None = opt(None, "pixels on a patch's side, if not the model's own", least=1)
    in_chans: int = opt(3, "image channels: 1 grey, 3 colour, 4 colour and alpha; else as many bands", least=1)
    weight_decay: float | None = opt(None, "AdamW's weight decay", least=0)
    clip_grad: float | None = opt(None, "largest gradient norm (default: no clipping)", least=0)
    init: str | None = opt(None, "checkpoint in any layout whose weights a new run starts from")


@dataclass
class TrainingOptions(NetworkOptions):
    """Further options of those that train it on random crops of one size."""
    min_crop: float | None = opt(None, "smallest area of a random crop, fraction of the image", least=0, most=1)
    interpolation: str | None = opt(None, "resizing; random: drawn per crop", choices=("bicubic", "bilinear", "random"))


@dataclass
class ProbeOptions:
    """The options of those that train without labels."""
    probe_every: int = opt(0, "epochs between k-NN and linear probes, for data with labels and val/; 0: none", least=0)
    probe_data: str | None = opt(None, "another set for the probes, with labels and val/ (default: --data)",
                                 needs="probe_every")


def flag(name):
    return "--" + name.replace("_", "-")


def read_command_line(Config, doc, argv=None, recipe=()):
    """Read a Config dataclass from the command line -> the config, and the names of the options that were given. - and
    _ are alike; booleans have --x and --no-x. recipe: values of the default model, shown by --help."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{parser.prog}: {message} (--help lists every option)")
    hints, shared = typing.get_type_hints(Config), {f.name for f in fields(TrainingOptions)}
    for f in sorted(fields(Config), key=lambda f: f.name in shared):        # a method's own options come first
        kind = hints[f.name]
        if type(None) in typing.get_args(kind):                             # `int | None` reads an int
            kind = typing.get_args(kind)[0]
        default = recipe[f.name] if f.default is None and f.name in recipe else f.default
        text = f.metadata["help"] if default is None else f"{f.metadata['help']} [{default}]"
        how, choices = dict(dest=f.name, help=text.replace("%", "%%")), f.metadata["choices"]
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            how.update(type=typing.get_args(kind)[0], nargs="+", metavar=None if choices else "N", choices=choices)
        else:
            how.update(type=kind, metavar=None if choices else kind.__name__.upper(), choices=choices)
        parser.add_argument(*[flag(name) for name in (f.name, f.metadata["old"]) if name], **how)
    argv = [re.sub("^--[^=]*", lambda found: found[0].replace("_", "-"), word)
            for word in (sys.argv[1:] if argv is None else argv)]
    given = vars(parser.parse_args(argv))
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return Config(**given), set(given)


def fill(cfg, given, values):
    """Set every option that the user has not given and that `values` has."""
    return replace(cfg, **{name: value for name, value in values.items() if hasattr(cfg, name) and name not in given})


BOUNDS = (("least", operator.ge, "at least"), ("most", operator.le, "at most"), ("above", operator.gt, "above"))


def check(cfg, given):
    """Check bounds and needs of all options; what is wrong ends in a sentence. Returns the config."""
    for f in fields(cfg):
        value = getattr(cfg, f.name)
        for number in value if isinstance(value, tuple) else (value,):
            for name, holds, words in BOUNDS:
                limit = f.metadata[name]
                if None not in (number, limit) and not holds(number, limit):        # NaN holds nowhere
                    fail(f"{flag(f.name)} must be {words} {limit}, not {number}")
        if f.name in given and f.metadata["needs"] and not getattr(cfg, f.metadata["needs"]):
            fail(f"{flag(f.name)} has no effect without {flag(f.metadata['needs'])}: give that as well")
    return replace(cfg, data=os.path.normpath(cfg.data)) if hasattr(cfg, "data") else cfg   # a/ is no other data than a


def shorten(cfg, given, recipe):
    """In a run of fewer epochs than its recipe, options counted in epochs become at most a tenth of them."""
    if cfg.epochs is None or not cfg.epochs < recipe.get("epochs", 0):
        return cfg
    short = {f.name: min(getattr(cfg, f.name), cfg.epochs / 10) for f in fields(cfg)
             if f.metadata["shrinks"] and f.name not in given and getattr(cfg, f.name) is not None}
    return replace(cfg, **short)


def model_options(name):
    """What a model's name decides and an option may change: heads of a ViT or Hiera, window of others, patch size."""
    kind, own = PYRAMIDS.get(name) or (None, MODELS[name])
    if kind in (None, Hiera):
        return {k: own[k] for k in ("heads", "patch_size")}
    return dict(window=7, patch_size=4) | {k: v for k, v in own.items() if k in ("window", "patch_size")}


def parse(Config, name, doc, recipes, demo, argv=None):
    """Read the command line of a pre-training script: what the user gave, else the demo's values (with --demo), else
    the recipe of --model, else the default -> the config. name: of the script, for the default of --out."""
    default = next(f.default for f in fields(Config) if f.name == "model")
    cfg, given = read_command_line(Config, doc, argv, recipes.get(default, {}))
    values = demo if cfg.demo else {}
    model = fill(cfg, given, values).model
    if model not in recipes:
        fail(f"--model must be one of {', '.join(recipes)}, not {model}")
    out = f"out/{name}-demo" if cfg.demo else f"out/{name}"
    recipe = {"out": out, **model_options(model), **recipes[model], **values}
    return check(shorten(fill(cfg, given, recipe), given, recipe), given)


def vit_config(cfg):
    """The options of the ViT that a config asks for. Its MLPs are as wide as those in the file of --init."""
    return dict(MODELS[cfg.model], heads=cfg.heads, patch_size=cfg.patch_size, img_size=cfg.img_size,
                in_chans=cfg.in_chans, mlp_ratio=init_mlp_ratio(cfg) if cfg.init else 4.0)
