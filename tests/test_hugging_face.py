"""weights/hugging_face.py: transformers computes from the folder what we compute from the checkpoint, and so do we."""
import json

import numpy as np
import pytest
import torch
from golden import FOLDER, Golden, needs_golden, recordings
from golden import close as close_recorded
from PIL import Image
from test_export import RELATIVE, faint, saved, special, swin, vit
from torch import nn

from data import CenterCrops
from mae import MAE
from nets.beit import BeitViT, TwoHeads
from tools.pictures import Config, load_mae
from weights import export, hugging_face, load_classifier, read

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
transformers.logging.disable_progress_bar()


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def opened(folder):
    """The network that config.json names, for which no tensor is missing, unexpected or of another shape."""
    name, = json.loads((folder / "config.json").read_text())["architectures"]
    model, found = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(found.values()), found
    return model.eval()


def square(**options):
    return vit(BeitViT, **dict(num_classes=3, pool="avg", **options))


# What is exported, and what transformers calls that.
NETWORKS = {
    "encoder": (lambda: vit(), "ViTModel"),
    "another eps": (lambda: faint(vit(eps=1e-3)), "ViTModel"),
    "classifier": (lambda: vit(num_classes=5, mlp_ratio=2.5), "ViTForImageClassification"),
    "not square, grey": (lambda: vit(num_classes=2, img_size=(16, 40), in_chans=1), "ViTForImageClassification"),
    "classifier on the mean": (lambda: vit(num_classes=5, pool="avg"), "BeitForImageClassification"),
    "encoder, mean": (lambda: vit(pool="avg"), "BeitModel"),
    "relative positions, cls": (lambda: vit(BeitViT, relative=True), "BeitModel"),
    "relative positions": (lambda: square(relative=True), "BeitForImageClassification"),
    "layer scale": (lambda: square(layer_scale=0.5), "BeitForImageClassification"),
    "all of BEiT": (lambda: square(**RELATIVE), "BeitForImageClassification"),
    "swin": (lambda: swin(), "SwinModel"),
    "swin classifier": (lambda: swin(num_classes=4, img_size=(36, 44)), "SwinForImageClassification"),
    "swin of EsViT": (lambda: faint(swin(eps=1e-6, num_classes=4)), "SwinForImageClassification"),
}


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_transformers_computes_the_same(tmp_path, name):
    make, theirs_name = NETWORKS[name]
    model = make()
    path = saved(tmp_path / "e.pt", model)
    folder = tmp_path / "e-hf"
    assert export.export(path, "hf") == str(folder)
    theirs = opened(folder)
    assert type(theirs).__name__ == theirs_name
    img = torch.randn(3, model.config["in_chans"], *model.config["img_size"])
    found = theirs(img)
    if theirs_name.endswith("Model"):
        close(found.pooler_output, model(img))
        if model.pool == "cls" or "Swin" in theirs_name:        # else tokens are not normed
            close(found.last_hidden_state, model.encode(img))
    else:
        close(found.logits, model(img))
        base = transformers.AutoModel.from_pretrained(folder, **({} if theirs_name[:3] != "ViT" else
                                                                 dict(add_pooling_layer=False))).eval()(img)
        features = base.last_hidden_state[:, 0] if theirs_name[:3] == "ViT" else base.pooler_output
        close(features, model.features(img))
    # We read both what we wrote, and what transformers makes of it, which has no metadata of ours.
    theirs.save_pretrained(tmp_path / "again")
    names = [{name for name in safetensors.load_file(p / "model.safetensors") if "position_index" not in name}
             for p in (folder, tmp_path / "again")]
    assert names[0] == names[1]
    for place in (folder, tmp_path / "again"):
        ours, left = load_classifier(read(str(place)))
        close(ours(img), model(img))
        assert set(left) <= {"pooler.dense.weight", "pooler.dense.bias"}


def test_names_of_classes_and_numbers_of_the_input(tmp_path):
    path = saved(tmp_path / "e.pt", vit(num_classes=2), mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6),
                 classes=["ant", "bee"])
    folder = export.export(path, "hf")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "ant", 1: "bee"} and config.label2id == {"ant": 0, "bee": 1}
    assert list(transformers.AutoImageProcessor.from_pretrained(folder).image_mean) == [0.1, 0.2, 0.3]
    opened(tmp_path / "e-hf").save_pretrained(tmp_path / "again")
    assert read(str(tmp_path / "again")).config["classes"] == ["ant", "bee"]
    # Names of another number of classes are of another head.
    path = saved(tmp_path / "f.pt", vit(num_classes=3), classes=["ant", "bee"])
    assert transformers.AutoConfig.from_pretrained(export.export(path, "hf")).id2label[2] == "LABEL_2"


