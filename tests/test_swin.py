"""Swin: against the recorded reference runs, against torch, and what windows must not let through."""
import pytest
import torch
from golden import Golden, close, close_grads, needs_golden
from test_parity import recordings
from torch import nn

from vit import (
    SWINS,
    PatchMerging,
    Swin,
    WindowAttention,
    cached_window_layout,
    pair,
    relative_index,
    window_layout,
)

CPU = torch.device("cpu")


def without_ape(pattern):
    """Recordings of networks without absolute positions, which are not built here."""
    return [name for name in recordings(pattern) if not Golden(name).config.get("ape")]


def from_golden(c, **options):
    return Swin(c["img_size"], c["patch_size"], 3, c["embed_dim"], c["depths"], c["num_heads"], c["window_size"],
                c["mlp_ratio"], eps=c["norm_eps"], **options)


def small(**options):
    torch.manual_seed(0)
    return Swin(**{**dict(img_size=32, patch_size=2, dim=16, depths=(2, 2), heads=(2, 4), window=4), **options})


def record(model):
    """What comes out of every stage, by number."""
    outs = {}
    for s, layer in enumerate(model.layers):
        part = layer.downsample if "downsample" in layer else layer.blocks[-1]
        part.register_forward_hook(lambda m, a, out, s=s: outs.update({s: out}))
    return outs


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs


@needs_golden
@pytest.mark.parametrize("name", without_ape("swin_forward*"))
def test_forward_of_the_official_code(name):
    """Supervised Swin: eps 1e-5, files with attn_mask."""
    g = Golden(name)
    model = from_golden(g.config, num_classes=g.config["num_classes"])
    state, outs = g.under("state"), record(model)
    masks = {k.removesuffix(".attn_mask"): v for k, v in state.items() if k.endswith("attn_mask")}
    model.load_state_dict({k: v for k, v in state.items() if not k.endswith("attn_mask")})
    close(model.features(g("input/imgs")), g("out/features"), 2e-5)
    logits = model(g("input/imgs"))
    close(logits, g("out/logits"), 2e-5)
    for s in range(model.stages):
        close(outs[s], g(f"out/stage{s}"), 2e-5)
    (logits * g("input/grad_logits")).sum().backward()
    close_grads(model, g.under("grad"), 1e-4)
    check_windows(model, g, masks, g.config["img_size"])


def check_windows(model, g, masks, size):
    blocks = [(f"layers.{s}.blocks.{i}", block.attn, s) for s, layer in enumerate(model.layers)
              for i, block in enumerate(layer.blocks)]
    assert [[a.side, a.shift] for _, a, _ in blocks] == g("out/block_window_shift").tolist()
    maps = model.maps(*pair(size))
    for name, a, s in blocks:
        mask = window_layout(*maps[s], a.side, a.shift, CPU)[2]
        assert (mask is None) == (name not in masks) or g.config.get("store_stages") is False
        if name in masks:
            assert torch.equal(mask, masks[name]), name


# Of outputs and of gradients, as recorded; any other recording gets the widest of these.
TOLERANCES = {"esvit_swin_divisible": (2e-5, 5e-5), "esvit_swin_padded": (5e-5, 1e-4),
              "esvit_swin_w7_224": (5e-5, 1e-4), "esvit_swin_w14_96": (5e-5, 1e-4)}


@needs_golden
@pytest.mark.parametrize("name", without_ape("esvit_swin_*"))
def test_forward_of_esvit(name):
    """Any crop with the windows of the nominal size: padding, shift, odd merging, the last blocks' tokens."""
    g = Golden(name)
    tolerance, grad_tolerance = TOLERANCES.get(name, (5e-5, 5e-4))
    model, img = from_golden(g.config), g("input/imgs")
    model.load_state_dict(g.under("state"))
    outs = record(model)
    region = model.encode(img)
    close(region, g("out/region"), tolerance)
    for s in range(model.stages - 1):
        if f"out/stage{s}" in g.arrays:
            close(outs[s], g(f"out/stage{s}"), tolerance)
    assert region.shape[1] == torch.tensor(model.grid_of(*img.shape[-2:])).prod()
    close(model.features(img), g("out/cls"), tolerance)
    means, last_stage = [], model.depth - model.config["depths"][-1]        # tokens of the last stage are normed
    for number, tokens in enumerate(model.block_outputs(img)):
        means.append((model.norm(tokens) if number >= last_stage else tokens).mean(1))
    close(torch.cat(means[-3:], 1), g("out/last3_blocks_avg"), tolerance)
    ((region.mean(1) * g("input/grad_cls")).sum() + 0.1 * region.square().mean()).backward()
    close_grads(model, g.under("grad"), grad_tolerance)
    check_windows(model, g, g.under("out/attn_mask"), g.config["input_size"])


