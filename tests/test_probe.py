"""probe.py: what it reads of an encoder, its protocols, its options; in this process and in several."""
import math
import shutil
import types
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from golden import Golden, close, each_recording
from PIL import Image
from test_runs import finish, kill_9, rows, same_state, start, steps, wait_for

import probe
import runtime.run
from data import crop_box, uniforms
from images.datasets import open_dataset
from nets.heads import accuracies, knn, make_head, sweep
from probe import features
from runtime.probes import extract
from runtime.run import Run, warmup_cosine
from vit import Swin, ViT
from weights import load_encoder

CPU, HALF, QUARTER = torch.device("cpu"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

# ----------------------------------------------------------------------------------------------------------------
# Features


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    vit = ViT(16, 4, dim=24, depth=3, heads=3, **options).eval()
    for p in vit.parameters():                                  # no identity norms, no zero biases
        p.data += 0.3 * torch.randn_like(p)
    return vit


def test_what_is_read_of_the_last_blocks():
    vit, img, outputs = tiny(), torch.randn(2, 3, 16, 16), []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, args, out: outputs.append(out))
    found = features(vit, img, "cls", 2)
    normed = [F.layer_norm(x, (24,), vit.norm.weight, vit.norm.bias, 1e-6) for x in outputs[1:]]
    torch.testing.assert_close(found, torch.cat([x[:, 0] for x in normed], 1))
    both = features(vit, img, "both")
    torch.testing.assert_close(both[:, ::2], normed[-1][:, 0])
    torch.testing.assert_close(both[:, 1::2], normed[-1][:, 1:].mean(1))
    torch.testing.assert_close(both[:, 1::2], features(vit, img, "avg"))
    torch.testing.assert_close(features(vit, img), vit.features(img))
    averaged = tiny(pool="avg")                              # fine-tuned networks norm after the mean
    torch.testing.assert_close(features(averaged, img, "avg"), averaged.features(img))


def tiny_swin():
    torch.manual_seed(0)
    return Swin(16, 2, dim=8, depths=(1, 2), heads=(1, 2), window=4).eval()


def test_what_is_read_of_a_swin():
    """Means of the last blocks' tokens: those of the last stage through the norm, earlier ones as they are."""
    swin, img, outputs = tiny_swin(), torch.randn(2, 3, 16, 16), []
    for layer in swin.layers:
        for block in layer.blocks:
            block.register_forward_hook(lambda module, args, out: outputs.append(out))
    found = features(swin, img, "avg", 3)
    want = [outputs[0].mean(1), *(swin.norm(x).mean(1) for x in outputs[1:])]
    torch.testing.assert_close(found, torch.cat(want, 1))
    torch.testing.assert_close(features(swin, img, "avg"), swin.features(img))


def test_one_draw():
    """Torchvision's box where its first try fits; else that box cut off at the edges."""
    fitted = 0
    for width, height in ((50, 37), (40, 40)):
        for u in uniforms(0, [(0, i) for i in range(400)], 23).tolist():
            (left, top, w, h), how = probe.one_draw((0.08, 1.0), width, height, u)
            assert 0 <= left <= width - w and 0 <= top <= height - h and how == "bicubic"
            area, aspect = width * height * (0.08 + 0.92 * u[0]), 0.75 * (16 / 9) ** u[10]
            wanted = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            assert (w, h) == (min(wanted[0], width), min(wanted[1], height))
            if (w, h) == wanted:
                fitted += 1
                assert (left, top, w, h) == crop_box(width, height, (0.08, 1.0), (3 / 4, 4 / 3), u)
    assert 400 < fitted < 700


# ----------------------------------------------------------------------------------------------------------------
# The script, in this process


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    path, vit = tmp_path_factory.mktemp("encoder") / "encoder.pt", tiny()
    torch.save(dict(config=dict(vit.config, mean=HALF, std=QUARTER), model=vit.state_dict()), path)
    return path


TINY = "--workers 0 --log-every 1 --save-every 3".split()


