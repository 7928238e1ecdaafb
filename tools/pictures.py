"""
Pictures of what an MAE reconstructs, from any checkpoint with a decoder, official ones included.

python -m tools.pictures out/mae/last.pt --images some/folder         writes out/pictures/recon.png
"""
import os
import sys
from dataclasses import dataclass

import torch

from images.augment import statistics
from images.datasets import look_over, open_dataset
from mae import MAE, draw
from runtime.options import check, fail, opt, read_command_line, value_errors_exit
from runtime.run import launch
from weights import load_into, read, vit_options
from weights.reading import DECODER_HEADS


@dataclass
class Config:
    images: str | None = opt(None, "folder, tar or named set of images (default: what the checkpoint was trained on)")
    out: str = opt("out/pictures", "folder of the picture")
    heads: int | None = opt(None, "attention heads of the encoder, where the file does not say", least=1)
    decoder_heads: int | None = opt(None, "attention heads of the decoder, where the file does not say", least=1)
    img_size: tuple[int, ...] | None = opt(None, "pixels: one number, or height and width (default: of the file)",
                                          least=1)
    mask_ratio: float | None = opt(None, "fraction of hidden patches (default: the file's, or 0.75)", least=0)
    norm_pix: bool | None = opt(None, "whether it predicts standardised patches (default: as the file says, or yes)")
    mean: tuple[float, ...] | None = opt(None, "channel means in 0..1 (default: the file's, or ImageNet's)")
    std: tuple[float, ...] | None = opt(None, "channel deviations in 0..1 (default: the file's, or ImageNet's)")
    count: int = opt(8, "images drawn", least=1)


def first(*values):
    """The first value that is not None."""
    return next((value for value in values if value is not None), None)


def load_mae(path, cfg):
    """The MAE of a checkpoint with its decoder -> (model, what the file stores of its options)."""
    file = read(path)
    stored = file.config
    if "decoder_pred.weight" not in file.state:
        fail(f"{path} has no decoder to draw with: give last.pt, or an official mae_visualize file")
    width = len(file.state["decoder_embed.weight"])
    heads = first(cfg.decoder_heads, stored.get("decoder_heads"), DECODER_HEADS.get(width))
    if not heads:
        fail(f"{path} does not say how many heads its decoder has: give --decoder-heads")
    norm_pix = first(cfg.norm_pix, stored.get("norm_pix"), stored.get("norm_pix_loss"))
    if norm_pix is None:
        print("the file does not say what it predicts: drawn as standardised patches (for official mae_visualize "
              "files give --no-norm-pix)")
    depth = len({name.split(".")[1] for name in file.state if name.startswith("decoder_blocks.")})
    options = vit_options(file, cfg.heads)
    options["img_size"] = cfg.img_size or options["img_size"]
    with value_errors_exit():
        model = MAE(width, depth, heads, norm_pix is not False, first(cfg.mask_ratio, stored.get("mask_ratio"), 0.75),
                    stored.get("distill_tap"), **options)
    load_into(model, file)
    return model.eval(), stored


@torch.inference_mode()
def main(argv):
    if "--visualize" in argv:                                   # the old spelling, mae.py --visualize FILE
        place = argv.index("--visualize")
        argv = argv[place + 1:] + argv[:place]
    asks_help = {"-h", "--help"} & set(argv)
    if not asks_help and (not argv or argv[0].startswith("-")):
        fail("a checkpoint is expected first: python -m tools.pictures FILE --images FOLDER")
    cfg, given = read_command_line(Config, __doc__, argv if asks_help else argv[1:])
    path, cfg = argv[0], check(cfg, given)
    model, stored = load_mae(path, cfg)
    with value_errors_exit():
        mean, std = statistics(model.config["in_chans"], *(first(getattr(cfg, name), stored.get(name))
                                                           for name in ("mean", "std")))
    source = first(cfg.images, stored.get("data"))
    if source is None:
        fail(f"{path} does not say what it was trained on: give --images FOLDER")
    images = open_dataset(source, "val") or open_dataset(source)
    look_over(images, model.config["in_chans"], stored.get("bits"), stored.get("value_range"))
    target = os.path.join(cfg.out, "recon.png")
    try:
        os.makedirs(cfg.out, exist_ok=True)
    except OSError as error:
        fail(f"--out {cfg.out} cannot be written: {error}")
    if not draw(model, images, mean, std, target, cfg.count):
        raise SystemExit(1)                                     # the reason has been printed
    print(f"drew {target}")


if __name__ == "__main__":
    launch(lambda: main(sys.argv[1:]))
