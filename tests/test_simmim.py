"""Masked image modelling on whole inputs: textbook forms, invariants, masks, words, bad input, and real runs."""
import json
import math
import shutil

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from test_runs import TINY, finish, rows, same_state, start_and_kill, steps
from torch import nn

import finetune
from data import WholeImages
from images.datasets import open_dataset
from more import simmim
from more.simmim import RECIPES, SimMIM, draw, rate_at, resolve
from nets.beit import BeitViT
from nets.hog import hog, strokes
from nets.masked import checkpoint_of, exempt, mean_token, read_map, reconstruct
from nets.masks import Masks, block_masks, to_patches, uniform_masks
from nets.naming import cubic_through, resize_geometric
from nets.swin_distill import DistilledSimMIM, TeacherLogits, check_teacher
from nets.tokens import Words
from runtime.run import decay_groups
from tools import pack
from vit import MODELS, SWINS, Swin, patchify
from weights import export, load_encoder, load_into, read

TINY = [*TINY, "--picture-every", "0"]
VIT = dict(img_size=32, patch_size=8, dim=24, depth=2, heads=3)
SWIN = dict(img_size=32, patch_size=2, dim=8, depths=(2, 2, 2), heads=(1, 2, 4), window=4)


def small(target="pixels", net=BeitViT, seed=0, **options):
    """A SimMIM without zeros that could hide a mistake."""
    torch.manual_seed(seed)
    encoder = Swin(**SWIN) if net is Swin else BeitViT(**VIT, positions="learned")
    model = SimMIM(encoder, target, vocab=50, **options)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def batch(model, hidden=6, images=3):
    """Normalised images, a mask that hides `hidden` cells of each, and what is asked."""
    img = torch.randn(images, 3, 32, 32)
    cells = torch.rand(images, model.grid[0] * model.grid[1]).argsort(1).argsort(1) < hidden
    mask = to_patches(cells.view(images, *model.grid), model.side)
    if model.target == "tokens":
        return img, mask, torch.randint(50, (images, 1, *model.grid))
    return img, mask, model.ask((img * 40 + 120).clamp(0, 255).byte(), img)


ALL = [(target, net) for target in ("pixels", "hog", "tokens") for net in (BeitViT, Swin)]


# ----------------------------------------------------------------------------------------------------------------
# The objective


@pytest.mark.parametrize("target", ["pixels", "hog", "tokens"])
def test_same_as_textbook(target):
    """Fifteen steps beside timm's blocks with a head, a target and an error of every patch: losses and weights. As with
    blocks, fewer patches are hidden in some images than in others."""
    pytest.importorskip("timm")
    from textbook import TextbookMIM
    ours = small(target)
    plain = TextbookMIM(target, ours.decoder[0].out_channels, **VIT)
    plain.load_state_dict(ours.state_dict())
    ours.most = 8
    optimizers = [torch.optim.AdamW(decay_groups(m, 0.05), 1e-3) for m in (ours, plain)]
    counts = set()
    for _ in range(15):
        img, hidden = torch.randn(6, 3, 32, 32), torch.randint(5, 9, (6, 1))
        mask = (torch.rand(6, 16).argsort(1).argsort(1) < hidden).view(6, 4, 4)
        counts |= set(mask.flatten(1).sum(1).tolist())
        crops, words = torch.randint(256, img.shape, dtype=torch.uint8), torch.randint(50, (6, 1, 4, 4))
        asked = words if target == "tokens" else ours.ask(crops, img)
        theirs = dict(pixels=img, hog=crops, tokens=words)[target]
        losses = ours(img, mask, asked), plain(img, mask, theirs)
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(counts) > 1, "all masks were alike, so nothing was padded"
    torch.testing.assert_close(ours.decoder[0].weight, plain.decoder[0].weight, rtol=0, atol=2e-4)


@pytest.mark.parametrize("target, net", ALL)
def test_hidden_pixels_do_not_reach_the_encoder(target, net):
    model = small(target, net)
    img, mask, asked = batch(model, hidden=2)
    hidden = to_patches(mask, model.encoder.patch_size).unsqueeze(1)
    other = img + hidden * torch.randn_like(img)
    before, after = (read_map(model.encoder, model.embed(x, mask), (32, 32)) for x in (img, other))
    assert torch.equal(before, after)
    seen = img + ~hidden                                        # while what is visible does
    assert not torch.equal(before, read_map(model.encoder, model.embed(seen, mask), (32, 32)))


