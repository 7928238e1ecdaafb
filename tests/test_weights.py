"""weights/reading.py: any layout, and nothing silently wrong."""
import argparse
import hashlib
import json
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nets.beit import BeitViT, TwoHeads
from vit import Swin, ViT
from weights import (
    build,
    digest,
    encoder_options,
    file_and_key,
    layer_of,
    load_classifier,
    load_encoder,
    load_into,
    mlp_ratio_of,
    read,
    vit_options,
)
from weights.__main__ import main


def vit(**options):
    torch.manual_seed(0)
    return ViT(**{**dict(img_size=16, patch_size=4, dim=24, depth=2, heads=3, positions="learned"), **options})


def quiet(_):
    pass


def prefixed(prefix, state):
    return {prefix + k: v for k, v in state.items()}


LAYOUTS = {
    "bare": lambda s: s,
    "mae": lambda s: dict(model=s, optimizer={}, epoch=3, scaler={}, args=argparse.Namespace(model="mae_vit")),
    "mae-lite": lambda s: dict(start_epoch=1, model={**prefixed("module.model.", s), **prefixed(
        "module.tch_model.", {k: v * 0 for k, v in s.items()})}, best_top1=np.float64(1.5)),
    "mae-lite, one gpu": lambda s: dict(model={**prefixed("tch_model.", {k: v * 0 for k, v in s.items()}),
                                               **prefixed("model.", s)}),
    "moco": lambda s: dict(epoch=1, arch="vit_small", state_dict={
        **prefixed("module.momentum_encoder.", {k: v * 0 for k, v in s.items()}),
        **prefixed("module.base_encoder.", s), "module.predictor.0.weight": torch.zeros(3)}),
    "dino": lambda s: dict(student=prefixed("module.backbone.", {k: v * 0 for k, v in s.items()}),
                           teacher=prefixed("backbone.", s), args=argparse.Namespace(arch="vit_tiny"), epoch=2),
    "timm": lambda s: dict(state_dict=prefixed("module.", s), arch="vit", metric=1.0),
    "compiled": lambda s: dict(model=prefixed("_orig_mod.", s), config=dict(heads=3)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    model = vit()
    torch.save(LAYOUTS[layout](model.state_dict()), tmp_path / "file.pth")
    found = load_encoder(str(tmp_path / "file.pth"), 3, quiet)
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(found(img), model(img))
    assert vit_options(read(str(tmp_path / "file.pth")), 3) == dict(
        dim=24, depth=2, heads=3, mlp_ratio=4.0, patch_size=4, in_chans=3, img_size=(16, 16))


@pytest.mark.parametrize("layout, key", [("dino", "student"), ("moco", "momentum_encoder")])
def test_choosing_a_network(tmp_path, layout, key):
    torch.save(LAYOUTS[layout](vit().state_dict()), tmp_path / "file.pth")
    assert not read(f"{tmp_path}/file.pth:{key}").state["patch_embed.proj.weight"].any()
    assert read(str(tmp_path / "file.pth"), key).state["cls_token"].shape == (1, 1, 24)
    with pytest.raises(SystemExit, match="has nothing called 'studnt'"):
        read(f"{tmp_path}/file.pth:studnt")


def test_safetensors(tmp_path):
    model, header, body = vit(), {}, b""
    for name, t in model.state_dict().items():
        raw = t.numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(t.shape), data_offsets=[len(body), len(body) + len(raw)])
        body += raw
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(str(tmp_path / "m.safetensors"), 3, quiet)(img), model(img))


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


def test_code_is_refused(tmp_path, capfd):
    torch.save(dict(model=vit().state_dict(), extra=Evil()), tmp_path / "evil.pth")
    with pytest.raises(SystemExit, match="would run code"):
        read(str(tmp_path / "evil.pth"))
    assert "code ran" not in capfd.readouterr().out


@pytest.mark.parametrize("content, words", [
    (b"", "damaged"), (b"not a checkpoint", "damaged"), (dict(epoch=1), "no weights"), ([1, 2], "holds a list"),
    (dict(model={"fc.weight": torch.zeros(2)}), "no network known here"),
    (dict(model={"patch_embed.proj.weight": torch.zeros(1), "layers.0.x": torch.zeros(1)}), "no plain vision")])
def test_what_is_no_checkpoint(tmp_path, content, words):
    path = tmp_path / "x.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(SystemExit, match=words):
        read(str(path))
    with pytest.raises(SystemExit, match="does not exist"):
        read(str(tmp_path / "absent.pth"))