def run(out, protocol, *args):
    """Run a protocol with the encoder's file in front, or more options -> the rows of the log."""
    file = [] if str(args[0]).startswith("--") else [str(args[0])]
    probe.main([*file, "--protocol", protocol, *TINY, "--out", str(out), *map(str, args[len(file):])])
    return rows(out)


class Pictures:
    """A source of `count` blank images in `classes` classes: as many as a recording wants."""
    where, skipped = "the recording", Counter()

    def __init__(self, count, classes):
        self.images, self.classes = np.arange(count), [str(k) for k in range(classes)]
        self.labels = self.images % classes

    def __len__(self):
        return len(self.images)

    def name(self, i):
        return f"{i}.png"

    def read(self, i):
        return Image.new("RGB", (8, 8))


class Recorded:
    """The recorded batches, over and over, in the place of random crops."""

    def __init__(self, g):
        self.g, self.given = g, 0

    def __getitems__(self, keys):
        i = self.given % len(self.g("input/imgs"))
        self.given += 1
        return self.g("input/imgs")[i], self.g("input/labels")[i], []

    def finish(self, batches, device):
        return batches


@each_recording("mae_linprobe*")
def test_official_linear_probe(name, tmp_path, monkeypatch):
    """main_linprobe.py's steps through the script's own loop: loss, logits, head, rates, BatchNorm."""
    g, seen = Golden(name), []
    c = g.config
    config = dict(heads=c["num_heads"], img_size=torch.Size(g("input/imgs").shape[-2:]))
    torch.save(dict(model=g.under("state"), config=config), tmp_path / "official.pth")
    pictures = Pictures(c["n_batches"] * c["batch"], c["num_classes"]), Pictures(c["num_classes"], c["num_classes"])

    def note(model, args, out):
        if model.training:
            seen.append((model[1].weight.clone(), model[1].bias.clone(), out.detach()))

    def prepared(*args):
        model = make_head(*args)
        model[0].eps = c["bn_eps"]
        model.load_state_dict({k[5:]: v for k, v in g.under("state").items() if k.startswith("head.")})
        model.register_forward_hook(note)
        return model

    monkeypatch.setattr(runtime.run, "train_and_val", lambda *how: pictures)
    monkeypatch.setattr(probe, "make_head", prepared)
    monkeypatch.setattr(probe, "random_crops", lambda run: Recorded(g))
    monkeypatch.setattr(probe, "random_flip", lambda img: img)
    monkeypatch.setattr(probe, "normalize", lambda img, mean, std: img)
    monkeypatch.setattr(probe, "warmup_cosine", partial(warmup_cosine, floor=c["min_lr"]))
    monkeypatch.setattr(probe, "LARS", partial(probe.LARS, weight_decay=c["weight_decay"]))
    args = [tmp_path / "official.pth", "--eval-every", 0]
    for option, key in (("--batch-size", "batch"), ("--epochs", "epochs"), ("--lr", "lr"),
                        ("--warmup-epochs", "warmup_epochs")):
        args += [option, c[key]]
    found = [row for row in run(tmp_path / "out", "mae", *args) if "loss" in row]
    assert len(found) == len(g("out/loss")) == c["epochs"] * c["n_batches"]
    close(torch.tensor([row["loss"] for row in found]), g("out/loss"), 5e-5)
    close(torch.tensor([row["lr"] for row in found], dtype=torch.float64), g("out/lr"), 1e-9)
    state = torch.load(tmp_path / "out" / "encoder.pt")["model"]
    seen.append((state["head.1.weight"], state["head.1.bias"]))
    for i in range(len(found)):
        close(seen[i][2], g("out/train_logits")[i], 5e-5)
        close(seen[i + 1][0], g("out/head_weight")[i], 5e-5)
        close(seen[i + 1][1], g("out/head_bias")[i], 5e-5)
    for key, value in g.under("after").items():
        close(state[key].double(), value, 1e-5)
    vit = load_encoder(str(tmp_path / "out" / "encoder.pt"), say=str, pool="avg" if c["global_pool"] else "cls")
    trained = make_head("mae", vit.width, c["num_classes"]).eval()
    trained[0].eps = c["bn_eps"]
    trained.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
    close(torch.stack([trained(features(vit, img, vit.pool)) for img in g("input/imgs")]), g("out/eval_logits"), 5e-5)


