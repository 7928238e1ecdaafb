"""The masked autoencoder: closed-form numbers, invariants, and the textbook form, all checkable on a fresh clone."""
import copy
import shutil

import pytest
import torch

import mae
from mae import MAE, patchify, unpatchify
from training import decay_groups, finite_step
from vit import ViT, sincos_positions


def small(norm_pix=True, mask_ratio=0.75, dim=24, heads=3, **vit):
    options = dict(img_size=32, patch_size=8, dim=dim, depth=2, heads=heads)
    return MAE(ViT(**{**options, **vit}), 12, 1, 3, norm_pix, mask_ratio)


def fill(model, phase=0.0):
    """Parameters by formula: the k-th name in sorted order gets 0.05 sin(phase + k + 0.37 j), norms' weights plus 1."""
    model.double()
    named = dict(model.named_parameters())
    for k, name in enumerate(sorted(n for n in named if not n.endswith("pos_embed"))):
        p = named[name]
        p.data = (0.05 * torch.sin(phase + k + 0.37 * torch.arange(p.numel()).double())).view(p.shape)
        if name.endswith("weight") and "norm" in name.split(".")[-2]:
            p.data += 1
    return model


IMG = torch.sin(0.1 * torch.arange(2 * 3 * 32 * 32).double()).view(2, 3, 32, 32)
ORDER = torch.tensor([[(5 * t + 3 * b + 1) % 16 for t in range(16)] for b in range(2)])
NOISE = torch.zeros(2, 16).scatter_(1, ORDER, torch.arange(16.0).expand(2, -1))


def test_closed_form_numbers():
    """A reference implementation in float64 on weights and images given by formulas."""
    model = fill(small())
    found = model.reconstruct(IMG, NOISE)
    assert model.shuffle(IMG, NOISE)[0][:, :4].tolist() == [[1, 6, 11, 0], [4, 9, 14, 3]]
    assert ["".join(str(int(m)) for m in row) for row in found["mask"]] == ["0011110111101111", "1110011110111101"]
    assert found["loss"].item() == pytest.approx(1.0024968460841925, rel=1e-9)
    latent, pred = found["latent"], found["pred"]
    assert latent.sum().item() == pytest.approx(1.7517279024071537, rel=1e-9)
    assert latent.abs().sum().item() == pytest.approx(213.4142224891967, rel=1e-9)
    assert latent[0, 0, :4].tolist() == pytest.approx(
        [-1.0945989639082974, -0.15272234231801185, 0.31347069708298364, 0.04274705476863882], rel=1e-8)
    assert latent[1, 2, :4].tolist() == pytest.approx(
        [-0.8782319369659737, -0.6925269500994741, 1.3931183612143156, -0.5412906929877364], rel=1e-8)
    assert pred.sum().item() == pytest.approx(-3.6000565545341896, rel=1e-9)
    assert pred.abs().sum().item() == pytest.approx(442.08307153636935, rel=1e-9)
    assert pred[0, 3, :4].tolist() == pytest.approx(
        [0.1996257596643577, -0.053044692227998916, -0.23174394039568708, 0.08368511187380526], rel=1e-8)


def test_closed_form_losses_and_gradients():
    assert fill(small(norm_pix=False))(IMG, NOISE).item() == pytest.approx(0.5087352875493106, rel=1e-9)
    model = fill(small())
    loss = model(IMG, NOISE)
    assert loss.item() == pytest.approx(1.0024968460841925, rel=1e-9)
    loss.backward()
    assert model.mask_token.grad.norm().item() == pytest.approx(0.014322765147770424, rel=1e-7)
    assert model.decoder_pred.bias.grad.norm().item() == pytest.approx(0.07716422628539339, rel=1e-7)


def test_closed_form_logits():
    """The tensors that distillation matches: scaled, before the softmax, cls included, visible tokens only."""
    student, teacher = fill(small()), fill(small(dim=36, heads=6), 1.0)
    logits = [model.encode(IMG, ORDER[:, :4], logits_of=(2,))[1][0] for model in (student, teacher)]
    assert [tuple(t.shape) for t in logits] == [(2, 3, 5, 5), (2, 6, 5, 5)]
    assert [t.sum().item() for t in logits] == pytest.approx([9.766184687150332, -14.241230194730022], rel=1e-9)
    assert logits[0][0, 0, 0, :3].tolist() == pytest.approx(
        [0.6341500639813746, 0.10365352576961322, 0.12768921075722217], rel=1e-9)


