"""tools/analyze.py: estimators against recorded runs, closed forms, invariants; the commands on small made-up files."""
import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from einops import rearrange
from golden import Golden, close, each_recording
from PIL import Image
from textbook import TextbookCKA
from torch import nn

from data import CenterCrops
from images.augment import IMAGENET_MEAN, IMAGENET_STD, recolour
from images.datasets import open_dataset
from tools import analysis_plots as plots
from tools import analyze
from tools.analyze import cka_of, gram, hsic, logits_of, mass_mask, matches, mirrored, reach, spread, tokens_of, watch
from vit import Swin, ViT, WindowAttention

ROOT = Path(__file__).parents[1]


def vit(**options):
    torch.manual_seed(0)
    options = {**dict(img_size=16, patch_size=4, dim=48, depth=2, heads=4, positions="learned"), **options}
    model = ViT(**options).eval().requires_grad_(False)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def swin(img_size=32, **options):
    torch.manual_seed(1)
    return Swin(img_size, dim=16, depths=(2, 2), heads=(2, 4), window=4, **options).eval().requires_grad_(False)


def saved(path, model, **config):
    path.parent.mkdir(exist_ok=True)
    torch.save(dict(method="mae", config=dict(model.config, **config), model=model.state_dict()), path)
    return str(path)


def cka(first, second):
    """Features of one batch or several, [(n, ...), ...] for each network's layers."""
    both = [torch.stack([gram(x) for x in (*one, *two)]).double() for one, two in zip(first, second)]
    return cka_of(sum(hsic(x, x) for x in both), len(first[0]))


# ----------------------------------------------------------------------------------------------------------------
# CKA


@each_recording("*_cka")
def test_cka_as_recorded(name):
    g = Golden(name)
    counts = [len(g.config[f"layers{k}"]) for k in (1, 2)]
    nets = [[g(f"input/feat{k}_{i}") for i in range(count)] for k, count in zip((1, 2), counts)]
    batches = [[[layer[b] for layer in net] for b in range(g.config["n_batches"])] for net in nets]
    close(cka(*batches), g("out/cka"), 1e-5)
    K, L = ([torch.stack([gram(x).double() for x in batch]) for batch in net] for net in batches)
    first, both, second = [sum(hsic(k, x) for k, x in zip(*pair)) for pair in ((K, K), (K, L), (L, L))]
    own = first.diagonal()[:, None].expand(*counts), both, second.diagonal().expand(*counts)
    close(torch.stack(own, -1), g("out/hsic_sums"), 1e-5)
    found = [hsic(K[0], L[0])[0, 0], hsic(K[0], K[0])[0, 0], hsic(L[0], L[0])[0, 0]]
    close(torch.stack(found), g("out/hsic_first"), 1e-5)


def test_cka_in_closed_form():
    def feature(s, channels, b):
        n = torch.arange(32 * channels).double()
        return torch.sin(s * n + 0.3 * b + 0.11 * (n % 7) ** 2).view(8, 4, channels)

    nets = [[[feature(s, c, b) for s, c in net] for b in range(2)]
            for net in (((0.7, 3), (1.3, 3)), ((0.7, 3), (2.1, 5), (1.9, 5)))]
    expected = [[1, -0.4055129379420669, 0.7079600746317549],
                [-0.306407616163323, -0.14316136353067624, -0.162510518751874]]
    torch.testing.assert_close(cka(*nets), torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_cka_of_the_same_the_turned_and_the_unrelated():
    torch.manual_seed(0)
    x = torch.randn(4, 32, 40, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))
    others = torch.randn(4, 32, 40, dtype=torch.float64)
    found = cka([[part] for part in x], [[part, 3 * part @ turn + 5, other] for part, other in zip(x, others)])[0]
    torch.testing.assert_close(found[:2], torch.ones(2).double())
    assert abs(found[2]) < 0.1                                  # a biased estimate would say 40 / (40 + 32)
    centred = [y - y.mean(0) for y in (x[0], others[0])]
    biased = (centred[0].T @ centred[1]).norm() ** 2 / math.prod((y.T @ y).norm() for y in centred)
    assert biased > 0.4