@pytest.mark.parametrize("target, net", ALL)
def test_visible_cells_carry_no_loss(target, net):
    """The error is that of hidden cells alone, by hand; what is asked of the others does not matter."""
    model = small(target, net)
    img, mask, asked = batch(model, hidden=2)
    loss = model(img, mask, asked)
    size = asked.shape[-1] // model.grid[1]
    cells = mask[:, ::model.side, ::model.side].flatten(1)      # (B, N)
    tokens = read_map(model.encoder, model.embed(img, mask), (32, 32))
    answers = nn.functional.conv2d(rearrange(tokens, "b (h w) d -> b d h w", h=model.grid[0]), model.decoder[0].weight,
                                   model.decoder[0].bias).flatten(2).mT[cells]                  # (hidden, A)
    wanted = patchify(asked, size)[cells]
    if target == "tokens":
        by_hand = nn.functional.cross_entropy(answers, wanted.flatten())
    else:
        by_hand = (answers - wanted).square().mean() if target == "hog" else (answers - wanted).abs().mean()
    torch.testing.assert_close(loss, by_hand)
    model.most = 2                                              # fewer cells are looked at: the same
    torch.testing.assert_close(model(img, mask, asked), by_hand)
    visible = ~cells.view(-1, 1, *model.grid).repeat_interleave(size, 2).repeat_interleave(size, 3)
    torch.testing.assert_close(model(img, mask, torch.where(visible, (asked + 1) % 50, asked)), by_hand)


@pytest.mark.parametrize("target, net", ALL)
@pytest.mark.parametrize("block", [0, 12])
def test_every_parameter_learns(target, net, block):
    model = small(target, net, block=block)
    img, mask, asked = batch(model, hidden=2)
    model(img, mask, asked).backward()
    lost = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A window of one map has one offset that nobody has, and a ViT's last block answers for patches alone.
    assert not lost


def test_a_cell_that_is_hidden_in_part():
    """Where units are smaller than a Swin's cells, only pixels of hidden patches count."""
    model = small(net=Swin)
    img, mask = torch.randn(2, 3, 32, 32), torch.rand(2, 16, 16) < 0.3
    hidden = to_patches(mask, 2).unsqueeze(1)
    by_hand = (reconstruct(model, img, mask) - img).abs()[hidden.expand(-1, 3, -1, -1)].mean()
    torch.testing.assert_close(model(img, mask, img), by_hand)


def test_the_map_of_answers():
    """A head whose answers are a patch's pixels, in the order of the image: pixel shuffle puts them in place."""
    model = small()
    model.decoder[0].weight.data.zero_()
    patch = torch.randn(3, 8, 8)
    model.decoder[0].bias.data = patch.flatten()
    img, mask, _ = batch(model)
    assert torch.equal(reconstruct(model, img, mask), patch.repeat(1, 4, 4).expand(3, -1, -1, -1))
    shuffled = nn.functional.pixel_shuffle(patch.flatten().view(1, -1, 1, 1), 8)
    assert torch.equal(shuffled[0], patch)
    assert model(patch.repeat(1, 4, 4).expand(3, -1, -1, -1), mask, patch.repeat(1, 4, 4).expand(3, -1, -1, -1)) == 0


def test_autocast_loss_is_fp32_and_close():
    for target, net in ALL:
        model = small(target, net)
        img, mask, asked = batch(model, hidden=2)
        exact = model(img, mask, asked)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(img, mask, asked)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, exact, rtol=3e-2, atol=0)