def test_parameter_counts():
    """Published sizes, decoder and the two fixed tables included."""
    for name, total, trained in (("vit_tiny", 5_748_480, 5_691_744), ("vit_small", 22_371_072, 22_257_600),
                                 ("vit_base", 111_907_840, 111_655_680), ("vit_huge", 657_074_508, 656_613_964)):
        r = mae.RECIPES[name]
        with torch.device("meta"):
            model = MAE(ViT(**mae.MODELS[name]), r["decoder_dim"], r["decoder_depth"], r["decoder_heads"])
        assert sum(p.numel() for p in model.parameters()) == total
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_same_as_textbook():
    """Thirty steps beside MAE as the paper describes it, built from timm's blocks: losses and weights."""
    pytest.importorskip("timm")
    from textbook import TextbookMAE
    torch.manual_seed(0)
    ours = small(dim=24)
    plain = TextbookMAE(32, 8, 24, 2, 3, 12, 1, 3)
    plain.load_state_dict(ours.state_dict())
    optimizers = [torch.optim.AdamW(decay_groups(m, 0.05), 1e-3, betas=(0.9, 0.95)) for m in (ours, plain)]
    for _ in range(30):
        img, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 16)
        losses = ours(img, noise), plain(img, noise)[0]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)     # Adam divides noise by noise: fp32 differences grow
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.decoder_pred.weight, plain.decoder_pred.weight, rtol=0, atol=2e-4)


def test_reconstruct_is_the_training_loss():
    torch.manual_seed(0)
    for norm_pix in (True, False):
        model, img, noise = small(norm_pix), torch.randn(3, 3, 32, 32), torch.rand(3, 16)
        torch.testing.assert_close(model(img, noise), model.reconstruct(img, noise)["loss"])


def test_hidden_pixels_do_not_reach_the_encoder():
    torch.manual_seed(0)
    model, img, noise = small(), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    before = model.reconstruct(img, noise)
    hidden = before["mask"].unsqueeze(-1)
    patches = patchify(img, 8)
    other = unpatchify(patches + hidden * torch.randn_like(patches), 8, 32, 32)
    after = model.reconstruct(other, noise)
    assert torch.equal(before["latent"], after["latent"]) and torch.equal(before["pred"], after["pred"])
    assert not torch.equal(before["loss"], after["loss"])
    other = unpatchify(patches + (1 - hidden), 8, 32, 32)       # while what is visible does
    assert not torch.equal(before["latent"], model.reconstruct(other, noise)["latent"])


