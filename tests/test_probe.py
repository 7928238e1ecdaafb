import math
import shutil
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_images
from golden import Golden, close, needs_golden
from test_runs import finish, kill_9, rows, same_state, start, steps, wait_for
from torch import nn

import probe
import training
from data import crop_box, uniforms
from probe import (
    LARS,
    accuracies,
    extract,
    features,
    fit_heads,
    knn,
    knn_counts,
    linear,
    neighbours,
    sweep,
    tally,
    votes,
)
from sources import find
from vit import Swin, ViT
from weights import build_vit

CPU, HALF, QUARTER = torch.device("cpu"), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def clusters(n, spread, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 5
    centres = F.one_hot(torch.arange(5), 8).float()
    return centres[labels] + spread * torch.randn(n, 8, generator=generator), labels


# ----------------------------------------------------------------------------------------------------------------
# k-NN and accuracy


def test_identical_features_are_found():
    x, y = clusters(200, 0.5)
    assert knn(x, y, x, y, k=1) == 100


def test_separate_clusters_are_told_apart_and_noise_is_not():
    train, test = clusters(500, 0.1), clusters(200, 0.1, seed=1)
    assert knn(*train, *test) == 100 and linear(*train, *test) == 100
    noise = [torch.randn(n, 8, generator=torch.Generator().manual_seed(n)) for n in (500, 200)]
    for method in (knn, linear):
        assert 8 < method(noise[0], train[1], noise[1], test[1]) < 34       # chance is 20, five deviations are 14


@needs_golden
def test_knn_of_dino():
    """Votes, predictions, top-1 and top-5 for every k, from one search."""
    g = Golden("dino_knn")
    sets = [g(f"input/{s}_{x}") for s in ("train", "test") for x in ("features", "labels")]
    ks, T, classes = g.config["ks"], g.config["T"], g.config["num_classes"]
    found, counts = votes(*sets[:3], ks, classes, T), knn_counts(*sets, ks, classes, T)
    for k in ks:
        close(found[k].sort(1, descending=True).values, g(f"out/sorted_votes_k{k}"), 2e-5)
        assert torch.equal(found[k].argmax(1), g(f"out/pred_k{k}"))
        numbers = accuracies(counts[k])
        expected = dict(zip(("test_acc1", "test_acc5"), g(f"out/top1_top5_k{k}").tolist()))
        assert {name: numbers[name] for name in expected} == pytest.approx(expected, abs=1e-4)
        assert knn(*sets, k=k, temperature=T) == numbers["test_acc1"]


@pytest.mark.parametrize("most", [1, 7 * 40, 100 * 40, 2 ** 26])
def test_search_in_parts_is_exact(most):
    """Features of few bits, so that every product is exact: the parts find what one search of all finds."""
    train, test = (torch.randn(n, 8, generator=torch.Generator().manual_seed(n)).mul(128).round() for n in (300, 40))
    best, places = neighbours(train, test, 12, most)
    every = test @ train.T
    assert torch.equal(best, every.topk(12, 1).values) and torch.equal(every.gather(1, places), best)
    assert all(len(set(row)) == 12 for row in places.tolist())
    assert neighbours(train, test, 400, most)[0].shape == (40, 300)         # more than there are


def test_knn_is_the_textbook_loop():
    """One image and one neighbour at a time, in float64."""
    (train, y), (test, z) = clusters(300, 0.6), clusters(60, 0.6, seed=1)
    together, right = knn_counts(train, y, test, z, (1, 10, 100), 5), {1: 0, 10: 0, 100: 0}
    for x, label in zip(test.double().tolist(), z.tolist()):
        cosine = [sum(a * b for a, b in zip(x, t)) / math.hypot(*x) / math.hypot(*t) for t in train.double().tolist()]
        nearest = sorted(range(300), key=lambda i: -cosine[i])                                      # noqa: B023
        for k in right:
            score = [sum(math.exp(cosine[i] / 0.07) for i in nearest[:k] if y[i] == c) for c in range(5)]
            right[k] += score.index(max(score)) == label
    for k, hits in right.items():
        assert 24 < hits < 60 and knn(train, y, test, z, k) == pytest.approx(100 * hits / 60, abs=1e-4)
        assert accuracies(together[k])["test_acc1"] == knn(train, y, test, z, k)


def test_accuracies():
    """Uneven classes, one of them without images, in parts."""
    scores, labels = torch.randn(90, 8, generator=torch.Generator().manual_seed(0)), torch.arange(90) // 7 % 7
    order = scores.argsort(1, descending=True)
    right, five = order[:, 0] == labels, (order[:, :5] == labels[:, None]).any(1)
    each = [right[labels == c].double().mean() for c in range(7)]
    found = accuracies(sum(tally(s, y) for s, y in zip(scores.split(13), labels.split(13))))
    assert found == {k: pytest.approx(100 * float(v), abs=1e-4) for k, v in dict(
        test_acc1=right.double().mean(), test_acc5=five.double().mean(), test_class_acc=sum(each) / 7).items()}
    assert accuracies(tally(scores[:, :2], labels.clamp(max=1)))["test_acc5"] == 100        # fewer classes than five
    assert accuracies(tally(scores * math.nan, labels))["test_acc5"] == 0
    assert tally(torch.zeros(2, 8), torch.tensor([0, 4])).sum(1).tolist() == [2, 1, 2]      # ties go by class


# ----------------------------------------------------------------------------------------------------------------
# Linear: closed form, LARS, many heads at once


def test_linear_is_ridge_regression():
    """Against torch's own least squares, where the penalty hardly matters."""
    train, test = clusters(2000, 0.4), clusters(1000, 0.4, seed=1)
    mean, std = train[0].mean(0), train[0].std(0)
    a, b = (torch.cat([(x - mean) / std, torch.ones(len(x), 1)], 1) for x in (train[0], test[0]))
    weight = torch.linalg.lstsq(a, F.one_hot(train[1]).float()).solution
    expected = 100 * ((b @ weight).argmax(1) == test[1]).float().mean().item()
    assert linear(*train, *test) == pytest.approx(expected, abs=0.5)


@needs_golden
@pytest.mark.parametrize("name", ["lars_mae", "lars_moco"])
def test_lars(name):
    """Stopped and gone on with from its state after the second of four steps."""
    g = Golden(name)
    params = {k: nn.Parameter(v) for k, v in g.under("state").items()}
    made = dict(lr=1.0, momentum=g.config["momentum"], weight_decay=g.config["weight_decay"],
                trust=g.config["trust_coefficient"])
    optimizer = LARS(params.values(), **made)
    for step, lr in enumerate(g.config["lr_per_step"]):
        if step == 2:
            state = optimizer.state_dict()
            optimizer = LARS(params.values(), lr=1.0)
            optimizer.load_state_dict(state)
        training.set_lr(optimizer, lr)
        for k, p in params.items():
            p.grad = g(f"input/grads/{k}")[step]
        optimizer.step()
        for k, p in params.items():
            close(p, g(f"out/{k}")[step], 1e-5)


def test_without_trust_it_is_sgd_and_a_skipped_step_is_none():
    pairs = [[nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))) for _ in "ab"] for _ in "ab"]
    (ours, *_), (theirs, *_) = pairs
    a, b = LARS([ours], 0.1, trust=None), torch.optim.SGD([theirs], 0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for step in range(6):
        ours.grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step + 1))
        theirs.grad = ours.grad.clone()
        if step in (0, 3):                                      # the first is bad: there is no momentum yet
            ours.grad[0, 0] = math.nan
        else:
            b.step()
        assert training.finite_step(a, scaler)[1] == (step in (0, 3))
        torch.testing.assert_close(ours, theirs)