@pytest.mark.parametrize("protocol, more", [("mae", ["--accum", 2]), ("moco", []), ("dino", ["--blocks", 2])])
def test_linear_probes(classes, encoder, tmp_path, protocol, more, capsys):
    """Rates by the law, everything that a run leaves, the encoder untouched, and the accuracy that is in the log."""
    found = run(tmp_path, protocol, "--init", encoder, "--data", classes, "--batch-size", 8, "--epochs", 4, "--lr", 0.5,
                *more)
    lrs = [row["lr"] for row in found if "loss" in row]                     # 5 steps an epoch
    if protocol == "mae":
        assert lrs == pytest.approx([warmup_cosine(i, 20, 2, 0.5) for i in range(20)])
    else:
        assert lrs == pytest.approx([0.25 * (1 + math.cos(math.pi * (i // 5) / 4)) for i in range(20)])
    tests = [row for row in found if "test_acc1" in row]
    assert [row["step"] for row in tests] == [5, 10, 15, 20]
    assert f"best epoch: top-1 {max(row['test_acc1'] for row in tests):.3f}%" in capsys.readouterr().out
    state, before = (torch.load(path)["model"] for path in (tmp_path / "encoder.pt", encoder))
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert ("probe.weight" in state) == (protocol == "dino")    # no head of a classifier reads two blocks
    x, y = extract(lambda i: i, open_dataset(str(classes), "val"), range(8), (16, 16), 3, HALF, QUARTER, CPU)
    blocks = 2 if protocol == "dino" else 1
    head = make_head(protocol, 24 * blocks, 2).eval()
    head.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith(("head.", "probe."))})
    right = (head(features(load_encoder(str(encoder), say=str), x, "cls", blocks)).argmax(1) == y).double().mean()
    assert tests[-1]["test_acc1"] == 100 * right
    assert [row for row in found if row.get("sha256")]
    assert found[0]["config"]["blr"] == probe.PROTOCOLS[protocol]["blr"]


def test_accumulated_steps_are_whole_steps(classes, encoder, tmp_path, monkeypatch):
    """Without BatchNorm and flips, which are drawn by the pass, a step in two passes is the step."""
    monkeypatch.setattr(probe, "random_flip", lambda img: img)
    for accum in (1, 2):
        run(tmp_path / str(accum), "moco", "--init", encoder, "--data", classes, "--batch-size", 8, "--epochs", 1,
            "--lr", 0.1, "--accum", accum)
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in "12")
    torch.testing.assert_close(a, b)
    assert a["weight"].abs().max() > 0.05


def test_resumed_is_the_same(classes, encoder, tmp_path, monkeypatch):
    """Ended at the second evaluation, gone on with, and typed again after the end; another encoder is refused."""
    args = ["--data", classes, "--batch-size", 8, "--epochs", 4]
    run(tmp_path / "whole", "mae", "--init", encoder, *args)
    copy, evaluate = tmp_path / "copy.pt", probe.evaluate
    shutil.copy(encoder, copy)

    def stop(run, encoder, model, val, step):
        if step == 10:
            raise KeyboardInterrupt
    monkeypatch.setattr(probe, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", "mae", "--init", copy, *args)
    monkeypatch.setattr(probe, "evaluate", evaluate)
    assert steps(tmp_path / "broken") == list(range(1, 11))
    for _ in range(2):
        found = run(tmp_path / "broken", "mae", "--init", copy, *args)
    assert steps(tmp_path / "broken") == [*range(1, 11), *range(10, 21)]    # saved at 9
    same_state(tmp_path / "whole", tmp_path / "broken")
    assert [r["test_acc1"] for r in found if "test_acc1" in r][-1] == rows(tmp_path / "whole")[-1]["test_acc1"]
    torch.save(torch.load(copy) | dict(more=1), copy)
    with pytest.raises(SystemExit, match="is not the file that this run began with"):
        run(tmp_path / "broken", "mae", "--init", copy, *args)


def features_of(encode, classes):
    """Features and labels of the 40 training images and of the 8 others."""
    sets = []
    for part, count in (("train", 40), ("val", 8)):
        source = open_dataset(str(classes), part)
        sets += extract(encode, source, range(count), (16, 16), 3, HALF, QUARTER, CPU)
    return sets


def test_knn_and_sweep(classes, encoder, tmp_path, capsys):
    found = run(tmp_path / "knn", "knn", "--init", encoder, "--data", classes, "--k", 5, 3, 100)
    vit = load_encoder(str(encoder), say=str)
    sets = features_of(vit, classes)
    assert [row["k"] for row in found[1:]] == [3, 5, 40]
    assert [row["test_acc1"] for row in found[1:]] == [knn(*sets, k=k) for k in (3, 5, 40)]
    assert "there are 40 training images, so --k is at most that" in capsys.readouterr().out
    found = run(tmp_path / "sweep", "sweep", "--init", encoder, "--data", classes, "--epochs", 5, "--lrs", 0.01, 1)
    held_out, best, counts = sweep(*sets, (0.01, 1.0), 2, 5, 128)
    assert found[1]["held_out"] == held_out and found[2] == dict(lr=best, **accuracies(counts))
    assert "the best rate is at an end of --lrs" in capsys.readouterr().out


def test_files_of_features(classes, encoder, tmp_path, capsys):
    run(tmp_path, "features", "--init", encoder, "--data", classes, "--split", "train", "--tokens", "cls", "mean",
        "patches")
    source, vit = open_dataset(str(classes)), load_encoder(str(encoder), say=str)
    tokens, labels = extract(vit.encode, source, range(40), (16, 16), 3, HALF, QUARTER, CPU)
    for name, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1)), ("patches", tokens[:, 1:]),
                           ("labels", labels)):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected.numpy()), name
    assert (tmp_path / "names.txt").read_text().splitlines() == [source.relative(i) for i in range(40)]
    assert "cls.npy (40, 24)" in capsys.readouterr().out and not list(tmp_path.glob("*.part"))