def test_chance():
    """The loss of one answer for all, whatever the image: of pixels the mean colour, of HOG each bin's mean."""
    torch.manual_seed(0)
    model = small()
    img = torch.randn(4, 3, 32, 32)
    assert model.metrics(img)["chance"] == img.abs().mean()
    asked = torch.rand(4, 27, 4, 4)
    constant = asked.mean((0, 2, 3), keepdim=True)
    torch.testing.assert_close(small("hog").metrics(asked)["chance"], (asked - constant).square().mean(), rtol=2e-2,
                               atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("target, net", ALL)
def test_compiled_is_the_same(target, net):
    model = small(target, net)
    img, mask, asked = batch(model, hidden=2)
    exact = model(img, mask, asked)
    model.compile(dynamic=False)
    torch.testing.assert_close(model(img, mask, asked), exact)


def test_any_shape():
    """Not square, one channel, and patches that 8 x 8 pixels do not divide."""
    for target in ("pixels", "hog"):
        model = SimMIM(BeitViT(img_size=(28, 42), patch_size=14, in_chans=1, dim=8, depth=1, heads=2), target)
        assert model.hog_cell == 7
        img, mask = torch.randn(2, 1, 28, 42), torch.rand(2, 2, 3) < 0.5
        crops = torch.randint(256, img.shape, dtype=torch.uint8)
        loss = model(img, mask, model.ask(crops, img))
        assert loss.isfinite() and reconstruct(model, img, mask).shape == model.ask(crops, img).shape


# ----------------------------------------------------------------------------------------------------------------
# HOG


def test_hog_of_one_edge():
    """An edge between left and right is one bin's alone; mirrored, brighter or stronger it is the same."""
    img = torch.zeros(1, 1, 8, 16)
    img[..., 8:] = 100.0
    upright = hog(img)[0, 0]                                    # (9, 1, 2)
    assert upright.shape == (9, 1, 2) and (upright.amax(0) == 1).all() and (upright.sum(0) == 1).all()
    for other in (img.flip(-1), 3 * img + 20):
        assert torch.equal(hog(other), hog(img))
    lying = hog(img.mT.contiguous())[0, 0]
    assert lying.argmax(0).flatten().tolist() == [0, 0] != upright.argmax(0).flatten().tolist()
    assert upright.argmax(0).flatten().tolist() == [4, 4]       # 90 degrees from the y axis


def test_hog_against_loops():
    """Each cell by hand, in float64, on 8-bit values; flat cells are zeros."""
    torch.manual_seed(0)
    img = torch.randint(256, (2, 3, 16, 24), dtype=torch.uint8)
    img[0, :, :, :16] = 77                                      # its left cells are flat but for the border
    ours, x = hog(img.float()), np.pad(img.double().numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    want = np.zeros((2, 3, 9, 2, 3))
    for b, c, i, j in np.ndindex(2, 3, 16, 24):
        part = x[b, c, i:i + 3, j:j + 3]
        gx, gy = (part * kernel).sum(), (part * kernel.T).sum()
        number = math.floor(np.float32(math.atan2(gx, gy)) / np.float32(math.pi) * 9) % 9
        want[b, c, number, i // 8, j // 8] += math.hypot(gx, gy)
    want /= np.maximum(np.linalg.norm(want, axis=2, keepdims=True), 1e-12)
    torch.testing.assert_close(ours.double(), torch.from_numpy(want), rtol=0, atol=1e-6)
    assert not ours[0, :, :, :, 0].any() and ours[1].any()


def test_strokes():
    """A stroke lies along its edge."""
    img = torch.zeros(1, 1, 8, 8)
    img[..., 4:] = 100.0
    upright = strokes(hog(img), 9)[0, 0].float()
    assert upright[:, 4].mean() > 3 * upright[4].mean()
    assert strokes(torch.zeros(2, 3, 9, 2, 5), 8).shape == (2, 1, 16, 40)


# ----------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("units, ratio, hidden", [(49, 0.6, 30), (36, 0.6, 22), (196, 0.6, 118), (4, 0.6, 3),
                                                  (9, 0.4, 4)])
def test_units_are_rounded_up(units, ratio, hidden):
    side = math.isqrt(units)
    assert uniform_masks(5, (side, side), ratio).flatten(1).sum(1).tolist() == [hidden] * 5
    assert Masks("uniform", (4 * side, 4 * side), 2, 8, ratio).count == hidden


def test_blocks():
    """The published counts: 75 of 196 in two masks of three, 74.48 on average; also the last row and column are hidden,
    and hidden patches have neighbours."""
    masks = block_masks(4000, (14, 14), 75, 16, generator=torch.Generator().manual_seed(0))
    counts = masks.flatten(1).sum(1)
    assert counts.max() == 75 and abs((counts == 75).float().mean() - 0.669) < 0.04
    assert counts.float().mean().item() == pytest.approx(74.48, abs=0.15)
    assert masks[:, -1].any() and masks[:, :, -1].any()
    alike = (masks[:, 1:] == masks[:, :-1]).float().mean()
    assert alike > 0.85 > (uniform_masks(400, (14, 14), 75 / 196)[:, 1:] == uniform_masks(400, (14, 14), 75 / 196)[
        :, :-1]).float().mean()


def test_masks_follow_the_seed_alone():
    masks = Masks("blocks", (8, 8), 4, 4, 0.4)
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(masks.draw(20))
    assert torch.equal(*drawn) and not torch.equal(drawn[0], masks.draw(20))
    assert masks.draw(3).shape == (3, 8, 8) and masks.cells == masks.count == 26 and masks.least == 5


def test_a_unit_is_hidden_whole():
    masks = Masks("uniform", (16, 24), 2, 8, 0.5, cell=4)
    mask = masks.draw(10)
    assert torch.equal(to_patches(mask[:, ::4, ::4], 4), mask)
    assert masks.cells == masks.count * 4 and mask[0].sum() == masks.count * 16


# ----------------------------------------------------------------------------------------------------------------
# Schedules, start, files


def test_rates():
    assert rate_at("steps", 0, 100, 10, 1.0, start=0.1) == 0.1 and rate_at("steps", 10, 100, 10, 1.0, start=0.1) == 1.0
    assert rate_at("steps", 70, 100, 10, 1.0, milestones=[50, 70]) == pytest.approx(0.01)
    assert rate_at("cosine", 55, 100, 10, 1.0, floor=0.2) == pytest.approx(0.6)         # half-way between 10 and 100
    assert rate_at("whole_cosine", 50, 100, 10, 1.0, floor=0.2) == pytest.approx(0.6)   # between 0 and 100
    assert [rate_at("steps", n, 100, 10, 1.0, lag=True) for n in (0, 1, 2)] == [0.0, 0.0, 0.1]


def test_recipes():
    """Published numbers, as the batch makes them."""
    lite, base = RECIPES["pixels"]["swin_lite"], RECIPES["tokens"]["vit_base"]
    assert lite["blr"] * lite["batch_size"] / 256 == pytest.approx(4e-4)
    assert base["blr"] * base["batch_size"] / 256 == pytest.approx(1.5e-3)
    assert Masks("blocks", (14, 14), 16, 16, base["mask_ratio"], base["min_block"]).count == 75
    hog_recipe = RECIPES["hog"]["vit_base"]
    masks = Masks("blocks", (14, 14), 16, 16, hog_recipe["mask_ratio"], hog_recipe.get("min_block"))
    assert (masks.count, masks.least) == (78, 15)
    for target in RECIPES:
        assert set(RECIPES[target]) == {*MODELS, *SWINS}
        assert RECIPES[target]["vit_tiny"]["epochs"] == 400


def test_start():
    """MaskFeat's biases are 0.02 and its head 0; BEiT's deeper blocks start smaller. Our small ViTs start as MAE's."""
    learned = ["--demo", "--positions", "learned"]
    model = SimMIM(simmim.make_encoder(resolve([*learned, "--target", "hog"])), "hog")
    assert (model.encoder.blocks[1].norm1.bias == 0.02).all() and (model.encoder.blocks[1].mlp.fc1.bias == 0.02).all()
    assert not model.decoder[0].weight.any() and not model.decoder[0].bias.any()
    ours = simmim.make_encoder(resolve(["--demo"]))
    assert ours.blocks[1].attn.qkv.weight.abs().max().item() == pytest.approx((6 / (128 + 384)) ** 0.5, rel=1e-2)
    assert ours.patch_embed.proj.weight.abs().max().item() == pytest.approx((6 / (192 + 128)) ** 0.5, rel=1e-2)
    model = SimMIM(simmim.make_encoder(resolve(learned)))
    first, last = (model.encoder.blocks[i].mlp.fc2.weight.std() for i in (0, 3))
    assert (first / last).item() == pytest.approx(2.0, rel=0.02) and model.encoder.mask_token.abs().max() <= 0.02
    assert model.decoder[0].bias.any()                          # torch's own start, as published


def test_groups_of_names():
    model = small()
    plain, decayed = exempt(decay_groups(model, 0.05), model, ("pos_embed", "cls_token"))
    names = {id(p): name for name, p in model.named_parameters()}
    free = {names[id(p)] for p in plain["params"]}
    assert {"encoder.pos_embed", "encoder.cls_token", "encoder.norm.weight", "decoder.0.bias"} <= free
    assert "encoder.mask_token" in {names[id(p)] for p in decayed["params"]}
    assert len(plain["params"]) + len(decayed["params"]) == len(names)


@pytest.mark.parametrize("net, tap", [(BeitViT, None), (Swin, None), (Swin, 1)])
def test_encoder_file(net, tap, tmp_path):
    """encoder.pt has the encoder under its own names, and probes look at the mean token of that network."""
    model, img = small(net=net, tap=tap), torch.randn(2, 3, 32, 32)
    path = str(tmp_path / "encoder.pt")
    torch.save(dict(checkpoint_of(model.encoder, tap), method="simmim"), path)
    loaded = load_encoder(path, say=lambda text: None)
    mean = loaded.features(img) if net is Swin else loaded.encode(img)[:, 1:].mean(1)
    torch.testing.assert_close(mean_token(model.encoder, img, tap), mean)
    assert "mask_token" not in torch.load(path)["model"] and model.encoder.mask_token.requires_grad
    if tap is not None:
        assert torch.load(path)["config"]["final_norm"].startswith("fresh")


def test_resized_windows():
    """A spline goes through its points and keeps a cubic; a SimMIM's file uses it, another Swin's does not."""
    x = torch.tensor([-4.0, -2.5, -1.0, 0.0, 1.0, 2.5, 4.0], dtype=torch.float64)
    at = torch.linspace(-4, 4, 23, dtype=torch.float64)
    torch.testing.assert_close(cubic_through(x, x), torch.eye(7, dtype=torch.float64))
    cubic = 0.3 * x ** 3 - x ** 2 + 2 * x - 1
    torch.testing.assert_close(cubic_through(x, at) @ cubic, 0.3 * at ** 3 - at ** 2 + 2 * at - 1)
    torch.manual_seed(0)
    table = torch.randn(49, 2)
    bigger = resize_geometric(table, 4, 7)
    # Next to the middle nothing moves.
    torch.testing.assert_close(bigger.view(13, 13, 2)[5:8, 5:8], table.view(7, 7, 2)[2:5, 2:5])


def test_resized_windows_of_a_file(tmp_path):
    model = small(net=Swin)
    state = {k: v for k, v in checkpoint_of(model.encoder)["model"].items()}
    name = "layers.0.blocks.0.attn.relative_position_bias_table"
    for method in ("simmim", "esvit"):
        path = str(tmp_path / f"{method}.pt")
        torch.save(dict(model=state, config=model.encoder.config, method=method), path)
        larger = Swin(**{**SWIN, "img_size": 112, "window": 7})
        load_into(larger, read(path), say=lambda text: None)
        alike = torch.allclose(larger.state_dict()[name], resize_geometric(state[name], 4, 7))
        assert alike == (method == "simmim")


# ----------------------------------------------------------------------------------------------------------------
# A teacher


def test_distillation_by_hand():
    """Both parts of the loss, each network's logits from its own layers; the upper stages get no gradient of pixels."""
    model = small(net=Swin, tap=1)
    theirs = SimMIM(Swin(**{**SWIN, "dim": 12}))
    blocks = [*theirs.encoder.layers[-1]["blocks"]]
    both = DistilledSimMIM(model, TeacherLogits(theirs, "cpu"), weight=2.0)
    img, mask, asked = batch(model, hidden=2)
    loss = both(img, mask, asked)
    torch.testing.assert_close(loss, model(img, mask, asked) + 2 * both.parts["distill"])
    x = theirs.embed(img, mask)
    for layer, grid in zip(theirs.encoder.layers, theirs.encoder.maps(32, 32)):
        for block in [*layer["blocks"]]:
            x = block(x, grid)
        x = layer["downsample"](x, grid) if "downsample" in layer else x
    attn, x = blocks[-1].attn, blocks[-1].norm1(x)
    q, k, _ = attn.qkv(x).view(3, 16, 3, 4, -1).permute(2, 0, 3, 1, 4)                          # (B, H, N, d)
    bias = attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
    torch.testing.assert_close(both.targets, q @ k.mT / q.shape[-1] ** 0.5 + bias)
    guess = both.metrics(asked)
    torch.testing.assert_close(guess["distill_chance"], (both.targets - both.targets.mean()).square().mean())
    both.weight = 0.0
    model.zero_grad()
    both(img, mask, asked).backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.encoder.layers[2].parameters())
    assert all(p.grad is None for p in theirs.parameters()) and "teacher" not in " ".join(both.state_dict())