def test_heads(tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save(dict(model=vit().state_dict()), path)
    with pytest.raises(SystemExit, match="give --heads"):
        load_encoder(path)
    torch.save(dict(model=vit().state_dict(), config=dict(heads=3)), path)
    assert load_encoder(path, say=quiet).config["heads"] == 3
    with pytest.raises(SystemExit, match="trained with 3 heads and the network here has 12.*--heads 3"):
        load_into(vit(heads=12), read(path), quiet)
    with torch.device("meta"):
        base = ViT(dim=768, depth=1, heads=12).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in base.items()}, path)
    assert vit_options(read(path))["heads"] == 12                  # width 768 has one published answer


def test_nothing_is_silently_missing(tmp_path):
    path, said = str(tmp_path / "x.pth"), []
    state = vit().state_dict()
    torch.save(dict(model={k: v for k, v in state.items() if "blocks.1.mlp" not in k}), path)
    with pytest.raises(SystemExit, match="lacks 4 tensors of the encoder"):
        load_into(vit(), read(path), said.append)
    assert "blocks.1.mlp.fc1.weight" in said[0]
    torch.save(dict(model=state | {"blocks.0.norm1.weight": torch.ones(7)}), path)
    with pytest.raises(SystemExit, match=r"blocks.0.norm1.weight is \(7,\) in the file and \(24,\)"):
        load_into(vit(), read(path), quiet)


