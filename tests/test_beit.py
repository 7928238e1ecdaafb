"""nets/beit.py: what fine-tuning adds to a ViT, against the reference, closed forms and the plain network."""
import math

import pytest
import torch
import torch.nn.functional as F
from golden import Golden, close, close_grads, needs_golden
from test_parity import recordings, vit_config
from torch import nn

from nets.beit import BeitAttention, BeitBlock, BeitViT, TwoHeads, relative_index_with_cls, resize_relative
from vit import Block, ViT

EVERYTHING = dict(relative=True, layer_scale=0.1, key_bias=False)


def small(kind=BeitViT, **options):
    torch.manual_seed(0)
    return kind(**{**dict(img_size=16, patch_size=4, dim=24, depth=3, heads=3, num_classes=5, positions="learned",
                          pool="avg"), **options})


# ----------------------------------------------------------------------------------------------------------------
# Against recordings


def with_absolute_positions(name):
    """Relative positions without absolute ones, or shared by all blocks, are not built here."""
    c = Golden(name).config
    return c["use_abs_pos_emb"] and not c["use_shared_rel_pos_bias"]


@needs_golden
@pytest.mark.parametrize("name", [name for name in recordings("maelite_rpe_ft*") if with_absolute_positions(name)])
def test_relative_positions_of_mae_lite(name):
    g = Golden(name)
    c, img = g.config, g("input/imgs")
    model = BeitViT(**vit_config(c), num_classes=c["num_classes"], positions="learned",
                    pool="avg" if c["global_pool"] else "cls", relative=c["use_rel_pos_bias"],
                    layer_scale=c["init_values"] or 0.0, key_bias=False)
    model.load_state_dict(g.under("state"))
    assert torch.equal(model.blocks[0].attn.relative_position_index, g("out/relative_position_index"))
    close(model.features(img), g("out/features"), 1e-5)
    logits = model(img)
    close(logits, g("out/logits"), 1e-5)
    loss = F.cross_entropy(logits, g("input/soft_target"))
    close(loss, g("out/loss"), 1e-5)
    loss.backward()
    close_grads(model, g.under("grad"), 5e-5)


@needs_golden
@pytest.mark.parametrize("name", recordings("maelite_vit_ft_distill_*"))
def test_two_heads_of_mae_lite(name):
    """The logits; tests/test_finetune.py has the loss that is formed of them, and its gradients."""
    g = Golden(name)
    model = TwoHeads(**vit_config(g.config), num_classes=g.config["num_classes"], positions="learned", pool="avg")
    model.load_state_dict(g.under("state"))
    labels, teacher = model(g("input/imgs"))
    close(labels, g("out/logits"), 1e-5)
    close(teacher, g("out/logits_kd"), 1e-5)
    close(model.eval()(g("input/imgs")), g("out/eval_logits"), 1e-5)


# ----------------------------------------------------------------------------------------------------------------
# Laws that a fresh clone can check


def test_closed_form_numbers():
    """The classifier and the RPE classifier filled by a rule, in float64, to eight digits."""
    img = torch.sin(0.1 * torch.arange(2 * 3 * 32 * 32, dtype=torch.float64)).view(2, 3, 32, 32)
    for kind, options, pool, expected in [
            (ViT, {}, "avg", [-0.09848781586259622, 0.17740996447035645, -0.06446382544507293]),
            (ViT, {}, "cls", [0.11768495444567098, -0.44954226702319156, 0.6932651150758573]),
            (BeitViT, EVERYTHING, "avg", [-0.01813307835076002, -0.018731666619081766, -0.07960344163428805])]:
        model = kind(32, 8, 3, 24, 2, 3, num_classes=5, positions="learned", pool=pool, **options).double()
        names = dict(model.named_parameters())
        for k, name in enumerate(sorted(set(names) - {"pos_embed"})):
            p = names[name].data
            p.copy_(0.05 * torch.sin(k + 0.37 * torch.arange(p.numel()).double()).view(p.shape))
            if name.endswith("weight") and "norm" in name.split(".")[-2]:
                p += 1
        model.pos_embed.data.copy_((0.02 * torch.cos(0.1 * torch.arange(17 * 24).double())).view(1, 17, 24))
        for block in model.blocks if options else ():
            block.gamma_1.data.fill_(0.1)
            block.gamma_2.data.fill_(0.1)
        torch.testing.assert_close(model(img)[0, :3], torch.tensor(expected, dtype=torch.float64), rtol=1e-8,
                                   atol=1e-10)


def test_relative_index():
    assert relative_index_with_cls(2, 2).tolist() == [[11, 9, 9, 9, 9], [10, 4, 3, 1, 0], [10, 5, 4, 2, 1],
                                                      [10, 7, 6, 4, 3], [10, 8, 7, 5, 4]]
    assert relative_index_with_cls(2, 3)[1].tolist() == [16, 7, 6, 5, 2, 1, 0]


