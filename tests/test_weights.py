"""weights/reading.py: any layout, and nothing silently wrong."""
import argparse
import hashlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nets.beit import BeitViT, TwoHeads
from runtime.options import vit_config
from vit import Swin, ViT
from weights import (
    build,
    damage_in,
    digest,
    encoder_options,
    file_and_key,
    init_mlp_ratio,
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
        dim=24, depth=2, heads=3, mlp_ratio=4.0, patch_size=4, in_chans=3, img_size=(16, 16), eps=1e-6)


@pytest.mark.parametrize("layout, key", [("dino", "student"), ("moco", "momentum_encoder")])
def test_choosing_a_network(tmp_path, layout, key):
    torch.save(LAYOUTS[layout](vit().state_dict()), tmp_path / "file.pth")
    assert not read(f"{tmp_path}/file.pth:{key}").state["patch_embed.proj.weight"].any()
    assert read(str(tmp_path / "file.pth"), key).state["cls_token"].shape == (1, 1, 24)
    with pytest.raises(SystemExit, match="has nothing called 'studnt'"):
        read(f"{tmp_path}/file.pth:studnt")


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
        img_size="(16, 16)", eps="1e-06",
        tensors="cls_token (1), pos_embed (1), patch_embed (2), blocks (24), norm (2), head (2)")
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


# ----------------------------------------------------------------------------------------------------------------
# Whose network it is, and which parts of it are not ours


def small_file(tmp_path, state=None, name="x.pth", **file):
    """A file of vit()'s weights, or of others, with what else it should hold -> its path."""
    torch.save(dict(model=vit().state_dict() if state is None else state, **file), tmp_path / name)
    return str(tmp_path / name)


@pytest.mark.parametrize("prefix", [
    "_orig_mod.module.", "module._orig_mod.module.", "net.", "vit.", "backbone.vit.", "model.backbone.", "module.net.",
    "student_backbone.", "model._orig_mod.encoder.", "trunk.0.", "a.b.c.d."])
def test_any_prefix(tmp_path, prefix):
    """One network is found behind any prefix, whatever else is in the file."""
    model, img = vit(), torch.randn(2, 3, 16, 16)
    others = {"classifier.weight": torch.zeros(2, 24), prefix + "predictor.weight": torch.zeros(2, 2)}
    path = small_file(tmp_path, {**prefixed(prefix, model.state_dict()), **others})
    assert torch.equal(load_encoder(path, 3, quiet)(img), model(img))
    assert repr(prefix) in read(path).layout


@pytest.mark.parametrize("key", ["model_state_dict", "net", "ema", "weights", "student_backbone"])
def test_any_key(tmp_path, key):
    """The one dict of tensors is the network, whatever it is called."""
    torch.save({"epoch": 3, "optimizer": dict(state={}, lr=0.1), key: vit().state_dict()}, tmp_path / "x.pth")
    img = torch.randn(2, 3, 16, 16)
    assert torch.equal(load_encoder(str(tmp_path / "x.pth"), 3, quiet)(img), vit()(img))
    assert read(str(tmp_path / "x.pth")).layout == f"under {key!r}"
    torch.save({key: vit().state_dict(), "average": vit().state_dict()}, tmp_path / "x.pth")
    with pytest.raises(SystemExit, match=f"holds several networks: give .*x.pth:KEY with one of {key}, average"):
        read(str(tmp_path / "x.pth"))
    assert torch.equal(load_encoder(f"{tmp_path}/x.pth:{key}", 3, quiet)(img), vit()(img))


def test_of_several_networks_one_must_be_named(tmp_path):
    model, zeros = vit(), {k: v * 0 for k, v in vit().state_dict().items()}
    path = small_file(tmp_path, {**prefixed("student.backbone.", model.state_dict()), "student.head.w": torch.ones(1),
                                 **prefixed("teacher.backbone.", zeros)})
    with pytest.raises(SystemExit, match=r"several networks: give .*x.pth:KEY with one of student.backbone, teach"):
        read(path)
    assert torch.equal(load_encoder(f"{path}:student", 3, quiet).cls_token, model.cls_token)
    assert "head.w" in read(f"{path}:student").state            # DINO's heads stand beside the backbone
    assert not read(f"{path}:teacher.backbone").state["cls_token"].any()
    path = small_file(tmp_path, {**model.state_dict(), **prefixed("momentum.", zeros)})         # a copy beside is none
    assert torch.equal(load_encoder(path, 3, quiet).cls_token, model.cls_token)


