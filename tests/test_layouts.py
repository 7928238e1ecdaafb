"""weights/layouts.py: what other libraries write, read to their own features; what is not read, refused by name."""

import json
import re

import pytest
import torch

from weights import load_classifier, load_encoder, read

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")
pytest.importorskip("safetensors")
transformers.logging.disable_progress_bar()

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


def beit(**options):
    options = dict(use_absolute_position_embeddings=True, use_mean_pooling=False) | options
    return hugging_face("BeitModel", "BeitConfig", **VIT, **options)


HUGGING_FACE = {
    "ViTMAEModel": lambda: hugging_face("ViTMAEModel", "ViTMAEConfig", **VIT, **DECODER),
    "ViTMAEForPreTraining": lambda: hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **DECODER),
    "ViTModel": lambda: hugging_face("ViTModel", "ViTConfig", **VIT),
    "ViTForImageClassification": lambda: hugging_face("ViTForImageClassification", "ViTConfig", **VIT, **LABELS),
    "ViTMSNModel": lambda: hugging_face("ViTMSNModel", "ViTMSNConfig", **VIT),
    "Dinov2Model": lambda: hugging_face("Dinov2Model", "Dinov2Config", **DINO),
    "Dinov2ForImageClassification": lambda: hugging_face("Dinov2ForImageClassification", "Dinov2Config", **DINO),
    "BeitModel": lambda: beit(use_relative_position_bias=True),
    "SwinModel": lambda: hugging_face("SwinModel", "SwinConfig", **SWIN),
    "SwinForImageClassification": lambda: hugging_face("SwinForImageClassification", "SwinConfig", **SWIN, **LABELS),
}


EMBEDS = re.compile(r"embeddings\.(?!norm)|patch_embed\.proj|conv_proj|features\.0\.0|cls_token|class_token|pos_embed")