def test_teachers_that_do_not_fit():
    ours = dict(patch_size=4, in_chans=3, window=7, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), mean=(0.5,), std=(0.2,))
    check_teacher("t.pth", dict(ours, dim=96, mean=None), ours)
    check_teacher("t.pth", dict(ours, depths=[2, 2, 18, 2], mean=[0.5]), ours)
    for change, words in ((dict(window=12), "windows of 12"), (dict(patch_size=2), "patches of 2"),
                          (dict(depths=(2, 2, 6, 1)), "1 blocks in its last stage"), (dict(in_chans=1), "1 channels"),
                          (dict(depths=(2, 2, 6), heads=(3, 6, 12)), "3 stages"), (dict(mean=(0.4,)), "mean"),
                          (dict(heads=(4, 8, 16, 32)), "32 heads in its last stage")):
        with pytest.raises(ValueError, match=words):
            check_teacher("t.pth", {**ours, **change}, ours)


# ----------------------------------------------------------------------------------------------------------------
# Words


class MeanColours(nn.Module):
    """A tokenizer: the mean colour of a patch, each channel in four steps, 64 words."""

    def __init__(self, patch):
        super().__init__()
        self.patch = patch

    def forward(self, img):
        steps = (nn.functional.avg_pool2d(img, self.patch) * 4).long().clamp(0, 3)
        return (steps[:, 0] * 4 + steps[:, 1]) * 4 + steps[:, 2]                                # (B, h, w)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A program for images of 16 x 16 pixels in patches of 4."""
    path = str(tmp_path_factory.mktemp("tokenizer") / "colours.pt2")
    shapes = ({0: torch.export.Dim("b")},)
    program = torch.export.export(MeanColours(4), (torch.rand(2, 3, 16, 16),), dynamic_shapes=shapes)
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def known_words(classes, tokenizer, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("words") / "words.npy")
    assert not pack.command_line(["words", str(classes), path, "--tokenizer", tokenizer, "--img-size", "16",
                                  "--patch-size", "4", "--workers", "0"])
    return path


