"""Mixup, cutmix, soft targets, random erasing, and the losses they go into."""
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close, each_recording

from images.mixing import draw_mix, erase, erase_mask, mix, mix_box, random_mix, soft_targets


def within(count, n, p, sigmas=4.5):
    assert abs(count - n * p) < sigmas * math.sqrt(n * p * (1 - p)), (count, n * p)


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs


def batch_cases(g):
    """(case, seed, key, boxes) of every recorded case with one lambda per batch, of timm's three modes."""
    found = [(case, seed, f"case{number}_seed{seed}")
             for number, (case, seeds) in enumerate(zip(g.config["cases"], g.config["seeds"]))
             if case["mode"] == "batch" for seed in seeds]
    assert found, "the recording has no case of one lambda per batch"
    return [(case, seed, key, [tuple(box) for box in g(f"rand/{key}/bbox_yl_yh_xl_xh").tolist()])
            for case, seed, key in found]


@each_recording("timm_mixup*")
def test_mixing_as_recorded(name):
    g = Golden(name)
    for case, _, key, boxes in batch_cases(g):
        targets = soft_targets(g("input/target"), g.config["num_classes"], case["label_smoothing"])
        lam = g(f"rand/{key}/lam_drawn").item()
        img, mixed = mix(g("input/x"), targets.clone(), lam, boxes[0] if boxes else None)
        if not case["correct_lam"] and not case["cutmix_minmax"]:       # then timm's targets ignore the box's true area
            mixed = targets.lerp(targets.flip(0), 1 - lam)
        close(img, g(f"out/{key}/x"), 1e-6)
        close(mixed, g(f"out/{key}/target"), 1e-6)


@each_recording("timm_mixup*")
def test_boxes_as_recorded(name):
    """numpy's old generator, drawn from in the recorded order, gives the lambdas and the centres of the boxes."""
    g = Golden(name)
    height, width = g.config["size"]
    for case, seed, key, boxes in batch_cases(g):
        if case["cutmix_minmax"]:                               # another law, whose boxes have no centre
            continue
        rng, lam, expected = np.random.RandomState(seed), 1.0, []
        mixup, cutmix = case["mixup_alpha"], case["cutmix_alpha"]
        if rng.rand() < case["prob"]:
            cut = rng.rand() < case["switch_prob"] if mixup and cutmix else not mixup
            lam = rng.beta(cutmix, cutmix) if cut else rng.beta(mixup, mixup)
            if cut:
                y, x = int(rng.randint(height)), int(rng.randint(width))
                expected = [mix_box(lam, y, x, height, width)]
        assert lam == g(f"rand/{key}/lam_drawn").item() and boxes == expected


@each_recording("losses_timm*")
def test_losses_are_torchs_own(name):
    """Cross-entropy with soft targets or with label smoothing needs no code of ours."""
    g = Golden(name)
    labels = g("input/labels")
    losses = {"soft_target_ce": lambda z: F.cross_entropy(z, g("input/soft_target"))}
    for eps in g.config["smoothings"]:
        losses[f"label_smoothing_ce_{eps}"] = lambda z, eps=eps: F.cross_entropy(z, labels, label_smoothing=eps)
    for key, loss in losses.items():
        logits = g("input/logits").requires_grad_()
        value = loss(logits)
        value.backward()
        close(value, g(f"out/{key}"), 1e-5)
        close(logits.grad, g(f"grad/{key}"), 5e-5)


def test_smoothing_through_targets_is_the_same_loss():
    logits, labels = torch.randn(6, 7), torch.tensor([0, 6, 3, 3, 1, 2])
    value = F.cross_entropy(logits, soft_targets(labels, 7, 0.1))
    log_p = logits.log_softmax(1)
    nll = -log_p[torch.arange(6), labels]
    torch.testing.assert_close(value, (0.9 * nll - 0.1 * log_p.mean(1)).mean())
    torch.testing.assert_close(value, F.cross_entropy(logits, labels, label_smoothing=0.1))


# ----------------------------------------------------------------------------------------------------------------
# The laws