def test_names_with_line_ends_are_one_line_a_row(encoder, tmp_path):
    names = ["a\nb.png", "c\td.png", "e\\n.png", "f\r.png", "g\u2028h.png", "plain é.png"]
    write_images(tmp_path / "set", 1)
    for name in names:
        (tmp_path / "set" / name).write_bytes((tmp_path / "set" / "000.png").read_bytes())
    probe.main(["--init", str(encoder), "--data", str(tmp_path / "set"), "--protocol", "features", "--split", "train",
                "--out", str(tmp_path / "out"), "--workers", "0"])
    rows = (tmp_path / "out" / "names.txt").read_text().splitlines()
    assert rows == ["000.png", r"a\nb.png", r"c\td.png", r"e\\n.png", r"f\r.png", r"g\u2028h.png", "plain é.png"]


def test_a_swin_is_probed(classes, tmp_path, capsys):
    swin, path = tiny_swin(), tmp_path / "encoder.pt"
    torch.save(dict(method="esvit", config=dict(swin.config, mean=HALF, std=QUARTER), model=swin.state_dict()), path)
    found = run(tmp_path / "knn", "knn", "--init", path, "--data", classes, "--k", 5)
    sets = features_of(swin.features, classes)
    assert found[1]["test_acc1"] == knn(*sets, k=5)
    assert "pool avg (a Swin has no cls token) of the last 1 blocks, 16 numbers" in capsys.readouterr().out
    run(tmp_path / "dino", "dino", "--init", path, "--data", classes, "--epochs", 1, "--batch-size", 8)
    assert "of the last 3 blocks, 40 numbers" in capsys.readouterr().out
    run(tmp_path / "files", "features", "--init", path, "--data", classes, "--tokens", "mean", "patches")
    assert np.load(tmp_path / "files/patches.npy").shape == (8, 16, 16)
    assert np.array_equal(np.load(tmp_path / "files/mean.npy"), sets[2].numpy())
    for args, words in ((["knn", "--pool", "cls"], "is a Swin, which has no cls token"),
                        (["features", "--tokens", "cls"], "is a Swin, which has no cls token: give --tokens")):
        with pytest.raises(SystemExit, match=words):
            run(tmp_path / "no", *args, "--init", path, "--data", classes)


