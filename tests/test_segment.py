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

from dense import segment
from dense.segment import Segmenter, parameter_groups, poly
from images.mask_classes import IGNORED
from images.mask_crops import MaskCrops, choose_crop, distort, resize_pair, scaled_size
from images.masks import open_pairs, read_pair
from nets.beit import BeitViT, resize_relative_geometric, spline_weights
from nets.fpn import BatchNorm, FPNHead
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
                         (".ffn.layers.0.0.", ".mlp.fc1."), (".ffn.layers.1.", ".mlp.fc2."),
                         (".projection.", ".proj.")):
        name = name.replace(theirs, ours)
    return name


def recorded(g):
    """The network of a recording, with its weights."""
    c, state = g.config, {our_name(name): tensor for name, tensor in g.under("state").items()}
    ratio = len(state["backbone.blocks.0.mlp.fc1.bias"]) / c["dim"]
    backbone = BeitViT(img_size=c["img"], patch_size=c["patch"], dim=c["dim"], depth=c["layers"], heads=c["heads"],
                       mlp_ratio=ratio, positions="learned", relative=True, layer_scale=1.0, eps=c["ln_eps"])
    model = Segmenter(backbone, c["classes"], taps=[tap + 1 for tap in c["taps"]], channels=c["channels"],
                      dropout=c["dropout"])
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

    def keep(module, inputs, output):                           # what a hook returned would replace the output
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
    assert abs(mean - loss) > 1e-3 * loss
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
        ours = dict(intersect=both, pred_area=pred, label_area=true, union=pred + true - both)
        for name, counts in ours.items():
            assert torch.equal(counts.float(), g(f"out/{name}{k}")), name
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
    recorded_groups = json.loads((DENSE / "seg_paramgroups.json").read_text())
    shapes = json.loads((DENSE / "shapes_seg.json").read_text())
    model = real_net()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, recorded_groups["weight_decay"], recorded_groups["layer_decay"])
    ours = {frozenset(names[id(p)] for p in group["params"]): (group["lr_scale"], group["weight_decay"])
            for group in groups}
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
        mask = g("input/labels" + kind)
        rows = (g(key + kind).tolist() for key in ("rand/crop_draws", "out/crop_n_candidates", "out/crop_y1y2x1x2"))
        for draws, count, (top, bottom, left, right) in zip(*rows):
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


# ----------------------------------------------------------------------------------------------------------------
# Closed forms and invariants


