"""dense/segment.py: recorded runs of mmsegmentation, closed forms, real runs, and what a user can get wrong."""
import json
import os
import re
import tarfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import DATA, FOLDER, Golden, close, close_grads
from PIL import Image
from test_runs import finish, same_state, start_and_kill, steps
from torch import nn

from data import decode
from dense import segment
from dense.segment import Segmenter, parameter_groups, poly
from images.augment import normalize
from images.mask_crops import MaskCrops, choose_crop, distort, resize_pair, scaled_size
from images.masks import IGNORED, MaskError, open_pairs, read_pair
from nets.beit import BeitViT, resize_relative_geometric, spline_weights
from nets.fpn import BatchNorm, FPNHead, Neck
from nets.heads import pixel_areas, pixel_scores
from runtime.windows import Windows, count_pixels, slide, window_starts
from vit import MODELS, SWINS, Swin, ViT
from weights import load_encoder

# Recordings of dense tasks are in a folder of their own, unless $GOLDEN names one that has them.
DENSE = next((folder for folder in (FOLDER, FOLDER.parent / "golden_dense") if list(folder.glob("seg_*.npz"))), FOLDER)
golden = pytest.mark.golden


def recording(name):
    if not (DENSE / f"{name}.npz").exists():
        pytest.skip(f"{name}.npz not found in {DENSE}")
    g = Golden.__new__(Golden)
    g.arrays = np.load(DENSE / f"{name}.npz", allow_pickle=False)
    g.config = json.loads(str(g.arrays["config"])) if "config" in g.arrays.files else {}
    return g


def our_name(name):
    """mmsegmentation's name of a parameter -> ours: its ViT has names of its own, neck and head have the same."""
    for theirs, ours in (("backbone.layers.", "backbone.blocks."), (".ln1.", ".norm1."), (".ln2.", ".norm2."),
                         (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."), (".projection.", ".proj.")):
        name = name.replace(theirs, ours)
    return name


def recorded(g):
    """The network of a recording, with its weights."""
    c, state = g.config, {our_name(name): tensor for name, tensor in g.under("state").items()}
    ratio = len(state["backbone.blocks.0.mlp.fc1.bias"]) / c["dim"]
    backbone = BeitViT(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["layers"], heads=c["heads"],
                       mlp_ratio=ratio, positions="learned", relative=True, layer_scale=1.0, eps=c["ln_eps"])
    model = Segmenter(backbone, c["classes"], taps=[tap + 1 for tap in c["taps"]], channels=c["channels"], dropout=c["dropout"])
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) == {"backbone.norm.weight", "backbone.norm.bias"} and not unexpected
    return model


def small(classes=3, **options):
    return Segmenter(ViT(img_size=32, patch_size=8, dim=32, depth=4, heads=4, positions="learned"), classes, **options)


# ----------------------------------------------------------------------------------------------------------------
# Recordings


@golden
def test_recorded_training_step():
    g = recording("seg_fpn_train")
    model, seen = recorded(g), {}

    def keep(module, inputs, output):                           # a hook that returned something would replace the output
        seen[module] = inputs[0], output

    model.neck.register_forward_hook(keep)
    model.decode_head.register_forward_hook(keep)
    loss, right = model(g("input/imgs"), g("input/labels").to(torch.uint8))
    taps, maps = seen[model.neck]
    for k, x in enumerate(maps):
        close(x, g(f"out/neck{k}"), 2e-5)
    close(seen[model.decode_head][1], g("out/logits"), 2e-5)
    tap_grads = torch.autograd.grad(loss, taps, retain_graph=True)
    loss.backward()
    for k, (tap, grad) in enumerate(zip(taps, tap_grads)):
        close(tap, g(f"out/tap{k}"), 2e-5)
        close(grad, g(f"out/tapgrad{k}"), 5e-5)
    close(loss, g("out/loss"), 2e-5)
    assert 100 * right.item() == pytest.approx(g("out/acc_seg").item(), abs=0.02)
    mean = loss * g("input/labels").numel() / (g("input/labels") != IGNORED).sum()
    close(mean, g("out/loss_if_mean_over_valid"), 2e-5)         # another number: what is divided by matters
    assert abs(mean - loss) > 0.1
    close_grads(model, {our_name(name): grad for name, grad in g.under("grad").items()}, 5e-5)
    buffers = dict(model.named_buffers())
    for name, after in g.under("after").items():
        close(buffers[our_name(name)], after, 5e-6)


@golden
def test_recorded_sliding_windows():
    g = recording("seg_slide")
    model, window = recorded(g).eval(), (g.config["window"],) * 2
    with torch.no_grad():
        close(model.logits(g("input/imgs")), g("out/whole_logits"), 2e-5)
        for k, own in enumerate(g.config["ori_sizes"]):
            img = g(f"input/image{k}")
            starts = [window_starts(side, window[0], g.config["stride"]) for side in img.shape[-2:]]
            assert len(starts[0]) * len(starts[1]) == g(f"out/n_windows{k}")
            logits = slide(model.logits, img, window, (g.config["stride"],) * 2, batch=3)
            close(logits, g(f"out/slide_logits{k}"), 2e-5)
            pred = F.interpolate(logits, own, mode="bilinear", align_corners=False).argmax(1)[0]
            assert (pred != g(f"out/pred{k}")).float().mean() < 5e-4


@golden
def test_recorded_metric():
    g, total = recording("seg_metric"), 0
    for k in range(g.config["images"]):
        both, pred, true = areas = pixel_areas(g(f"input/pred{k}"), g(f"input/gt{k}"), g.config["classes"])
        for ours, name in ((both, "intersect"), (pred, "pred_area"), (true, "label_area"), (pred + true - both, "union")):
            assert torch.equal(ours.float(), g(f"out/{name}{k}")), name
        total = total + areas
    iou, acc, found = pixel_scores(total)
    for ours, name in ((iou / 100, "IoU"), (acc / 100, "Acc")):
        torch.testing.assert_close(ours.float(), g(f"out/{name}"), rtol=1e-6, atol=1e-6, equal_nan=True)
    assert [round(found[name], 2) for name in ("aAcc", "mIoU", "mAcc")] == pytest.approx(
        g("out/rounded_aAcc_mIoU_mAcc").tolist(), abs=1e-4)


@golden
def test_recorded_schedule():
    g = recording("seg_schedule")
    for size in ("small", "real"):
        for step, lrs in zip(g(f"out/{size}_iter").tolist(), g(f"out/{size}_lr").tolist()):
            lr = poly(step, g.config[size]["total"], g.config[size]["warmup"], g.config["lr"])
            assert [lr, lr * g.config["second_group_scale"]] == pytest.approx(lrs, rel=1e-9, abs=1e-18)


def real_net():
    backbone = BeitViT(**MODELS["vit_tiny"], img_size=512, positions="learned", relative=True, layer_scale=1.0)
    return Segmenter(backbone, 150)


@golden
def test_recorded_groups_and_shapes():
    if not (DENSE / "seg_paramgroups.json").exists():
        pytest.skip(f"seg_paramgroups.json not found in {DENSE}")
    recorded_groups, shapes = (json.loads((DENSE / f"{name}.json").read_text()) for name in ("seg_paramgroups", "shapes_seg"))
    model = real_net()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, recorded_groups["weight_decay"], recorded_groups["layer_decay"])
    ours = {frozenset(names[id(p)] for p in group["params"]): (group["lr_scale"], group["weight_decay"]) for group in groups}
    theirs = {frozenset(map(our_name, group["names"])): (group["lr_scale"], group["weight_decay"])
              for group in recorded_groups["groups"]}
    assert set(ours) == set(theirs)
    for group, values in theirs.items():
        assert ours[group] == pytest.approx(values)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name: list(p.shape) for name, p in parameters.items()} == {
        our_name(name): shape for name, shape in shapes["shapes"].items() if our_name(name) in parameters}
    for part, count in shapes["parameters"].items():
        assert sum(p.numel() for name, p in parameters.items() if name.startswith(part)) == count