# ----------------------------------------------------------------------------------------------------------------
# An MAE with its decoder

def masked(**options):
    torch.manual_seed(0)
    options = dict(decoder_dim=16, decoder_depth=2, decoder_heads=4, mask_ratio=0.5) | options
    model = MAE(**options, img_size=16, patch_size=4, dim=24, depth=2, heads=3).eval()
    for name, p in model.named_parameters():
        if "pos_embed" not in name:
            nn.init.normal_(p, std=0.3)
    return model


@pytest.mark.parametrize("norm_pix", [True, False])
def test_an_mae_has_the_same_loss_and_gradients(tmp_path, norm_pix):
    """For the same noise, with half of the patches hidden: mask_ratio, norm_pix and heads are in config.json."""
    model = masked(norm_pix=norm_pix)
    path = saved(tmp_path / "last.pt", model, "mae", decoder_heads=4, mask_ratio=0.5, norm_pix=norm_pix)
    export.export(path, "hf")
    theirs = opened(tmp_path / "last-hf")
    assert type(theirs) is transformers.ViTMAEForPreTraining
    img, noise = torch.randn(2, 3, 16, 16), torch.rand(2, 16)
    loss, found = model(img, noise.argsort(1)), theirs(img, noise=noise).loss
    close(found, loss)
    loss.backward()
    found.backward()
    close(theirs.vit.embeddings.cls_token.grad, model.cls_token.grad)
    close(theirs.decoder.mask_token.grad, model.mask_token.grad)
    theirs.save_pretrained(tmp_path / "again")
    for place in ("last-hf", "again"):
        ours, stored = load_mae(str(tmp_path / place), Config())
        close(ours(img, noise.argsort(1)), loss)
        assert stored["mask_ratio"] == 0.5 and stored["norm_pix"] is norm_pix
    base = transformers.AutoModel.from_pretrained(tmp_path / "last-hf", mask_ratio=0.0).eval()
    in_order = torch.arange(16).float().expand(2, -1)
    close(base(img, noise=in_order).last_hidden_state, model.encode(img))


def test_decoders_of_others(tmp_path):
    """Heads by the published width; without them, or of images that are not square, it is refused."""
    model = masked(decoder_dim=96, decoder_heads=3)
    out = export.export(saved(tmp_path / "a.pt", model), "hf")
    config = json.loads(open(f"{out}/config.json").read())
    assert config["decoder_num_attention_heads"] == 3 and not {"mask_ratio", "norm_pix_loss"} & set(config)
    state = masked().state_dict()
    flat = MAE(16, 1, 4, img_size=(16, 32), patch_size=4, dim=24, depth=2, heads=3)
    cases = [(dict(model=state, config=model.config), "a decoder that is 16 wide and does not say how many heads"),
             (dict(model={k: v for k, v in state.items() if k != "decoder_norm.bias"}, config=model.config),
              "has a decoder without decoder_norm.bias"),
             (dict(model=state, config=dict(model.config, distill_tap=1)), "is of a D2-MAE run"),
             (dict(model=flat.state_dict(), config=dict(flat.config, decoder_heads=4)), "takes square images")]
    for i, (file, words) in enumerate(cases):
        torch.save(file, tmp_path / f"{i}.pt")
        with pytest.raises(SystemExit, match=words):
            export.export(str(tmp_path / f"{i}.pt"), "hf")


# ----------------------------------------------------------------------------------------------------------------
# Recorded runs of the reference implementations, in transformers

def open_or_refuse(path, folder, heads=None):
    """What transformers opens of a file; None, if a sentence refuses it because its images are not square, say."""
    if hugging_face.unfit(load_classifier(read(path), heads)[0]):
        with pytest.raises(SystemExit, match="which transformers does not support"):
            export.export(path, "hf", str(folder), heads)
        return None
    export.export(path, "hf", str(folder), heads)
    return opened(folder)


@needs_golden
@pytest.mark.parametrize("name", ["mae_vit_ft_cls", "mae_vit_ft_gap", "maelite_vit_ft_gap", "maelite_rpe_ft"])
@torch.no_grad()
def test_recorded_classifiers(tmp_path, name):
    g, path = Golden(name), str(tmp_path / "x.pth")
    torch.save(dict(model=g.under("state"), config=dict(img_size=g.config["img_size"])), path)
    model = open_or_refuse(path, tmp_path / "hf", g.config["num_heads"])
    if model:
        close_recorded(model(g("input/imgs")).logits, g("out/logits"), 2e-5)


