"""weights/layouts.py: what other libraries write, read to their own features; what is not read, refused by name."""

import pytest
import torch

from weights import load_classifier, load_encoder, read

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

VIT = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48, image_size=16,
           patch_size=4)
DINO = {k: v for k, v in VIT.items() if k != "intermediate_size"} | dict(mlp_ratio=2)
SWIN = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)
DECODER = dict(decoder_hidden_size=16, decoder_num_hidden_layers=2, decoder_num_attention_heads=2,
               decoder_intermediate_size=32)
LABELS = dict(id2label={0: "cat", 1: "dog", 2: "emu"})


def quiet(_):
    pass


def hugging_face(model, config, **options):
    return getattr(transformers, model)(getattr(transformers, config)(**options))


HUGGING_FACE = {
    "ViTMAEModel": lambda: hugging_face("ViTMAEModel", "ViTMAEConfig", **VIT, **DECODER),
    "ViTMAEForPreTraining": lambda: hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **DECODER),
    "ViTModel": lambda: hugging_face("ViTModel", "ViTConfig", **VIT),
    "ViTForImageClassification": lambda: hugging_face("ViTForImageClassification", "ViTConfig", **VIT, **LABELS),
    "ViTMSNModel": lambda: hugging_face("ViTMSNModel", "ViTMSNConfig", **VIT),
    "Dinov2Model": lambda: hugging_face("Dinov2Model", "Dinov2Config", **DINO),
    "Dinov2ForImageClassification": lambda: hugging_face("Dinov2ForImageClassification", "Dinov2Config", **DINO),
    "SwinModel": lambda: hugging_face("SwinModel", "SwinConfig", **SWIN),
    "SwinForImageClassification": lambda: hugging_face("SwinForImageClassification", "SwinConfig", **SWIN, **LABELS),
}