def test_spline_is_a_cubic_one():
    """It reproduces cubic polynomials of the stretched places, and keeps the middle where it is."""
    from nets.beit import geometric_places
    for source, target in ((7, 13), (27, 63), (27, 19), (3, 9)):
        places, wanted = geometric_places(source, target)
        wanted = wanted.clamp(places[0], places[-1])
        weights, powers = spline_weights(source, target), range(min(4, source))
        for power in powers:
            torch.testing.assert_close(weights @ places ** power, wanted ** power, rtol=1e-9, atol=1e-6)
        middle = weights[target // 2]
        assert middle.argmax() == source // 2 and middle.max() == pytest.approx(1)
    table = torch.randn(15 + 3, 2)                              # a grid of 2 x 3 patches: one axis stays
    grown = resize_relative_geometric(table, (2, 3), (4, 3))
    assert grown.shape == (35 + 3, 2) and torch.equal(grown[-3:], table[-3:])
    torch.testing.assert_close(grown.view(-1, 2)[15:20], table[5:10])       # the middle row


def test_fpn_head_adds_levels():
    """Semantic-FPN by hand: convolution, norm, ReLU and a doubling per halving, then a sum."""
    head = FPNHead([6] * 4, 3, channels=5, dropout=0.0).eval()
    maps = [torch.randn(2, 6, 16 >> k, 16 >> k) for k in range(4)]
    for module in head.modules():
        if isinstance(module, BatchNorm):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    total = 0
    for level, x in enumerate(maps):
        for i in range(max(1, level)):
            block = head.scale_heads[level][2 * i]
            norm = nn.BatchNorm2d(5).eval()
            norm.load_state_dict(block.bn.state_dict())
            x = norm(F.conv2d(x, block.conv.weight, padding=1)).relu()
            x = F.interpolate(x, scale_factor=2, mode="bilinear") if level else x
        total = total + x
    torch.testing.assert_close(head(maps), F.conv2d(total, head.conv_seg.weight, head.conv_seg.bias))


def test_batch_norm_is_torchs():
    ours, ref, x = BatchNorm(6), nn.BatchNorm2d(6), torch.randn(3, 6, 4, 5)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    for _ in range(2):
        torch.testing.assert_close(ours(a), ref(b))
    (ours(a) ** 3).sum().backward()
    (ref(b) ** 3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)
    for name, value in ref.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    ours(torch.full_like(x, torch.nan))                         # a step that is skipped leaves nothing behind
    assert ours.running_mean.isfinite().all() and ours.running_var.isfinite().all()


def over_ranks(rank, port, x, folder):
    import torch.distributed as dist
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    norm, mine = BatchNorm(4), x[rank::2].clone().requires_grad_()
    out = norm(mine)
    (out ** 3).sum().backward()
    torch.save(dict(out=out.detach(), grad=mine.grad, **norm.state_dict()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_batch_norm_over_processes(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    x = torch.randn(4, 4, 3, 5)
    torch.multiprocessing.start_processes(over_ranks, (port, x, str(tmp_path)), 2, start_method="fork")
    whole, norm = x.clone().requires_grad_(), nn.BatchNorm2d(4)
    out = norm(whole)
    (out ** 3).sum().backward()
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["out"], out.detach()[rank::2])
        torch.testing.assert_close(found["grad"], whole.grad[rank::2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["running_var"], norm.running_var)
        torch.testing.assert_close(found["running_mean"], norm.running_mean)


@pytest.mark.parametrize("head", ["fpn", "linear"])
def test_every_parameter_learns(head):
    swin = Swin(**SWINS["swin_mini"], img_size=32)
    vit = BeitViT(img_size=32, patch_size=8, dim=32, depth=4, heads=4, positions="learned", relative=True,
                  layer_scale=1.0)
    for backbone in (vit, swin):
        model = Segmenter(backbone, 3, head=head)
        model(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8))[0].backward()
        learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert not [name for name, p in learning.items() if p.grad is None or not p.grad.any()]
        norm = {f"backbone.norm.{kind}" for kind in ("weight", "bias")} if head == "fpn" else set()
        assert set(dict(model.named_parameters())) - set(learning) == norm


def test_frozen_backbone_stays(tmp_path):
    model = small(head="linear", frozen=True).train()
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, 1.0), 0.1)
    model(torch.randn(2, 3, 32, 32), torch.randint(0, 3, (2, 32, 32), dtype=torch.uint8))[0].backward()
    optimizer.step()
    assert not model.backbone.training and model.decode_head.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.backbone.state_dict().items())
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.decode_head.parameters()}


def test_loss_without_a_label_is_zero():
    loss, right = small()(torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), IGNORED, dtype=torch.uint8))
    loss.backward()
    assert loss.item() == 0 and right.item() == 0


def test_padding_does_not_count():
    """An image smaller than a window gives the logits of the padded one, cut; each pixel of a larger one is covered."""
    model, img = small().eval(), torch.randn(1, 3, 20, 45)
    with torch.no_grad():
        found = slide(model.logits, img, (32, 32), (21, 21))
        padded = F.pad(img, (0, 0, 0, 12))
        left, right = model.logits(padded[..., :32]), model.logits(padded[..., 13:])
    expected = torch.cat([left[..., :13], (left[..., 13:] + right[..., :19]) / 2, right[..., 19:]], 3)[:, :, :20]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for length, window, stride in ((100, 32, 21), (32, 32, 21), (7, 32, 21), (33, 32, 40)):
        starts = window_starts(length, window, stride)
        assert set(range(length)) <= {s + i for s in starts for i in range(window)}
        assert starts[-1] == max(0, length - window)