def test_relative_positions_depend_on_the_offset_alone():
    """The table's rows act as the sum q k^T + b(query - key) does, also for a slice of queries and as logits."""
    model = small(relative=True, img_size=(16, 24)).eval()
    for block in model.blocks:
        nn.init.normal_(block.attn.relative_position_bias_table)
    x, attn = torch.randn(2, 25, 24), model.blocks[0].attn
    logits = attn.logits(x)
    q, k, v = (t.view(2, 25, 3, 8).transpose(1, 2) for t in attn.qkv(x).chunk(3, -1))
    by_hand = attn.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), by_hand)
    torch.testing.assert_close(attn(x, first=3), by_hand[:, 3:])
    torch.testing.assert_close(model.blocks[0](x, first=3), model.blocks[0](x)[:, 3:])
    share = logits - q @ k.transpose(2, 3) / math.sqrt(8)
    at = {(r, c): 1 + r * 6 + c for r in range(4) for c in range(6)}
    torch.testing.assert_close(share[0, :, at[1, 2], at[0, 4]], share[1, :, at[3, 0], at[2, 2]])
    with pytest.raises(ValueError, match="whole images of its own size"):
        model(torch.randn(1, 3, 16, 16))


def test_keys_without_a_bias():
    """q_bias and v_bias act as a qkv.bias with zeros between them, in the output, a slice of it and the logits."""
    torch.manual_seed(0)
    ours, plain = BeitAttention(24, 3, key_bias=False), BeitAttention(24, 3)
    nn.init.normal_(ours.q_bias)
    nn.init.normal_(ours.v_bias)
    bias = torch.cat([ours.q_bias, torch.zeros(24), ours.v_bias]).detach()
    plain.load_state_dict({"qkv.bias": bias, "qkv.weight": ours.qkv.weight, **ours.state_dict()}, strict=False)
    x = torch.randn(2, 7, 24)
    torch.testing.assert_close(ours(x), plain(x))
    torch.testing.assert_close(ours(x, first=2), plain(x)[:, 2:])
    torch.testing.assert_close(ours.logits(x), plain.logits(x))


def test_layer_scale_shrinks_the_branches():
    """A factor of one changes nothing; of zero, no branch is added."""
    torch.manual_seed(0)
    ours, plain, x = BeitBlock(24, 3, layer_scale=1.0), Block(24, 3), torch.randn(2, 7, 24)
    plain.load_state_dict(ours.state_dict(), strict=False)
    torch.testing.assert_close(ours(x), plain(x))
    ours.gamma_1.data.zero_()
    torch.testing.assert_close(ours(x), x + ours.mlp(ours.norm2(x)))
    ours.gamma_2.data.zero_()
    assert torch.equal(ours(x, first=3), x[:, 3:])


def test_tables_of_relative_positions_grow():
    """A table linear in the offsets stays linear inside; cls's rows stay; the same grid returns the same tensor."""
    h, w = 5, 7
    y, x = torch.meshgrid(torch.arange(2 * h - 1.), torch.arange(2 * w - 1.), indexing="ij")
    table = torch.cat([torch.stack([y.flatten(), x.flatten()], 1), torch.full((3, 2), 9.0)])
    assert resize_relative(table, (h, w), (h, w)) is table
    bigger = resize_relative(table, (h, w), (9, 13))
    assert bigger.shape == (17 * 25 + 3, 2) and torch.equal(bigger[-3:], table[-3:])
    assert torch.equal(resize_relative(table[:-3], (h, w), (9, 13)), bigger[:-3])               # Swin's has no cls
    rows = bigger[:-3].view(17, 25, 2)
    expected = (torch.arange(17) + 0.5) * 9 / 17 - 0.5
    # The cubic of torch, a = -0.75, bends even a straight line, by up to 0.04 of a step.
    torch.testing.assert_close(rows[4:-4, 12, 0], expected[4:-4], rtol=0, atol=0.05)


def test_names_and_start():
    """Without options it is the plain network, with the same random start; with them, new parameters come first in
    each part, as BEiT has them, and what a plain network has too starts the same."""
    plain, same, full = small(ViT), small(), small(**EVERYTHING)
    assert type(same.blocks[0]) is Block
    for ours in (same, small(relative=True, layer_scale=0.5)):
        state = ours.state_dict()
        assert all(torch.equal(state[name], t) for name, t in plain.state_dict().items())
    names = [name.removeprefix("blocks.1.") for name, _ in full.named_parameters() if name.startswith("blocks.1.")]
    assert names[:9] == ["gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias",
                         "attn.relative_position_bias_table", "attn.qkv.weight", "attn.proj.weight"]
    assert "attn.qkv.bias" not in names and (full.blocks[1].gamma_2 == 0.1).all()
    attn = full.blocks[1].attn
    assert not attn.relative_position_bias_table.any() and not attn.q_bias.any() and not attn.v_bias.any()
    assert {k: full.config[k] for k in EVERYTHING} == EVERYTHING and full.config["depth"] == 3
    assert [block.drop_path for block in small(drop_path=0.5, **EVERYTHING).blocks] == [0, 0.25, 0.5]


@pytest.mark.parametrize("kind", [BeitViT, TwoHeads])
def test_every_parameter_learns(kind):
    model = small(kind, **EVERYTHING)
    out = model(torch.randn(4, 3, 16, 16))
    loss = sum(logits.square().sum() for logits in out) if kind is TwoHeads else out.square().sum()
    loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