def test_unreadable_images_are_named(tmp_path, encoder, capsys):
    for part in ("train", "val"):
        for name in "ab":
            write_images(tmp_path / "set" / part / name, 6)
    (tmp_path / "set" / "val" / "b" / "002.png").write_bytes(b"damaged")
    run(tmp_path / "out", "knn", "--init", encoder, "--data", tmp_path / "set", "--k", 1)
    text = capsys.readouterr().out
    assert text.count("002.png cannot be read; another image takes its place") == 1 and "k-NN, k 1: top-1" in text


# ----------------------------------------------------------------------------------------------------------------
# Options and mistakes


def resolved(*argv):
    return probe.resolve(["x", *argv])


def test_recipes(tmp_path, monkeypatch):
    """The published numbers; a recipe's rates are per 256 images: 6.4, 12 and 0.004."""
    monkeypatch.setattr(runtime.run, "train_and_val", lambda *how: (Pictures(1_281_167, 1000), None))
    for name, lr, batch, epochs, warmup in (("mae", 6.4, 16384, 90, 10), ("moco", 12, 1024, 90, 0),
                                            ("dino", 0.004, 1024, 100, 0)):
        cfg = resolved("--protocol", name, "--out", str(tmp_path / name))
        plan = Run(replace(cfg, img_size=(224, 224), in_chans=3), "probe")
        plan.datasets()
        assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs) == (batch, epochs, warmup)
        assert (plan.per_epoch, plan.peak) == (1_281_167 // batch, pytest.approx(lr))
        head = make_head(name, 192, 500)
        (weight, bias), names = head.parameters(), [k for k, _ in head.named_buffers()]
        assert weight.std().item() == pytest.approx(0.01, rel=0.02) and not bias.any()
        assert len(names) == 3 * (name == "mae")                # a BatchNorm's statistics
    assert resolved("--protocol", "mae", "--epochs", "18").warmup_epochs == 2
    assert resolved().k == (10, 20, 100, 200) and resolved().out == "out/probe-knn"
    assert len(resolved("--protocol", "sweep").lrs) == 20 and resolved("--protocol", "features").split == "val"


def test_how_the_encoder_is_named():
    """A bare FILE in front, or --init FILE as before, or the demo's; once."""
    for argv in (["a.pt", "--k", "5"], ["--k", "5", "--init", "a.pt"], ["a.pt", "--k", "5", "--demo"]):
        assert probe.resolve(argv).init == "a.pt" and probe.resolve(argv).k == (5,)
    assert probe.resolve(["--demo"]).init == "out/mae-demo/encoder.pt" and probe.resolve(["--demo"]).data == "shapes"
    with pytest.raises(SystemExit, match="two encoders are named, a.pt and --init b.pt"):
        probe.resolve(["a.pt", "--init", "b.pt"])
    with pytest.raises(SystemExit, match="the file of an encoder is required: python probe.py FILE"):
        probe.resolve(["--k", "5"])


def opened(path, *argv):
    """The encoder that these options read, and the run's config, which it has filled in."""
    run = Run(probe.resolve([str(path), "--device", "cpu", "--dtype", "fp32", *argv]), "probe")
    return probe.Encoder(run), run.cfg


def test_pools(tmp_path, encoder, capsys):
    """DINO reads four blocks of a narrow network, and cls with the mean patch of a wide one; else the default is that
    of the method which the file names, or the place of its last norm. --readout is the old name."""
    narrow, wide = dict(dim=24, depth=3), dict(dim=768, depth=1)
    for size, pool, method, argv, expected in (
            (narrow, "cls", None, "--protocol dino", ("cls", 3)), (narrow, "cls", None, "--protocol mae", ("cls", 1)),
            (wide, "cls", None, "--protocol dino", ("both", 1)), (narrow, "avg", None, "--protocol mae", ("avg", 1)),
            (narrow, "cls", "mae", "", ("avg", 1)), (narrow, "cls", "distill", "", ("avg", 1)),
            (narrow, "cls", "moco_v3", "", ("cls", 1)), (narrow, "cls", "dino", "", ("cls", 1)),
            (narrow, "cls", "finetune", "", ("cls", 1)), (narrow, "avg", "finetune", "", ("avg", 1)),
            (narrow, "cls", "mae", "--pool cls", ("cls", 1)), (narrow, "cls", "mae", "--readout both", ("both", 1)),
            (narrow, "cls", "mae", "--protocol dino --pool cls --blocks 2", ("cls", 2)),
            (wide, "cls", "mae", "--protocol dino --pool avg", ("avg", 1))):
        vit = ViT(8, 4, heads=3, pool=pool, **size)
        torch.save(dict(method=method, config=vit.config, model=vit.state_dict()), tmp_path / "net.pt")
        made, cfg = opened(tmp_path / "net.pt", *argv.split())
        assert (cfg.pool, cfg.blocks) == expected and made(torch.zeros(2, 3, 8, 8)).shape == (2, made.width)
        if method == "mae" and not argv:
            assert made.reason == "the file is of mae"
    made, cfg = opened(encoder, "--img-size", "24", "16")
    assert made.inputs["size"] == cfg.img_size == (24, 16) and made.inputs["mean"] == cfg.mean == HALF
    assert cfg.in_chans == 3


def test_a_file_of_mae_is_read_by_its_patches(classes, encoder, tmp_path, capsys):
    """The whole way: the method in the file decides what k-NN sees, and the first lines say so."""
    torch.save(torch.load(encoder) | dict(method="mae"), tmp_path / "mae.pt")
    found = run(tmp_path / "default", "knn", tmp_path / "mae.pt", "--data", classes, "--k", 5)
    assert "knn: pool avg (the file is of mae) of the last 1 blocks, 24 numbers" in capsys.readouterr().out
    asked = run(tmp_path / "asked", "knn", encoder, "--data", classes, "--k", 5, "--readout", "avg")
    assert "knn: pool avg (as asked for)" in capsys.readouterr().out and found[1:] == asked[1:]


@pytest.mark.parametrize("args, words", [
    (["--protocol", "lars"], "--protocol: invalid choice: 'lars' .choose from .?knn"),
    (["--tokens", "cls", "cla"], "--tokens: invalid choice: 'cla' .choose from .?cls"),
    (["--pool", "gap"], "--pool/--readout: invalid choice: 'gap' .choose from .?cls"),
    (["--split", "test"], "--split: invalid choice: 'test' .choose from .?train"),
    (["--k", "10", "0"], "--k must be at least 1"), (["--init", "none.pth"], "none.pth does not exist"),
    (["--blocks", "4"], "--blocks 4: .* has 3"), (["--img-size", "18"], "patches of 4 do not tile a 18x18"),
    (["--img-size", "4", "4", "4"], "an image size is one number, or height and width"),
    (["--protocol", "mae"], "40 images, less than one batch: give --batch-size 40"),
    (["--protocol", "mae", "--batch-size", "8", "--epochs", "0"], "--epochs 0 must be more than --warmup-epochs 0"),
    (["--protocol", "mae", "--batch-size", "4", "--accum", "4"], "leaves one image to a pass: MAE's BatchNorm needs"),
    (["--demo", "--protocol", "mae"], "--demo supports knn, sweep and features"),
    (["--mean", "1", "2"], "need 3 numbers"), (["--decode", "gpu"], "--decode: invalid choice: 'gpu'"),
    (["--protocol", "features", "--tokens", "patches"], "take .* GB, and .* has 0.0 GB of room")])
def test_bad_options(classes, encoder, tmp_path, args, words, monkeypatch):
    if "GB" in words:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(free=0))
    args = args if "--init" in args else ["--init", str(encoder), *args]
    with pytest.raises(SystemExit, match=words):
        probe.main(["--data", str(classes), *TINY, "--out", str(tmp_path), *args])


