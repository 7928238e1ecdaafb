"""The masked autoencoder: closed-form numbers, invariants, and the textbook form, all checkable on a fresh clone."""
import copy
import shutil

import pytest
import torch
from einops import rearrange

from distill import run_blocks
from mae import MAE, RECIPES
from runtime.run import decay_groups, finite_step
from vit import MODELS, ViT, sincos_positions


def small(norm_pix=True, mask_ratio=0.75, dim=24, heads=3, tap=None, **vit):
    options = dict(img_size=32, patch_size=8, dim=dim, depth=2, heads=heads)
    return MAE(12, 1, 3, norm_pix, mask_ratio, tap, **{**options, **vit})


def random_order(images=2, patches=16):
    return torch.rand(images, patches).argsort(1)


def patches_of(img, p):
    """Images (B, C, h*p, w*p) -> (B, h*w, p*p*C) as published: in a patch rows, columns, channels."""
    return rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)


def images_of(patches, p, height):
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=height // p)


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


def test_closed_form_numbers():
    """A reference implementation in float64 on weights and images given by formulas."""
    model = fill(small())
    found = model.reconstruct(IMG, ORDER)
    assert ORDER[:, :model.visible].tolist() == [[1, 6, 11, 0], [4, 9, 14, 3]]
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
    assert fill(small(norm_pix=False))(IMG, ORDER).item() == pytest.approx(0.5087352875493106, rel=1e-9)
    model = fill(small())
    loss = model(IMG, ORDER)
    assert loss.item() == pytest.approx(1.0024968460841925, rel=1e-9)
    loss.backward()
    assert model.mask_token.grad.norm().item() == pytest.approx(0.014322765147770424, rel=1e-7)
    assert model.decoder_pred.bias.grad.norm().item() == pytest.approx(0.07716422628539339, rel=1e-7)


def test_closed_form_logits():
    """The tensors that distillation matches: scaled, before the softmax, cls included, visible tokens only."""
    student, teacher = fill(small()), fill(small(dim=36, heads=6), 1.0)
    logits = [run_blocks(m, m.embed(IMG, ORDER[:, :4]), attention=(2,))[1][0] for m in (student, teacher)]
    assert [tuple(t.shape) for t in logits] == [(2, 3, 5, 5), (2, 6, 5, 5)]
    assert [t.sum().item() for t in logits] == pytest.approx([9.766184687150332, -14.241230194730022], rel=1e-9)
    assert logits[0][0, 0, 0, :3].tolist() == pytest.approx(
        [0.6341500639813746, 0.10365352576961322, 0.12768921075722217], rel=1e-9)


def test_parameter_counts():
    """Published sizes, decoder and the two fixed tables included."""
    for name, total, trained in (("vit_tiny", 5_748_480, 5_691_744), ("vit_small", 22_371_072, 22_257_600),
                                 ("vit_base", 111_907_840, 111_655_680), ("vit_huge", 657_074_508, 656_613_964)):
        r = RECIPES[name]
        with torch.device("meta"):
            model = MAE(r["decoder_dim"], r["decoder_depth"], r["decoder_heads"], **MODELS[name])
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
        losses = ours(img, noise.argsort(1)), plain(img, noise)[0]
        torch.testing.assert_close(*losses, rtol=1e-4, atol=0)     # Adam divides noise by noise: fp32 differences grow
        for loss, optimizer in zip(losses, optimizers):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    torch.testing.assert_close(ours.decoder_pred.weight, plain.decoder_pred.weight, rtol=0, atol=2e-4)


def test_reconstruct_is_the_training_loss():
    torch.manual_seed(0)
    for norm_pix in (True, False):
        model, img, order = small(norm_pix), torch.randn(3, 3, 32, 32), random_order(3)
        torch.testing.assert_close(model(img, order), model.reconstruct(img, order)["loss"])


def test_hidden_pixels_do_not_reach_the_encoder():
    torch.manual_seed(0)
    model, img, order = small(), torch.randn(2, 3, 32, 32), random_order()
    before = model.reconstruct(img, order)
    hidden = before["mask"].unsqueeze(-1)
    patches = patches_of(img, 8)
    other = images_of(patches + hidden * torch.randn_like(patches), 8, 32)
    after = model.reconstruct(other, order)
    assert torch.equal(before["latent"], after["latent"]) and torch.equal(before["pred"], after["pred"])
    assert not torch.equal(before["loss"], after["loss"])
    other = images_of(patches + (1 - hidden), 8, 32)            # while what is visible does
    assert not torch.equal(before["latent"], model.reconstruct(other, order)["latent"])