@needs_golden
@pytest.mark.parametrize("name", recordings("ckpt_mae_visualize_release"))
@torch.no_grad()
def test_the_recorded_mae(tmp_path, name):
    """An official file with its decoder, and beside it the options that it does not store."""
    g, path = Golden(name), str(tmp_path / "x.pth")
    c, file = g.config, torch.load(FOLDER / g.config["checkpoint"], weights_only=True)
    stored = dict(heads=c["num_heads"], decoder_heads=c["decoder_num_heads"], mask_ratio=c["mask_ratio"],
                  norm_pix_loss=c["norm_pix_loss"], img_size=c["img_size"])
    torch.save(dict(file, config=stored), path)
    model = open_or_refuse(path, tmp_path / "hf")
    found = model(g("input/imgs"), noise=g("rand/noise"))
    close_recorded(found.loss, g("out/loss"), 2e-5)
    close_recorded(found.logits, g("out/pred"), 2e-5)
    assert torch.equal(found.mask, g("out/mask"))


@needs_golden
@pytest.mark.parametrize("name", recordings("ckpt_esvit"))
@torch.no_grad()
def test_the_recorded_esvit(tmp_path, name):
    """Its Swin has an eps of 1e-6, transformers' merges with 1e-5."""
    g = Golden(name)
    for who in ("teacher", "student"):
        model = open_or_refuse(f"{FOLDER / g.config['checkpoint']}:{who}", tmp_path / who)
        if model and model.config.image_size == g.config["img_size"]:
            close_recorded(model(g("input/imgs")).pooler_output, g(f"out/cls_{who}"), 2e-5)
            close_recorded(model(g("input/imgs")).last_hidden_state, g(f"out/region_{who}"), 2e-5)


# ----------------------------------------------------------------------------------------------------------------
# What transformers computes otherwise

@torch.no_grad()
def test_swins_whose_windows_differ(tmp_path):
    """What is refused would be something else there, or nothing; what is not is the same."""
    refused = 0
    for size in ((16, 16), (16, 24), (36, 36), (24, 24), (40, 32), (12, 12)):
        for depths in ((2, 2), (1, 2), (2, 1)):
            model, img = swin(img_size=size, depths=depths), torch.randn(2, 3, *size)
            reason = hugging_face.unfit(model)
            name = f"{size}{depths}"
            if reason:
                with pytest.raises(SystemExit, match="has windows of .*, which transformers does not support"):
                    export.export(saved(tmp_path / f"{name}.pt", model), "hf")
                refused += 1
                continue
            export.export(saved(tmp_path / f"{name}.pt", model), "hf")
            close(opened(tmp_path / f"{name}-hf")(img).pooler_output, model(img))
    assert 0 < refused < 18


def test_what_transformers_has_no_place_for(tmp_path):
    for i, (model, words) in enumerate([(special(TwoHeads), "two heads"),
                                        (special(**RELATIVE), "images that are not square"),
                                        (swin(eps=1e-3), "an eps of 0.001")]):
        with pytest.raises(SystemExit, match=f"has {words}.*, which transformers does not support: use --to safetens"):
            export.export(saved(tmp_path / f"{i}.pt", model), "hf")


# ----------------------------------------------------------------------------------------------------------------
# Images

@pytest.mark.parametrize("size, channels", [(32, 3), (224, 3), (240, 3), (32, 1)])
def test_images_are_cropped_as_we_evaluate(tmp_path, size, channels):
    """Resized, cropped and normalised to the same pixels, upright and lying, with an odd rest."""
    model = vit(img_size=size, in_chans=channels)
    facts = dict(mean=(0.5,) * channels, std=(0.25,) * channels)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(hugging_face.preprocessor(model, facts)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    rng = np.random.default_rng(0)
    for shape in ((333, 500), (480, 301)):
        img = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(shape, Image.BICUBIC)
        if channels == 1:
            img = img.convert("L")
        pixels = torch.from_numpy(np.array(img)).reshape(*shape[::-1], channels).permute(2, 0, 1)
        ours = CenterCrops([pixels], model.config["img_size"], channels).crop(pixels, None)
        theirs = processor(images=img, return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(theirs, (ours / 255 - 0.5) / 0.25, rtol=0, atol=1e-5)
