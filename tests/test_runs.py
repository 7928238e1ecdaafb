"""mae.py as its users run it: real processes, killed, preempted, resumed, fed with bad input."""
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from conftest import write_images
from PIL import Image

import mae
from data import RandomCrops, batch_keys
from images.datasets import train_and_val
from runtime.options import parse
from tools import pictures
from vit import MODELS
from weights import load_encoder

ROOT = Path(__file__).parents[1]
OLD = Path(__file__).parent / "old_run"
TINY = "--model vit_mini --img-size 16 --patch-size 4 --batch-size 8 --workers 0 --log-every 1 --save-every 5".split()


def command(*args, world=1, script="mae.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
                "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1"] if world > 1 else []
    return [sys.executable, *launcher, str(ROOT / script), *map(str, args)]


def start(*args, world=1, script="mae.py", **environment):
    return subprocess.Popen(command(*args, world=world, script=script), stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment})


def finish(*args, expect=0, **options):
    process = start(*args, **options)
    text = process.communicate(timeout=300)[0]
    assert process.returncode == expect, text
    return text


def rows(out):
    log = Path(out) / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def steps(out):
    return [row["step"] for row in rows(out) if "loss" in row]


def wait_for(process, out, step):
    while max(steps(out), default=0) < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def kill_9(process):
    """The process and all its descendants: torchrun's workers have sessions of their own and would outlive it."""
    pids = [process.pid]
    for pid in pids:
        pids += map(int, subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True).stdout.split())
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def start_and_kill(*args, out, step, **options):
    """Start a run and kill -9 it after `step`, until that loses a step -> how many starts it took. Killed right after a
    checkpoint a run repeats nothing when it goes on, which would prove nothing."""
    starts, saved = 0, None
    while saved is None or saved == max(steps(out)):
        process = start(*args, "--out", out, **options)
        wait_for(process, out, step)
        kill_9(process)
        starts, step = starts + 1, max(steps(out)) + 3
        last, previous = Path(out) / "last.pt", Path(out) / "previous.pt"   # between two renames there is no last.pt
        saved = torch.load(last if last.exists() else previous, weights_only=True)["step"]
    return starts


def same_state(a, b):
    a, b = (torch.load(Path(out) / "last.pt", weights_only=True) for out in (a, b))
    assert a["step"] == b["step"]
    for name in a["model"]:
        assert torch.equal(a["model"][name], b["model"][name]), name
    for i, moments in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][i][k]) for k, v in moments.items())


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_killed_and_resumed_is_bitwise_the_same(classes, tmp_path, world):
    """kill -9, another number of workers, SIGTERM, the end: equal to the run that nothing happened to. Two processes
    read a part of a tar, two crops of each image."""
    if world == 2:
        with tarfile.open(tmp_path / "set.tar", "w") as archive:
            archive.add(classes, "set")
    more = ["--data", tmp_path / "set.tar", "--repeat", 2, "--fraction", 0.95] if world == 2 else ["--data", classes]
    args = [*more, *TINY, "--epochs", 16 if world == 1 else 20, "--warmup-epochs", 2]    # 80 steps
    finish(*args, "--out", tmp_path / "whole", world=world)
    assert steps(tmp_path / "whole") == list(range(1, 81))

    out = tmp_path / "broken"
    starts = start_and_kill(*args, out=out, step=12, world=world)
    process = start(*args, "--out", out, "--workers", 1, world=world)
    killed_at = max(steps(out))
    wait_for(process, out, killed_at + 12)
    asked = time.time()
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=60)[0]
    assert time.time() - asked < 25                             # torchrun kills after 30 s
    assert "stopped by a signal" in text and 'mae.py", line' not in text
    assert text.count("signal: finishing this step") == 1
    if world == 1:
        assert process.returncode == 0
    finish(*args, "--out", out, world=world)

    got = steps(out)
    again = [b for a, b in zip(got, got[1:]) if b <= a]
    assert len(again) >= 1, "no step was repeated: nothing was resumed"
    assert len([row for row in rows(out) if "config" in row]) == starts + 2
    whole, broken = ({r["step"]: r["loss"] for r in rows(f) if "loss" in r} for f in (tmp_path / "whole", out))
    assert whole == broken
    same_state(tmp_path / "whole", out)