def test_words_of_a_set(classes, tokenizer, known_words):
    """Each image's words are those that the tokenizer gives for it, also in another order."""
    source = open_dataset(str(classes), "train")
    img, numbers, _ = WholeImages(source, (16, 16), 3).__getitems__([(3, i) for i in (7, 0, 39, 7)])
    assert numbers.tolist() == [7, 0, 39, 7] and source.labels[39] == 1
    want = MeanColours(4)(img.float() / 255)
    names = json.loads(open(known_words.replace(".npy", ".json")).read())["names"]
    for path in (known_words, tokenizer):
        words = Words(path, (4, 4), 64, 40, names)
        assert torch.equal(words(img, numbers), want.unsqueeze(1))


def test_words_that_do_not_fit(classes, tokenizer, known_words, tmp_path):
    names = json.loads(open(known_words.replace(".npy", ".json")).read())["names"]
    img = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    for change, message in ((dict(vocab=20), "words from 0 to 6.*, and the head knows 0 to 19"),
                            (dict(grid=(2, 4)), "4 x 4 words of each image, and 2 x 4 were expected"),
                            (dict(images=41), "the words of 40 images, and the training set has 41"),
                            (dict(names="others"), "of other images than the training set"),
                            (dict(path=str(tmp_path / "no.npy")), "does not exist"),
                            (dict(path=__file__), "is no program of torch.export.save")):
        options = dict(path=known_words, grid=(4, 4), vocab=64, images=40, names=names)
        with pytest.raises(ValueError, match=message):
            Words(**options | change)
    np.save(tmp_path / "real.npy", np.zeros((40, 4, 4)))
    with pytest.raises(ValueError, match="whole numbers"):
        Words(str(tmp_path / "real.npy"), (4, 4), 64, 40, names)
    with pytest.raises(ValueError, match=r"answers with \(2, 4, 4\) for 2 images, and 2 x 2 words"):
        Words(tokenizer, (2, 2), 64, 40, names)(img, None)
    with pytest.raises(ValueError, match="takes no images of"):
        Words(tokenizer, (4, 4), 64, 40, names)(img[..., :8], None)
    words = Words(tokenizer, (4, 4), 20, 40, names)
    assert words(img + 255, None).max() == 19                   # a GPU's cross-entropy would abort the process
    with pytest.raises(ValueError, match="the head knows 0 to 19"):
        words.check()