def shaken(model):
    """A model whose every parameter counts, its eps included: what comes before the first norm is small."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "position" not in name:
            torch.nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.2)
        if EMBEDS.search(name) and "decoder" not in name:
            p.data *= 1e-3
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
    model, heads, path = HUGGING_FACE[name](), None, tmp_path / "them"
    if name == "ViTMSNModel" and form != "folder":              # its tensors are those of a ViT, which has another eps
        model = hugging_face("ViTMSNModel", "ViTMSNConfig", **VIT, layer_norm_eps=1e-12)
    shaken(model).save_pretrained(path)
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
    """Also by the name of the file in it."""
    model = shaken(hugging_face("ViTModel", "ViTConfig", **VIT, layer_norm_eps=eps))
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
    model = shaken(hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", **VIT, **DECODER))
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
        theirs_in_order = theirs.gather(1, order.unsqueeze(-1).expand_as(theirs))
        torch.testing.assert_close(found, theirs_in_order, rtol=1e-5, atol=5e-5)        # the decoder's eps here is 1e-6
    assert read(str(tmp_path / "them")).config["decoder_heads"] == 2


def test_the_loss_and_gradients_of_a_masked_autoencoder(tmp_path):
    """With standardised patches, three quarters of them hidden, as in pre-training."""
    from tools.pictures import Config, load_mae
    options = dict(VIT, **DECODER, layer_norm_eps=1e-6, norm_pix_loss=True)
    model = shaken(hugging_face("ViTMAEForPreTraining", "ViTMAEConfig", **options))
    model.save_pretrained(tmp_path)
    img, noise = image(model), torch.rand(2, 16, generator=torch.Generator().manual_seed(3))
    theirs = model(img, noise=noise).loss
    theirs.backward()
    ours, _ = load_mae(str(tmp_path), Config())
    loss = ours(img, noise.argsort(1))
    loss.backward()
    close(loss, theirs)
    close(ours.patch_embed.proj.weight.grad, model.vit.embeddings.patch_embeddings.projection.weight.grad)
    close(ours.decoder_pred.weight.grad, model.decoder.decoder_pred.weight.grad)
    attention = model.vit.layers[0].attention
    joined = torch.cat([part.weight.grad for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
    close(ours.blocks[0].attn.qkv.weight.grad, joined)


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


# ----------------------------------------------------------------------------------------------------------------
# Folders, and what their config.json says

def timm_folder(path, name, **options):
    """A folder as timm pushes it to the hub, of a small network -> the model."""
    model = shaken(timm.create_model(name, **options))
    model_args = {k: v for k, v in options.items() if k != "num_classes"}
    timm.models.save_for_hf(model, path, model_args=model_args)
    return model


TIMM = {"vit_tiny_patch16_224": 3, "vit_small_patch16_224": 6, "deit_tiny_patch16_224": 3, "vit_base_patch16_224": 12,
        "vit_small_patch14_dinov2": 6, "swin_tiny_patch4_window7_224": (3, 6, 12, 24)}


@pytest.mark.parametrize("name", TIMM)
def test_folders_of_timm(tmp_path, name):
    """timm's config.json has the heads only where they are not the entry's own."""
    small = dict(depth=1, img_size=(28, 42), patch_size=14)
    if "swin" in name:
        small = dict(depths=(1, 1, 2, 1), embed_dim=24)
    model = timm_folder(tmp_path, name, num_classes=5, **small)
    ours, left = load_classifier(read(str(tmp_path)))
    assert ours.config["heads"] == TIMM[name] and not left
    assert read(str(tmp_path)).config["mean"] == list(model.pretrained_cfg["mean"])
    img = torch.randn(2, 3, *ours.config["img_size"])
    with torch.no_grad():
        torch.testing.assert_close(ours(img), model(img), rtol=1e-5, atol=1e-4)


def test_timm_folder_with_other_heads_and_pooling(tmp_path):
    options = dict(depth=1, img_size=32, embed_dim=48, num_heads=4, global_pool="avg", num_classes=5)
    model, img = timm_folder(tmp_path, "vit_base_patch16_224", **options), torch.randn(2, 3, 32, 32)
    ours, _ = load_classifier(read(str(tmp_path)))
    with torch.no_grad():
        close(ours(img), model(img))


@pytest.mark.parametrize("name, options, words", [
    ("vit_small_patch16_rope_ape_224", dict(no_embed_class=False), "_ape_224 with rope, for which there is no place"),
    ("vit_base_patch16_224", dict(act_layer="gelu_tanh"), "with gelu_tanh, for which there is no place"),
    ("vit_base_patch16_224", dict(global_pool="avg", fc_norm=False), "reads a mean of normed tokens .no fc_norm")])
def test_timm_folders_whose_tensors_would_fit(tmp_path, name, options, words):
    """Only config.json tells that they compute something else."""
    timm_folder(tmp_path, name, depth=1, img_size=32, embed_dim=48, **options)
    with pytest.raises(SystemExit, match=words):
        read(str(tmp_path))


SAYS = {
    "nothing": ({}, "give --heads"),
    "another activation": (dict(hidden_act="quick_gelu"), "has hidden_act 'quick_gelu' in its config.json"),
    "another network": (dict(model_type="dpt"), "holds a dpt of Hugging Face, and of theirs vit, vit_mae, deit"),
    "heads of a word": (dict(num_attention_heads="three"), "stores heads as 'three', and whole numbers"),
    "heads that do not divide": (dict(num_attention_heads=5), "5 heads do not divide the width 24"),
    "an eps of a word": (dict(layer_norm_eps="1e-6"), "stores eps as '1e-6', and finite numbers"),
    "a kind of a list": (dict(model_type=["vit"]), "damaged config.json"),
    "labels in a list": (dict(id2label=["cat"]), "damaged config.json"),
    "labels without numbers": (dict(id2label=dict(cat="cat")), "stores classes as"),
}


@pytest.mark.parametrize("case", SAYS)
def test_what_a_config_says(tmp_path, case):
    changes, words = SAYS[case]
    hugging_face("ViTModel", "ViTConfig", **VIT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | changes if changes else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit, match=words) as stop:
        load_encoder(str(tmp_path), say=quiet)
    assert "\n" not in str(stop.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_config(tmp_path, content):
    hugging_face("ViTModel", "ViTConfig", **VIT).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(SystemExit, match="has a damaged config.json or preprocessor_config.json beside its weights"):
        read(str(tmp_path))


def test_other_folders(tmp_path):
    model = hugging_face("ViTModel", "ViTConfig", **VIT)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_encoder(f"{tmp_path}/", 3, quiet).config["heads"] == 3
    model.config.save_pretrained(tmp_path)
    images = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.2, 0.2])
    for normalise, mean in ((True, [0.5, 0.4, 0.3]), (False, None)):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(images | dict(do_normalize=normalise)))
        assert read(str(tmp_path)).config.get("mean") == mean
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="is a folder without model.safetensors or pytorch_model.bin: give a file"):
        load_encoder(str(tmp_path / "empty"))


# ----------------------------------------------------------------------------------------------------------------
# What is not read, by its own name

def timm_vit(**options):
    """A timm VisionTransformer with further parts."""
    base = dict(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0)
    return timm.models.VisionTransformer(**base | options)


def timm_entry(name, **options):
    return timm.create_model(name, **dict(embed_dim=24, depth=2, num_heads=3) | options)


REFUSED = {
    "registers": (lambda: timm_vit(reg_tokens=4), "has register tokens .reg_token"),
    "registers without positions": (lambda: timm_vit(reg_tokens=4, no_embed_class=True), "has register tokens"),
    "no cls": (lambda: timm_vit(class_token=False, global_pool="avg"), "it has no cls_token"),
    "no_embed_class": (lambda: timm_vit(no_embed_class=True, init_values=0.1), "for 16 patches and none for cls"),
    "SigLIP": (lambda: timm_vit(class_token=False, global_pool="map"), "has pooling by attention"),
    "attention pooling": (lambda: timm_vit(global_pool="map"), "has pooling by attention"),
    "q/k norms": (lambda: timm_vit(qk_norm=True), "has q/k norms .blocks.0.attn.q_norm"),
    "CLIP": (lambda: timm_vit(pre_norm=True), "a norm before its blocks, CLIP's pre-norm .norm_pre"),
    "SwiGLU": (lambda: timm_vit(mlp_layer=timm.layers.SwiGLUPacked), "has a gated MLP, SwiGLU"),
    "no biases": (lambda: timm_vit(qkv_bias=False), "queries, keys and values without biases"),
    "more norms": (lambda: timm_vit(scale_attn_norm=True), "holds blocks.N.attn.norm.bias, blocks.N.attn.norm.weight"),
    "RoPE": (lambda: timm_entry("vit_small_patch16_rope_mixed_224", img_size=32), "has rotary positions, RoPE"),
    "DINOv3": (lambda: timm_entry("vit_small_patch16_dinov3", img_size=32), "has register tokens"),
    "EVA-02": (lambda: timm_entry("eva02_tiny_patch14_224", img_size=28), "has a gated MLP, SwiGLU"),
    "BEiT": (lambda: timm_entry("beit_base_patch16_224", img_size=32), "it has no pos_embed"),
    "hybrid": (lambda: timm.create_model("vit_tiny_r_s16_p8_224"), "has a convolutional stem .patch_embed.backbone"),
    "Swin V2": (lambda: torchvision.models.swin_transformer.SwinTransformer(
        [4, 4], 24, [1, 1], [1, 2], [7, 7], block=torchvision.models.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=torchvision.models.swin_transformer.PatchMergingV2), "Swin V2's cosine attention"),
    "HF DeiT": (lambda: hugging_face("DeiTModel", "DeiTConfig", **VIT), "has a distillation token"),
    "HF registers": (lambda: hugging_face("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINO),
                     "has register tokens"),
    "HF SwiGLU": (lambda: hugging_face("Dinov2Model", "Dinov2Config", **DINO, use_swiglu_ffn=True), "SwiGLU"),
    "HF no biases": (lambda: hugging_face("ViTModel", "ViTConfig", **VIT, qkv_bias=False), "without biases"),
    "HF BEiT": (lambda: hugging_face("BeitModel", "BeitConfig", **VIT), "it has no pos_embed"),
    "HF BEiT that shares positions": (lambda: beit(use_shared_relative_position_bias=True),
                                      "relative_position_bias_table, which the network here has no place for"),
    "HF CLIP": (lambda: hugging_face("CLIPVisionModel", "CLIPVisionConfig", **VIT), "CLIP's pre-norm .pre_layrnorm"),
    "HF SigLIP": (lambda: hugging_face("SiglipVisionModel", "SiglipVisionConfig", **VIT), "has pooling by attention"),
    "HF I-JEPA": (lambda: hugging_face("IJepaModel", "IJepaConfig", **VIT), "it has no cls_token"),
    "HF Swin with positions": (lambda: hugging_face("SwinModel", "SwinConfig", **SWIN, use_absolute_embeddings=True),
                               "holds pos_embed, which the network here has no place for"),
}


AS_TEACHER = {"registers", "no cls", "no_embed_class", "SigLIP", "q/k norms", "CLIP", "SwiGLU", "RoPE", "DINOv3",
              "EVA-02", "HF registers", "HF SwiGLU", "HF CLIP", "HF SigLIP"}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_name(tmp_path, name):
    make, words = REFUSED[name]
    model = make()
    torch.save(model.state_dict(), tmp_path / "x.pth")
    paths = [tmp_path / "x.pth"]
    if name.startswith("HF"):
        model.save_pretrained(tmp_path / "them")
        paths.append(tmp_path / "them")
    for path in paths:
        with pytest.raises(SystemExit, match=words) as stop:
            load_encoder(str(path), 3, quiet)
        assert "\n" not in str(stop.value)
        assert name not in AS_TEACHER or "distill.py --teacher timm:NAME" in str(stop.value)


def test_an_eps_for_blocks_alone(tmp_path):
    """Hugging Face's Swin merges with an eps of 1e-5, whatever its config says."""
    hugging_face("SwinModel", "SwinConfig", **SWIN, layer_norm_eps=1e-3).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="has layer_norm_eps 0.001 in its blocks and 1e-05 where it merges"):
        read(str(tmp_path))