def test_bad_data_and_files(classes, encoder, tmp_path):
    write_images(tmp_path / "bare", 6)
    for part, names in (("train", "ab"), ("val", "ac")):
        for name in names:
            write_images(tmp_path / "other" / part / name, 3)
    for name in "ab":
        write_images(tmp_path / "alone" / "train" / name, 3)
        write_images(tmp_path / "flat" / "train" / name, 3)
    write_images(tmp_path / "flat" / "val", 3)
    torch.save(dict(state_dict={"conv1.weight": torch.zeros(2)}), tmp_path / "resnet.pth")
    vit = ViT(8, 4, in_chans=6, dim=24, depth=1, heads=3)
    torch.save(dict(config=vit.config, model=vit.state_dict()), tmp_path / "six.pt")
    for data, more, words in (
            ("bare", [], "bare has no images to evaluate on"), ("alone", [], "alone has no images to evaluate on"),
            ("flat", [], "flat/val has no labels"), ("other", [], "val has 1 classes that .*train lacks, first c"),
            (classes, ["--init", tmp_path / "resnet.pth"], "is no network known here"),
            (classes, ["--init", tmp_path / "six.pt"], "its number of bands is 3, and --in-chans is 6"),
            ("other/train", ["--protocol", "features"], "has no images to evaluate on"),
            (classes, ["--out", encoder], "cannot be written")):
        with pytest.raises(SystemExit, match=words):
            run(tmp_path / "out", "knn", "--init", encoder, "--data", tmp_path / data, *more)
    run(tmp_path / "out", "features", "--init", encoder, "--data", tmp_path / "bare", "--split", "train")
    assert np.load(tmp_path / "out" / "labels.npy").tolist() == [-1] * 6    # labels are not needed to be written