# ----------------------------------------------------------------------------------------------------------------
# Runs


def run(classes, out, *args):
    return simmim.main(list(map(str, ["--data", classes, *TINY, "--out", out, *args])))


@pytest.fixture(scope="module")
def swin_file(classes, tmp_path_factory):
    """last.pt of a Swin that SimMIM has trained, to be a teacher."""
    out = tmp_path_factory.mktemp("swin")
    run(classes, out, *SWIN_RUN, "--epochs", "1")
    return str(out / "last.pt")


SWIN_RUN = ("--model", "swin_mini", "--img-size", "32", "--mask-unit", "16")
VIT_BAD = (
    (["--target", "tokens"], "--target tokens and --tokenizer FILE go together"),
    (["--tokenizer", "x.npy"], "--target tokens and --tokenizer FILE go together"),
    (["--target", "tokens", "--tokenizer", "no.npy"], "--tokenizer no.npy does not exist"),
    (["--mask-unit", "6"], "--mask-unit 6 is no multiple of 4"),
    (["--mask-unit", "12"], "--mask-unit 12 does not tile a 16x16 image"),
    (["--mask-ratio", "0.99"], "hides 4 of 4 units"),
    (["--mask", "blocks"], "--mask blocks needs 3 units or more both ways"),
    (["--distill-teacher", "x.pt"], "--distill-teacher is for a Swin"),
    (["--distill", "decoupled"], "--distill has no effect without --distill-teacher"),
    (["--window", "4"], "--heads is an option of a ViT and --window of a Swin"),
)