def test_heads_side_by_side_are_single_heads():
    """Each against torch's own layer, loss, SGD and cosine, on the same batches."""
    (x, y), rates = clusters(130, 1.0), (1e-3, 0.03, 1.0)
    x = F.pad(x, (0, 1), value=1.0)
    heads = fit_heads(x, y, 5, rates, epochs=3, batch=32, seed=4)
    for rate, head in zip(rates, heads):
        layer = nn.Linear(9, 5, bias=False)
        nn.init.zeros_(layer.weight)
        optimizer = torch.optim.SGD(layer.parameters(), rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
        for epoch in range(3):
            order = torch.randperm(130, generator=torch.Generator().manual_seed(4 * 1_000_003 + epoch))
            for batch in order[:128].split(32):
                optimizer.zero_grad()
                F.cross_entropy(layer(x[batch]), y[batch]).backward()
                optimizer.step()
                schedule.step()
        torch.testing.assert_close(head, layer.weight.data, rtol=1e-4, atol=1e-6)
        alone = fit_heads(x, y, 5, (rate,), epochs=3, batch=32, seed=4)[0]
        torch.testing.assert_close(alone, head, rtol=1e-4, atol=1e-6)


def test_sweep():
    """It finds the rate that learns, whatever the scale of the features, and a head that diverges harms no other."""
    (x, y), (a, b) = clusters(500, 0.3), clusters(200, 0.3, seed=1)
    rates = (1e-6, 0.1, 1e38)
    held_out, best, counts = sweep(1e3 * x - 7, y, 1e3 * a - 7, b, rates, 5, epochs=20)
    assert best == 0.1 and held_out[1] > 90 and accuracies(counts)["test_acc1"] > 90
    alone = sweep(1e3 * x - 7, y, 1e3 * a - 7, b, (0.1,), 5, epochs=20)
    assert alone[0] == [held_out[1]] and torch.equal(alone[2], counts)


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
    averaged = tiny(readout="avg")                              # fine-tuned networks norm after the mean
    torch.testing.assert_close(features(averaged, img, "avg"), averaged.features(img))


def tiny_swin():
    torch.manual_seed(0)
    return Swin(16, 2, dim=8, depths=(1, 2), heads=(1, 2), window=4).eval()


def test_what_is_read_of_a_swin():
    """Means of the last blocks' tokens: those of the last stage through the norm, earlier ones as they are."""
    swin, img, outputs = tiny_swin(), torch.randn(2, 3, 16, 16), []
    for layer in swin.layers:
        for block in layer.blocks:
            block.register_forward_hook(lambda module, args, out: outputs.append(out[0]))
    found = features(swin, img, "avg", 3)
    want = [outputs[0].mean(1), *(swin.norm(x).mean(1) for x in outputs[1:])]
    torch.testing.assert_close(found, torch.cat(want, 1))
    torch.testing.assert_close(features(swin, img, "avg"), swin.features(img))


def test_features_come_in_the_order_asked_for(classes):
    source = find(str(classes))
    indices = [31, 2, 17, 5, 39]
    x, y = extract(lambda img: img.flatten(1), source, indices, (16, 16), 3, HALF, QUARTER, CPU, batch=2)
    one, _ = extract(lambda img: img.flatten(1), source, [17], (16, 16), 3, HALF, QUARTER, CPU)
    assert y.tolist() == [1, 0, 0, 0, 1] and torch.equal(x[2], one[0])


def test_one_draw():
    """Torchvision's box where its first try fits; else that box cut off at the edges."""
    crops, fitted = probe.OneDraw(None, (8, 8), 3, 0, (0.08, 1.0), "bicubic"), 0
    for width, height in ((50, 37), (40, 40)):
        for u in uniforms(0, [(0, i) for i in range(400)], 23).tolist():
            (left, top, w, h), how = crops.plan(width, height, u)
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
    probe.main(["--protocol", protocol, *TINY, "--out", str(out), *map(str, args)])
    return rows(out)


@needs_golden
def test_official_linear_probe(tmp_path, monkeypatch):
    """Six steps of main_linprobe.py through the script's own loop: loss, logits, head, rates, BatchNorm."""
    g, seen = Golden("mae_linprobe"), []
    for k in range(7):
        write_images(tmp_path / "set" / "train" / str(k), 3 if k < 4 else 2)
        write_images(tmp_path / "set" / "val" / str(k), 1)
    torch.save(dict(model=g.under("state")), tmp_path / "official.pth")
    head, normalize = probe.make_head, probe.normalize

    def note(model, args, out):
        if model.training:
            seen.append((model[1].weight.clone(), model[1].bias.clone(), out.detach()))

    def prepared(*args):
        model = head(*args)
        model.load_state_dict({k[5:]: v for k, v in g.under("state").items() if k.startswith("head.")})
        model.register_forward_hook(note)
        return model

    def batches(*args):
        return ((g("input/imgs")[i % 3], g("input/labels")[i % 3], []) for i in range(6))

    monkeypatch.setattr(probe, "make_head", prepared)
    monkeypatch.setattr(probe, "random_crops", batches)
    monkeypatch.setattr(probe, "random_flip", lambda img: img)
    monkeypatch.setattr(probe, "normalize", lambda img, *how: img if img.is_floating_point() else normalize(img, *how))
    args = ["--data", tmp_path / "set", "--init", tmp_path / "official.pth", "--eval-every", 0]
    for option, name in (("--heads", "num_heads"), ("--batch-size", "batch"), ("--epochs", "epochs"), ("--lr", "lr"),
                         ("--warmup-epochs", "warmup_epochs")):
        args += [option, g.config[name]]
    found = [row for row in run(tmp_path / "out", "mae", *args) if "loss" in row]
    close(torch.tensor([row["loss"] for row in found]), g("out/loss"), 5e-5)
    close(torch.tensor([row["lr"] for row in found], dtype=torch.float64), g("out/lr"), 1e-9)
    state = torch.load(tmp_path / "out" / "encoder.pt")["model"]
    seen.append((state["head.1.weight"], state["head.1.bias"]))
    for i in range(6):
        close(seen[i][2], g("out/train_logits")[i], 5e-5)
        close(seen[i + 1][0], g("out/head_weight")[i], 5e-5)
        close(seen[i + 1][1], g("out/head_bias")[i], 5e-5)
    for name, value in g.under("after").items():
        close(state[name].double(), value, 1e-5)
    trained = head("mae", 24, 7).eval()
    trained.load_state_dict({k[5:]: v for k, v in state.items() if k.startswith("head.")})
    vit = build_vit(str(tmp_path / "out" / "encoder.pt"), say=str)
    close(torch.stack([trained(features(vit, img)) for img in g("input/imgs")]), g("out/eval_logits"), 5e-5)


@pytest.mark.parametrize("protocol, more", [("mae", ["--accum", 2]), ("moco", []), ("dino", ["--blocks", 2])])
def test_linear_probes(classes, encoder, tmp_path, protocol, more, capsys):
    """Rates by the law, everything that a run leaves, the encoder untouched, and the accuracy that is in the log."""
    found = run(tmp_path, protocol, "--init", encoder, "--data", classes, "--batch-size", 8, "--epochs", 4, "--lr", 0.5,
                *more)
    lrs = [row["lr"] for row in found if "loss" in row]                     # 5 steps an epoch
    if protocol == "mae":
        assert lrs == pytest.approx([training.warmup_cosine(i, 20, 2, 0.5) for i in range(20)])
    else:
        assert lrs == pytest.approx([0.25 * (1 + math.cos(math.pi * (i // 5) / 4)) for i in range(20)])
    tests = [row for row in found if "test_acc1" in row]
    assert [row["step"] for row in tests] == [5, 10, 15, 20]
    assert f"top-1 of the best epoch {max(row['test_acc1'] for row in tests):.3f}%" in capsys.readouterr().out
    state, before = (torch.load(path)["model"] for path in (tmp_path / "encoder.pt", encoder))
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert ("probe.weight" in state) == (protocol == "dino")    # no head of a classifier reads two blocks
    x, y = extract(lambda i: i, find(str(classes), "val"), range(8), (16, 16), 3, HALF, QUARTER, CPU)
    blocks = 2 if protocol == "dino" else 1
    head = probe.make_head(protocol, 24 * blocks, 2).eval()
    head.load_state_dict({k.partition(".")[2]: v for k, v in state.items() if k.startswith(("head.", "probe."))})
    right = (head(features(build_vit(str(encoder), say=str), x, "cls", blocks)).argmax(1) == y).double().mean()
    assert tests[-1]["test_acc1"] == 100 * right
    assert found[0]["sha256"] and found[0]["config"]["blr"] == probe.PROTOCOLS[protocol]["blr"]


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

    def stop(*told):
        if told[4] == 10:
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
    with pytest.raises(SystemExit, match="has changed since this run began"):
        run(tmp_path / "broken", "mae", "--init", copy, *args)


def test_knn_and_sweep(classes, encoder, tmp_path, capsys):
    found = run(tmp_path / "knn", "knn", "--init", encoder, "--data", classes, "--k", 5, 3, 100)
    vit = build_vit(str(encoder), say=str)
    sets = [t for part, count in (("train", 40), ("val", 8))
            for t in extract(vit, find(str(classes), part), range(count), (16, 16), 3, HALF, QUARTER, CPU)]
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
    source, vit = find(str(classes)), build_vit(str(encoder), say=str)
    tokens, labels = extract(vit.encode, source, range(40), (16, 16), 3, HALF, QUARTER, CPU)
    for name, expected in (("cls", tokens[:, 0]), ("mean", tokens[:, 1:].mean(1)), ("patches", tokens[:, 1:]),
                           ("labels", labels)):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected.numpy()), name
    assert (tmp_path / "names.txt").read_text().splitlines() == [source.relative(i) for i in range(40)]
    assert "cls.npy (40, 24)" in capsys.readouterr().out and not list(tmp_path.glob("*.part"))


def test_a_swin_is_probed(classes, tmp_path, capsys):
    swin, path = tiny_swin(), tmp_path / "encoder.pt"
    torch.save(dict(method="esvit", config=dict(swin.config, mean=HALF, std=QUARTER), model=swin.state_dict()), path)
    found = run(tmp_path / "knn", "knn", "--init", path, "--data", classes, "--k", 5)
    sets = [t for part, count in (("train", 40), ("val", 8))
            for t in extract(swin.features, find(str(classes), part), range(count), (16, 16), 3, HALF, QUARTER, CPU)]
    assert found[1]["test_acc1"] == knn(*sets, k=5)
    assert "avg token of the last 1 blocks, 16 numbers" in capsys.readouterr().out
    run(tmp_path / "dino", "dino", "--init", path, "--data", classes, "--epochs", 1, "--batch-size", 8)
    assert "avg token of the last 3 blocks, 40 numbers" in capsys.readouterr().out
    run(tmp_path / "files", "features", "--init", path, "--data", classes, "--tokens", "mean", "patches")
    assert np.load(tmp_path / "files/patches.npy").shape == (8, 16, 16)
    assert np.array_equal(np.load(tmp_path / "files/mean.npy"), sets[2].numpy())
    for args, words in ((["knn", "--readout", "cls"], "is a Swin, which has no cls token"),
                        (["features", "--tokens", "cls"], "is a Swin, which has none")):
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
    many = find(str(tmp_path / "set"), "val")
    read, many.read = many.read, lambda i: b"damaged" if i % 9 == 0 else read(i)
    with pytest.raises(SystemExit, match="of 240 images under .* could not be read, more than --max-unreadable 0.05"):
        extract(lambda x: x.flatten(1), many, list(range(12)) * 20, (4, 4), 3, HALF, QUARTER, CPU, max_unreadable=0.05)


# ----------------------------------------------------------------------------------------------------------------
# Options and mistakes


def resolved(*argv):
    return probe.resolve(*training.parse(probe.Config, "", ["--init", "x", *argv]))


def test_laws():
    """The published numbers; a law's rates are per 256 images: 6.4, 12 and 0.004."""
    for name, lr, batch, epochs, warmup in (("mae", 6.4, 16384, 90, 10), ("moco", 12, 1024, 90, 0),
                                            ("dino", 0.004, 1024, 100, 0)):
        cfg = resolved("--protocol", name)
        plan, peak = training.plan(cfg, 1_281_167, 8)
        assert (cfg.batch_size, cfg.epochs, cfg.warmup_epochs, peak) == (batch, epochs, warmup, pytest.approx(lr))
        assert plan.per_epoch == 1_281_167 // batch
        head = probe.make_head(name, 192, 500)
        (weight, bias), names = head.parameters(), [k for k, _ in head.named_buffers()]
        assert weight.std().item() == pytest.approx(0.01, rel=0.02) and not bias.any()
        assert len(names) == 3 * (name == "mae")                # a BatchNorm's statistics
    assert resolved("--protocol", "mae", "--epochs", "18").warmup_epochs == 2
    assert resolved().k == (10, 20, 100, 200) and len(resolved().lrs) == 20 and resolved().out == "out/probe-knn"
    assert resolved("--demo").data == "shapes"


def test_readouts(tmp_path, encoder):
    """DINO reads four blocks of a narrow network, and cls with the mean patch of a wide one; the rest as trained."""
    for dim, readout, protocol, expected in ((24, "cls", "dino", ("cls", 3)), (24, "cls", "mae", ("cls", 1)),
                                             (768, "cls", "dino", ("both", 1)), (24, "avg", "mae", ("avg", 1))):
        vit = ViT(8, 4, dim=dim, depth=3 if dim == 24 else 1, heads=3, readout=readout)
        torch.save(dict(config=vit.config, model=vit.state_dict()), tmp_path / "net.pt")
        cfg = replace(resolved("--protocol", protocol), init=str(tmp_path / "net.pt"), dtype="fp32")
        made = probe.Encoder(cfg, CPU, str)
        assert (made.readout, made.blocks) == expected and made(torch.zeros(2, 3, 8, 8)).shape == (2, made.width)
    made = probe.Encoder(replace(cfg, init=str(encoder), img_size=(24, 16)), CPU, str)
    assert made.sight["size"] == (24, 16) and made.sight["mean"] == HALF


@pytest.mark.parametrize("args, words", [
    (["--protocol", "lars"], "--protocol is one of knn, features, sweep, mae, moco, dino, not lars"),
    (["--tokens", "cls", "cla"], "--tokens is one of cls, mean, patches, not cls cla"),
    (["--readout", "gap"], "--readout is one of cls, avg, both, not gap"),
    (["--split", "test"], "--split is one of train, val, not test"),
    (["--k", "10", "0"], "--k must be at least 1"), (["--init", "none.pth"], "none.pth does not exist"),
    (["--blocks", "4"], "--blocks 4: .* has 3"), (["--img-size", "18"], "patches of 4 do not tile a 18x18"),
    (["--protocol", "mae"], "40 images, less than one --batch-size of 16384"),
    (["--protocol", "mae", "--batch-size", "4", "--accum", "4"], "leaves one image to a pass: MAE's BatchNorm needs"),
    (["--demo", "--protocol", "mae"], "--demo goes with knn, sweep and features"),
    (["--mean", "1", "2"], "need 3 numbers"), (["--decode", "gpu"], "--decode is one of workers, device, not gpu"),
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
            ("flat", [], "flat/val has no labels"), ("other", [], "differ in their classes, first b"),
            (classes, ["--init", tmp_path / "resnet.pth"], "is no network known here"),
            (classes, ["--init", tmp_path / "six.pt"], "sees 6 channels: images have 1, 3 or 4"),
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