# ----------------------------------------------------------------------------------------------------------------
# Real processes


@pytest.mark.slow
def test_killed_and_resumed_on_two_processes(classes, encoder, tmp_path):
    """kill -9, then the end: equal to the run that nothing happened to, evaluations too."""
    args = ["--protocol", "mae", "--init", encoder, "--data", classes, *TINY, "--batch-size", 8, "--epochs", 20,
            "--eval-every", 4]
    finish(*args, "--out", tmp_path / "whole", world=2, script="probe.py")
    out = tmp_path / "broken"
    process = start(*args, "--out", out, world=2, script="probe.py")
    wait_for(process, out, 30)
    kill_9(process)
    finish(*args, "--out", out, "--workers", 1, world=2, script="probe.py")
    begun = [row["start"] for row in rows(out) if "config" in row]
    assert len(begun) == 2 and 0 < begun[1] < 100, "nothing was resumed"
    for what in ("loss", "test_acc1"):
        whole, broken = ({r["step"]: r[what] for r in rows(f) if what in r} for f in (tmp_path / "whole", out))
        assert whole == broken and len(whole) == (100 if what == "loss" else 5)
    same_state(tmp_path / "whole", out)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(encoder, tmp_path):
    """An odd number of images: none is left out, none counted twice. A mistake is said once."""
    for part, count in (("train", 9), ("val", 5)):
        for k, name in enumerate("abc"):
            write_images(tmp_path / "set" / part / name, count, seed=k)
    args = ["--init", encoder, "--data", tmp_path / "set", "--k", 1, 5]
    for protocol in ("knn", "features"):
        run(tmp_path / f"{protocol}1", protocol, *args)
        finish(*TINY, "--protocol", protocol, *args, "--out", tmp_path / f"{protocol}2", world=2, script="probe.py")
    one, two = (rows(tmp_path / f"knn{world}") for world in (1, 2))
    assert one[1:] == two[1:] and len(one) == 3 and (one[0]["world"], two[0]["world"]) == (1, 2)
    for name in ("cls", "labels"):
        one, two = (np.load(tmp_path / f"features{world}" / f"{name}.npy") for world in (1, 2))
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    text = finish(*TINY, *args, "--blocks", 9, "--out", tmp_path / "bad", world=2, script="probe.py", expect=1)
    assert text.count("--blocks 9:") == 1 and 'probe.py", line' not in text
