"""weights/export.py: others must compute from the file what we compute from the checkpoint."""
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import Golden, close, needs_golden
from test_parity import public_file
from torch import nn

from nets.beit import BeitViT, TwoHeads
from vit import Swin, ViT
from weights import __main__ as describe
from weights import export, load_classifier, load_encoder, read
from weights.reading import read_safetensors


def vit(network=ViT, **options):
    """A small net that has learned: no bias is zero, no gain is one."""
    torch.manual_seed(0)
    options = {**dict(img_size=16, patch_size=8, dim=48, depth=2, heads=12, positions="learned"), **options}
    model = network(**options).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def saved(path, model, method="finetune", **config):
    torch.save(dict(method=method, config=dict(model.config, **config), model=model.state_dict()), path)
    return str(path)


SHAPES = {
    "encoder": dict(),
    "classifier on cls": dict(num_classes=5, dim=24),
    "encoder, mean": dict(pool="avg", patch_size=4, dim=36, depth=3),
    "classifier on the mean": dict(pool="avg", num_classes=7, img_size=(16, 40), in_chans=1),
    "tiny": dict(num_classes=3, img_size=(32, 64), patch_size=16, dim=192, depth=12),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_timm_computes_the_same(tmp_path, capsys, shape):
    timm = pytest.importorskip("timm")
    model = vit(**SHAPES[shape])
    c = model.config
    out = export.export(saved(tmp_path / "encoder.pt", model), "timm")
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert theirs.blocks[0].attn.num_heads == 12 and theirs.num_classes == c["num_classes"]
    assert (theirs.pretrained_cfg["architecture"] == "vit_tiny_patch16_224") == (shape == "tiny")
    img = torch.randn(3, c["in_chans"], *c["img_size"])
    ours = model(img)
    torch.testing.assert_close(theirs(img), ours, rtol=1e-5, atol=1e-5)
    features = theirs.forward_head(theirs.forward_features(img), pre_logits=True)
    torch.testing.assert_close(features, model.features(img), rtol=1e-5, atol=1e-5)
    said = capsys.readouterr().out
    assert "12 heads" in said and f"{c['num_classes'] or 'no'} classes" in said and "left out: none" in said
    assert f'timm.create_model("local-dir:{out}", pretrained=True)' in said
    # what the exported heads are worth: with three, the same tensors load strictly and mean something else
    wrong = timm.create_model(f"local-dir:{out}", pretrained=True, num_heads=3).eval()
    assert (wrong(img) - ours).abs().max() > 1e-2 * ours.abs().max()


def swin(**options):
    torch.manual_seed(0)
    model = Swin(**{**dict(img_size=32, patch_size=2, dim=16, depths=(2, 2), heads=(2, 4), window=4, eps=1e-5),
                    **options}).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model


def faint(model):
    """The same network, in which what comes before the first norm is small, so that its eps counts."""
    for name, p in model.named_parameters():
        if name.startswith(("cls_token", "pos_embed", "patch_embed.proj")):
            p.data *= 1e-3
    return model


@pytest.mark.parametrize("options", [dict(num_classes=5), dict(depths=(1, 2), heads=(2, 4), img_size=(32, 48))])
def test_timm_takes_a_swin(tmp_path, capsys, options):
    timm = pytest.importorskip("timm")
    model = swin(**options)
    theirs = timm.create_model(f"local-dir:{export.export(saved(tmp_path / 'e.pt', model), 'timm')}", pretrained=True)
    img = torch.randn(2, 3, *model.config["img_size"])
    torch.testing.assert_close(theirs.eval()(img), model(img), rtol=1e-5, atol=1e-5)
    assert f"width 32, {sum(model.config['depths'])} layers" in capsys.readouterr().out
    path = export.export(str(tmp_path / "e.pt"), "safetensors")
    assert torch.equal(load_classifier(read(path))[0](img), model(img))


def test_timm_feeds_it_as_we_do_and_goes_on_from_it(tmp_path):
    timm = pytest.importorskip("timm")
    model = vit(num_classes=2, pool="avg", img_size=(16, 32))
    path = saved(tmp_path / "e.pt", model, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), classes=["ant", "bee"])
    out = export.export(path, "timm", str(tmp_path / "new" / "folder"))
    theirs = timm.create_model(f"local-dir:{out}", pretrained=True)
    data = timm.data.resolve_model_data_config(theirs)
    assert data["input_size"] == (3, 16, 32) and data["mean"] == [0.1, 0.2, 0.3] and data["std"] == [0.4, 0.5, 0.6]
    assert data["crop_pct"] == 0.875 and data["interpolation"] == "bicubic"
    assert list(theirs.pretrained_cfg["label_names"]) == ["ant", "bee"]
    other = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=9).eval()     # a fresh head, our encoder
    img = torch.randn(2, 3, 16, 32)
    assert other(img).shape == (2, 9)
    torch.testing.assert_close(other.forward_head(other.forward_features(img), pre_logits=True), model.features(img),
                               rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_the_decoder_stays_behind(tmp_path, capsys, to):
    """timm takes any file with a mask token for DINOv2's, so there must be none."""
    from mae import MAE
    model = vit(positions="sincos")
    mae = MAE(8, 1, 2, img_size=16, patch_size=8, dim=48, depth=2, heads=12)
    mae.load_state_dict(model.state_dict(), strict=False)
    out = export.export(saved(tmp_path / "last.pt", mae, "mae"), to)
    names = set(read(f"{out}/model.safetensors" if to == "timm" else out).state)
    assert names == set(model.state_dict())
    said = capsys.readouterr().out
    assert "mask_token (1)" in said and "decoder_blocks (12)" in said
    assert "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225) (not stored: the usual)" in said
    if to == "timm":
        theirs = pytest.importorskip("timm").create_model(f"local-dir:{out}", pretrained=True).eval()
        img = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(theirs(img), model(img), rtol=1e-5, atol=1e-5)


def test_safetensors_bit_for_bit(tmp_path):
    package = pytest.importorskip("safetensors")
    from safetensors.torch import load_file
    model = vit(num_classes=4, img_size=(16, 40), in_chans=2)
    out = export.export(saved(tmp_path / "e.pt", model, "mae", mean=(0.5, 0.25), std=(1.0, 2.0)), "safetensors")
    theirs, ours = load_file(out), read(out)
    assert set(theirs) == set(ours.state) == set(model.state_dict())
    for name, t in model.state_dict().items():
        assert torch.equal(theirs[name], t) and torch.equal(ours.state[name], t)
    with package.safe_open(out, "pt") as f:
        assert f.metadata() == dict(format="pt", method="mae", heads="12", img_size="[16, 40]", pool="cls",
                                    num_classes="4", eps="1e-06", mean="[0.5, 0.25]", std="[1.0, 2.0]")
    assert ours.config["heads"] == 12 and ours.config["mean"] == [0.5, 0.25] and ours.config["method"] == "mae"
    img = torch.randn(2, 2, 16, 40)                             # heads and a grid that is no square come from the file
    assert torch.equal(load_encoder(out, say=lambda _: None, num_classes=4)(img), model(img))
    with pytest.raises(SystemExit, match="trained with 12 heads and the network here has 3"):
        load_encoder(out, 3, lambda _: None)
    export.export(out, "safetensors", str(tmp_path / "again.safetensors"))
    again = read(str(tmp_path / "again.safetensors"))
    assert again.config == ours.config and again.state.keys() == ours.state.keys()
    assert all(torch.equal(again.state[name], t) for name, t in ours.state.items())


def test_every_type_and_shape(tmp_path):
    load_file = pytest.importorskip("safetensors.torch").load_file
    state = {"odd": torch.arange(3, dtype=torch.uint8), "half": torch.randn(3).half(),
             "brain": torch.randn(5).bfloat16(), "flag": torch.tensor([True, False, True]),
             "scalar": torch.tensor(1.5, dtype=torch.float64), "index": torch.arange(6).view(2, 3),
             "turned": torch.randn(2, 3).T, "short": torch.arange(4, dtype=torch.int16),
             "counts": torch.arange(4).to(torch.uint16), "eight": torch.randn(3).to(torch.float8_e4m3fn)}
    path = str(tmp_path / "x.safetensors")
    export.write_safetensors(path, state, dict(note="3 things: \N{GREEK SMALL LETTER PI}", method="mae"))
    theirs, ours = load_file(path), read_safetensors(path)
    for name, t in state.items():
        assert theirs[name].dtype == ours[name].dtype == t.dtype
        assert torch.equal(theirs[name], t) and torch.equal(ours[name], t)
    assert ours["config"]["note"] == "3 things: \N{GREEK SMALL LETTER PI}"


@needs_golden
@pytest.mark.parametrize("name, logits", [("maelite_rpe_ft", "logits"), ("maelite_vit_ft_distill_soft", "eval_logits"),
                                          ("maelite_vit_ft_gap", "logits"), ("mae_vit_ft_cls", "logits")])
def test_official_classifiers_survive(tmp_path, name, logits):
    """Relative positions, two heads and both pools, through our safetensors to the recorded logits."""
    g, path = Golden(name), str(tmp_path / "x.pth")
    torch.save(dict(model=g.under("state")), path)
    model, left = load_classifier(read(export.export(path, "safetensors", heads=g.config["num_heads"])))
    assert not left
    close(model(g("input/imgs")), g(f"out/{logits}"), 2e-5)


RELATIVE = dict(relative=True, layer_scale=0.1, key_bias=False)


@needs_golden
@pytest.mark.parametrize("name, network, key", [
    ("ckpt_mae_pretrain_release", "", "features_cls"), ("ckpt_maelite_last_epoch", "", "features_cls"),
    ("ckpt_moco", "", "features"), ("ckpt_dino", ":student", "features_student"), ("ckpt_deit", "", "logits")])
def test_official_files_reach_timm(tmp_path, name, network, key):
    timm = pytest.importorskip("timm")
    g, path, heads = public_file(name)
    out = export.export(path + network, "timm", str(tmp_path / "timm"), heads)
    close(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(g("input/imgs")), g(f"out/{key}"), 2e-5)


def special(network=BeitViT, **options):
    return vit(network, pool="avg", num_classes=4, img_size=(16, 24), **options)


@pytest.mark.parametrize("options", [RELATIVE, dict(relative=True), dict(layer_scale=0.5)],
                         ids=["all", "relative positions", "layer scale"])
def test_timm_takes_relative_positions_as_a_beit(tmp_path, options):
    timm = pytest.importorskip("timm")
    model, img = special(**options), torch.randn(2, 3, 16, 24)
    out = export.export(saved(tmp_path / "e.pt", model), "timm")
    torch.testing.assert_close(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(img), model(img),
                               rtol=1e-5, atol=1e-5)


EPS = {"Swin as EsViT trains it": lambda **eps: swin(num_classes=5, **(dict(eps=1e-6) | eps)),
       "ViT": lambda **eps: vit(**(dict(eps=1e-5) | eps)),
       "BeitViT": lambda **eps: special(**RELATIVE, **(dict(eps=1e-5) | eps))}


@pytest.mark.parametrize("name", EPS)
def test_timm_and_another_eps(tmp_path, capsys, name):
    """timm's networks have an eps of their own: the tensors are scaled so that it computes the same."""
    timm = pytest.importorskip("timm")
    model, img = faint(EPS[name]()), torch.randn(2, 3, *EPS[name]().config["img_size"])
    other = faint(EPS[name](eps=1.1e-5 - model.config["eps"]))
    assert (other(img) - model(img)).abs().max() > 1e-3         # the eps counts
    out = export.export(saved(tmp_path / "e.pt", model), "timm")
    torch.testing.assert_close(timm.create_model(f"local-dir:{out}", pretrained=True).eval()(img), model(img),
                               rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(load_classifier(read(out))[0](img), model(img), rtol=1e-5, atol=1e-5)
    assert "times as large as in the checkpoint" in capsys.readouterr().out


def test_what_timm_has_no_place_for(tmp_path):
    model = special(TwoHeads)
    path, img = saved(tmp_path / "e.pt", model), torch.randn(2, 3, 16, 24)
    with pytest.raises(SystemExit, match="has two heads, which timm does not support: use --to safetensors"):
        export.export(path, "timm")
    assert torch.equal(load_classifier(read(export.export(path, "safetensors")))[0](img), model(img))
    with pytest.raises(SystemExit, match="has an eps of 1e-12, which timm"):
        export.export(saved(tmp_path / "eps.pt", vit(eps=1e-12)), "timm")
    # timm pads after it rolls, rounds maps up, and takes height and width apart.
    for i, (size, words) in enumerate([((16, 32), "4 x 8 tokens and windows of 4"), ((24, 24), "6 x 6 .* windows of 4"),
                                       ((12, 12), "6 x 6 .* windows of 4"), ((6, 6), "2 x 2 .* windows of 1")]):
        with pytest.raises(SystemExit, match=f"has a map of {words}, which timm"):
            export.export(saved(tmp_path / f"flat{i}.pt", swin(img_size=size)), "timm")


def onnx_engines(path):
    """Functions of an image: ONNX's own slow reference, and onnxruntime where it is installed."""
    engines = [pytest.importorskip("onnx.reference").ReferenceEvaluator(path)]
    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime
        engines.append(onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]))
    return [lambda img, engine=engine: torch.from_numpy(engine.run(None, {"image": img.numpy()})[0])
            for engine in engines]