def test_heads_and_decoders_may_be_fresh(tmp_path):
    path, said = str(tmp_path / "x.pth"), []
    from mae import MAE
    torch.save(dict(model=vit().state_dict() | {"head.weight": torch.zeros(9, 24)}), path)
    model = MAE(8, 1, 2, img_size=16, patch_size=4, dim=24, depth=2, heads=3)
    missing = load_into(model, read(path), said.append)
    assert missing and all(name.startswith(("decoder_", "mask_token")) for name in missing)
    assert "not expected: head (1)" in said[0]
    assert load_into(vit(num_classes=5, pool="avg"), read(path), quiet) == [
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_positions_follow_the_grid(tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save(dict(model=vit().state_dict()), path)
    assert load_encoder(path, 3, quiet, img_size=(24, 32)).pos_embed.shape == (1, 1 + 48, 24)
    wide = vit(img_size=(16, 32))
    torch.save(dict(model=wide.state_dict()), path)
    with pytest.raises(SystemExit, match="32 patches, which is no square"):
        load_encoder(path, 3, quiet)
    torch.save(dict(model=wide.state_dict(), config=wide.config), path)
    img = torch.randn(1, 3, 16, 32)
    assert torch.equal(load_encoder(path, say=quiet)(img), wide(img))


@pytest.mark.parametrize("rows", [24, 40, 96, 100])
def test_mlp_ratio_is_seen(tmp_path, rows):
    """Also where dim * (rows / dim) is a little less than rows in floating point, and in a decoder."""
    path = str(tmp_path / "x.pt")
    for dim in (24, 88, 104):
        model = vit(dim=dim, heads=4, mlp_ratio=(rows + 0.5) / dim)
        assert len(model.blocks[0].mlp.fc1.weight) == rows
        decoder = {"decoder_" + k: v for k, v in model.state_dict().items() if k.startswith("blocks.")}
        torch.save(dict(model={**model.state_dict(), **decoder}), path)
        img = torch.randn(2, 3, 16, 16)
        assert torch.equal(load_encoder(path, 4, quiet)(img), model(img))
        file = read(path)
        assert mlp_ratio_of(file, "decoder_blocks.0") == mlp_ratio_of(file) == pytest.approx(rows / dim)
    assert mlp_ratio_of(file, "blocks.7") == 4.0                # a reduced block has no MLP
    swin = Swin(32, 2, dim=16, depths=(1, 1), heads=(2, 4), window=4, mlp_ratio=2.5)
    torch.save(dict(model=swin.state_dict(), config=swin.config), path)
    img = torch.randn(1, 3, 32, 32)
    assert torch.equal(load_encoder(path, say=quiet)(img), swin(img))


SWIN = dict(img_size=32, patch_size=2, dim=16, depths=(2, 1), heads=(2, 4), window=4)


@pytest.mark.parametrize("kind, options", [
    (ViT, {}), (BeitViT, dict(relative=True)), (BeitViT, dict(layer_scale=0.1)), (BeitViT, dict(key_bias=False)),
    (TwoHeads, dict(num_classes=3, pool="avg")), (Swin, SWIN)])
def test_the_class_is_what_the_file_has(tmp_path, kind, options):
    torch.manual_seed(0)
    small = {} if kind is Swin else dict(img_size=16, patch_size=4, dim=24, depth=2, heads=3, positions="learned")
    model = kind(**{**small, **options}).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    path = str(tmp_path / "x.pt")
    torch.save(dict(model=model.state_dict(), config=model.config), path)
    back, left = load_classifier(read(path))
    img = torch.randn(2, 3, *model.config["img_size"])
    assert type(back) is kind and left == [] and torch.equal(back(img), model(img))
    assert type(build(encoder_options(read(path)))) is (BeitViT if kind is BeitViT else Swin if kind is Swin else ViT)


@pytest.mark.parametrize("pool", ["cls", "avg"])
def test_files_of_before_are_read(tmp_path, pool):
    """They store the pool as "readout", and options of fine-tuning with every ViT."""
    model = vit(pool=pool, num_classes=3).eval()
    config = dict(model.config, readout=pool, relative=False, layer_scale=0.0, key_bias=True)
    del config["pool"]
    torch.save(dict(model=model.state_dict(), config=config, method="finetune"), tmp_path / "x.pt")
    weights = read(str(tmp_path / "x.pt"))
    assert weights.config["pool"] == pool and "readout" not in weights.config
    back, left = load_classifier(weights)
    img = torch.randn(2, 3, 16, 16)
    assert type(back) is ViT and left == [] and torch.equal(back(img), model(img))
    assert torch.equal(load_encoder(str(tmp_path / "x.pt"), say=quiet, pool=pool)(img), model.features(img))


def test_file_key_and_digest(tmp_path):
    path = tmp_path / "a:b.pt"
    path.write_bytes(b"weights")
    assert file_and_key(str(path)) == (str(path), "") and file_and_key(f"{path}:teacher") == (str(path), "teacher")
    assert digest(str(path)) == digest(f"{path}:teacher") == hashlib.sha256(b"weights").hexdigest()


def test_layers():
    """0 before the blocks, blocks from 1, then one more; a Swin's merging belongs to the block before it."""
    model = ViT(16, 8, dim=24, depth=2, heads=3, num_classes=4)
    layers = {name: layer_of(model, name) for name, _ in model.named_parameters()}
    assert {layers[k] for k in ("cls_token", "pos_embed", "patch_embed.proj.bias")} == {0}
    assert (layers["blocks.0.norm1.bias"], layers["blocks.1.mlp.fc2.bias"]) == (1, 2)
    assert layers["norm.weight"] == layers["head.bias"] == layer_of(model, "head_dist.bias") == 3
    swin = Swin(**SWIN)
    found = {name: layer_of(swin, name) for name in dict(swin.named_parameters())}
    assert (found["patch_embed.norm.bias"], found["layers.0.blocks.1.norm1.bias"]) == (0, 2)
    assert found["layers.0.downsample.reduction.weight"] == 2
    assert (found["layers.1.blocks.0.attn.qkv.bias"], found["norm.bias"]) == (3, 4)


def test_what_is_said_of_a_file(tmp_path, capsys):
    """One readable line for each thing, whatever is stored."""
    model, swin = vit(num_classes=5), Swin(**SWIN)
    files = {"stored.pt": dict(model=model.state_dict(), config=model.config, method="mae"),
             "bare.pt": model.state_dict(), "swin.pt": dict(model=swin.state_dict())}
    said = {}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        main([str(tmp_path / name)])
        first, *lines = capsys.readouterr().out.splitlines()
        assert first.startswith(f"{tmp_path / name}: ") and "{" not in "".join(lines)
        said[name] = dict(line.split(maxsplit=1) for line in lines)
    assert said["stored.pt"] == dict(
        method="mae", network="ViT", dim="24", depth="2", heads="3", mlp_ratio="4.0", patch_size="4", in_chans="3",
        img_size="(16, 16)", tensors="cls_token (1), pos_embed (1), patch_embed (2), blocks (24), norm (2), head (2)")
    assert (said["bare.pt"]["method"], said["bare.pt"]["heads"]) == ("not stored", "not stored")
    assert (said["swin.pt"]["network"], said["swin.pt"]["heads"]) == ("Swin", "(2, 4)")
    for argv in ([], ["--help"], ["a", "b"]):
        with pytest.raises(SystemExit, match="python -m weights FILE"):
            main(argv)


def test_saying_it_ends_quietly(tmp_path):
    torch.save(vit().state_dict(), tmp_path / "x.pt")
    done = subprocess.run([sys.executable, "-m", "weights", str(tmp_path / "x.pt")], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and "heads        not stored" in done.stdout
