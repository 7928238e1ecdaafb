import argparse
import json
import struct

import numpy as np
import pytest
import torch

from mae import MAE
from vit import ViT
from weights import build_vit, load_into, read, shape_of


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
    found = build_vit(str(tmp_path / "file.pth"), 3, quiet)
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(found(img), model(img))
    assert shape_of(read(str(tmp_path / "file.pth")), 3) == dict(
        dim=24, depth=2, heads=3, patch_size=4, in_chans=3, img_size=[16, 16])


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
    assert torch.equal(build_vit(str(tmp_path / "m.safetensors"), 3, quiet)(img), model(img))


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
        build_vit(path)
    torch.save(dict(model=vit().state_dict(), config=dict(heads=3)), path)
    assert build_vit(path, say=quiet).config["heads"] == 3
    with pytest.raises(SystemExit, match="trained with 3 heads and the network here has 12.*--heads 3"):
        load_into(vit(heads=12), read(path), quiet)
    with torch.device("meta"):
        base = ViT(dim=768, depth=1, heads=12).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in base.items()}, path)
    assert shape_of(read(path))["heads"] == 12                  # width 768 has one published answer


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
    torch.save(dict(model=vit().state_dict() | {"head.weight": torch.zeros(9, 24)}), path)
    model = MAE(vit(positions="sincos"), 8, 1, 2)
    missing = load_into(model, read(path), said.append)
    assert missing and all(name.startswith(("decoder_", "mask_token")) for name in missing)
    assert "not expected: head (1)" in said[0]
    assert load_into(vit(num_classes=5, readout="avg"), read(path), quiet) == [
        "fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]


def test_positions_follow_the_grid(tmp_path):
    path = str(tmp_path / "x.pth")
    torch.save(dict(model=vit().state_dict()), path)
    assert build_vit(path, 3, quiet, img_size=(24, 32)).pos_embed.shape == (1, 1 + 48, 24)
    wide = vit(img_size=(16, 32))
    torch.save(dict(model=wide.state_dict()), path)
    with pytest.raises(SystemExit, match="32 patches, which is no square"):
        build_vit(path, 3, quiet)
    torch.save(dict(model=wide.state_dict(), config=wide.config), path)
    img = torch.randn(1, 3, 16, 32)
    assert torch.equal(build_vit(path, say=quiet)(img), wide(img))