def test_visible_patches_carry_no_loss():
    torch.manual_seed(0)
    model, img, noise = small(norm_pix=False), torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    found = model.reconstruct(img, noise)
    by_hand = [(found["pred"][b, n] - patchify(img, 8)[b, n]).square().mean()
               for b in range(2) for n in range(16) if found["mask"][b, n]]
    torch.testing.assert_close(model(img, noise), torch.stack(by_hand).mean())


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = small()
    model(torch.randn(4, 3, 32, 32)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert {n for n, _ in model.named_parameters()} - set(trained) == {"pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("ratio, patches, visible", [(0.75, 196, 49), (0.9, 196, 19), (0.75, 256, 64), (0.9, 50, 4)])
def test_visible_count_is_cut_off(ratio, patches, visible):
    side = {196: (14, 14), 256: (16, 16), 50: (5, 10)}[patches]
    model = MAE(ViT((side[0] * 2, side[1] * 2), 2, 3, 8, 1, 2), 8, 1, 2, mask_ratio=ratio)
    assert model.patches == patches and model.visible == visible


def test_masks():
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True                                          # the upper half is hidden
    found = model.reconstruct(img, mask=mask)
    assert torch.equal(found["mask"].bool().view(2, 4, 4), mask)
    assert found["latent"].shape[1] == 1 + 8
    torch.testing.assert_close(model(img, mask=mask), found["loss"])
    order = found["ids_restore"].argsort(1)
    assert order[0].tolist() == [*range(8, 16), *range(8)]      # both parts in reading order
    mask[0, 3, 3] = True
    for wrong in (mask, torch.zeros_like(mask), torch.ones_like(mask), mask[:, :3]):
        with pytest.raises(ValueError, match="same number hidden"):
            model(img, mask=wrong)
    with pytest.raises(ValueError, match="cannot take images of"):
        model(torch.randn(2, 3, 64, 64))


def test_noise_decides_the_mask_uniformly():
    torch.manual_seed(0)
    model = small()
    hidden = model.shuffle(torch.empty(4000, 3, 32, 32))[0][:, 4:]
    share = torch.bincount(hidden.flatten(), minlength=16) / 4000
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 4000) ** 0.5     # five standard deviations


@pytest.mark.parametrize("size, chans", [((96, 160), 1), ((64, 64), 6), ((32, 32), 3)])
def test_any_shape(size, chans):
    torch.manual_seed(0)
    model = small(img_size=size, in_chans=chans, patch_size=16)
    img = torch.randn(2, chans, *size)
    assert torch.equal(unpatchify(patchify(img, 16), 16, *size), img)
    found = model.reconstruct(img)
    assert found["pred"].shape == (2, size[0] * size[1] // 256, 256 * chans)
    model(img).backward()


def test_patch_order():
    """Rows, columns, channels: a channel-first order trains as well but cannot read official decoders."""
    first = patchify(torch.arange(48.0).view(1, 3, 4, 4), 2)[0, 0]
    assert first.tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]


def test_target_is_standardised_with_the_unbiased_variance():
    t = torch.randn(2, 5, 192).double() * 3 + 1
    expected = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(small().target(t), expected, rtol=1e-12, atol=1e-12)
    assert small().target(torch.ones(1, 1, 192)).abs().max() == 0           # a flat patch: no NaN


def test_initialisation():
    torch.manual_seed(0)
    model = MAE(ViT(), 96, 1, 3)
    qkv, patch = model.blocks[0].attn.qkv, model.patch_embed.proj
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 576)) ** 0.5, rel=1e-3)      # stacked fan
    assert patch.weight.abs().max().item() == pytest.approx((6 / (768 + 192)) ** 0.5, rel=1e-3)    # flattened fan
    assert patch.bias.abs().max().item() == pytest.approx(768 ** -0.5, rel=0.1)                    # torch's own
    assert not qkv.bias.any() and not model.decoder_pred.bias.any()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.pos_embed, sincos_positions(192, 14, 14))


def test_autocast_loss_is_fp32_and_close():
    torch.manual_seed(0)
    model, img, noise = small(), torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    exact = model(img, noise)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(img, noise)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)              # bf16 has 8 bits of mantissa


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_the_same():
    torch.manual_seed(0)
    model, img, noise = small(), torch.randn(4, 3, 32, 32), torch.rand(4, 16)
    compiled = copy.deepcopy(model)
    compiled.compile()
    losses = [m(img, noise) for m in (model, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(model.named_parameters(), compiled.parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-6, msg=name)
    assert model.state_dict().keys() == compiled.state_dict().keys()


def test_a_non_finite_gradient_changes_nothing():
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.AdamW(decay_groups(model, 0.05), 1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(img):
        model(img).backward()
        norm, skipped = finite_step(optimizer, scaler)
        optimizer.zero_grad()
        return norm, skipped.item()

    assert step(torch.randn(2, 3, 32, 32))[1] == 0
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    img = torch.randn(2, 3, 32, 32)
    img[0, 0, 0, 0] = float("nan")
    assert step(img)[1] == 1
    for a, b in zip(before[0].values(), model.state_dict().values()):
        assert torch.equal(a, b)
    for i, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(v, before[1][i][k]) for k, v in moments.items())    # the step counter too
    assert step(torch.randn(2, 3, 32, 32))[1] == 0


def test_clipping():
    torch.manual_seed(0)
    model = small()
    optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=True)
    model(torch.randn(2, 3, 32, 32)).backward()
    reference = copy.deepcopy(model)
    for p, q in zip(model.parameters(), reference.parameters()):
        q.grad = p.grad.clone() if p.grad is not None else None
    expected = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.01)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    norm, _ = finite_step(optimizer, scaler, clip=0.01)
    torch.testing.assert_close(norm, expected)
    torch.testing.assert_close(model.decoder_pred.weight.grad, reference.decoder_pred.weight.grad)
    model.norm.bias.grad[0] = float("nan")                      # stays where it is, so that it can be named
    assert finite_step(optimizer, scaler, clip=0.01)[1] == 1
    assert [n for n, p in model.named_parameters() if p.grad is not None and p.grad.isnan().any()] == ["norm.bias"]