@needs_golden
def test_masks_and_indices():
    g = Golden("swin_attn_mask")
    for h, w, side, shift in g.config["cases"]:
        mask = window_layout(h, w, side, shift, CPU)[2]
        assert torch.equal(mask, g(f"out/mask_{h}x{w}_w{side}_s{shift}"))
    g = Golden("swin_rel_pos_index")
    for h, w in g.config["windows"]:
        assert torch.equal(relative_index(h, w), g(f"out/index_{h}x{w}"))


@needs_golden
def test_window_attention():
    g = Golden("swin_window_attention")
    c = g.config
    side = c["window"][0]
    attn = WindowAttention(c["dim"], c["heads"], side)
    attn.load_state_dict(g.under("state"))
    x, mask = g("input/x"), g("input/mask")                     # (B * n, T, D)
    for given, want in ((None, "y_nomask"), (mask, "y_mask")):
        qkv = attn.qkv(x).view(c["batch"], -1, 3 * c["dim"])
        close(attn.proj(attn.attend(qkv, given)).view_as(x), g(f"out/{want}"), 1e-5)
    order, place, _ = window_layout(*g("input/map").shape[1:3], side, 0, CPU)
    tokens = g("input/map").flatten(1, 2)
    assert torch.equal(tokens[:, order].view_as(g("out/windows")), g("out/windows"))
    assert torch.equal(tokens[:, order][:, place], tokens)


@needs_golden
@pytest.mark.parametrize("name", recordings("*_patch_merging"))
def test_patch_merging(name):
    g = Golden(name)
    merging = PatchMerging(g.config["dim"], g.config.get("norm_eps", 1e-6))
    merging.load_state_dict(g.under("state"))
    cases = [((h, w), f"{h}x{w}") for h, w in g.config.get("resolutions", [])]
    cases += [((side, side), str(side)) for side in g.config.get("sizes", [])]
    assert cases
    for grid, label in cases:
        close(merging(g(f"input/x_{label}"), grid), g(f"out/y_{label}"), 1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Invariants


@pytest.mark.parametrize("name, options, count", [
    ("swin_tiny", dict(num_classes=1000), 28_288_354), ("swin_tiny", {}, 27_519_354),
    ("swin_tiny", dict(window=14), 27_569_754), ("swin_small", dict(num_classes=1000), 49_606_258),
    ("swin_base", dict(num_classes=1000), 87_768_224), ("swin_lite", dict(num_classes=1000), 7_299_634)])
def test_published_parameter_counts(name, options, count):
    with torch.device("meta"):
        model = Swin(**{**SWINS[name], **options})
    assert sum(p.numel() for p in model.parameters()) == count


def test_window_attention_matches_torch():
    """Without numbers for offsets a window is plain attention among its tokens."""
    torch.manual_seed(0)
    ours, ref = WindowAttention(24, 3, 4), nn.MultiheadAttention(24, 3, batch_first=True)
    nn.init.zeros_(ours.relative_position_bias_table)
    ref.in_proj_weight.data, ref.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    ref.out_proj.weight.data, ref.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    x = torch.randn(2, 8, 12, 24)                               # 2 x 3 windows
    out = ours(x.flatten(1, 2), (8, 12)).view_as(x)
    for top in (0, 4):
        for left in (0, 4, 8):
            part = x[:, top:top + 4, left:left + 4].flatten(1, 2)
            want = ref(part, part, part, need_weights=False)[0]
            torch.testing.assert_close(out[:, top:top + 4, left:left + 4].flatten(1, 2), want)


def test_padding_is_zeros_of_the_map():
    """The same as padding the tokens themselves before the projection, which is how it is published."""
    torch.manual_seed(0)
    for shift in (0, 2):
        attn, x = WindowAttention(16, 2, 4, shift), torch.randn(2, 5, 6, 16)
        nn.init.normal_(attn.qkv.bias)
        padded = nn.functional.pad(x, (0, 0, 0, 2, 0, 3)).flatten(1, 2)
        want = attn(padded, (8, 8)).view(2, 8, 8, 16)[:, :5, :6]
        torch.testing.assert_close(attn(x.flatten(1, 2), (5, 6)).view(2, 5, 6, 16), want)


def reach(attn, grid, at):
    """Which tokens of a map (h, w) the token numbered `at` sees."""
    x = torch.randn(1, grid[0] * grid[1], 8, requires_grad=True)
    attn(x, grid)[0, at].sum().backward()
    return x.grad[0].abs().sum(-1).view(grid) > 1e-12


def test_opposite_edges_do_not_see_each_other():
    torch.manual_seed(0)
    plain, shifted = WindowAttention(8, 2, 4), WindowAttention(8, 2, 4, 2)
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:4, :4] = True
    assert torch.equal(reach(plain, (8, 8), 0), corner)
    corner[2:] = corner[:, 2:] = False                          # rolled, it shares its window with three other corners
    assert torch.equal(reach(shifted, (8, 8), 0), corner)
    middle = torch.zeros(8, 8, dtype=torch.bool)
    middle[2:6, 2:6] = True                                     # across the border of four plain windows
    assert torch.equal(reach(shifted, (8, 8), 3 * 8 + 4), middle)
    assert reach(shifted, (3, 6), 0).sum() == 4                 # a single window of a map with padding keeps its shift