def test_mean_of_images_is_another_metric():
    """Counts of a set by a matrix of all pairs of classes, a class that nobody has, and one that is only predicted."""
    truth = torch.tensor([[0, 0, 1, 255], [1, 1, 0, 0]], dtype=torch.uint8)
    pred = torch.tensor([[0, 2, 1, 1], [0, 1, 0, 0]], dtype=torch.uint8)
    iou, acc, found = pixel_scores(pixel_areas(pred, truth, 4))
    torch.testing.assert_close(iou, 100 * torch.tensor([3 / 5, 2 / 3, 0, torch.nan]).double(), equal_nan=True)
    torch.testing.assert_close(acc, 100 * torch.tensor([3 / 4, 2 / 3, torch.nan, torch.nan]).double(), equal_nan=True)
    assert found["mIoU"] == pytest.approx(100 * (3 / 5 + 2 / 3) / 3, abs=1e-3)
    assert found["aAcc"] == pytest.approx(100 * 5 / 7, abs=1e-3)


# ----------------------------------------------------------------------------------------------------------------
# Sets on disk


def write_pair(images, masks, name, size=(40, 48), classes=3, mode="L", seed=0):
    """Write one image, and a mask of two halves whose classes are seen in the image."""
    rng = np.random.default_rng(seed)
    for folder in (images, masks):
        folder.mkdir(parents=True, exist_ok=True)
    mask = np.zeros(size, np.uint8)
    mask[:, size[1] // 2:], mask[size[0] // 2:, :9] = rng.integers(1, classes), rng.integers(0, classes)
    img = np.stack([mask * 60 + 40, 255 - mask * 50, rng.integers(0, 255, size).astype(np.uint8)], 2)
    Image.fromarray(img).save(images / f"{name}.png")
    Image.fromarray(mask).save(masks / f"{name}.png")
    return mask


def write_set(root, count=(6, 3), lines=("sky", "road", "tree"), **options):
    for split, n in zip(("train", "val"), count):
        for i in range(n):
            write_pair(root / "images" / split, root / "annotations" / split, f"{split}{i}", seed=i, **options)
    (root / "classes.txt").write_text("\n".join(lines))
    return root


TINY = ("--model vit_mini --img-size 32 --patch-size 8 --batch-size 2 --steps 12 --workers 0 --log-every 1 "
        "--save-every 3 --eval-every 6 --channels 16").split()
OF_FILE = [*TINY[2:4], *TINY[6:]]                               # with --init, which decides the model and its patches


def test_layouts(tmp_path, monkeypatch):
    """A folder, the same with the splits outside, a tar of it, ADE20K, CamVid, VOC and Cityscapes: the same masks."""
    root = write_set(tmp_path / "plain")
    first, mask = read_pair(open_pairs(str(root)), 0)
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        archive.add(root, "some/folder")
    outside = tmp_path / "outside"
    for split in ("train", "val"):
        for kind in ("images", "annotations"):
            os.makedirs(outside / split, exist_ok=True)
            os.symlink(root / kind / split, outside / split / kind)
    (outside / "classes.txt").write_text("sky 1 2 3\nroad, 4, 5, 6\ntree 7 8 9")
    for place in (tmp_path / "set.tar", outside):
        source = open_pairs(str(place))
        img, found = read_pair(source, 0)
        assert torch.equal(img, first) and torch.equal(found, mask) and source.classes == ["sky", "road", "tree"]
        assert len(source) == 6 and len(open_pairs(str(place), "val")) == 3 and open_pairs(str(place), "test") is None

    ade = tmp_path / "ade"
    write_pair(ade / "images" / "training", ade / "annotations" / "training", "a", classes=150)
    monkeypatch.setenv("ADE20K", str(ade))
    source, raw = open_pairs("ade20k"), np.array(Image.open(ade / "annotations" / "training" / "a.png")).astype(int)
    assert len(source.classes) == 150
    assert np.array_equal(source.mask(0), np.where(raw == 0, IGNORED, raw - 1))

    write_pair(tmp_path / "cam" / "train", tmp_path / "cam" / "trainannot", "a", classes=12)
    source = open_pairs(str(tmp_path / "cam"))
    assert source.classes[0] == "Sky" and len(source.classes) == 11
    assert source.meaning.of_indices(np.array([[10, 11, 255]]), "x").tolist() == [[10, IGNORED, IGNORED]]


def test_named_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("DATASETS", str(tmp_path))
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    expected = write_pair(voc / "JPEGImages", voc / "SegmentationClass", "a", classes=21)
    os.rename(voc / "JPEGImages" / "a.png", voc / "JPEGImages" / "a.jpg")
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("a\n")
    source = open_pairs("voc")
    assert len(source.classes) == 21 and np.array_equal(source.mask(0), expected)
    with pytest.raises(SystemExit, match="voc is not whole under"):
        open_pairs("voc", "val")
    city = tmp_path / "cityscapes"
    expected = write_pair(city / "leftImg8bit" / "train" / "x", city / "gtFine" / "train" / "x", "a", classes=34)
    for kind, old, new in (("leftImg8bit", "a", "a_leftImg8bit"), ("gtFine", "a", "a_gtFine_labelIds")):
        os.rename(city / kind / "train" / "x" / f"{old}.png", city / kind / "train" / "x" / f"{new}.png")
    from torchvision.datasets import Cityscapes
    train_id = {c.id: c.train_id for c in Cityscapes.classes if not c.ignore_in_eval}
    source = open_pairs("cityscapes")
    assert len(source.classes) == 19 and source.classes[0] == "road"
    assert np.array_equal(source.mask(0), np.vectorize(lambda k: train_id.get(k, IGNORED))(expected))


def test_colour_masks(tmp_path):
    root = write_set(tmp_path, lines=("sky 0 0 255", "road 90 90 90", "ignore 0 0 0", "tree 0 255 0"))
    colours = np.array([[0, 0, 255], [0, 255, 0], [0, 0, 0]], np.uint8)
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(colours[np.array(Image.open(path))]).save(path)
    source = open_pairs(str(root))
    assert source.classes == ["sky", "road", "tree"] and source.colours[2] == (0, 255, 0)
    assert set(np.unique(source.mask(0))) <= {0, 2, IGNORED}
    index = source.meaning.of_indices(np.array([[0, 1, 2, 3]]), "x")       # the same lines by number
    assert index.tolist() == [[0, 1, IGNORED, 2]]


def test_crops_follow_from_seed_epoch_index(tmp_path):
    source, colour = open_pairs(str(write_set(tmp_path))), torch.tensor([1, 2, 3], dtype=torch.uint8)
    crops = MaskCrops(source, (32, 56), 3, 5, 0, (0.5, 2.0), False, colour)
    keys = [(0, 1), (3, 2), (0, 4)]
    img, labels, failed = next(crops.finish([crops.__getitems__(keys)], None))
    one = [crops.__getitems__([key])[:2] for key in keys]
    assert torch.equal(img, torch.cat([x for x, _ in one])) and torch.equal(labels, torch.cat([y for _, y in one]))
    assert img.shape == (3, 3, 32, 56) and labels.shape == (3, 32, 56) and not failed
    assert not torch.equal(img, crops.__getitems__([(1, 1), (3, 2), (0, 4)])[0])
    # The images show their classes in green, so that image and mask are seen to move together; outside is `colour`.
    green, inside = img[:, 1].int(), labels != IGNORED
    assert (img.permute(0, 2, 3, 1)[~inside] == colour).all()
    exact = (green == 255 - 50 * labels.int())[inside].float().mean()
    assert exact > 0.8


def test_unusable_images_are_replaced_and_named(tmp_path, capsys):
    root = write_set(tmp_path)
    (root / "images" / "train" / "train1.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.full((40, 48), 255, np.uint8)).save(root / "annotations" / "train" / "train3.png")
    source = open_pairs(str(root))
    crops = MaskCrops(source, (32, 32), 3, 0, 0, (1.0, 1.0), True, torch.zeros(3, dtype=torch.uint8))
    _, labels, failed, problem = crops.__getitems__([(0, 1), (0, 2), (0, 3)])
    assert problem is None and [os.path.basename(name) for name, _ in failed] == ["train1.png", "train3.png"]
    windows = Windows((32, 32), (21, 21), 0, (0.5,) * 3, (0.25,) * 3)
    found = count_pixels(small().eval(), source, windows, torch.device("cpu"))
    assert found[2].sum() == 4 * 40 * 48                        # in evaluation it does not count, and the run goes on
    assert "train1.png cannot be read" in capsys.readouterr().out
    assert failed[1][1] == "all pixels of its mask are ignored"
    assert torch.equal(labels[2], crops.__getitems__([(0, 4)])[1][0])       # the next one


# ----------------------------------------------------------------------------------------------------------------
# Bad input: a sentence each


def break_size(root):
    write_pair(root / "images" / "train", root / "other", "train0", size=(40, 50))
    write_pair(root / "x", root / "annotations" / "train", "train0", size=(40, 48), seed=1)


def break_label(root):
    mask = np.full((40, 48), 3, np.uint8)
    Image.fromarray(mask).save(root / "annotations" / "train" / "train5.png")


def break_all_ignored(root):
    for path in root.glob("annotations/train/*.png"):
        Image.fromarray(np.full((40, 48), 255, np.uint8)).save(path)


def break_mode(root):
    path = root / "annotations" / "train" / "train0.png"
    Image.open(path).convert("RGB").save(path)


def break_colour(root):
    (root / "classes.txt").write_text("sky 0 0 0\nroad 1 1 1\ntree 3 3 3")
    for path in root.glob("annotations/*/*.png"):
        Image.open(path).convert("RGB").save(path)


def break_missing(root):
    (root / "annotations" / "train" / "train2.png").unlink()


def break_classes(root):
    (root / "classes.txt").unlink()


def break_layout(root):
    os.rename(root / "annotations", root / "labels")


@pytest.mark.parametrize("broken, message", [
    (break_size, "train0.png has 50x40 pixels and its mask 48x40: masks must have the size of their images"),
    (break_label, "train5.png has the label 3, and there are 3 classes, the last one tree"),
    (break_all_ignored, "all pixels of the masks under .* are ignored: their numbers are not those of the classes sky"),
    (break_mode, r"train0.png has colours \(RGB\), and an index mask was expected"),
    (break_colour, "has pixels of colour [12] [12] [12], which no class in classes.txt has"),
    (break_missing, "1 of 6 .* no mask, first images/train/train2.png: annotations/train/train2.png was expected"),
    (break_classes, "has no classes.txt: write the name of a class on each line"),
    (break_layout, "has no masks: looked for images/ and annotations/"),
])
def test_bad_sets(tmp_path, broken, message):
    broken(write_set(tmp_path))
    with pytest.raises(SystemExit, match=message):
        segment.main(["--data", str(tmp_path), *TINY, "--out", str(tmp_path / "out")])


def test_a_bad_mask_in_the_middle_ends_the_run(tmp_path):
    """One that the look at 16 masks did not meet, in a decoding process."""
    root = write_set(tmp_path, count=(40, 1))
    chosen = np.linspace(0, 39, 16, dtype=int)
    names = sorted(path.stem for path in (root / "images" / "train").glob("*.png"))
    for k in set(range(40)) - set(chosen.tolist()):
        Image.fromarray(np.full((40, 48), 77, np.uint8)).save(root / "annotations" / "train" / f"{names[k]}.png")
    args = [word if word != "0" else "1" for word in TINY]
    text = finish("--data", root, *args, "--out", tmp_path / "out", script="dense/segment.py", expect=1)
    assert re.search(r"has the label 77, and there are 3 classes", text) and "Traceback" not in text


@pytest.mark.parametrize("options, message", [
    (["--img-size", "36"], "patches of 8 do not tile a 36x36 image"),
    (["--img-size", "40"], "--img-size 40 40 does not fit: --head fpn needs multiples of 16"),
    (["--taps", "1", "2", "3", "9"], "--taps wants four of the 4 blocks, not 1 2 3 9"),
    (["--data", "nowhere"], "no data: nowhere does not exist"),
    (["--decode", "device"], "--decode device knows nothing of masks"),
    (["--batch-size", "9"], "the training set has 6 images, less than one batch"),
    (["--eval", "x.pt"], "x.pt does not exist"),
    (["--predict", "x"], "--predict has no effect without --eval"),
    (["--ratios", "0", "2"], "--ratios must be above 0, not 0"),
    (["--ratios", "2"], "--ratios wants two numbers"),
    (["--stride", "40"], "--stride 40 leaves gaps between windows of 32x32 pixels"),
    (["--warmup-steps", "12"], "--steps 12 must be more than --warmup-steps 12"),
])
def test_bad_options(tmp_path, options, message):
    root = write_set(tmp_path / "set")
    with pytest.raises(SystemExit, match=message):
        segment.main(["--data", str(root), *TINY, "--out", str(tmp_path / "out"), *options])


def test_a_file_whose_patches_do_not_tile(tmp_path):
    root = write_set(tmp_path / "set")
    torch.save(dict(model=ViT(img_size=30, patch_size=10, dim=32, depth=4, heads=4).state_dict(), config=dict(heads=4)),
               tmp_path / "e.pt")
    args = [*OF_FILE, "--init", str(tmp_path / "e.pt"), "--data", str(root), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="patches of 10 do not tile a 32x32 image"):
        segment.main(args)
    with pytest.raises(SystemExit, match="--model is decided by the file of --init"):
        segment.main([*args, "--model", "vit_tiny"])


# ----------------------------------------------------------------------------------------------------------------
# Real runs


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_and_resumed_is_bitwise_the_same(tmp_path, world):
    root = write_set(tmp_path / "set")
    args = ["--data", root, *TINY, "--steps", 40, "--photometric"]
    finish(*args, "--out", tmp_path / "whole", world=world, script="dense/segment.py")
    out = tmp_path / "broken"
    start_and_kill(*args, out=out, step=7, world=world, script="dense/segment.py")
    finish(*args, "--out", out, world=world, script="dense/segment.py")
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    same_state(tmp_path / "whole", out)
    whole, broken = (torch.load(folder / "best.pt", weights_only=True) for folder in (tmp_path / "whole", out))
    assert all(torch.equal(tensor, broken["model"][name]) for name, tensor in whole["model"].items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a few steps, and what it printed."""
    folder = tmp_path_factory.mktemp("trained")
    root = write_set(folder / "set")
    args = ["--data", root, *TINY, "--relative", "--layer-scale", 1, "--out", folder / "out"]
    text = finish(*args, script="dense/segment.py")
    return root, folder / "out", text


def test_run(trained):
    root, out, text = trained
    assert {"best.pt", "encoder.pt", "last.pt", "segments.png", "log.jsonl"} <= set(os.listdir(out))
    assert re.search(r"^step 6: mIoU \d", text, re.M) and re.search(r"^tree +IoU", text, re.M)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    lrs = [row["lr"] for row in rows if "loss" in row]
    assert lrs == pytest.approx([poly(step, 12, 1, 5e-4) for step in range(12)])
    for name in ("encoder.pt", "best.pt"):                      # a whole segmenter is read as an encoder, too
        encoder = load_encoder(str(out / name), say=lambda text: None)
        assert encoder.encode(torch.zeros(1, 3, 32, 32)).shape == (1, 17, 128)
        assert encoder.config["relative"] and encoder.config["layer_scale"]


@pytest.mark.parametrize("world", [1, 2])
def test_evaluation_and_pictures(trained, tmp_path, world, capsys):
    """--eval gives the number of the run, on one process and on two; masks have the sizes of the images."""
    root, out, text = trained
    last = re.findall(r"^mIoU .*", text, re.M)[-1]
    best = torch.load(out / "best.pt", weights_only=True)
    best["model"] = torch.load(out / "last.pt", weights_only=True)["model"]
    torch.save(best, tmp_path / "now.pt")
    args = ["--eval", tmp_path / "now.pt", "--data", root, "--predict", tmp_path / "pictures", "--workers", 0]
    if world == 1:
        segment.main([*map(str, args)])
        assert last in capsys.readouterr().out
    else:
        assert last in finish(*args, world=world, script="dense/segment.py")
    masks = sorted((tmp_path / "pictures" / "masks").rglob("*.png"))
    assert len(masks) == 3 and (tmp_path / "pictures" / "legend.png").exists()
    img = Image.open(masks[0])
    assert img.mode == "P" and img.size == (48, 40) and set(np.unique(np.array(img))) <= {0, 1, 2}
    if world == 1:                                              # the masks are what was counted
        areas = sum(pixel_areas(torch.from_numpy(np.array(Image.open(path))), torch.from_numpy(
            np.array(Image.open(root / "annotations" / "val" / path.name))), 3) for path in masks)
        assert f"mIoU {pixel_scores(areas)[2]['mIoU']:.2f}" in last
        segment.main(["--eval", str(tmp_path / "now.pt"), "--data", str(root / "images" / "val"), "--predict",
                      str(tmp_path / "more"), "--workers", "0"])           # a folder without masks
        assert "IoU" not in capsys.readouterr().out and len(list((tmp_path / "more" / "overlays").rglob("*.jpg"))) == 3


def test_grey_images_of_any_shape(tmp_path, capsys):
    """One channel, crops that are no squares, passes, bf16, a part of the set without val/; masks of one bit."""
    root = write_set(tmp_path / "set", count=(8, 0), lines=("sky", "road"), classes=2)
    for path in root.glob("annotations/*/*.png"):
        Image.fromarray(np.array(Image.open(path)).astype(bool)).save(path)
    segment.main(["--data", str(root), *TINY, "--in-chans", "1", "--img-size", "32", "64", "--accum", "2", "--dtype",
                  "bf16", "--fraction", "0.5", "--steps", "3", "--out", str(tmp_path / "out")])
    assert Image.open(root / "annotations" / "train" / "train0.png").mode == "1"
    text = capsys.readouterr().out
    assert "4 images in 2 classes" in text and (tmp_path / "out" / "best.pt").exists()
    assert "images of 40x48 pixels are smaller than a crop of 32x64, even at ratio 1: they are padded" in text
    assert text.count("is smaller than a window of 32x64 pixels: it is padded") == 1


def test_evaluation_refuses(trained, tmp_path):
    root, out, _ = trained
    with pytest.raises(SystemExit, match="encoder.pt holds no segmentation network: a best.pt of dense.segment"):
        segment.main(["--eval", str(out / "encoder.pt"), "--data", str(root)])
    other = write_set(tmp_path / "other", lines=("a", "b", "c", "d"))
    with pytest.raises(SystemExit, match=r"has the classes a, b, c, d \(4\), and the network tells apart sky, road"):
        segment.main(["--eval", str(out / "best.pt"), "--data", str(other)])
    with pytest.raises(SystemExit, match="has no images of test"):
        segment.main(["--eval", str(out / "best.pt"), "--data", str(root), "--split", "test"])


def checkpoints(folder):
    """Files of other tasks: plain, fine-tuned with relative positions, averaged pool, Swin, a segmenter's own."""
    options = dict(img_size=16, patch_size=8, dim=32, depth=4, heads=4)
    yield "plain", ViT(**options)
    yield "beit", BeitViT(**options, positions="learned", relative=True, layer_scale=0.1, key_bias=False, num_classes=7)
    yield "pooled", BeitViT(**options, positions="learned", pool="avg", num_classes=7)
    yield "swin", Swin(dim=16, depths=(2, 2), heads=(2, 4), window=2, img_size=16, num_classes=7)


@pytest.mark.parametrize("options", [[], ["--frozen"], ["--relative", "--layer-scale", "1"]])
def test_from_any_checkpoint(tmp_path, options):
    root = write_set(tmp_path / "set")
    for name, network in checkpoints(tmp_path):
        torch.save(dict(model=network.state_dict(), config=network.config), tmp_path / f"{name}.pt")
        own = [] if name == "swin" and "--relative" in options else options        # a Swin has its own positions
        segment.main(["--init", str(tmp_path / f"{name}.pt"), "--data", str(root), *OF_FILE, "--steps", "2", *own,
                      "--out", str(tmp_path / name)])
        after = torch.load(tmp_path / name / "encoder.pt", weights_only=True)
        weight = "layers.0.blocks.0.mlp.fc1.weight" if name == "swin" else "blocks.0.mlp.fc1.weight"
        moved = (after["model"][weight] - network.state_dict()[weight]).abs().max()
        assert moved == 0 if "--frozen" in options else 0 < moved < 5e-3
    best = tmp_path / "beit" / "best.pt"                        # and on from a whole segmenter
    segment.main(["--init", str(best), "--data", str(root), *OF_FILE, "--steps", "1", "--out", str(tmp_path / "on")])
    with pytest.raises(SystemExit, match="--relative is an option of a ViT, and the network is a Swin"):
        segment.main(["--init", str(tmp_path / "swin.pt"), "--data", str(root), *OF_FILE, "--relative"])


def test_camvid(tmp_path):
    """The sample of CamVid: classes and shares of pixels as its README has them."""
    if not (DATA / "camvid" / "camvid_val.tar").exists():
        pytest.skip(f"camvid is not in {DATA}")
    with tarfile.open(DATA / "camvid" / "camvid_val.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    source = open_pairs(str(tmp_path / "camvid"), "val")
    assert len(source) == 101 and len(source.classes) == 11 and open_pairs(str(tmp_path / "camvid"), "test") is None
    mask = source.mask(0)
    raw = np.array(Image.open(tmp_path / "camvid" / os.fsdecode(source.images["mask"][0])))
    assert np.array_equal(mask, np.where(raw == 11, IGNORED, raw)) and mask.shape == (360, 480)
    model, windows = small(classes=11).eval(), Windows((32, 32), (32, 32), 40, (0.5,) * 3, (0.25,) * 3)
    source.images = source.images[:2]
    areas = count_pixels(model, source, windows, torch.device("cpu"))
    assert areas[2].sum() == areas[1].sum() == sum((source.mask(i) != IGNORED).sum() for i in range(2))


def test_demo(tmp_path):
    text = finish("--demo", "--steps", 2, "--out", tmp_path, script="dense/segment.py")
    assert re.search(r"^triangle +IoU", text, re.M) and (tmp_path / "segments.png").exists()


def test_demo_draws_masks():
    source = open_pairs("shapes")
    img, mask = read_pair(source, 3)
    assert img.shape == (3, 96, 96) and mask.shape == (96, 96) and set(mask.unique().tolist()) <= {0, 1, 2, 3}
    again = read_pair(open_pairs("shapes"), 3)
    assert torch.equal(img, again[0]) and torch.equal(mask, again[1])
    other = read_pair(open_pairs("shapes", "val"), 3)
    assert not torch.equal(img, other[0])