def shaken(model):
    """A model whose every parameter counts. Small weights before the norms: that is where an eps tells."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "position" not in name:
            torch.nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.2)
    return model.eval()


@torch.no_grad()
def their_tokens(model, img):
    """Their own normed tokens, all patches seen and in reading order."""
    base = getattr(model, model.base_model_prefix, model)
    options = {}
    if isinstance(base, transformers.ViTMAEModel):
        base.config.mask_ratio, count = 0.0, base.embeddings.position_embeddings.shape[1] - 1
        options["noise"] = torch.arange(count).float().expand(len(img), -1)
    return base(img, **options).last_hidden_state


def image(model):
    size = model.config.image_size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["folder", "safetensors", "state dict", "behind prefixes"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face(tmp_path, name, form):
    """Names on disk are those of transformers 4; a state dict of transformers 5 has others."""
    model, heads, path = shaken(HUGGING_FACE[name]()), None, tmp_path / "them"
    model.save_pretrained(path)
    if form != "folder":
        heads = None if "Swin" in name else 3
    if form == "safetensors":
        path = (path / "model.safetensors").rename(tmp_path / "x.safetensors")
    if form == "state dict":
        path = tmp_path / "x.pth"
        torch.save(model.state_dict(), path)
    if form == "behind prefixes":
        path = tmp_path / "x.ckpt"
        torch.save(dict(state_dict={f"model.net.{k}": v for k, v in model.state_dict().items()}, epoch=3), path)
    said, img = [], image(model)
    ours = load_encoder(str(path), heads, said.append)
    with torch.no_grad():
        close(ours.encode(img), their_tokens(model, img))
    assert "missing, so fresh: none" in said[-1]
    assert "named as in Hugging Face's" in read(str(path)).layout
    if "Classification" in name and "Dino" not in name:
        whole, _ = load_classifier(read(str(path)), heads)
        with torch.no_grad():
            close(whole(img), model(img).logits)
        assert read(str(path)).config.get("classes") == (["cat", "dog", "emu"] if form == "folder" else None)


def test_a_folder_tells_a_swins_size(tmp_path):
    """Its windows fit 16 pixels too, but there the last stage would not be shifted."""
    model = shaken(hugging_face("SwinModel", "SwinConfig", **SWIN | dict(image_size=32)))
    model.save_pretrained(tmp_path)
    img = image(model)
    with torch.no_grad():
        close(load_encoder(str(tmp_path), say=quiet).encode(img), their_tokens(model, img))


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-3])
def test_the_eps_of_a_folder_reaches_the_network(tmp_path, eps):
    """Also by the file in it. Patch embeddings of 1e-3 are where it changes the features."""
    model = shaken(hugging_face("ViTModel", "ViTConfig", **VIT, layer_norm_eps=eps))
    for p in model.embeddings.parameters():
        p.data *= 1e-3
    model.save_pretrained(tmp_path)
    img = image(model)
    for path, heads in ((tmp_path, None), (tmp_path / "model.safetensors", None)):
        ours = load_encoder(str(path), heads, quiet)
        assert ours.config["eps"] == eps
        with torch.no_grad():
            close(ours.encode(img), their_tokens(model, img))


def test_masked_autoencoder_with_its_decoder(tmp_path):
    """Every patch hidden or seen is predicted as Hugging Face does it, and tools.pictures draws."""
    from tools.pictures import Config, load_mae
    model = shaken(hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **DECODER, layer_norm_eps=1e-6))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    model.save_pretrained(tmp_path / "them")
    img, noise = image(model), torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = model(img, noise=noise).logits
    order = noise.argsort(1)
    for path, config in ((tmp_path / "them", Config()), (tmp_path / "x.pth", Config(heads=3, decoder_heads=2))):
        ours, stored = load_mae(str(path), config)
        with torch.no_grad():
            latent = ours.encode_visible(img, order)
            found = ours.decoder_pred(ours.decode(latent, order, all_patches=True))
        close(found, theirs.gather(1, order.unsqueeze(-1).expand_as(theirs)))
    assert read(str(tmp_path / "them")).config["decoder_heads"] == 2


def torchvision_vit(**options):
    return torchvision.models.VisionTransformer(16, 4, 2, 3, 24, 48, num_classes=5, **options)


def torchvision_swin():
    return torchvision.models.SwinTransformer([2, 2], 16, [2, 2], [2, 4], [4, 4], num_classes=5)


def timm_swin(size=32, **options):
    return timm.models.SwinTransformer(**dict(img_size=size, patch_size=2, embed_dim=16, depths=(2, 1, 2),
                                              num_heads=(2, 4, 4), window_size=4, num_classes=5) | options)


CLASSIFIERS = {"torchvision's ViT": (torchvision_vit, 16, 3), "torchvision's Swin": (torchvision_swin, 16, None),
               "timm's Swin": (timm_swin, 32, None)}


@pytest.mark.parametrize("prefix", ["", "module.", "model.backbone."])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(tmp_path, name, prefix):
    make, size, heads = CLASSIFIERS[name]
    model, path, img = shaken(make()), str(tmp_path / "x.pth"), torch.randn(2, 3, size, size)
    torch.save({prefix + k: v for k, v in model.state_dict().items()}, path)
    ours, left = load_classifier(read(path), heads)
    assert not [k for k in left if not k.endswith("relative_position_index")]
    with torch.no_grad():
        close(ours(img), model(img))
    assert f"named as in {name}" in read(path).layout


def test_published_shapes_need_no_option(tmp_path):
    """Heads of vit_b_16, windows, eps and image size of swin_t, but for their depths and widths."""
    img = torch.randn(1, 3, 224, 224)
    for model in (torchvision.models.VisionTransformer(224, 16, 1, 12, 768, 768),
                  torchvision.models.SwinTransformer([4, 4], 24, [1, 1, 2, 2], [1, 2, 4, 8], [7, 7])):
        torch.save(shaken(model).state_dict(), tmp_path / "x.pth")
        ours, _ = load_classifier(read(str(tmp_path / "x.pth")))
        with torch.no_grad():
            torch.testing.assert_close(ours(img), model(img), rtol=1e-5, atol=1e-4)


def test_a_layer_between_feature_and_head(tmp_path, capsys):
    """Its head is not put on the feature without it."""
    model = shaken(torchvision_vit(representation_size=24))
    torch.save(model.state_dict(), tmp_path / "x.pth")
    ours, left = load_classifier(read(str(tmp_path / "x.pth")), 3)
    assert ours.config["num_classes"] == 0 and "pre_logits.head.weight" in left
    img = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        hidden = model.heads.pre_logits(ours(img))
        close(model.heads.head(torch.tanh(hidden)), model(img))


def test_lightly(tmp_path):
    """Its MAE: the encoder behind backbone.vit, the decoder beside it."""
    from mae import MAE
    model = MAE(16, 1, 2, img_size=16, patch_size=4, dim=24, depth=2, heads=3)
    state = {("decoder." if k.startswith(("decoder_", "mask_token")) else "backbone.vit.") + k: v
             for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=state | {"backbone.mask_token": torch.zeros(1, 1, 24)}), tmp_path / "x.ckpt")
    found = read(str(tmp_path / "x.ckpt"))
    assert model.state_dict().keys() <= found.state.keys() and "lightly's MAE" in found.layout