def test_any_size_and_channels():
    with torch.device("meta"):
        assert Swin().maps(96, 96) == [(24, 24), (12, 12), (6, 6), (3, 3)]                      # as published
    model = small(in_chans=1)
    assert model.grid == (8, 8)
    for height, width, regions in ((32, 32, 64), (20, 44, 55), (6, 2, 2)):
        img = torch.randn(1, 1, height, width)
        assert model.encode(img).shape == (1, regions, 32) and model(img).shape == (1, 32)
        h, w = model.grid_of(height, width)
        assert h * w == regions
    wide = small(img_size=(16, 64), window=8)                   # the shorter side decides, for all stages
    assert [(b.attn.side, b.attn.shift) for layer in wide.layers for b in layer.blocks] == [(8, 0)] * 2 + [(4, 0)] * 2
    with pytest.raises(ValueError, match="patches of 2 do not tile a 33x32 image"):
        model(torch.randn(1, 1, 33, 32))
    with pytest.raises(ValueError, match="shorter"):
        small(heads=(2,))
    with pytest.raises(ValueError, match="3 heads do not divide the width 16"):
        small(heads=(3, 4))


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize("size", [80, 96, 112, 144, 176, 208, 224, 240, (112, 176), 448])
def test_windows_are_those_of_the_official_code(size, window):
    """Decided by maps of patches // 2**stage, as swin_transformer.py and EsViT's have it; the maps that tokens lie on
    are rounded up, because merging pads."""
    with torch.device("meta"):
        model = Swin(size, window=window, depths=(2, 2, 2, 2))
    grid = min(pair(size)) // 4
    for stage, layer in enumerate(model.layers):
        resolution = grid // (2 ** stage)
        side, shift = window, window // 2
        if resolution <= window:
            side, shift = resolution, 0
        assert [(block.attn.side, block.attn.shift) for block in layer.blocks] == [(side, 0), (side, shift)]
        assert min(model.maps(*pair(size))[stage]) == -(-grid // 2 ** stage)


def test_windows_at_112():
    assert [layer.blocks[0].attn.side for layer in Swin(112, window=14).layers] == [14, 14, 7, 3]
    assert [layer.blocks[0].attn.side for layer in Swin(240).layers] == [7, 7, 7, 7]
    assert [layer.blocks[1].attn.shift for layer in Swin(240).layers] == [3, 3, 3, 0]   # a map of 8, taken for 7
    model = small(img_size=14, depths=(1, 1, 1), heads=(2, 2, 2), window=8)                     # 7, 4 and 2 tokens
    assert [layer.blocks[0].attn.side for layer in model.layers] == [7, 3, 1]
    assert model(torch.randn(1, 3, 14, 14)).shape == (1, 64)


def test_tokens_after_each_block():
    model, img = small(), torch.randn(2, 3, 24, 20)
    outputs = model.block_outputs(img)
    assert [tuple(x.shape) for x in outputs] == [(2, 12 * 10, 16)] * 2 + [(2, 6 * 5, 32)] * 2
    assert torch.equal(model.norm(outputs[-1]), model.encode(img))
    assert torch.equal(model.features(img), model.encode(img).mean(1))


def test_drop_path_and_start():
    model = small(drop_path=0.3, num_classes=5)
    assert [b.drop_path for layer in model.layers for b in layer.blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    img = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(img), model(img)) and not torch.equal(model.train()(img), model(img))
    table, qkv = model.layers[1].blocks[0].attn.relative_position_bias_table, model.layers[1].blocks[0].attn.qkv
    assert 0.015 < table.std() < 0.025 and 0.015 < qkv.weight.std() < 0.025 and not qkv.bias.any()
    assert model.patch_embed.proj.weight.std() > 0.05           # torch's own start


def test_every_parameter_learns():
    model = small(num_classes=3)
    model(torch.randn(4, 3, 28, 28)).square().sum().backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]


def test_kept_layouts_serve_training_after_inference():
    cached_window_layout.cache_clear()
    model, img = small(), torch.randn(1, 3, 24, 24)
    with torch.inference_mode():
        model(img)
    model(img).sum().backward()
    count = cached_window_layout.cache_info().misses
    model(img)
    assert cached_window_layout.cache_info().misses == count                 # made once for a size