@pytest.mark.parametrize("args, message", VIT_BAD, ids=[" ".join(args) for args, _ in VIT_BAD])
def test_bad_input(classes, tmp_path, args, message):
    with pytest.raises(SystemExit, match=message):
        run(classes, tmp_path, *args)


def test_bad_input_for_a_swin(classes, swin_file, tmp_path):
    for args, message in (((*SWIN_RUN[:4], "--mask-unit", "8"), "--mask-unit 8 is no multiple of 16"),
                          ((*SWIN_RUN[:2], "--img-size", "40"), "are not halves of each other"),
                          ((*SWIN_RUN, "--distill-teacher", swin_file, "--window", "2"), "windows of 4 patches"),
                          ((*SWIN_RUN, "--distill-teacher", swin_file.replace("last", "encoder")), "mask token")):
        with pytest.raises(SystemExit, match=message):
            run(classes, tmp_path, *args)


@pytest.mark.parametrize("what", ["pixels", "hog", "tokens", "known words", "swin", "teacher"])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, what, tokenizer, known_words, swin_file):
    """Each kind of run on one process: kill -9, other workers, the end."""
    of_kind = dict(pixels=["--mask-unit", 8], hog=["--target", "hog", "--accum", 2],
                   tokens=["--target", "tokens", "--tokenizer", tokenizer, "--vocab", 64],
                   swin=[*SWIN_RUN, "--head-block", 12], teacher=[*SWIN_RUN, "--distill-teacher", swin_file])
    of_kind["known words"] = ["--target", "tokens", "--tokenizer", known_words, "--vocab", 64]
    resume(classes, tmp_path, of_kind[what], world=1)


@pytest.mark.parametrize("what", ["pixels", pytest.param("teacher", marks=pytest.mark.slow)])
def test_killed_and_resumed_on_two_processes(classes, tmp_path, what, swin_file):
    more = ["--mask-unit", 8] if what == "pixels" else [*SWIN_RUN, "--distill-teacher", swin_file, "--accum", 2]
    resume(classes, tmp_path, more, world=2)


def resume(classes, tmp_path, more, world):
    more = [*more, "--epochs", 4]                               # 20 steps
    command = ["--data", classes, *TINY, *more]

    def once(out, *args):
        return run(classes, out, *more, *args) if world == 1 else finish(*command, "--out", out, *args, world=world,
                                                                         script="more/simmim.py")
    once(tmp_path / "whole")
    out = tmp_path / "broken"
    start_and_kill(*command, out=out, step=6, world=world, script="more/simmim.py")
    once(out, "--workers", 1)
    got = steps(out)
    assert any(b <= a for a, b in zip(got, got[1:])), "no step was repeated: nothing was resumed"
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken and len(whole) == 20
    same_state(tmp_path / "whole", out)