def test_the_fact_sheets_numbers():
    targets = mix(torch.zeros(4, 1, 2, 2), soft_targets(torch.arange(4), 5, 0.1), 0.7)[1]
    torch.testing.assert_close(targets[0], torch.tensor([0.65, 0.02, 0.02, 0.29, 0.02]))
    rng = np.random.RandomState(3)
    assert mix_box(0.4, int(rng.randint(224)), int(rng.randint(224)), 224, 224) == (20, 192, 66, 224)
    img = torch.arange(256.0).view(4, 1, 8, 8)
    rng = np.random.RandomState(2)
    rng.rand(), rng.rand()
    box = mix_box(rng.beta(1.0, 1.0), int(rng.randint(8)), int(rng.randint(8)), 8, 8)
    img, targets = mix(img, soft_targets(torch.arange(4), 5, 0.1), 0.5, box)
    assert img.sum((1, 2, 3)).tolist() == [3168, 6496, 9824, 13152]
    torch.testing.assert_close(targets[0], torch.tensor([0.835625, 0.02, 0.02, 0.104375, 0.02]))


def test_boxes_pixel_by_pixel():
    """A pixel is inside if it is no more than half a side from the centre, the far edge not included."""
    rng = random.Random(0)
    for _ in range(40):
        height, width, lam = rng.randint(1, 16), rng.randint(1, 16), rng.choice([0.0, 1.0, rng.random()])
        y, x = rng.randrange(height), rng.randrange(width)
        half = [int(side * math.sqrt(1 - lam)) // 2 for side in (height, width)]
        inside = {(i, j) for i in range(height) for j in range(width)
                  if -half[0] <= i - y < half[0] and -half[1] <= j - x < half[1]}
        top, bottom, left, right = mix_box(lam, y, x, height, width)
        assert {(i, j) for i in range(top, bottom) for j in range(left, right)} == inside


@pytest.mark.parametrize("box", [None, (2, 5, 0, 3), (4, 4, 1, 7)])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_mixing_image_by_image(batch, box):
    torch.manual_seed(0)
    img, targets = torch.randn(batch, 3, 6, 7), soft_targets(torch.arange(batch) % 4, 4, 0.2)
    mixed, soft = mix(img.clone(), targets.clone(), 0.3, box)
    share = 1 - (box[1] - box[0]) * (box[3] - box[2]) / 42 if box else 0.3
    for i in range(batch):
        expected, other = img[i].clone(), img[batch - 1 - i]
        for y in range(6):
            for x in range(7):
                if box is None:
                    expected[:, y, x] = 0.3 * img[i, :, y, x] + 0.7 * other[:, y, x]
                elif box[0] <= y < box[1] and box[2] <= x < box[3]:
                    expected[:, y, x] = other[:, y, x]
        torch.testing.assert_close(mixed[i], expected)
        torch.testing.assert_close(soft[i], share * targets[i] + (1 - share) * targets[batch - 1 - i])
    torch.testing.assert_close(soft.sum(1), torch.ones(batch))
    if batch % 2:
        torch.testing.assert_close(mixed[batch // 2], img[batch // 2])


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 0.0), (0.2, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_draws(mixup, cutmix):
    """Moments of the Beta distributions, how often it is cutmix, and the sizes of its boxes."""
    torch.manual_seed(0)
    draws, n = [draw_mix(mixup, cutmix, 32, 48) for _ in range(4000)], 4000
    cuts = [(lam, box) for lam, box in draws if box]
    if mixup and cutmix:
        within(len(cuts), n, 0.5)
    else:
        assert len(cuts) == (n if cutmix else 0)
    for alpha, lams in ((mixup, [lam for lam, box in draws if not box]), (cutmix, [lam for lam, _ in cuts])):
        if lams:
            lams = np.array(lams)
            variance = 1 / (4 * (2 * alpha + 1))
            assert abs(lams.mean() - 0.5) < 4.5 * math.sqrt(variance / len(lams))
            assert abs(lams.var() / variance - 1) < 0.12
    wholes = [(lam, box) for lam, box in cuts if box[0] > 0 and box[1] < 32 and box[2] > 0 and box[3] < 48]
    for lam, (top, bottom, left, right) in wholes:
        assert bottom - top == int(32 * math.sqrt(1 - lam)) // 2 * 2
        assert right - left == int(48 * math.sqrt(1 - lam)) // 2 * 2


def test_centres_are_every_pixel_alike():
    """The centre follows from the edge that is not cut off, and all are drawn equally often."""
    torch.manual_seed(1)
    counts = np.zeros((8, 8))
    for _ in range(6400):
        lam, (top, bottom, left, right) = draw_mix(0.0, 1.0, 8, 8)
        half = int(8 * math.sqrt(1 - lam)) // 2
        counts[top + half if top else bottom - half, left + half if left else right - half] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 114              # chi-squared of 63 degrees at the 0.01% level


def test_probabilities():
    torch.manual_seed(0)
    plain = sum(draw_mix(0.8, 1.0, 8, 8, prob=0.3) == (1.0, None) for _ in range(2000))
    within(plain, 2000, 0.7)
    within(sum(draw_mix(0.8, 1.0, 8, 8, switch=0.2)[1] is not None for _ in range(2000)), 2000, 0.2)
    assert draw_mix(0.0, 0.0, 8, 8) == (1.0, None)
    img, targets = torch.randn(4, 1, 3, 3), soft_targets(torch.arange(4), 4)
    same = mix(img.clone(), targets.clone(), 1.0)
    assert torch.equal(same[0], img) and torch.equal(same[1], targets)


@pytest.mark.parametrize("chunk, sizes", [(0, [7]), (3, [3, 3, 1]), (4, [4, 3]), (99, [7])])
def test_chunks_are_mixed_apart(chunk, sizes):
    """Each chunk as if it were alone and the draws came from one generator, one after the other."""
    torch.manual_seed(2)
    img, targets = torch.randn(7, 2, 8, 8), soft_targets(torch.arange(7), 7)
    torch.manual_seed(3)
    mixed, soft = random_mix(img.clone(), targets.clone(), 0.8, 1.0, chunk)
    torch.manual_seed(3)
    for ours, label, own, target in zip(*(t.split(sizes) for t in (mixed, soft, img, targets))):
        expected = mix(own.clone(), target.clone(), *draw_mix(0.8, 1.0, 8, 8))
        assert torch.equal(ours, expected[0]) and torch.equal(label, expected[1])
    torch.manual_seed(3)
    again = random_mix(img.clone(), targets.clone(), 0.8, 1.0, chunk)
    assert torch.equal(again[0], mixed) and not torch.equal(mixed, img)


# ----------------------------------------------------------------------------------------------------------------
# Erasing


def rectangles(mask):
    """(B, 1, h, w) masks of one full rectangle each, or of none -> (B, 4) top, left, height, width."""
    found = np.zeros((len(mask), 4), dtype=int)
    for i, inside in enumerate(mask[:, 0].numpy()):
        y, x = np.nonzero(inside)
        if len(y):
            found[i] = y.min(), x.min(), np.ptp(y) + 1, np.ptp(x) + 1
            assert inside.sum() == found[i, 2] * found[i, 3]
    return found


def slow_rectangle(rng, p, height, width):
    """The law as a loop over one image."""
    if rng.random() >= p:
        return 0, 0, 0, 0
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    return 0, 0, 0, 0


@pytest.mark.parametrize("height, width", [(40, 40), (16, 64)])
def test_erased_rectangles_follow_the_law_of_the_loop(height, width):
    """Area, aspect ratio and place of 4,000 against as many of a loop; in wide images tries that do not fit matter."""
    torch.manual_seed(0)
    rng, n = random.Random(0), 4000
    ours = rectangles(erase_mask(n, 1.0, height, width, torch.device("cpu")))
    theirs = np.array([slow_rectangle(rng, 1.0, height, width) for _ in range(n)])
    assert abs((ours[:, 2] == 0).mean() - (theirs[:, 2] == 0).mean()) < 0.01
    ours, theirs = ours[ours[:, 2] > 0], theirs[theirs[:, 2] > 0]
    for quantity in (lambda r: r[:, 2] * r[:, 3], lambda r: r[:, 2] / r[:, 3], lambda r: r[:, 0], lambda r: r[:, 1],
                     lambda r: r[:, 0] / (height - r[:, 2]), lambda r: r[:, 1] / (width - r[:, 3])):
        a, b = np.sort(quantity(ours)), np.sort(quantity(theirs))
        both = np.concatenate([a, b])
        distance = np.abs(np.searchsorted(a, both, "right") / len(a) - np.searchsorted(b, both, "right") / len(b)).max()
        assert distance < 1.95 * (1 / len(a) + 1 / len(b)) ** 0.5       # Kolmogorov-Smirnov at the 0.1% level
    area = ours[:, 2] * ours[:, 3] / (height * width)
    assert 0.01 < area.min() and area.max() < 0.36 and (ours[:, 2] < height).all() and (ours[:, 3] < width).all()
    if height == width:
        assert abs(area.mean() - (0.02 + 1 / 3) / 2) < 0.01 and area.max() > 0.33
        assert abs(np.log(ours[:, 2] / ours[:, 3]).mean()) < 0.05
        places = ours[:, 0] / (height - ours[:, 2]), ours[:, 1] / (width - ours[:, 3])
        assert abs(np.corrcoef(*places)[0, 1]) < 4.5 / math.sqrt(len(ours))     # drawn apart


def test_each_image_is_erased_with_its_own_probability():
    torch.manual_seed(0)
    erased = erase_mask(4000, 0.25, 12, 20, torch.device("cpu")).flatten(1).any(1)
    within(erased.sum().item(), 4000, 0.25)
    pairs = (erased[1:] & erased[:-1]).sum().item()             # neighbours do not know of each other
    within(pairs, 3999, 0.0625)
    assert not erase_mask(100, 0.0, 12, 20, torch.device("cpu")).any()
    img = torch.randn(100, 1, 12, 20)
    assert torch.equal(erase(img.clone(), 0.0), img)


def test_tiny_images_are_left_or_erased_inside():
    torch.manual_seed(0)
    for size in ((1, 1), (1, 30), (2, 2), (3, 5)):
        assert erase(torch.full((50, 1, *size), 7.0), 1.0).shape == (50, 1, *size)
    assert not erase_mask(50, 1.0, 1, 30, torch.device("cpu")).any()    # a rectangle is lower than its image


def test_noise_inside_and_nothing_elsewhere():
    torch.manual_seed(5)
    before = 10 + torch.rand(400, 3, 24, 32)
    after = erase(before.clone(), 0.5)
    torch.manual_seed(5)
    torch.rand(400, 3, 24, 32)
    inside = erase_mask(400, 0.5, 24, 32, torch.device("cpu")).expand_as(before)
    assert torch.equal(after[~inside], before[~inside]) and (after[inside] < 9).all()
    noise, n = after[inside].double(), int(inside.sum())
    assert abs(noise.mean()) < 4.5 / math.sqrt(n) and abs(noise.var() - 1) < 4.5 * math.sqrt(2 / n)
    assert abs((noise ** 4).mean() - 3) < 4.5 * math.sqrt(96 / n)       # normal, not just of variance 1
    one = after[inside[:, 0].flatten(1).any(1)][0]              # channels are drawn apart, pixels too
    assert len(one[one < 9].unique()) == (one < 9).sum()
    torch.manual_seed(5)
    torch.rand(400, 3, 24, 32)
    assert torch.equal(erase(before.clone(), 0.5), after)


def test_nothing_waits_for_the_device():
    """On tensors without numbers whatever would read one raises."""
    img, labels = torch.empty(6, 3, 16, 16, device="meta"), torch.empty(6, dtype=torch.long, device="meta")
    mixed, soft = random_mix(img, soft_targets(labels, 5, 0.1), 0.8, 1.0, 4)
    assert mixed.shape == img.shape and soft.shape == (6, 5) and erase(mixed, 0.25).shape == img.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_same_on_a_gpu():
    torch.manual_seed(0)
    img, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    cpu = random_mix(img.clone(), soft_targets(labels, 8, 0.1), 0.8, 1.0, 3)
    there, marks, mode = img.cuda(), labels.cuda(), torch.cuda.get_sync_debug_mode()
    torch.manual_seed(0)
    torch.randn(8, 3, 32, 32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mixed, soft = random_mix(there, soft_targets(marks, 8, 0.1), 0.8, 1.0, 3)
        erased = erase(mixed.clone(), 0.5)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    torch.testing.assert_close(mixed.cpu(), cpu[0])
    torch.testing.assert_close(soft.cpu(), cpu[1])
    changed = (erased != mixed).all(1, keepdim=True).cpu()
    assert torch.equal(changed.expand_as(mixed), (erased != mixed).cpu()) and (rectangles(changed)[:, 2] > 0).any()
