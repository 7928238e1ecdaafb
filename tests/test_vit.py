import pytest
import torch
from torch import nn

from vit import (
    MODELS,
    Attention,
    Block,
    ViT,
    drop_path,
    gather_tokens,
    pair,
    patchify,
    resize_positions,
    sincos_positions,
)


def small(**options):
    torch.manual_seed(0)
    return ViT(**{**dict(img_size=32, patch_size=8, dim=48, depth=3, heads=4), **options})


def test_attention_matches_torch():
    torch.manual_seed(0)
    ours, ref = Attention(48, 4), nn.MultiheadAttention(48, 4, batch_first=True)
    ref.in_proj_weight.data, ref.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
    ref.out_proj.weight.data, ref.out_proj.bias.data = ours.proj.weight.data, ours.proj.bias.data
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), ref(x, x, x, need_weights=False)[0])


def test_block_matches_timm():
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    ours, ref = Block(48, 4), timm.Block(48, 4, qkv_bias=True, norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=1e-6))
    ref.load_state_dict(ours.state_dict())
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(ours(x), ref(x))


def test_logits():
    """By hand, from the tokens that enter block 2; and the block forms its output of their softmax."""
    model, img = small(), torch.randn(2, 3, 32, 32)
    tokens = model.blocks[0](model.embed(img))
    attn, x = model.blocks[1].attn, model.blocks[1].norm1(tokens)
    q, k, v = attn.qkv(x).view(2, 17, 3, 4, 12).permute(2, 0, 3, 1, 4)
    logits = attn.logits(x)
    assert logits.shape == (2, 4, 17, 17)
    torch.testing.assert_close(logits, q @ k.transpose(-2, -1) / 12 ** 0.5)
    torch.testing.assert_close(attn(x), attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)))


def test_blocks_can_be_walked():
    """What a method does that wants the tokens between blocks is what encode does."""
    model, img = small(), torch.randn(2, 3, 32, 32)
    x = model.embed(img)
    for block in model.blocks:
        x = block(x)
    assert torch.equal(model.norm(x), model.encode(img))


def test_first_is_a_slice_of_all():
    torch.manual_seed(0)
    block, x = Block(48, 4), torch.randn(2, 9, 48)
    torch.testing.assert_close(block(x, first=5), block(x)[:, 5:])
    torch.testing.assert_close(block.attn(x, first=5), block.attn(x)[:, 5:])


def test_subset_of_tokens():
    """All patches kept in any order are the same image; fewer are what a masked encoder computes by hand."""
    model, img = small(), torch.randn(2, 3, 32, 32)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    everything = model.encode(img)
    shuffled = model.encode(img, order)
    torch.testing.assert_close(shuffled[:, 0], everything[:, 0])
    torch.testing.assert_close(shuffled[:, 1:], gather_tokens(everything[:, 1:], order))
    keep = order[:, :5]
    x = model.embed(img)
    x = torch.cat([x[:, :1], gather_tokens(x[:, 1:], keep)], 1)
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.encode(img, keep), model.norm(x))


@pytest.mark.parametrize("name, count", [("vit_tiny", 5_717_416), ("vit_small", 22_050_664), ("vit_base", 86_567_656),
                                         ("vit_large", 304_326_632), ("vit_huge", 632_045_800)])
@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_published_parameter_counts(name, count, pool):
    with torch.device("meta"):
        model = ViT(**MODELS[name], num_classes=1000, pool=pool, positions="learned")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count


def test_sincos_positions():
    table = sincos_positions(8, 2, 2)[0]
    s, c = [0.841471, 0.01], [0.540302, 0.99995]
    expected = [[0] * 8, [0, 0, 1, 1] * 2, [*s, *c, 0, 0, 1, 1], [0, 0, 1, 1, *s, *c], [*s, *c] * 2]
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6)
    assert sincos_positions(192, 14, 14).double().abs().sum().item() == pytest.approx(21077.81830152832, rel=1e-6)
    # the other axis order is the table of the transposed grid
    swapped = sincos_positions(8, 3, 2, "yx")[0, 1:].view(3, 2, 8)
    assert torch.equal(swapped, sincos_positions(8, 2, 3)[0, 1:].view(2, 3, 8).transpose(0, 1))
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(6, 2, 2)


def test_resizing_positions():
    pos = torch.randn(1, 1 + 6, 4)
    assert resize_positions(pos, (2, 3), (2, 3)) is pos
    grown = resize_positions(pos, (2, 3), (4, 5))
    assert grown.shape == (1, 1 + 20, 4) and torch.equal(grown[:, :1], pos[:, :1])
    flat = resize_positions(torch.ones(1, 7, 4), (2, 3), (5, 2), offset=0.1)
    torch.testing.assert_close(flat, torch.ones(1, 11, 4))


def test_other_image_size():
    model = small(positions="learned")
    assert model.encode(torch.randn(1, 3, 48, 64)).shape == (1, 1 + 48, 48)
    with pytest.raises(ValueError, match="do not tile a 30x32"):
        model(torch.randn(1, 3, 30, 32))
    with pytest.raises(ValueError, match="5 heads do not divide"):
        small(heads=5)


def test_cutting_patches():
    """The same as unfold; a subset is those rows; and a patch times the weight is the convolution."""
    model, img = small(), torch.randn(2, 3, 16, 32)
    patches = patchify(img, 8)
    assert torch.equal(patches, nn.functional.unfold(img, 8, stride=8).transpose(1, 2))
    index = torch.tensor([[3, 0, 7], [1, 1, 2]])
    assert torch.equal(patchify(img, 8, index), torch.stack([patches[b, index[b]] for b in range(2)]))
    assert torch.equal(gather_tokens(patches, index), patchify(img, 8, index))
    torch.testing.assert_close(model.patch_embed(patches), model.patch_embed.proj(img).flatten(2).transpose(1, 2))


def test_pool():
    img = torch.randn(2, 3, 32, 32)
    cls, avg = small(), small(pool="avg")
    tokens = cls.encode(img)
    assert torch.equal(cls(img), tokens[:, 0])
    avg.load_state_dict(cls.state_dict() | {"fc_norm." + k: v for k, v in cls.norm.state_dict().items()}, strict=False)
    raw = avg.encode(img)[:, 1:].mean(1)                        # "avg" has no norm before the mean
    torch.testing.assert_close(avg(img), cls.norm(raw))
    assert "norm.weight" not in avg.state_dict() and "fc_norm.weight" not in cls.state_dict()


def test_drop_path():
    torch.manual_seed(0)
    x = torch.ones(20_000, 2, 3)
    y = drop_path(x, 0.3)
    kept = y[:, 0, 0] > 0
    assert torch.equal(y, kept[:, None, None] * x / 0.7)        # whole samples, survivors scaled
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.3 * 0.7 / 20_000) ** 0.5
    model = small(drop_path=0.5)
    assert [block.drop_path for block in model.blocks] == [0, 0.25, 0.5]
    img = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(img), model(img))
    assert not torch.equal(model.train()(img), model(img))


def test_pair():
    assert pair(224) == pair((224,)) == pair([224]) == (224, 224)
    assert pair((96, 160)) == (96, 160)
    with pytest.raises(ValueError):
        pair((1, 2, 3))