@pytest.mark.filterwarnings("ignore")                           # torch warns of sparse tensors
@pytest.mark.parametrize("name, change, words", [
    ("vit.layers.0.attention.k_proj.weight", lambda t: t[:5], "has blocks.0.attn.q.weight and no blocks.0.attn.k"),
    ("vit.layers.0.attention.k_proj.bias", lambda t: t.to(torch.float8_e5m2), "has blocks.0.attn.q.bias and no"),
    ("vit.layers.0.attention.q_proj.bias", lambda t: torch.tensor(1.0), "has blocks.0.attn.q.bias and no"),
    ("vit.layers.0.attention.v_proj.bias", lambda t: None, "has blocks.0.attn.q.bias and no blocks.0.attn.v.bias"),
    ("vit.layers.0.attention.q_proj.weight", lambda t: t.to_sparse(), "attn.q.weight as a sparse"),
    ("vit.layers.0.attention.q_proj.weight", lambda t: t / 0, "NaN or infinite weights in blocks.0.attn.q.weight"),
    ("vit.layers.1.norm3.weight", lambda t: torch.ones(24), "holds blocks.N.norm3.weight"),
    ("vit.encoder.layer.0.attention.q_proj.weight", lambda t: torch.ones(24, 24), "two tensors for blocks.0.attn.q")])
def test_odd_files_of_hugging_face(tmp_path, name, change, words):
    model = hugging_face("ViTForImageClassification", "ViTConfig", **VIT)
    state = model.state_dict()
    state[name] = change(state.get(name))
    torch.save({k: v for k, v in state.items() if v is not None}, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=words):
        load_encoder(str(tmp_path / "x.pth"), 3, quiet)