@golden
def test_recorded_tables():
    g = recording("seg_relpos_resize")
    for key in [key for key in g.arrays.files if key.startswith("input/table")]:
        old, new = map(int, key.split("_")[1:])
        close(resize_relative_geometric(g(key), (old, old), (new, new)), g(key.replace("input", "out")), 5e-6)


@golden
def test_recorded_resizing_and_crops():
    g = recording("seg_transforms")
    for h, w, ratio, _, _, new_h, new_w in g("out/resize_h_w_ratio_long_short_newh_neww").tolist():
        assert scaled_size(int(h), int(w), ratio, 512) == (new_h, new_w)
    img, labels = g("input/img_bgr").permute(2, 0, 1), g("input/labels")
    for k in range(len(g.config["resize_cases"])):
        reference = g(f"out/resized_img{k}").permute(2, 0, 1)
        ours, ours_labels = resize_pair(img, labels, reference.shape[1:])
        assert (ours.int() - reference.int()).abs().max() <= 1  # OpenCV's own fixed point
        assert torch.equal(ours_labels, g(f"out/resized_labels{k}"))
    for kind in ("", "_hard"):
        mask, rows = g("input/labels" + kind) if kind else labels, (g("rand/crop_draws" + kind), g("out/crop_n_candidates" + kind),
                                                                   g("out/crop_y1y2x1x2" + kind))
        for draws, count, (top, bottom, left, right) in zip(*(t.tolist() for t in rows)):
            corners = iter(zip(draws[::2], draws[1::2]))
            assert choose_crop(mask, g.config["crop"], corners, g.config["cat_max_ratio"]) == (top, left)
            assert (bottom - top, right - left) == tuple(g.config["crop"])
            assert len(list(corners)) == 11 - count


def options_of(draws):
    """A recorded row of draws -> the options of distort; each value follows a flag that is 1."""
    draws = iter(draws)
    options = dict(brightness=next(draws) if next(draws) else None)
    first = bool(next(draws))
    options["contrast_first"] = first
    order = ("contrast", "saturation", "hue") if first else ("saturation", "hue", "contrast")
    for name in order:
        options[name] = next(draws) if next(draws) else None
    options["hue"] = None if options["hue"] is None else int(options["hue"])
    return options


@golden
def test_recorded_colours():
    g = recording("seg_transforms")
    img = g("input/photo_img_bgr").flip(-1).permute(2, 0, 1).numpy()
    for draws, reference in zip(g("rand/photo_draws").tolist(), g("out/photo")):
        difference = np.abs(distort(img, **options_of(draws)).astype(int) - reference.flip(-1).permute(2, 0, 1).numpy())
        assert difference.max() <= 6 and difference.mean() < 0.04       # OpenCV's HSV has a table where we divide


@golden
def test_ratios_are_uniform(tmp_path):
    """The short sides that 2,000 of our draws make have the recorded quantiles."""
    from data import uniforms
    g = recording("seg_transforms")
    u = uniforms(0, [(0, i) for i in range(2000)], MaskCrops.draws)[:, 0]
    shorts = np.floor(512 * (0.5 + 1.5 * u))
    assert np.quantile(shorts, [0, 0.1, 0.25, 0.5, 0.75, 0.9, 1]) == pytest.approx(
        g("out/random_scale_quantiles").tolist(), abs=25)