ONNX = {"encoder": lambda: vit(depth=1), "classifier": lambda: special(BeitViT, depth=1),
        "all at once": lambda: special(TwoHeads, depth=1, **RELATIVE),
        "swin": lambda: swin(num_classes=4, img_size=(32, 48), depths=(2, 1))}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")                          # torch 2.11 warns of itself
@pytest.mark.parametrize("name", ONNX)
def test_onnx_computes_the_same(tmp_path, name):
    pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
    onnx = pytest.importorskip("onnx")
    model = ONNX[name]()
    out = export.export(saved(tmp_path / "e.pt", model, mean=(0.1, 0.2, 0.3)), "onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.onnx", "e.onnx.md", "e.pt"]
    file = onnx.load(out)
    assert {p.key: p.value for p in file.metadata_props}["heads"] == str(model.config["heads"])
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert file.graph.output[0].name == ("logits" if model.config["num_classes"] else "features")
    for engine in onnx_engines(out):
        for images in (1, 5):
            img = torch.randn(images, 3, *model.config["img_size"])
            torch.testing.assert_close(engine(img), model(img), rtol=1e-5, atol=1e-5)


def test_onnx_needs_its_packages(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(SystemExit, match=r"onnx and onnxscript: pip install '\.\[onnx\]'"):
        export.export(saved(tmp_path / "e.pt", vit()), "onnx")


def test_whole_or_not_at_all(tmp_path, monkeypatch):
    path = saved(tmp_path / "e.pt", vit())
    (tmp_path / "e-timm.tmp").mkdir()                           # an earlier try was killed
    (tmp_path / "e-timm.tmp" / "config.json").write_text("{")
    out = export.export(path, "timm")
    assert json.loads((tmp_path / "e-timm" / "config.json").read_text())["model_args"]["num_heads"] == 12
    with pytest.raises(SystemExit, match="e-timm exists: move it away, or give another --out"):
        export.export(path, "timm", out + "/")
    with pytest.raises(SystemExit, match="inside cannot be written: .*e.pt"):
        export.export(path, "safetensors", path + "/inside")

    def full(path, *rest):
        with open(path, "wb") as f:
            f.write(b"half")
        raise errors.pop()
    monkeypatch.setattr(export, "write_safetensors", full)
    errors = [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64\nof torch's writer")]
    for words in ("unexpected pos 64$", "No space left"):
        with pytest.raises(SystemExit, match=f"safetensors cannot be written: .*{words}"):
            export.export(path, "safetensors")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["e-timm", "e.pt"]


@pytest.mark.parametrize("to", ["timm", "safetensors"])
def test_a_full_disk_ends_in_a_sentence(tmp_path, to):
    """The error of the safetensors package, which is a kind of its own; a file may grow to 8 KB here."""
    import resource
    import signal
    path = saved(tmp_path / "e.pt", vit())
    limit, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(SystemExit, match="cannot be written: .*File too large"):
            export.export(path, to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.iterdir()] == ["e.pt"]


def test_heads_that_read_something_else_stay_behind(tmp_path, capsys):
    model, path = vit(), str(tmp_path / "x.pth")
    for head in ({"head.weight": torch.ones(5, 96), "head.bias": torch.ones(5)}, {"head.weight": torch.ones(5, 48)},
                 {"head.0.weight": torch.ones(5, 48), "head.0.bias": torch.ones(5)}):
        torch.save(dict(model=model.state_dict() | head, config=model.config), path)
        out = export.export(path, "safetensors", str(tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"))
        assert set(read(out).state) == set(model.state_dict())
        said = capsys.readouterr().out
        assert "no classes, mean" in said and f"left out: head ({len(head)})" in said


def test_what_cannot_be_exported(tmp_path):
    path, state = str(tmp_path / "x.pth"), vit(num_classes=3).state_dict()
    cases = [(state, "does not say how many heads", {}), (state, "5 heads do not divide", dict(heads=5)),
             (state | {"blocks.1.ls1.gamma": torch.ones(48)}, "holds blocks.N.gamma_1, which the net", dict(heads=12)),
             ({k: v for k, v in state.items() if not k.startswith("norm.")}, "lacks 2 tensors", dict(heads=12)),
             ({k: v for k, v in state.items() if k != "norm.bias"} | {"fc_norm.weight": torch.ones(48)},
              "lacks fc_norm.bias", dict(heads=12)),
             (state | {"head_dist.weight": torch.ones(3, 48), "head_dist.bias": torch.ones(3)},
              "lacks dist_norm.weight", dict(heads=12))]
    for tensors, words, options in cases:
        torch.save(dict(model=tensors), path)
        with pytest.raises(SystemExit, match=words):
            export.export(path, "safetensors", **options)


@pytest.mark.parametrize("argv, words", [
    ([], "required: FILE, --to"), (["x.pt"], "required: --to"), (["x.pt", "--to", "tf"], "invalid choice: 'tf'"),
    (["x.pt", "--to", "timm"], "does not exist"), (["x.pt", "--to", "timm", "--heads", "0"], "at least 1"),
    (["x.pt", "--too", "timm"], "python -m weights.export:")])
def test_command_line_in_words(tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=words) as stop:
        export.main(argv)
    assert "usage:" not in str(stop.value)


def test_command_line(tmp_path, capsys):
    path = saved(tmp_path / "e.pt", vit())
    out = str(tmp_path / "given.safetensors")
    export.main([f"{path}:model", "--to", "safetensors", "--out", out, "--heads", "12"])
    describe.main([out])
    said = capsys.readouterr().out
    assert "method       finetune\n" in said and "heads        12\n" in said


def test_it_runs_as_a_module(tmp_path):
    """And says nothing beside its one line, no warning of a package half imported either."""
    path = saved(tmp_path / "e.pt", vit())
    done = subprocess.run([sys.executable, "-m", "weights.export", path, "--to", "safetensors"],
                          cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "e.safetensors").exists()