def test_visible_patches_carry_no_loss():
    torch.manual_seed(0)
    model, img, order = small(norm_pix=False), torch.randn(2, 3, 32, 32), random_order()
    found = model.reconstruct(img, order)
    by_hand = [(found["pred"][b, n] - patches_of(img, 8)[b, n]).square().mean()
               for b in range(2) for n in range(16) if found["mask"][b, n]]
    torch.testing.assert_close(model(img, order), torch.stack(by_hand).mean())


def test_every_parameter_learns():
    torch.manual_seed(0)
    model = small()
    model(torch.randn(4, 3, 32, 32), random_order(4)).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert {n for n, _ in model.named_parameters()} - set(trained) == {"pos_embed", "decoder_pos_embed"}


@pytest.mark.parametrize("ratio, patches, visible", [(0.75, 196, 49), (0.9, 196, 19), (0.75, 256, 64), (0.9, 50, 4)])
def test_visible_count_is_cut_off(ratio, patches, visible):
    side = {196: (14, 14), 256: (16, 16), 50: (5, 10)}[patches]
    model = MAE(8, 1, 2, mask_ratio=ratio, img_size=(side[0] * 2, side[1] * 2), patch_size=2, dim=8, depth=1, heads=2)
    assert model.patches == patches and model.visible == visible


@pytest.mark.parametrize("ratio, visible", [(1.0, 0), (0.99, 0), (0.0, 16)])
def test_a_mask_leaves_something_to_see_and_to_predict(ratio, visible):
    with pytest.raises(ValueError, match=f"--mask-ratio {ratio} leaves {visible} of 16 patches visible"):
        small(mask_ratio=ratio)


def test_masks():
    """Any mask that hides the same number in each image: its stable argsort is an order, visible patches first."""
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    mask = torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[:, :2] = True                                          # the upper half is hidden
    order = mask.flatten(1).byte().argsort(dim=1, stable=True)
    found = model.reconstruct(img, order, visible=8)
    assert torch.equal(found["mask"].bool().view(2, 4, 4), mask)
    assert found["latent"].shape[1] == 1 + 8
    torch.testing.assert_close(model.pixel_error(img, model.encode_visible(img, order, 8), order), found["loss"])
    assert torch.equal(found["ids_restore"].argsort(1), order)
    assert order[0].tolist() == [*range(8, 16), *range(8)]      # both parts in reading order
    with pytest.raises((ValueError, RuntimeError)):             # an order of other patches than the network has
        model(img, mask[:, :3].flatten(1).byte().argsort(dim=1, stable=True))


@pytest.mark.parametrize("visible", [1, 3, 8, 15])
def test_any_number_of_visible_patches(visible):
    """The loss over the others, by hand; as many as the mask ratio says if no number is given."""
    torch.manual_seed(0)
    model, img, order = small(norm_pix=False), torch.randn(2, 3, 32, 32), random_order()
    latent, found = model.encode_visible(img, order, visible), model.reconstruct(img, order, visible)
    assert latent.shape == (2, 1 + visible, 24) and torch.equal(latent, found["latent"])
    hidden = [[n for n in range(16) if n not in order[b, :visible]] for b in range(2)]
    assert [found["mask"][b].nonzero().flatten().tolist() for b in range(2)] == hidden
    error = (found["pred"] - patches_of(img, 8)).square().mean(-1)
    by_hand = torch.stack([error[b, n] for b in range(2) for n in hidden[b]]).mean()
    torch.testing.assert_close(model.pixel_error(img, latent, order), by_hand)
    torch.testing.assert_close(found["loss"], by_hand)
    torch.testing.assert_close(latent, model.encode(img, order[:, :visible]))
    assert torch.equal(model.encode_visible(img, order), model.encode_visible(img, order, 4))


def test_images_of_another_size_are_refused():
    """Their patches have other numbers: an order of the network's own would hide and predict the wrong ones."""
    for call in (small(), small().reconstruct):
        with pytest.raises(ValueError, match="64"):
            call(torch.randn(2, 3, 64, 64), random_order())


def test_the_order_is_uniformly_random():
    torch.manual_seed(0)
    model = small()
    with torch.autocast("cpu", torch.bfloat16):                 # 8 bits of noise would have ties, which bias argsort
        order = model.random_order(4000, "cpu")
    assert torch.equal(order.sort(1)[0], torch.arange(16).expand(4000, -1))
    for part, expected in ((order[:, 4:], 0.75), (order[:, :1], 1 / 16), (order[:, -1:], 1 / 16)):
        share = torch.bincount(part.flatten(), minlength=16) / 4000
        assert (share - expected).abs().max() < 5 * (expected * (1 - expected) / 4000) ** 0.5   # five std deviations