def test_signal_to_the_whole_group_spares_the_workers(classes, tmp_path):
    """Ctrl-C and some schedulers signal every process: a decoding process that died of it would lose the run."""
    process = start("--data", classes, *TINY, "--workers", 2, "--epochs", 400, "--out", tmp_path, "--save-every", 9999)
    wait_for(process, tmp_path, 5)
    os.killpg(process.pid, signal.SIGINT)
    text = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "stopped by a signal" in text, text
    assert torch.load(tmp_path / "last.pt")["step"] == max(steps(tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_and_resumed(classes, tmp_path):
    args = ["--data", classes, *TINY, "--epochs", 16, "--compile"]
    finish(*args, "--out", tmp_path / "whole")
    process = start(*args, "--out", tmp_path / "broken")
    wait_for(process, tmp_path / "broken", 12)
    kill_9(process)
    finish(*args, "--out", tmp_path / "broken")
    same_state(tmp_path / "whole", tmp_path / "broken")


def test_nan_on_one_rank_of_two(classes, tmp_path):
    """One bad step is skipped on both ranks; too many in a row stop both, in words, with the state kept."""
    args = ["--data", classes, *TINY, "--epochs", 4, "--max-skipped", 3]
    text = finish(*args, "--out", tmp_path / "one", world=2, script="tests/nan_run.py", NAN_FROM="5", NAN_TO="6")
    assert rows(tmp_path / "one")[-1]["skipped"] == 1 and "done:" in text
    state = torch.load(tmp_path / "one" / "last.pt")
    assert all(v.isfinite().all() for v in state["model"].values())
    text = finish(*args, "--out", tmp_path / "many", world=2, script="tests/nan_run.py", NAN_FROM="5", NAN_TO="99",
                  expect=1)
    assert "3 steps in a row, up to step 8, gave a non-finite loss" in text
    assert 'mae.py", line' not in text                          # torchrun has a traceback of its own, we have none
    debug = torch.load(tmp_path / "many" / "debug-rank1.pt")    # rank 1 made the trouble and keeps its batch
    keys = list(batch_keys(40, 8, 1, 2, 1, 0, 7, 8))[0]
    batch = RandomCrops(train_and_val(str(classes))[0], (16, 16), 3, 0, (0.2, 1.0), "bicubic").__getitems__(keys)[0]
    assert debug["step"] == 8 and debug["batch"].shape == batch.shape
    for kept, crop in zip(debug["batch"], batch):
        assert torch.equal(kept, crop) or torch.equal(kept, crop.flip(-1))
    assert torch.load(tmp_path / "many" / "last.pt")["step"] == 5


def test_disk_that_is_full(classes, tmp_path):
    """A file size limit fails every write as a full disk does: the run goes on, its end says that it is not saved."""
    code = ("import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); "
            "sys.path.insert(0, '.'); import mae; mae.main(sys.argv[1:])")
    args = ["--data", str(classes), *TINY, "--epochs", "2", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *args], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "warning: step 5 could not be saved" in done.stdout
    assert done.stderr.splitlines()[-1].startswith(f"step 10 could not be saved in {tmp_path} (is the disk full?)")
    assert "Traceback" not in done.stderr and not list(tmp_path.glob("*.tmp"))


def test_a_closed_screen_does_not_end_a_run(classes, tmp_path):
    process = start("--data", classes, *TINY, "--epochs", 4, "--out", tmp_path)
    assert "40 images" in process.stdout.readline()
    process.stdout.close()                                      # as `python mae.py | head -1` does
    assert process.wait(timeout=300) == 0
    assert max(steps(tmp_path)) == 20 and torch.load(tmp_path / "last.pt")["step"] == 20


@pytest.mark.skipif(not hasattr(fcntl, "F_SETPIPE_SZ"), reason="the size of a pipe can be set on Linux only")
def test_a_screen_that_nobody_reads(classes, tmp_path):
    """As a stopped `tee`: the run waits in the middle of a line, and a signal still saves it and ends it."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    args = ["--data", classes, *TINY, "--epochs", 900, "--save-every", 9999, "--out", tmp_path]
    process = subprocess.Popen(command(*args), stdout=write, stderr=write, cwd=ROOT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(process, tmp_path, 20)
    before = 0
    while before < max(steps(tmp_path)):
        before = max(steps(tmp_path))
        time.sleep(1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 0
    assert torch.load(tmp_path / "last.pt")["step"] in (before, before + 1)
    os.close(read)
    os.close(write)


def test_one_sentence_and_no_traceback(tmp_path):
    for args, words in ((["--data", tmp_path / "no"], "does not exist"), (["--epoch", "3"], "--epoch")):
        done = subprocess.run(command(*args), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 1 and done.stdout == "" and words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr


# ----------------------------------------------------------------------------------------------------------------
# In this process


def train(out, *args):
    mae.main([*TINY, "--out", str(out), *map(str, args)])
    return rows(out)


def test_outputs(classes, tmp_path):
    found = train(tmp_path, "--data", classes, "--epochs", 2, "--probe-every", 1, "--keep-every", 1, "--accum", 2)
    assert {"last.pt", "previous.pt", "encoder.pt", "recon.png", "log.jsonl", "epoch0001.pt", "epoch0002.pt"} <= set(
        os.listdir(tmp_path))
    assert found[0]["config"]["decoder_dim"] == 64 and found[0]["config"]["warmup_epochs"] == 0.2
    last = [row for row in found if "loss" in row][-1]
    assert {"chance", "lr", "grad_norm", "skipped", "img_s", "data_s", "step_s", "mem_gb"} <= set(last)
    assert [row["step"] for row in found if "knn" in row] == [0, 5, 10]
    picture = Image.open(tmp_path / "recon.png")
    assert picture.width == 3 * (16 * 7 + 8) and picture.height == 8 * (16 * 7 + 8) + 36
    encoder = load_encoder(str(tmp_path / "encoder.pt"), say=str)           # heads, size and patch are stored
    assert encoder.config["heads"] == 4 and encoder.grid == (4, 4)


def test_init_and_pictures(classes, tmp_path):
    train(tmp_path / "a", "--data", classes, "--epochs", 1)
    train(tmp_path / "b", "--data", classes, "--epochs", 1, "--init", tmp_path / "a" / "last.pt", "--lr", 0)
    a, b = (torch.load(tmp_path / name / "last.pt")["model"] for name in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    images = ["--images", str(classes / "val"), "--out", str(tmp_path / "c")]
    pictures.main([str(tmp_path / "a" / "last.pt"), *images])
    assert Image.open(tmp_path / "c" / "recon.png").width == 360
    with pytest.raises(SystemExit, match="has no decoder"):
        pictures.main([str(tmp_path / "a" / "encoder.pt"), *images])


@pytest.mark.parametrize("args", [["--img-size", "16", "24", "--in-chans", "1"], ["--no-norm-pix", "--in-chans", "4"],
                                  ["--dtype", "bf16", "--clip-grad", "1"], ["--dtype", "fp16"]])
def test_other_settings(classes, tmp_path, args):
    found = train(tmp_path, "--data", classes, "--epochs", 1, *args)
    assert all(isinstance(row["loss"], float) for row in found if "loss" in row)


@pytest.mark.parametrize("args, words", [
    (["--model", "vit_giant"], "must be one of vit_mini, .*, not vit_giant"),
    (["--patch-size", "5"], "patches of 5 do not tile a 16x16"), (["--heads", "5"], "5 heads do not divide"),
    (["--batch-size", "64"], "40 images, less than one batch: give --batch-size 40"),
    (["--accum", "3"], "does not divide"), (["--repeat", "3"], "x 3 crops of an image"),
    (["--mask-ratio", "1"], "leaves 0 of 16"), (["--mask-ratio", "0.99"], "leaves 0 of 16"),
    (["--mask-ratio", "1.01"], "--mask-ratio must be at most 1"), (["--mask-ratio", "-1"], "must be at least 0"),
    (["--mask-ratio", "0"], "leaves 16 of 16"), (["--mean", "1", "2"], "need 3 numbers"),
    (["--init", "absent.pth"], "absent.pth does not exist"),
    (["--warmup-epochs", "3"], "must be more than --warmup-epochs 3"),
    (["--dtype", "fp8"], "fp8"), (["--decoder-heads", "5"], "5 heads do not divide"),
    (["--in-chans", "2"], "bands is 3, and --in-chans is 2"), (["--interpolation", "cubic"], "cubic"),
    (["--images", "x"], "--images x"), (["--min-crop", "2"], "--min-crop must be at most 1"),
    (["--std", "0", "0", "0"], "scale of 0 to 1"), (["--seed", "-1"], "--seed must be at least 0"),
    (["--device", "tpu"], "--device tpu is not available here"), (["--img-size", "1", "2", "3"], "height and width"),
    (["--log-every", "0"], "--log-every must be at least 1"), (["--decoder-depth", "0"], "at least 1"),
    (["--distill", "hidden"], "--distill has no effect without --distill-teacher"),
    (["--teacher-heads", "3"], "--teacher-heads has no effect without --distill-teacher"),
    (["--fraction", "0"], "--fraction is above 0"), (["--probe-every", "-1"], "--probe-every must be at least 0")])
def test_bad_options(classes, tmp_path, args, words):
    with pytest.raises(SystemExit, match=words):
        train(tmp_path, "--data", classes, "--epochs", 2, *args)


def test_probe_needs_classes(tmp_path):
    write_images(tmp_path / "flat", 8)
    write_images(tmp_path / "other" / "train" / "a", 8)
    write_images(tmp_path / "other" / "val" / "images", 8)      # as in Tiny-ImageNet, where this is no class
    for data in ("flat", "other"):
        with pytest.raises(SystemExit, match="--probe-every needs the same classes|train lacks, first images"):
            train(tmp_path / "out", "--data", tmp_path / data, "--probe-every", 1, "--epochs", 1)


def test_a_few_corrupt_images(tmp_path, capsys):
    write_images(tmp_path / "set", 200)
    for i in (7, 99, 150):
        (tmp_path / "set" / f"{i:03}.png").write_bytes(b"damaged")
    found = train(tmp_path / "out", "--data", tmp_path / "set", "--epochs", 2, "--log-every", 25)
    assert sorted(row["unreadable"][-7:] for row in found if "unreadable" in row) == ["007.png", "099.png", "150.png"]
    assert "done:" in capsys.readouterr().out


def test_mostly_corrupt_images(tmp_path):
    write_images(tmp_path / "set", 50)
    for i in range(30):
        (tmp_path / "set" / f"{i:03}.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"\d+ of \d+ images could not be read, more than --max-unreadable 0.05"):
        train(tmp_path / "out", "--data", tmp_path / "set", "--epochs", 20)
    assert torch.load(tmp_path / "out" / "last.pt")["step"] < 40


def test_nothing_but_corrupt_images(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:03}.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="images could not be read, more than"):
        train(tmp_path / "out", "--data", tmp_path, "--epochs", 20)


def test_typed_again_after_the_end(classes, tmp_path, capsys):
    """A run that has ended redraws its picture, probes and trains nothing."""
    args = ["--data", classes, "--epochs", 1, "--probe-every", 1]
    train(tmp_path, *args)
    os.remove(tmp_path / "recon.png")
    before = torch.load(tmp_path / "last.pt")["model"]["cls_token"]
    found = train(tmp_path, *args)
    assert (tmp_path / "recon.png").exists() and len([row for row in found if "loss" in row]) == 5
    assert torch.equal(before, torch.load(tmp_path / "last.pt")["model"]["cls_token"])
    assert "5 of 5 steps done" in capsys.readouterr().out


def test_checkpoints_of_others(classes, tmp_path):
    train(tmp_path / "out", "--data", classes, "--epochs", 1)
    state = torch.load(tmp_path / "out" / "last.pt")
    torch.save(state | dict(method="moco_v3"), tmp_path / "out" / "last.pt")
    with pytest.raises(SystemExit, match="a checkpoint of moco_v3, not of mae"):
        train(tmp_path / "out", "--data", classes, "--epochs", 1)
    with pytest.raises(SystemExit, match="trained with 4 heads and the network here has 8"):
        train(tmp_path / "new", "--data", classes, "--epochs", 1, "--heads", 8, "--init",
              tmp_path / "out" / "encoder.pt")


def test_a_teacher_is_neither_added_nor_left_out_later(classes, tmp_path):
    args = ["--data", classes, "--epochs", 1]
    teacher = ["--distill-teacher", tmp_path / "plain" / "encoder.pt"]
    train(tmp_path / "plain", *args)
    train(tmp_path / "distilled", *args, *teacher)
    for name, more in (("plain", teacher), ("distilled", [])):
        with pytest.raises(SystemExit, match="belongs to a run with other options") as stop:
            train(tmp_path / name, *args, *more)
        assert "\n" not in str(stop.value)


def test_demo_defaults():
    def defaults(*argv):
        return parse(mae.Config, "mae", "", mae.RECIPES, mae.DEMO, argv)
    cfg = defaults("--demo", "--epochs", "1")
    assert (cfg.data, cfg.model, cfg.epochs, cfg.out) == ("shapes", "vit_mini", 1, "out/mae-demo")
    assert cfg.warmup_epochs == 0.1                             # shortened with the run
    cfg = defaults()
    assert (cfg.epochs, cfg.warmup_epochs, cfg.heads, cfg.patch_size, cfg.min_crop, cfg.interpolation) == (
        400, 40, 12, 16, 0.08, "random")
    assert (cfg.batch_size, cfg.blr, cfg.weight_decay, cfg.decoder_dim, cfg.out) == (4096, 1.5e-4, 0.05, 96, "out/mae")
    cfg = defaults("--model", "vit_huge", "--epochs", "100")
    assert (cfg.warmup_epochs, cfg.patch_size, cfg.decoder_depth, cfg.min_crop) == (10, 14, 8, 0.2)


def test_flattened_file_gives_the_same_losses(classes, tmp_path):
    """tools.flatten's one file, alone in an empty folder, against mae.py."""
    text = subprocess.run([sys.executable, "-m", "tools.flatten", "mae.py"], capture_output=True, text=True, cwd=ROOT,
                          check=True).stdout
    (tmp_path / "mae_single.py").write_text(text)
    args = ["--data", str(classes), *TINY, "--epochs", "2"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run([sys.executable, "mae_single.py", *args, "--out", "single"], cwd=tmp_path, check=True, env=env)
    mae.main([*args, "--out", str(tmp_path / "several")])
    single, several = ([r["loss"] for r in rows(tmp_path / name) if "loss" in r] for name in ("single", "several"))
    assert single == several and len(single) == 10
    assert not re.search(r"^\s*(from|import) (vit|data|distill|images|nets|runtime|weights)\b", text, re.MULTILINE)


# ----------------------------------------------------------------------------------------------------------------
# Files of the first layout of this repository

# Made by its last commit, 27fb6e5, of write_images("set", 16) and a network of two blocks: last.pt and encoder.pt after
# 4 of 8 steps, and the losses with which that code went on.
OLD_ARGS = ("--data set --model vit_mini --img-size 8 --decoder-dim 8 --decoder-heads 2 --batch-size 8 --accum 2 "
            "--repeat 2 --epochs 4 --warmup-epochs 0.5 --blr 0.1 --clip-grad 0.5 --min-crop 0.5 --interpolation random "
            "--dtype fp32 --workers 0 --log-every 1").split()
OLD_LOSSES = {5: 1.3666530847549438, 6: 1.3276382684707642, 7: 1.2919278144836426, 8: 1.1412379741668701}


@pytest.fixture
def old_network(tmp_path, monkeypatch):
    write_images(tmp_path / "set", 16)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(MODELS, "vit_mini", dict(dim=8, depth=2, heads=2, patch_size=2))


def test_an_old_run_goes_on(old_network, capsys):
    os.mkdir("run")
    shutil.copy(OLD / "last.pt", "run")
    mae.main([*OLD_ARGS, "--out", "run"])
    found = {row["step"]: row["loss"] for row in rows("run") if "loss" in row}
    assert found == pytest.approx(OLD_LOSSES, rel=1e-5) and list(found) == [5, 6, 7, 8]
    assert "4 of 8 steps done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="clip_grad was 0.5, is 1.0"):
        mae.main([*OLD_ARGS, "--out", "run", "--clip-grad", "1"])


@pytest.mark.parametrize("name", ["last.pt", "encoder.pt"])
def test_old_weights_start_a_new_run(old_network, capsys, name):
    mae.main([*OLD_ARGS, "--out", "run", "--init", str(OLD / name), "--lr", "0"])
    old, new = (torch.load(path)["model"] for path in (OLD / name, "run/last.pt"))
    assert all(torch.equal(new[k], v) for k, v in old.items()) and len(old) >= 27
    fresh = "none" if name == "last.pt" else "mask_token, decoder_pos_embed"
    assert f"missing, so fresh: {fresh}" in capsys.readouterr().out
    assert load_encoder(str(OLD / name), heads=2, say=str).config["heads"] == 2


def test_an_old_encoder_says_what_it_is(old_network):
    encoder = load_encoder(str(OLD / "encoder.pt"), say=str)
    assert (encoder.config["heads"], encoder.grid, encoder.pool) == (2, (4, 4), "cls")