def test_layer_scale_of_timm_and_dinov2(tmp_path):
    """ls1.gamma and ls2.gamma are BEiT's gamma_1 and gamma_2."""
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    theirs = timm.VisionTransformer(img_size=16, patch_size=4, embed_dim=24, depth=2, num_heads=3, num_classes=0,
                                    init_values=0.5).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.2)
    path = small_file(tmp_path, theirs.state_dict() | {"mask_token": torch.zeros(1, 24)})
    said = []
    ours, img = load_encoder(path, 3, said.append), torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours.encode(img), theirs.forward_features(img), rtol=1e-5, atol=1e-5)
    assert said[0].endswith("missing, so fresh: none; not expected: mask_token (1)")
    with pytest.raises(SystemExit, match="holds blocks.N.gamma_1, blocks.N.gamma_2, which the network here has"):
        load_into(vit(), read(path), quiet)                     # as --init of a plain network does


PARTS = ["blocks.0.attn.q_norm.weight", "blocks.1.ls3.gamma", "blocks.2.norm1.weight", "blocks.0.attn.rel_pos_h",
         "norm_pre.weight", "norm.extra", "patch_embed.norm.weight", "patch_embed.proj2.weight", "reg_token",
         "register_tokens", "storage_tokens", "pos_embed_2", "cls_pos_embed", "absolute_pos_embed",
         "rope_embed.periods", "rel_pos_bias.relative_position_bias_table", "layers.7.x"]


@pytest.mark.parametrize("part", PARTS)
def test_no_part_of_an_encoder_is_left_behind(tmp_path, part):
    path = small_file(tmp_path, vit().state_dict() | {part: torch.ones(24)})
    named = part.replace("0", "N").replace("1.", "N.") if part.startswith("blocks") else part
    for load in (lambda: load_encoder(path, 3, quiet), lambda: load_classifier(read(path), 3),
                 lambda: load_into(vit(), read(path), quiet)):
        with pytest.raises(SystemExit, match="has no place for|has no blocks.2.attn.qkv.weight") as stop:
            load()
        assert part in str(stop.value) or named.split(".")[-1] in str(stop.value)


@pytest.mark.parametrize("other", ["mask_token", "decoder_pos_embed", "decoder_blocks.0.norm1.weight", "head.0.weight",
                                   "fc_norm.weight", "predictor.blocks.0.x", "momentum.norm.weight", "queue"])
def test_what_stands_beside_an_encoder_may_stay(tmp_path, other):
    said = []
    load_encoder(small_file(tmp_path, vit().state_dict() | {other: torch.ones(1, 1, 24)}), 3, said.append)
    assert f"not expected: {other.split('.')[0]} (1)" in said[0]


def test_a_block_lacks_what_others_have(tmp_path):
    """It may not start afresh: only a network without any layer scale or relative positions gets new ones."""
    options = dict(img_size=16, patch_size=4, dim=24, depth=2, heads=3, positions="learned")
    beit, swin = BeitViT(**options, relative=True, layer_scale=0.1).state_dict(), Swin(**SWIN).state_dict()
    for state, name in [(beit, "blocks.1.gamma_1"), (beit, "blocks.0.gamma_2"),
                        (beit, "blocks.1.attn.relative_position_bias_table"),
                        (swin, "layers.0.blocks.1.attn.relative_position_bias_table")]:
        path = small_file(tmp_path, {k: v for k, v in state.items() if k != name})
        with pytest.raises(SystemExit, match=f"lacks 1 tensors of the encoder .{name}"):
            load_encoder(path, 3, quiet)
    assert len(load_into(BeitViT(**options, layer_scale=0.1), read(small_file(tmp_path)), quiet)) == 4


# ----------------------------------------------------------------------------------------------------------------
# Files that are damaged, odd, or of another kind


def test_a_changed_byte_is_noticed(tmp_path):
    """Every 97th byte of a file is changed, and of what is not a tensor each 11th: refused, or no difference."""
    path = small_file(tmp_path, config=vit().config)
    good, same = read(path), Path(path).read_bytes()
    assert damage_in(path) is None
    body = len(same) - 9000                                     # the list of contents stands at the end
    refused = 0
    for at in [*range(0, body, 97), *range(body, len(same), 11)]:
        changed = bytearray(same)
        changed[at] ^= 0x11                                     # also the bit that marks a folder
        Path(path).write_bytes(changed)
        try:
            found = read(path)
        except SystemExit as stop:
            refused += "damaged" in str(stop)
        else:
            assert found.config == good.config and found.state.keys() == good.state.keys()
            assert all(torch.equal(found.state[k], t) for k, t in good.state.items()), at
    assert refused > 800