def test_cka_of_two_networks_by_the_textbook():
    nets, img = [vit(dim=24), vit(depth=3)], torch.randn(12, 3, 16, 16)
    ours = cka(*([tokens_of(net, img)] for net in nets))
    textbook = TextbookCKA(*(net.double() for net in nets))
    torch.testing.assert_close(ours.float(), textbook.compare(*textbook.look(img.double())), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------------------
# Layers and attention


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_layers_of_a_vit(pool):
    model, img, hooked = vit(pool=pool), torch.randn(3, 3, 16, 24), []
    for module in [b.norm1 for b in model.blocks] + [model.norm]:
        module.register_forward_hook(lambda _, __, out: hooked.append(out[:, 1:]))
    found = tokens_of(model, img)
    hooked[-1] = model.fc_norm(hooked[-1])
    for tokens, expected in zip(found, hooked, strict=True):
        torch.testing.assert_close(tokens, expected)
    seen, output = watch(model, img)
    torch.testing.assert_close(output, found[-1])
    x = model.embed(img)
    for (attn, tokens, grid), block in zip(seen, model.blocks, strict=True):
        logits, window, place = logits_of(attn, tokens, grid)
        torch.testing.assert_close(logits, block.attn.logits(block.norm1(x))[..., 1:, 1:])
        assert grid == window == (4, 6) and torch.equal(torch.arange(24)[place], torch.arange(24))
        x = block(x)
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layers_of_a_swin():
    model, img, hooked = swin(), torch.randn(2, 3, 32, 32), []
    blocks = [b for stage in model.layers for b in stage["blocks"]]
    for module in [b.norm1 for b in blocks] + [model.norm]:
        module.register_forward_hook(lambda _, __, out: hooked.append(out))
    for tokens, expected in zip(tokens_of(model, img), hooked, strict=True):
        torch.testing.assert_close(tokens, expected)
    seen, _ = watch(model, img)
    assert [attn for attn, _, _ in seen] == [b.attn for b in blocks]
    assert [grid for _, _, grid in seen] == [(8, 8), (8, 8), (4, 4), (4, 4)]


def test_swin_logits_make_the_attention():
    """Their softmax times the values is what the attention gives, with shifts, masks and padding; looking changes
    nothing."""
    model, img = swin(patch_size=2), torch.randn(2, 3, 24, 20)
    plain = model.encode(img)
    seen, output = watch(model, img)
    assert torch.equal(output, plain)
    assert [logits_of(*layer)[0].shape for layer in seen] == [(2 * 9, 2, 16, 16)] * 2 + [(2 * 4, 4, 16, 16)] * 2
    for attn, tokens, grid in seen:
        nn.init.normal_(attn.relative_position_bias_table)
        nn.init.normal_(attn.qkv.bias)
        logits, window, place = logits_of(attn, tokens, grid)
        order = analyze.window_layout(*grid, attn.side, attn.shift, tokens.device)[0]
        values = attn.padded_qkv(tokens, grid)[:, order].chunk(3, -1)[2]
        values = rearrange(values, "b (n t) (h d) -> (b n) h t d", t=16, h=attn.heads)
        x = rearrange(logits.softmax(-1) @ values, "(b n) h t d -> b (n t) (h d)", b=2)
        torch.testing.assert_close(attn.proj(x[:, place]), attn(tokens, grid))
        assert window == (4, 4) and (logits.amin() < -90) == (attn.shift > 0)


@each_recording("esvit_swin_*")
def test_attention_of_esvit_as_recorded(name):
    g = Golden(name)
    if g.config.get("ape"):
        pytest.skip("absolute positions in a Swin are not built here")
    names = dict(embed_dim="dim", num_heads="heads", window_size="window", norm_eps="eps")
    names |= {k: k for k in ("img_size", "patch_size", "depths", "mlp_ratio")}
    model = Swin(**{ours: g.config[theirs] for theirs, ours in names.items()})
    model.load_state_dict(g.under("state"))
    logits, _, _ = logits_of(*watch(model, g("input/imgs"))[0][-1])
    close(logits.softmax(-1), g("out/last_attention"), 2e-5 if name == "esvit_swin_divisible" else 5e-5)


@each_recording("swin_window_attention*")
def test_window_attention_as_recorded(name):
    g = Golden(name)
    c = g.config
    side, image = c["window"][0], g("input/x").unflatten(0, (c["batch"], c["nW"]))
    attn = WindowAttention(c["dim"], c["heads"], side)
    attn.load_state_dict(g.under("state"))
    tokens, grid = image.flatten(0, 2)[None], (len(image.flatten(0, 1)) * side, side)           # one window wide
    logits, _, place = logits_of(attn, tokens, grid)
    assert logits.shape == (len(g("input/x")), c["heads"], side * side, side * side)
    values = rearrange(attn.qkv(g("input/x")).chunk(3, -1)[2], "n t (h d) -> n h t d", h=c["heads"])
    for mask, expected in ((None, "y_nomask"), (g("input/mask"), "y_mask")):
        given = logits if mask is None else logits + mask.repeat(c["batch"], 1, 1).unsqueeze(1)
        x = rearrange(given.softmax(-1) @ values, "n h t d -> n t (h d)")
        close(attn.proj(x), g(f"out/{expected}"), 1e-5)


@each_recording("*_attn_analyzer")
def test_attention_as_recorded(name):
    """Also with cls, (1, 1, H, 1 + N, 1 + N), whose key says how many tokens it has. A patch counts 14 pixels."""
    g = Golden(name)
    n = g.config["grid"]
    distance = analyze.distances(n, n) * 14
    close(distance, g("out/dist_matrix"), 1e-5)
    found = torch.stack([spread(x.double(), distance).mean((1, 3)) for x in g("input/attn_logits_patch")]).mean(0)
    close(found[0], g("out/entropy"), 1e-5)
    close(found[1], g("out/distance"), 1e-5)
    for key in (k for k in g.arrays.files if re.fullmatch(r"input/attn_logits_\d+", k)):
        tokens = key.split("_")[-1]
        side = math.isqrt(int(tokens) - 1)
        found = [spread(x[..., 1:, 1:].double(), analyze.distances(side, side) * 14).mean((1, 3)) for x in g(key)]
        for ours, name in zip(torch.stack(found, 1), ("entropy", "distance")):                  # (blocks, H) each
            expected = g(f"out/{name}_{tokens}")
            close(ours if len(ours) == len(expected) else ours.mean(0, keepdim=True), expected, 1e-5)


def test_attention_in_closed_form():
    logits = 3 * torch.sin(0.01 * torch.arange(2 * 3 * 197 * 197).double()).view(2, 3, 197, 197)
    entropy, distance = spread(logits[..., 1:, 1:], analyze.distances(14, 14) * 14).mean((1, 3))
    assert entropy.tolist() == pytest.approx([4.854632067495952, 4.855800782288608, 4.852768538271843], rel=1e-12)
    assert distance.tolist() == pytest.approx([105.8536326262584, 105.82160064037112, 105.7096872718479], rel=1e-12)


def test_even_attention():
    entropy, distance = spread(torch.zeros(196, 196).double(), analyze.distances(14, 14) * 14).mean(1)
    assert entropy.item() == pytest.approx(math.log(196), abs=3e-4)
    assert distance.item() == pytest.approx(101.93, abs=0.01)
    assert analyze.distances(14, 14).max() * 14 == pytest.approx(257.4, abs=0.05)
    assert analyze.distances(2, 3)[0].tolist() == pytest.approx([0, 1, 2, 1, 2 ** 0.5, 5 ** 0.5])


def test_reach_of_a_vit():
    """Queries of zero see everything alike: the uniform reference; other ones as `spread` says, in true pixels."""
    model, img = vit(img_size=(16, 24)), torch.randn(3, 3, 16, 24)
    distance = analyze.distances(4, 6).float() * 4
    for found, (attn, tokens, _) in zip(reach(model, img), watch(model, img)[0], strict=True):
        torch.testing.assert_close(found, spread(attn.logits(tokens)[..., 1:, 1:], distance).mean(-1).sum(1))
    for found in reach(model, img[:1], even=True):
        torch.testing.assert_close(found[0], torch.full((4,), math.log(24)), rtol=1e-4, atol=1e-4)
    for block in model.blocks:
        block.attn.qkv.weight[:48], block.attn.qkv.bias[:48] = 0, 0
    for found, even in zip(reach(model, img, 14), reach(model, img[:1], 14, even=True)):
        torch.testing.assert_close(found / 3, even)
        assert even[1, 0].item() == pytest.approx(14 / 4 * distance.mean().item(), rel=1e-5)


def test_reach_of_a_swin():
    """Queries and tables of zero: even within windows, but for what the shift made neighbours. A map of 5 x 5 in
    windows of 4 is padded: padding is looked at and does not look."""
    model = swin()
    for stage in model.layers:
        for block in stage["blocks"]:
            width = len(block.norm1.weight)
            block.attn.qkv.weight[:width], block.attn.qkv.bias[:width] = 0, 0
            block.attn.relative_position_bias_table.zero_()
    four = analyze.distances(4, 4).float() * 4
    first, shifted, third, _ = reach(model, torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(first[:, 0] / 2, torch.tensor([math.log(16), four.mean()]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(third[:, 0] / 2, torch.tensor([math.log(16), 2 * four.mean()]), rtol=1e-4, atol=1e-4)
    sizes = torch.tensor([16.0, 8.0, 8.0, 4.0])                 # what an 8 x 8 map's windows, shifted by 2, fall into
    assert shifted[0, 0].item() / 2 == pytest.approx(sizes.log().mean().item(), abs=1e-3)
    assert shifted[1, 0] < first[1, 0]
    for even, found in zip(reach(model, torch.zeros(1, 3, 32, 32), even=True), (first, shifted, third)):
        torch.testing.assert_close(even, found / 2)
    real = four.mean(1).view(4, 4)
    by_window = [real.sum(), real[:, :1].sum(), real[:1].sum(), real[:1, :1].sum()]
    found = reach(model, torch.randn(1, 3, 20, 20))[0]
    torch.testing.assert_close(found[1, 0], sum(by_window) / 25, rtol=1e-5, atol=1e-5)


def test_mass_mask():
    a = torch.tensor([[0.1, 0.35, 0.05, 0.3, 0.2], [0.2, 0.2, 0.2, 0.2, 0.2]])
    assert mass_mask(a).tolist()[0] == [False, True, False, True, False]
    a = torch.rand(50, 30) ** 3
    kept, share = mass_mask(a), a / a.sum(1, keepdim=True)
    held = (share * kept).sum(1)
    least = share.masked_fill(~kept, 9).amin(1)
    assert (held >= 0.6 - 1e-6).all() and (held - least < 0.6 + 1e-6).all()     # the fewest that reach it
    assert (share.masked_fill(kept, 0).amax(1) <= least).all()
    assert mass_mask(a, 1.0).float().mean() > 0.99


def test_last_attention():
    model, img = vit(img_size=(16, 24)), torch.randn(1, 3, 16, 24)
    attn, tokens, _ = watch(model, img)[0][-1]
    whole = attn.logits(tokens)[0].softmax(-1)                                                  # (4, 25, 25)
    torch.testing.assert_close(analyze.last_attention(model, img), whole[:, 0, 1:].view(4, 4, 6))
    torch.testing.assert_close(analyze.last_attention(model, img, 7), whole[:, 8, 1:].view(4, 4, 6))
    with pytest.raises(ValueError, match="--query 24: the map has 4 x 6"):
        analyze.last_attention(model, img, 24)
    model = swin()
    found = analyze.last_attention(model, torch.randn(1, 3, 32, 32))
    assert found.shape == (4, 4, 4)
    torch.testing.assert_close(found.sum((1, 2)), torch.ones(4))
    with pytest.raises(ValueError, match="one window, not 8 x 8"):
        analyze.last_attention(swin(64), torch.randn(1, 3, 64, 64))


# ----------------------------------------------------------------------------------------------------------------
# Correspondence


def test_matches():
    torch.manual_seed(0)
    first, order = torch.eye(12, 24).expand(3, -1, -1), torch.stack([torch.randperm(12) for _ in range(3)])
    second = torch.zeros_like(first)
    for b in range(3):                                          # ever less alike, and twice as long
        second[b, order[b]] = 2 * torch.cat([torch.eye(12), torch.diag(0.1 * torch.arange(12.0))], 1)
    asked, found, cosine = matches(first, second, 5)
    assert asked.tolist() == [[0, 1, 2, 3, 4]] * 3 and torch.equal(found, order[:, :5])
    assert cosine[0].tolist() == pytest.approx([(1 + (0.1 * k) ** 2) ** -0.5 for k in range(5)])
    assert matches(first, second)[0].shape == (3, 10) and matches(first, second, 99)[0].shape == (3, 12)
    assert matches(first[:, :1], second[:, :1])[1].tolist() == [[0]] * 3
    cells = torch.arange(12).view(3, 4)
    assert torch.equal(mirrored(cells.flatten(), 4), cells.flip(1).flatten())
    asked, found, _ = matches(*torch.randn(2, 2000, 16, 8))     # features of nothing: chance
    assert (found == mirrored(asked, 4)).float().mean().item() == pytest.approx(1 / 16, abs=0.006)


def encoder_by(what):
    """Whose tokens are their patch, in grey, or where they are."""
    model = vit(dim=16, depth=1, heads=1)
    for name, p in model.named_parameters():
        p.fill_(float(name.endswith(("norm1.weight", "norm2.weight", "norm.weight"))))
    if what == "content":
        model.patch_embed.proj.weight.copy_(torch.eye(16).view(16, 1, 4, 4).expand(-1, 3, -1, -1))
    else:
        model.pos_embed[0, 1:] = torch.eye(16)
    return model


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Images of 16 x 16 in 4 x 4 patches, each its own mirror image and unlike the others."""
    folder, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for i in range(10):
        rows = rearrange(rng.integers(90, 160, (4, 4, 4)), "h w y -> (h y) w").repeat(4, 1)
        Image.fromarray(rows.astype(np.uint8)).convert("RGB").save(folder / f"{i}.png")
    return folder


def run(command, out, *argv):
    analyze.main([command, *map(str, argv), "--out", str(out)])
    return json.loads((out / f"{command}.json").read_text())


def test_correspond_finds_what_is_there(tmp_path, tiles):
    """By content everything, though the view is flipped, grey, of another brightness and contrast. By place nothing:
    the mirror image of cells 0 and 1 of four is three cells away, and one."""
    files = [saved(tmp_path / what / "encoder.pt", encoder_by(what)) for what in ("content", "place")]
    found = run("correspond", tmp_path, *files, "--data", tiles, "--workers", 0, "--draw", 2)
    content, place = found["networks"]
    assert (content["name"], content["accuracy"], content["error_pixels"]) == ("content", 100, 0)
    assert content["chance"] == 100 / 16 and content["top"] == 10 and found["images"] == 10
    assert place["accuracy"] == 0 and 4 <= place["error_pixels"] <= 12
    assert len(found["drawn"]) == 4 and np.shape(found["drawn"][0]["matches"]) == (10, 3)
    assert (tmp_path / "correspond.png").exists()


def test_views_depend_on_the_image_alone(tmp_path, classes, monkeypatch):
    path, seen = saved(tmp_path / "encoder.pt", vit(depth=1)), []
    monkeypatch.setattr(analyze, "recolour", lambda img, colours, *how: seen.append(colours) or recolour(
        img, colours, *how))
    argv = path, "--data", classes, "--workers", 0, "--draw", 1
    one, two, other = (run("correspond", tmp_path, *argv, *more)["networks"][0]
                       for more in ((), ("--batch_size", 3), ("--seed", 1)))
    assert one["error_pixels"] == pytest.approx(two["error_pixels"], rel=1e-6) and one != other
    assert len(seen[0].factors.unique(dim=0)) == 8 and seen[0].grey.all() and seen[0].order.amax() == 3


# ----------------------------------------------------------------------------------------------------------------
# Commands


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A ViT, another of more depth and other statistics, and a Swin, for 16 pixels; a folder of images."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(2)
    tiny = Swin(16, patch_size=2, dim=16, depths=(1, 2), heads=(2, 4), window=4)
    write_images(root / "images", 11, 20)
    two = saved(root / "two.pth", vit(depth=3), mean=(0.5,) * 3, std=(1,) * 3)
    return saved(root / "one" / "encoder.pt", vit()), two, saved(root / "three" / "best.pt", tiny), root / "images"


def pixels(images):
    return CenterCrops(open_dataset(str(images)), (16, 16), 3).__getitems__(range(11))[0].float() / 255


def test_cka_command(tmp_path, files, capsys):
    one, two, three, images = files
    found = run("cka", tmp_path, one, two, "--data", images, "--batch-size", 4, "--workers", 0)
    assert found["images"] == 8 and found["names"] == ["one", "two"] and np.shape(found["cka"]) == (3, 4)
    said = capsys.readouterr().out
    assert "8 images in batches of 4; 3 more" in said and "layer 2 of one is most like layer" in said
    # The same by hand: the set's order, and each network's own statistics.
    seen = pixels(images)
    first = (seen - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    by_hand = [[tokens_of(net, part) for part in x[:8].split(4)]
               for net, x in ((vit(), first), (vit(depth=3), seen - 0.5))]
    torch.testing.assert_close(torch.tensor(found["cka"]), cka(*by_hand).float(), rtol=1e-3, atol=1e-3)
    found = run("cka", tmp_path, three, three, "--data", images, "--images", 6, "--workers", 0)
    assert found["images"] == 6 and np.diag(found["cka"]) == pytest.approx(1) and np.shape(found["cka"]) == (4, 4)
    assert "6 images in batches of 6\n" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cka.json", "cka.png"]


def test_attention_command(tmp_path, files):
    """Batches of any size give the same means, for networks of any kind side by side."""
    one, _, three, images = files
    found = run("attention", tmp_path, files[1], "--data", images, "--workers", 0)["networks"][0]["distance"]
    by_hand = torch.stack(reach(vit(depth=3), pixels(images) - 0.5))[:, 1] / 11
    torch.testing.assert_close(torch.tensor(found), by_hand, rtol=1e-4, atol=0)
    whole, parts = (run("attention", tmp_path, one, three, "--data", images, "--batch-size", size, "--workers", 0,
                        "--names", "ours", "theirs") for size in (11, 4))
    for a, b, heads in zip(whole["networks"], parts["networks"], ([4, 4], [2, 4, 4])):
        for what in ("entropy", "distance"):
            assert list(map(len, a[what])) == heads
            for x, y, most in zip(a[what], b[what], a[f"uniform_{what}"]):
                assert x == pytest.approx(y, rel=1e-4)
                assert what == "distance" or max(x) <= most + 1e-3
    assert whole["networks"][0]["uniform_entropy"] == pytest.approx([math.log(16)] * 2, abs=1e-4)
    scaled = run("attention", tmp_path, one, "--data", images, "--workers", 0, "--patch-pixels", 2)["networks"][0]
    ours = sum(whole["networks"][0]["distance"], [])
    assert [2 * d for d in sum(scaled["distance"], [])] == pytest.approx(ours, rel=1e-4)
    assert (tmp_path / "attention.png").exists()


def test_maps_command(tmp_path, files):
    one, _, three, images = files
    analyze.main(["maps", one, three, "--pictures", str(images / "003.png"), "--out", str(tmp_path), "--show", "2"])
    found = json.loads((tmp_path / "maps-one-003.json").read_text())
    assert np.shape([head["attention"] for head in found["heads"]]) == (4, 4, 4)
    bits = [head["bits"] for head in found["heads"]]
    assert bits == sorted(bits, reverse=True) and sorted(head["head"] for head in found["heads"]) == [1, 2, 3, 4]
    for head in found["heads"]:
        a, mask = np.array(head["attention"]), np.array(head["mask"])
        assert 0.6 - 1e-4 < (a * mask).sum() / a.sum()
    assert (tmp_path / "maps-three-003.png").exists() and (tmp_path / "maps-one-003.png").exists()
    write_images(tmp_path / "some", 2)
    analyze.main(["maps", one, "--pictures", str(tmp_path / "some"), "--img-size", "24", "32", "--out", str(tmp_path)])
    assert np.shape(json.loads((tmp_path / "maps-one-001.json").read_text())["heads"][0]["mask"]) == (6, 8)


def test_maps_of_one_name_are_told_apart(tmp_path, files):
    analyze.main(["maps", files[0], files[0], "--pictures", str(files[3] / "000.png"), str(files[3] / "000.png"),
                  "--out", str(tmp_path)])
    assert len(list(tmp_path.glob("maps-*.json"))) == 4


def test_summary_command(tmp_path, files, capsys):
    one, _, three, _ = files
    bare = str(tmp_path / "bare.pth")
    state = {k: v for k, v in vit().state_dict().items() if not k.startswith("norm.")}
    torch.save({"model": {**state, "decoder_embed.weight": torch.ones(3, 48)}}, bare)
    found = run("summary", tmp_path, one, three, bare)
    assert [row["network"] for row in found] == ["ViT", "Swin", "ViT"]
    assert [row["heads"] for row in found] == [4, [2, 4], None] and found[0]["heads_stored"]
    assert found[0]["parameters"] == sum(p.numel() for p in vit().parameters()) and found[0]["method"] == "mae"
    assert found[2]["other_parameters"] == 144 and found[2]["others"] == ["decoder_embed.weight"]
    said = capsys.readouterr().out
    assert "give --heads" in said and "lacks 2 tensors of the encoder (norm.weight, norm.bias" in said
    assert "decoder_embed (1)" in said and "heads not stored" in said
    assert run("summary", tmp_path, bare, "--heads", 4)[0]["heads"] == 4


def test_without_matplotlib_the_numbers_are_there(tmp_path, files, monkeypatch, capsys):
    monkeypatch.setattr(plots, "INSTALLED", False)
    assert run("cka", tmp_path, files[0], files[1], "--data", files[3], "--workers", 0)["images"] == 11
    assert "pip install '.[plot]'" in capsys.readouterr().out and not (tmp_path / "cka.png").exists()


COMMANDS = {"cka": "ONE THREE --data IMAGES", "attention": "ONE TWO THREE --data IMAGES",
            "maps": "THREE --pictures PICTURE", "correspond": "ONE --data IMAGES --draw 2", "summary": "ONE TWO THREE",
            "layers": "MINI --data CLASSES --keep 0 4 -- --epochs 1 --batch-size 8 --workers 0"}


@pytest.mark.parametrize("command", ["cka", *(pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS)])
def test_a_real_process(tmp_path, files, classes, command):
    names = dict(ONE=files[0], TWO=files[1], THREE=files[2], IMAGES=files[3], PICTURE=files[3] / "000.png",
                 MINI=mini(tmp_path / "a" / "encoder.pt"), CLASSES=classes)
    argv = [str(names.get(word, word)) for word in COMMANDS[command].split()]
    out = tmp_path / "new" / "folder"
    at = argv.index("--") if "--" in argv else len(argv)
    argv[at:at] = ["--out", str(out)]
    done = subprocess.run([sys.executable, "-m", "tools.analyze", command, *argv], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    written = {p.name for p in out.iterdir() if p.is_file()}
    name = "maps-three-000" if command == "maps" else command
    assert f"{name}.json" in written and (f"{name}.png" in written) == (command != "summary")
    picture = "" if command == "summary" else f" and {out}/{name}.png"
    assert f"wrote {out}/{name}.json{picture}\n" in done.stdout


@pytest.mark.parametrize("argv, words", [
    ("what", "what is not one of cka"), ("cka ONE", "takes two files"), ("cka ONE gone.pt", "does not exist"),
    ("cka --data IMAGES ONE TWO", "before any option, not 0"), ("cka ONE TWO --mass 0.5", "unrecognized arguments"),
    ("cka ONE TWO --data gone", "gone does not exist"), ("cka ONE TWO --data EMPTY", "no image"),
    ("cka ONE TWO --data IMAGES --images 3", "of 4 images or more"),
    ("cka ONE TWO --data IMAGES --batch-size 3", "or more, not 3"),
    ("cka ONE TWO --names a b c", "--names has 3 values for 2 files"), ("cka ONE TWO --heads 4 4 4", "--heads has 3"),
    ("cka ONE BIG --data IMAGES", "--img-size makes sizes alike"), ("cka ONE TWO --mean 0.5", "need 3 numbers"),
    ("attention ONE --data IMAGES --img-size 18", "do not tile"), ("attention ONE --data IMAGES --device tpu", "tpu"),
    ("correspond ONE --data IMAGES --img-size 2", "do not tile"), ("correspond ONE --top 0", "at least 1"),
    ("maps ONE", "--pictures is required"), ("maps ONE --pictures gone.png", "gone.png cannot be read"),
    ("maps ONE --pictures EMPTY", "--pictures is required"),
    ("maps ONE --pictures PICTURE --query 16", "--query 16: the map"),
    ("maps ONE --pictures PICTURE --mass 1.1", "at most 1"), ("maps ONE --pictures PICTURE --img-size 3", "not tile"),
    ("maps THREE --pictures PICTURE --img-size 64", "one window, not 16 x 16"),
    ("layers ONE TWO", "takes one file"), ("layers ONE --keep 0 3", "--keep 3: .* has 2 blocks"),
    ("layers ONE --script mae", "invalid choice: .mae."), ("layers ONE -- --init x", "--init may not follow"),
    ("summary", "takes files"), ("summary PICTURE", "no checkpoint"),
    ("summary ONE --out PICTURE", "cannot be read or written"), ("summary ONE --heads 4 4", "--heads has 2"),
    ("attention", "takes files"), ("layers PICTURE", "no checkpoint"),
    ("layers ONE --out PICTURE", "cannot be read or written"),
])
def test_mistakes_end_in_a_sentence(tmp_path, files, argv, words):
    (tmp_path / "empty").mkdir()
    names = dict(ONE=files[0], TWO=files[1], THREE=files[2], IMAGES=files[3], EMPTY=tmp_path / "empty",
                 PICTURE=files[3] / "000.png", BIG=saved(tmp_path / "big" / "encoder.pt", vit(img_size=32)))
    argv = [str(names.get(word, word)) for word in argv.split()]
    if "--out" not in argv and len(argv) > 1:
        at = argv.index("--") if "--" in argv else len(argv)
        argv[at:at] = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=words) as stop:
        analyze.main(argv)
    assert "\n" not in str(stop.value)


# ----------------------------------------------------------------------------------------------------------------
# Layer importance


def mini(path):
    return saved(path, vit(dim=128, depth=4, img_size=8), mean=(0.5,) * 3)


def test_keep_only(tmp_path):
    path = mini(tmp_path / "encoder.pt")
    for k in (0, 2, 4):
        analyze.keep_only(analyze.Net(path), k, 0, str(tmp_path / "k.pt"))
        theirs, ours = torch.load(path)["model"], torch.load(tmp_path / "k.pt")
        assert ours["config"]["heads"] == 4 and ours["config"]["mean"] == (0.5,) * 3
        for name, t in ours["model"].items():
            fresh = name.startswith("blocks.") and int(name.split(".")[1]) >= k or k < 4 and name.startswith("norm.")
            assert torch.equal(t, theirs[name]) != fresh, name
    weight = ours["model"]["blocks.3.mlp.fc1.weight"]
    assert weight.std() > 0.2                                   # the file's own; a fresh one has 0.02
    analyze.keep_only(analyze.Net(path), 0, 0, str(tmp_path / "again.pt"))
    analyze.keep_only(analyze.Net(path), 0, 1, str(tmp_path / "other.pt"))
    again, other = (torch.load(tmp_path / f"{x}.pt")["model"]["blocks.0.attn.qkv.weight"] for x in ("again", "other"))
    assert again.std().item() == pytest.approx(0.02, rel=0.1) and not torch.equal(again, other)


def test_keep_only_of_a_swin(tmp_path):
    """Three of four blocks: the second stage's last is fresh, and so is the norm; merging goes with what is before."""
    path = saved(tmp_path / "encoder.pt", swin(patch_size=2))
    for k in (1, 3):
        analyze.keep_only(analyze.Net(path), k, 0, str(tmp_path / "k.pt"))
        theirs, ours = (torch.load(p)["model"] for p in (path, tmp_path / "k.pt"))
        of = {1: ("patch_embed", "layers.0.blocks.0"), 3: ("patch_embed", "layers.0", "layers.1.blocks.0")}[k]
        for name in (name for name, t in ours.items() if t.dim() > 1 and t.is_floating_point()):
            assert torch.equal(ours[name], theirs[name]) == name.startswith(of), name


SHORT = ["--epochs", "2", "--batch-size", "8", "--workers", "0", "--device", "cpu"]


def test_layers_command(tmp_path, classes, monkeypatch, capsys):
    """finetune.py in this process; what is done stays done, other options and other files are refused."""
    import finetune
    import probe
    path, started = mini(tmp_path / "a" / "encoder.pt"), []

    def here(command):
        started.append(command)
        {"finetune.py": finetune, "probe.py": probe}[command[0]].main(command[1:])
        return 0
    monkeypatch.setattr(analyze, "run_script", here)
    argv = ["layers", path, "--data", str(classes), "--out", str(tmp_path / "o"), "--fractions", "1", "0.5", "--keep"]
    analyze.main([*argv, "0", "4", "--", *SHORT])
    runs = json.loads((tmp_path / "o" / "layers.json").read_text())["runs"]
    assert [(run["fraction"], run["keep"]) for run in runs] == [(0.5, 0), (0.5, 4), (1, 0), (1, 4)]
    for run in runs:
        folder = tmp_path / "o" / f"keep-{run['keep']}-{run['fraction']:g}"
        rows = [json.loads(line) for line in (folder / "log.jsonl").open()]
        assert rows[0]["config"]["init"].endswith(f"keep-{run['keep']}.pt")
        assert rows[0]["images"] == 40 * run["fraction"]
        assert [row["test_acc1"] for row in rows if "test_acc1" in row] == [run["last"]] and run["best"] == run["last"]
    assert len(started) == 4 and (tmp_path / "o" / "layers.png").exists()
    analyze.main([*argv, "0", "1", "4", "--", *SHORT])                          # only those that are new
    assert [command[2][-9:] for command in started[4:]] == ["keep-1.pt"] * 2
    with pytest.raises(SystemExit, match="epochs was 2.0, is 3.0"):
        analyze.main([*argv, "0", "--", *SHORT, "--epochs", "3"])
    with pytest.raises(SystemExit, match="--seed 0.* another --out"):
        analyze.main([*argv, "0", "--seed", "1", "--", *SHORT])
    analyze.main(["layers", path, "--data", str(classes), "--out", str(tmp_path / "p"), "--script", "probe", "--keep",
                  "2", "--", "--epochs", "2", "--workers", "0", "--device", "cpu"])
    row, = json.loads((tmp_path / "p" / "layers.json").read_text())["runs"]
    found = [json.loads(line) for line in (tmp_path / "p" / "keep-2-1" / "log.jsonl").open()]
    assert [row["last"], row["best"]] == [found[-1]["test_acc1"]] * 2 and "held_out" in found[1]
    with pytest.raises(SystemExit, match="goes with --protocol sweep"):
        analyze.main(["layers", path, "--out", str(tmp_path / "q"), "--script", "probe", "--", "--protocol", "knn"])
    with pytest.raises(SystemExit, match="belongs to .* another --out"):
        analyze.main(["layers", f"{path}:model", "--out", str(tmp_path / "p"), "--script", "probe"])
    monkeypatch.setattr(analyze, "run_script", lambda command: 1)
    with pytest.raises(SystemExit, match="finetune.py failed with the first 2 blocks"):
        analyze.main([*argv, "2", "--", *SHORT])
    monkeypatch.setattr(analyze, "run_script", lambda command: 0)               # stopped by a signal: no end in the log
    log = tmp_path / "o" / "keep-0-1" / "log.jsonl"
    log.write_text("".join(line.replace('"step": 10, ', '"step": 5, ') for line in log.open()))
    capsys.readouterr()
    analyze.main([*argv, "0", "--", *SHORT, "--log-every", "1"])
    assert "stopped: the same command goes on" in capsys.readouterr().out


def test_layers_of_fewer_images_than_a_batch(tmp_path, classes, monkeypatch):
    import finetune
    monkeypatch.setattr(analyze, "run_script", lambda command: finetune.main(command[1:]))
    analyze.main(["layers", mini(tmp_path / "encoder.pt"), "--data", str(classes), "--out", str(tmp_path / "o"),
                  "--keep", "4", "--", "--epochs", "1", "--workers", "0", "--device", "cpu"])
    rows = [json.loads(line) for line in (tmp_path / "o" / "keep-4-1" / "log.jsonl").open()]
    assert rows[0]["config"]["batch_size"] == rows[0]["images"] == 40
    run, = json.loads((tmp_path / "o" / "layers.json").read_text())["runs"]
    assert run["last"] == [row["test_acc1"] for row in rows if "test_acc1" in row][-1]


def test_help_lists_the_options_of_a_command(capsys):
    for command, (_, options, *_) in analyze.COMMANDS.items():
        with pytest.raises(SystemExit):
            analyze.main([command, "--help"])
        said = capsys.readouterr().out
        listed = {name.replace("-", "_") for name in re.findall("^  --([a-z-]+)", said, re.MULTILINE)}
        assert listed == set(options.split())


@pytest.mark.slow
def test_layers_killed_and_gone_on_with(tmp_path, classes):
    command = [sys.executable, "-m", "tools.analyze", "layers", mini(tmp_path / "encoder.pt"), "--data", classes,
               "--out", tmp_path / "o", "--keep", "0", "4", "--", *SHORT, "--epochs", "20", "--log-every", "1"]
    log = tmp_path / "o" / "keep-0-1" / "log.jsonl"
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (log.exists() and '"loss"' in log.read_text()):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate()
    assert first.returncode == 0 and "stopped: the same command goes on" in said and "test_acc1" not in log.read_text()
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    rows = [json.loads(line) for line in log.open()]
    assert [row["start"] > 0 for row in rows if "start" in row] == [False, True]
    runs = json.loads((tmp_path / "o" / "layers.json").read_text())["runs"]
    assert [run["keep"] for run in runs] == [0, 4] and "4 of 4 blocks: top-1" in second.stdout
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)   # all is done: nothing is started
    assert third.returncode == 0 and "the first 0 of 4 blocks, 1 of the images:" not in third.stdout
    assert len(rows) == len(log.read_text().splitlines())