def test_another_tokenizer_is_another_run(classes, tmp_path, known_words):
    args = ["--target", "tokens", "--tokenizer", str(tmp_path / "words.npy"), "--vocab", 64, "--epochs", 1]
    shutil.copy(known_words, tmp_path / "words.npy")
    run(classes, tmp_path / "run", *args)
    np.save(tmp_path / "words.npy", np.load(known_words)[:, ::-1].copy())
    with pytest.raises(SystemExit, match="is not the file that this run began with"):
        run(classes, tmp_path / "run", *args)


@pytest.mark.parametrize("what", ["vit", "beit", "swin"])
def test_from_pretraining_to_what_comes_after(classes, tmp_path, what, tokenizer):
    """encoder.pt starts another run, a classifier and k-NN, and goes out to timm."""
    of_kind = dict(vit=["--target", "hog"], swin=SWIN_RUN,
                   beit=["--target", "tokens", "--tokenizer", tokenizer, "--vocab", "64"])
    run(classes, tmp_path / "one", *of_kind[what], "--epochs", 1)
    path = str(tmp_path / "one" / "encoder.pt")
    run(classes, tmp_path / "two", *of_kind[what], "--epochs", 1, "--init", path)
    common = ["--data", str(classes), "--workers", "0"]
    finetune.main([*common, "--init", path, "--epochs", "1", "--batch-size", "8", "--out", str(tmp_path / "tuned")])
    best = torch.load(tmp_path / "tuned" / "best.pt")
    assert best["config"]["classes"] == ["a", "b"]
    if what == "beit":
        assert "blocks.0.gamma_1" in best["model"] and "blocks.0.attn.q_bias" in best["model"]
    text = finish(path, *common, script="probe.py")
    assert "k-NN" in text and ("mean patch token" in text or "avg" in text)
    if what == "vit":                                           # timm has no place for what BEiT adds
        export.main([path, "--to", "timm", "--out", str(tmp_path / "timm")])
        assert (tmp_path / "timm" / "config.json").exists()


@pytest.mark.parametrize("target, net, columns", [("pixels", BeitViT, 3), ("hog", BeitViT, 4), ("pixels", Swin, 3),
                                                  ("tokens", BeitViT, 2)])
def test_pictures(classes, tmp_path, target, net, columns):
    """A row for each image; the completed one differs from the image where it is hidden, and nowhere else."""
    model, path = small(target, net), str(tmp_path / "recon.png")
    masks = Masks("uniform", model.patches, model.encoder.patch_size, model.cell, 0.5, cell=model.cell)
    source = open_dataset(str(classes), "val")
    assert draw(model, masks, source, (0.5,) * 3, (0.25,) * 3, path, count=2)
    page = np.asarray(Image.open(path)).astype(int)
    side = (page.shape[1] // columns, (page.shape[0] - 36) // 2)
    assert side[0] == side[1] == 32 * 4 + 8
    tiles = [page[18:18 + side[1], k * side[0]:(k + 1) * side[0]][4:-4, 4:-4] for k in range(columns)]
    hidden = to_patches(masks.draw(2, torch.Generator().manual_seed(0)), model.encoder.patch_size)[0]
    hidden = hidden.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
    assert (tiles[0] == tiles[1])[~hidden].all() and (tiles[1][hidden] == 128).all()
    if columns == 3:
        assert (tiles[0] == tiles[2])[~hidden].all() and (tiles[0] != tiles[2])[hidden].mean() > 0.5


def test_the_log(classes, tmp_path, swin_file):
    """Parts of the loss add up; each row has what chance would give."""
    run(classes, tmp_path, *SWIN_RUN, "--distill-teacher", swin_file, "--distill-weight", 0.5, "--epochs", 1)
    for row in [row for row in rows(tmp_path) if "loss" in row]:
        assert row["loss"] == pytest.approx(row["pixels"] + 0.5 * row["distill"], rel=1e-4)
        assert row["chance"] > row["distill_chance"] * 0.5 > 0