def test_files_without_checksums_are_read(tmp_path):
    state = vit().state_dict()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pth", "unchecked.pth"):
        assert damage_in(str(tmp_path / name)) is None
        assert torch.equal(read(str(tmp_path / name)).state["pos_embed"], state["pos_embed"])


def shaped(make):
    """A case for test_odd_files: the same state dict, with tensors replaced by name."""
    return lambda: dict(model=vit().state_dict() | make(vit().state_dict()), config=dict(heads=3))


def stored(**config):
    return lambda: dict(model=vit().state_dict(), config=dict(heads=3) | config)


QKV, PATCHES = "blocks.0.attn.qkv.weight", "patch_embed.proj.weight"
ODD = {
    "nan": (shaped(lambda s: {"norm.bias": s["norm.bias"] / 0}), "NaN or infinite weights in norm.bias"),
    "inf": (shaped(lambda s: {QKV: s[QKV].double() * 1e300}), f"infinite weights in {QKV}"),
    "sparse": (shaped(lambda s: {QKV: s[QKV].to_sparse()}), f"{QKV} as a sparse"),
    "meta": (shaped(lambda s: {QKV: s[QKV].to("meta")}), f"{QKV} as a sparse.*meta"),
    "complex": (shaped(lambda s: {QKV: s[QKV].to(torch.complex64)}), f"{QKV} as a sparse.*complex"),
    "quantised": (shaped(lambda s: {QKV: torch.quantize_per_tensor(s[QKV], 0.1, 0, torch.qint8)}), "quantised"),
    "integers": (shaped(lambda s: {QKV: s[QKV].long()}), f"{QKV} as torch.int64"),
    "repeated": (shaped(lambda s: {QKV: torch.zeros(1).expand(10 ** 12)}), f"{QKV} as a view that repeats"),
    "no tensor": (shaped(lambda s: {QKV: [1.0]}), f"a list called {QKV}"),
    "patches of no dimension": (shaped(lambda s: {PATCHES: torch.tensor(1.0)}), r"shape \(\), and 4 dimensions"),
    "positions of two": (shaped(lambda s: {"pos_embed": torch.zeros(17, 24)}), "shape .17, 24., and 3 dimensions"),
    "two tables": (shaped(lambda s: {"pos_embed": torch.zeros(2, 26, 24)}), "does not fit: pos_embed"),
    "no positions": (shaped(lambda s: {"pos_embed": torch.zeros(1, 1, 24)}), "positions for 0 patches"),
    "too wide": (shaped(lambda s: {PATCHES: torch.zeros(50000, 1, 1, 1)}), f"has no {QKV} of width 50000"),
    "oblong patches": (shaped(lambda s: {PATCHES: torch.zeros(24, 3, 4, 8)}), "does not fit: patch_embed.proj.weight"),
    "a gap": (shaped(lambda s: {"blocks.100000.x": torch.zeros(1)}), "has no blocks.2.attn.qkv.weight"),
    "a number too long": (shaped(lambda s: {f"blocks.{'9' * 5000}.x": torch.zeros(1)}), "has no blocks.2.attn.qkv"),
    "a stage too many": (shaped(lambda s: {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(49, 2),
                                           "layers.100000.x": torch.zeros(1)}), "has no layers.0.blocks.0.attn.qkv"),
    "names of numbers": (lambda: dict(model={0: torch.zeros(1)}), "no weights by name: its keys are model"),
    "nested size": (stored(img_size=[[16, 16]]), "stores img_size as .*whole numbers above 0 were expected"),
    "three sizes": (stored(img_size=[16, 16, 3]), "height and width were expected"),
    "heads of a word": (stored(heads="three"), "stores heads as 'three', and whole numbers"),
    "heads below 0": (stored(heads=-3), "stores heads as '-3', and whole numbers"),
    "heads of a half": (stored(heads=1.5), "stores heads as '1.5', and whole numbers"),
    "heads of a list": (stored(heads=[3, 3]), "stores heads as .3, 3., and one number"),
    "heads that do not divide": (stored(heads=5), "makes no network: 5 heads do not divide the width 24"),
    "mean of a word": (stored(mean="0.5 0.5 0.5"), "stores mean as '0.5 0.5 0.5', and finite numbers were"),
    "mean of words": (stored(mean=["0.5"] * 3), "stores mean as .*finite numbers were"),
    "mean of one number": (stored(mean=0.5), "stores mean as '0.5', and a list was"),
    "std of nan": (stored(std=[float("nan")] * 3), "stores std as .*finite numbers were"),
    "config": (lambda: dict(model=vit().state_dict(), config="vit"), "its options under 'config' as a str, and a dict"),
    "a tensor for config": (lambda: dict(model=vit().state_dict(), config=torch.zeros(2)), "as a Tensor, and a dict"),
    "method": (lambda: dict(model=vit().state_dict(), method=["mae"]), "stores method as .*one value"),
    "no cls token": (lambda: {k: v for k, v in vit().state_dict().items() if k != "cls_token"}, "it has no cls_token"),
    "without positions": (lambda: {k: v for k, v in vit().state_dict().items() if k != "pos_embed"},
                          r"it has no pos_embed \(positions\)"),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.filterwarnings("ignore")                           # torch warns of some of its own kinds of tensors
def test_odd_files(tmp_path, case):
    """Each is refused with a sentence on every way in, and none takes long or much memory."""
    make, words = ODD[case]
    torch.save(make(), tmp_path / "x.pt")
    path = str(tmp_path / "x.pt")
    for load in (lambda: load_encoder(path, say=quiet), lambda: load_classifier(read(path))):
        with pytest.raises(SystemExit, match=words) as stop:
            load()
        assert "\n" not in str(stop.value)


def test_safetensors_of_any_type(tmp_path, monkeypatch):
    """Whole numbers, fp8 and the like are no damage; in a weight, whole numbers lack their scale."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    path, state = str(tmp_path / "m.safetensors"), vit().state_dict()
    others = {"queue_ptr": torch.zeros(1, dtype=torch.int16), "seen": torch.zeros(2).to(torch.uint32),
              "scale": torch.ones(2).to(torch.float8_e5m2), "flag": torch.tensor(True)}
    save_file(state | others, path)
    img = torch.randn(1, 3, 16, 16)
    assert torch.equal(load_encoder(path, 3, quiet)(img), vit()(img))
    save_file(state | {"norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}, path)
    assert torch.equal(load_encoder(path, 3, quiet)(img), vit()(img))
    save_file({k: v.to(torch.int8) for k, v in state.items()}, path)
    with pytest.raises(SystemExit, match="holds .* as torch.int8, and floating-point numbers were expected"):
        load_encoder(path, 3, quiet)
    Path(path).write_bytes(Path(path).read_bytes()[:-100])
    with pytest.raises(SystemExit, match="damaged"):
        read(path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(SystemExit, match=r"need the package safetensors: pip install '\.\[safetensors\]'"):
        read(path)


# ----------------------------------------------------------------------------------------------------------------
# Networks that follow from a file


@pytest.mark.parametrize("channels", [1, 2, 4, 6])
def test_rgb_for_other_channels(tmp_path, channels):
    """As timm makes it, and said; of other channels than three it is refused."""
    timm = pytest.importorskip("timm.models")
    path, said = small_file(tmp_path), []
    weight = vit().state_dict()[PATCHES]
    model = vit(in_chans=channels)
    load_into(model, read(path), said.append)
    torch.testing.assert_close(model.patch_embed.proj.weight, timm.adapt_input_conv(channels, weight))
    assert f"matched, patch_embed.proj.weight made from that of RGB for --in-chans {channels}; missing" in said[0]
    if channels in (1, 6):                                      # a grey image is to them what it is to RGB
        grey = torch.rand(2, 1, 16, 16)
        torch.testing.assert_close(model(grey.expand(-1, channels, -1, -1)), vit()(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(SystemExit, match=r"does not fit: patch_embed.proj.weight is \(24, 5, 4, 4\)"):
        load_into(model, read(small_file(tmp_path, vit(in_chans=5).state_dict(), "five.pth")), quiet)
    load_into(vit(), read(path), said.append)
    assert "made from" not in said[1]


def test_init_decides_the_mlp_ratio(tmp_path):
    """Scripts build the network of --model around the file of --init; a resumed run no longer needs the file."""
    cfg = SimpleNamespace(model="vit_mini", heads=4, patch_size=4, img_size=(16,), in_chans=3, init=None,
                          out=str(tmp_path / "out"))
    assert ViT(**vit_config(cfg)).config["mlp_ratio"] == 4.0
    trained = ViT(**vit_config(cfg) | dict(mlp_ratio=2.5), positions="learned")
    cfg.init = small_file(tmp_path, trained.state_dict())
    model = ViT(**vit_config(cfg), positions="learned")
    load_into(model, read(cfg.init), quiet)
    assert model.config["mlp_ratio"] == 2.5
    assert torch.equal(model.blocks[3].mlp.fc1.weight, trained.blocks[3].mlp.fc1.weight)
    swin = Swin(**SWIN, mlp_ratio=3)
    assert init_mlp_ratio(SimpleNamespace(init=small_file(tmp_path, swin.state_dict()), out="x")) == 3.0
    cfg.init = str(tmp_path / "gone.pt")                        # a run that goes on has its own encoder.pt
    assert init_mlp_ratio(cfg) == 4.0
    (tmp_path / "out").mkdir()
    torch.save(dict(model=trained.state_dict(), config=trained.config), tmp_path / "out" / "encoder.pt")
    assert init_mlp_ratio(cfg) == 2.5


@pytest.mark.parametrize("ratio", [1.7, 2.0, 3.3, 4.0])
def test_a_decoder_has_the_encoders_ratio(tmp_path, ratio):
    """As the official MAE. Its other width may tell the ratio more exactly: 24 * 1.7 and 24 * 1.67 are 40 both."""
    from mae import MAE
    mae = MAE(32, 1, 2, img_size=16, patch_size=4, dim=24, depth=2, heads=3, mlp_ratio=ratio)
    assert len(mae.decoder_blocks[0].mlp.fc1.weight) == int(32 * ratio)
    weights = read(small_file(tmp_path, mae.state_dict()))
    again = MAE(32, 1, 2, **vit_options(weights, 3))
    assert load_into(again, weights, quiet) == []


@pytest.mark.parametrize("size, window", [(80, 7), (112, 7), (112, 14), (144, 7), (176, 7), (208, 7), (224, 7),
                                          (224, 14), (240, 7), (240, 14)])
def test_swins_of_any_size_load_as_they_are(tmp_path, size, window):
    """Without a stored size, one at which the windows are those of the file: nothing is resized."""
    torch.manual_seed(0)
    swin, said = Swin(size, dim=8, depths=(2, 1, 1, 1), heads=(2, 2, 2, 2), window=window), []
    for name, file in (("bare.pt", {}), ("stored.pt", dict(config=swin.config))):
        again = load_encoder(small_file(tmp_path, swin.state_dict(), name, **file), say=said.append)
        assert [(b.attn.side, b.attn.shift) for layer in again.layers for b in layer.blocks] == [
            (b.attn.side, b.attn.shift) for layer in swin.layers for b in layer.blocks]
        assert "resized" not in " ".join(said) and "missing, so fresh: none" in said[-1]
    assert again.config["img_size"] == (size, size)


def test_masks_tell_a_swins_size(tmp_path):
    """With windows alone, 448 pixels could be 224, where the last stage has no shift."""
    swin = Swin(448, dim=8, depths=(2, 1, 1, 2), heads=(2, 2, 2, 2))
    masks = {"layers.0.blocks.1.attn_mask": torch.zeros(256, 49, 49)}
    again = load_encoder(small_file(tmp_path, swin.state_dict() | masks), say=quiet)
    assert again.config["img_size"] == (448, 448) and again.layers[3].blocks[1].attn.shift == 3


def test_a_swin_with_other_windows_is_refused(tmp_path):
    swin = Swin(112, dim=8, depths=(1, 1, 1, 1), heads=(2, 2, 2, 2))
    name = "layers.3.blocks.0.attn.relative_position_bias_table"
    four = swin.state_dict() | {name: torch.zeros(49, 2)}       # of 4, as if maps were rounded up
    with pytest.raises(SystemExit, match=r"has windows of \[7, 7, 7, 4\], which no Swin with a window of 7"):
        load_encoder(small_file(tmp_path, four, config=swin.config), say=quiet)
    odd = swin.state_dict() | {name: torch.zeros(26, 2)}
    with pytest.raises(SystemExit, match="does not fit: layers.3.blocks.0.attn.relative_position_bias_table"):
        load_encoder(small_file(tmp_path, odd), say=quiet)