@pytest.mark.parametrize("size, chans", [((96, 160), 1), ((64, 64), 6), ((32, 32), 3)])
def test_any_shape(size, chans):
    torch.manual_seed(0)
    model = small(img_size=size, in_chans=chans, patch_size=16)
    img = torch.randn(2, chans, *size)
    order = model.random_order(2, "cpu")
    found = model.reconstruct(img, order)
    assert found["pred"].shape == (2, size[0] * size[1] // 256, 256 * chans)
    loss = model(img, order)
    torch.testing.assert_close(loss, found["loss"])
    loss.backward()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_patch_order(norm_pix):
    """Rows, columns, channels: a channel-first order trains as well but cannot read official decoders. A decoder that
    says the pixels of a patch in this order makes no error on an image of such patches, and any other order does."""
    first = patches_of(torch.arange(48.0).view(1, 3, 4, 4), 2)[0, 0]
    assert first.tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    torch.manual_seed(0)
    model, pixels, order = small(norm_pix), torch.randn(1, 3, 8, 8), random_order()
    img = pixels.expand(2, -1, -1, -1).repeat(1, 1, 4, 4)
    said = patches_of(pixels, 8).flatten()
    model.decoder_pred.weight.data.zero_()
    model.decoder_pred.bias.data = (said - said.mean()) / said.std() if norm_pix else said
    assert model(img, order) < 1e-9 and model.reconstruct(img, order)["loss"] < 1e-9
    model.decoder_pred.bias.data = rearrange(model.decoder_pred.bias.data, "(pq c) -> (c pq)", c=3)
    assert model(img, order) > 0.5 and model.reconstruct(img, order)["loss"] > 0.5


def test_target_is_standardised_with_the_unbiased_variance():
    t = torch.randn(2, 5, 192).double() * 3 + 1
    expected = (t - t.mean(-1, keepdim=True)) / (t.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(small().target(t), expected, rtol=1e-12, atol=1e-12)
    assert small().target(torch.ones(1, 1, 192)).abs().max() == 0           # a flat patch: no NaN


def test_chance_is_the_loss_of_predicting_zero():
    torch.manual_seed(0)
    for norm_pix in (True, False):
        model, img, order = small(norm_pix), torch.randn(4, 3, 32, 32) + 1, random_order(4)
        model.decoder_pred.weight.data.zero_()
        every = model.reconstruct(img, order)["pred"].sub(model.target(patches_of(img, 8))).square().mean()
        torch.testing.assert_close(model.metrics(img)["chance"], every)
        assert model(img, order).item() == pytest.approx(every.item(), rel=0.1)       # hidden patches alone


def test_encoder_file_and_features():
    """encoder.pt has the encoder under its own names, and probes look at the mean patch token of that network."""
    torch.manual_seed(0)
    model, img = small(), torch.randn(2, 3, 32, 32)
    found = model.encoder_checkpoint()
    assert found["config"] == model.config
    encoder = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
    assert set(found["model"]) == {name for name in model.state_dict() if name.startswith(encoder)}
    vit = ViT(**found["config"])
    vit.load_state_dict(found["model"])
    torch.testing.assert_close(model.features(img), vit.encode(img)[:, 1:].mean(1))
    model.cls_token.data.add_(1)                                # the tensors are the network's own: always up to date
    assert torch.equal(found["model"]["cls_token"], model.cls_token)


def test_initialisation():
    torch.manual_seed(0)
    model = MAE(96, 1, 3)
    qkv, patch = model.blocks[0].attn.qkv, model.patch_embed.proj
    assert qkv.weight.abs().max().item() == pytest.approx((6 / (192 + 576)) ** 0.5, rel=1e-3)      # stacked fan
    assert patch.weight.abs().max().item() == pytest.approx((6 / (768 + 192)) ** 0.5, rel=1e-3)    # flattened fan
    assert patch.bias.abs().max().item() == pytest.approx(768 ** -0.5, rel=0.1)                    # torch's own
    assert not qkv.bias.any() and not model.decoder_pred.bias.any()
    assert model.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert torch.equal(model.pos_embed, sincos_positions(192, 14, 14))


def test_autocast_loss_is_fp32_and_close():
    torch.manual_seed(0)
    model, img, order = small(), torch.randn(4, 3, 32, 32), random_order(4)
    exact = model(img, order)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(img, order)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)              # bf16 has 8 bits of mantissa


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_the_same():
    torch.manual_seed(0)
    model, img, order = small(), torch.randn(4, 3, 32, 32), random_order(4)
    compiled = copy.deepcopy(model)
    compiled.compile()
    losses = [m(img, order) for m in (model, compiled)]
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
        model(img, random_order()).backward()
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
    model(torch.randn(2, 3, 32, 32), random_order()).backward()
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
