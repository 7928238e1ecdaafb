"""A run: its plan, folder, checkpoints, log, stopping, and a whole one as small as can be."""
import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from test_options import Config
from torch import nn

import runtime.folder
import runtime.run
import runtime.writers
from images.pictures import draw_curve
from runtime.folder import Log, RunFolder
from runtime.run import Run, StopCheck, finite_step, print_rank0, warmup_cosine

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


# ----------------------------------------------------------------------------------------------------------------
# The screen


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_screen_that_is_gone_costs_the_line_only(tmp_path):
    """A closed pipe, a full disk, streams that are closed or not there: a process goes on to its own exit code 7."""
    code = """if True:
        import os, sys
        from runtime.run import protect_screens
        def closed_pipe(fd=1):
            read, write = os.pipe()
            os.dup2(write, fd)
            os.close(read)
        def closed_pipe_for_errors():
            closed_pipe(2)
        def full_disk():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        def full_disk_for_errors():
            os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        def closed():                                           # as Python finds it: it has no stream then
            os.close(1)
            sys.stdout = None
        def all_closed():
            os.closerange(0, 3)
            sys.stdout = sys.stderr = None
        def none():
            sys.stdout = sys.stderr = None
        def trial(before=lambda: None, during=lambda: None):
            if not os.fork():
                before()
                protect_screens()
                during()
                for i in range(3):
                    print("x" * 100_000)
                    print("y" * 100_000, file=sys.stderr)
                with open("a file", "w") as f:                  # which must not get the number of a closed screen
                    print("z")
                    f.write("went on")
                os._exit(7)
            status = os.waitstatus_to_exitcode(os.wait()[1])
            assert status == 7 and open("a file").read() == "went on", (before, during)
            os.remove("a file")
        for breaks in (closed_pipe, closed_pipe_for_errors, full_disk, full_disk_for_errors):
            trial(before=breaks)
            trial(during=breaks)
        for breaks in (closed, all_closed, none):
            trial(before=breaks)
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True)
    assert done.returncode == 0 and set(done.stderr) <= {"y", "\n"}, done.stderr[-500:]
    assert done.stdout.count("x") % 300_000 == 0 and done.stdout.count("x") >= 300_000


def test_names_that_a_screen_has_no_letters_for(tmp_path):
    code = "import os; from runtime.run import launch; launch(lambda: print(os.fsdecode(b'\\xff\\xe9.jpg'), '\\u4e2d'))"
    for encoding, shown in (("ascii", "\\udcff\\udce9.jpg \\u4e2d\n"), ("utf-8", "\\udcff\\udce9.jpg \u4e2d\n")):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                              env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0 and done.stdout.decode() == shown, done.stderr


def test_print_rank0(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        print_rank0(f"from {rank}")
    assert capsys.readouterr().out == "from 0\n"


# ----------------------------------------------------------------------------------------------------------------
# Plans, schedules, the optimizer's step


class Source:
    """A set of so many images, of which none is read here."""
    labels = classes = None

    def __init__(self, images):
        self.images = np.arange(images)

    def __len__(self):
        return len(self.images)


def planned(monkeypatch, cfg, images, world=1, **options):
    monkeypatch.setattr(runtime.run, "train_and_val", lambda *args: (Source(images), None))
    monkeypatch.setattr(runtime.run, "RunFolder", lambda *args: SimpleNamespace(saved=None))
    run = Run(cfg, "toy")
    run.world = world
    run.datasets(**options)
    return run


def test_plan(monkeypatch):
    cfg = Config(batch_size=512, blr=1.5e-4)
    run = planned(monkeypatch, cfg, 1_281_167, world=8)
    assert (run.total, run.warmup, run.per_epoch) == (25020, 2502, 2502) and run.peak == pytest.approx(3e-4)
    assert planned(monkeypatch, replace(cfg, lr=0.1), 1_281_167, 8).peak == 0.1
    assert planned(monkeypatch, replace(cfg, batch_size=4096), 1_281_167, 8).per_epoch == 312


@pytest.mark.parametrize("change, world, words", [
    (dict(batch_size=10), 4, "does not divide among 4 processes x 1"), (dict(accum=3), 1, "x 3 passes"),
    (dict(batch_size=64), 1, "50 images, less than one batch: give --batch-size 50"),
    (dict(batch_size=64, accum=4), 2, "50 images, less than one batch: give --batch-size 48"),
    (dict(warmup_epochs=10), 1, "must be more than --warmup-epochs 10"),
    (dict(epochs=0, warmup_epochs=0), 1, "--epochs 0 must be more"), (dict(epochs=math.nan), 1, "--epochs nan must be"),
    (dict(img_size=(1, 2, 3)), 1, "height and width"), (dict(mean=(0.5,)), 1, "3 numbers"),
    (dict(device="tpu"), 1, "--device tpu is not available here")])
def test_what_cannot_be_run(monkeypatch, change, world, words):
    with pytest.raises(SystemExit, match=words):
        planned(monkeypatch, replace(Config(), **change), 50, world)


def test_a_set_smaller_than_a_batch(monkeypatch, capsys):
    """Where the script allows it, the batch becomes what divides among processes and passes, and so does the rate."""
    cfg = Config(batch_size=512, blr=0.1)
    run = planned(monkeypatch, replace(cfg, accum=3), 50, world=4, shrink_batch=True)
    assert (run.cfg.batch_size, run.per_epoch, run.total) == (48, 1, 10) and run.peak == pytest.approx(0.1 * 48 / 256)
    assert "50 images, less than one batch: --batch-size is now 48" in capsys.readouterr().out
    assert planned(monkeypatch, replace(cfg, lr=0.3), 50, shrink_batch=True).peak == 0.3
    capsys.readouterr()
    assert planned(monkeypatch, replace(cfg, batch_size=32), 50, shrink_batch=True).cfg.batch_size == 32
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit, match="2 images, and a step of 4 processes x 1 passes .* needs 4"):
        planned(monkeypatch, cfg, 2, world=4, shrink_batch=True)


def test_learning_rates():
    """The published schedule at ImageNet's size: 400 epochs of 312 steps, 40 of warm-up, peak 2.4e-3."""
    for step, expected in ((0, 0), (1, 1.9230769e-7), (312, 6e-5), (6240, 1.2e-3), (12480, 2.4e-3),
                           (40000, 2.0617142e-3), (68640, 1.2e-3), (124799, 4.694e-13)):
        assert warmup_cosine(step, 124800, 12480, 2.4e-3) == pytest.approx(expected, rel=1e-4 if step > 1e5 else 1e-7)
    for step, expected in ((1, 6.3949e-7), (1251, 8e-4), (100000, 3.3963895e-3), (375299, 1.00000007e-6)):
        found = warmup_cosine(step, 375300, 6255, 4e-3, floor=1e-6)
        assert found == pytest.approx(expected, rel=1e-4 if step == 1 else 1e-7)


def test_due(monkeypatch):
    run = planned(monkeypatch, Config(), 80)                    # 10 epochs of 10 steps
    assert [step for step in range(1, 101) if run.due(4, step)] == [40, 80]
    assert run.due(4, 80) == 8 and run.due(0, 80) is None
    run.done = 40
    assert run.due(4) == 4 and run.due(3) is None


def test_precision_and_seeds():
    assert runtime.run.precision("auto", CPU) == "fp32" and runtime.run.precision("bf16", CPU) == "bf16"
    draws = set()
    for args in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        runtime.run.seed_for(*args)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


def with_gradients(*gradients, lr=1.0):
    params = [nn.Parameter(torch.zeros(len(g))) for g in gradients]
    for p, g in zip(params, gradients):
        p.grad = torch.tensor(g)
    return params, torch.optim.SGD(params, lr, fused=True), torch.amp.GradScaler("cpu", enabled=False)


def test_clipped_by_one_norm_or_each_by_its_own():
    params, *step = with_gradients([3.0, 0.0], [0.0, 4.0])
    norm, skipped = finite_step(*step, clip=1.0)
    assert (norm.item(), skipped.item()) == (5, 0)
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.tensor([-0.6, 0, 0, -0.8]))
    params, *step = with_gradients([0.3, 0.4], [0.0, 4.0])
    norm, _ = finite_step(*step, clip=1.0, per_tensor=True)     # the first is below the limit and stays
    assert norm.item() == pytest.approx(16.25 ** 0.5)
    torch.testing.assert_close(torch.cat([p.detach() for p in params]), torch.tensor([-0.3, -0.4, 0, -1.0]))
    params, *step = with_gradients([3.0, 4.0])
    assert finite_step(*step)[0] == 5 and torch.equal(params[0].detach(), torch.tensor([-3.0, -4.0]))


@pytest.mark.parametrize("per_tensor", [False, True])
def test_a_non_finite_step_leaves_weights_and_gradients(per_tensor):
    params, optimizer, scaler = with_gradients([0.3, math.inf], [0.3, 0.4])
    norm, skipped = finite_step(optimizer, scaler, 1.0, per_tensor)
    assert not norm.isfinite() and skipped == 1
    assert all(torch.equal(p.detach(), torch.zeros(2)) for p in params)
    assert torch.equal(params[0].grad, torch.tensor([0.3, math.inf]))       # so that the debug checkpoint shows it
    params[0].grad = torch.tensor([0.3, 0.4])
    assert finite_step(optimizer, scaler, 1.0, per_tensor)[1] == 0


# ----------------------------------------------------------------------------------------------------------------
# The folder and its checkpoints


def toy_parts():
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    return dict(model=model, optimizer=optimizer)


def folder_in(path, **change):
    folder = RunFolder(replace(Config(out=str(path)), **change), "toy", 0, 1, 50)
    folder.parts = toy_parts()
    folder.step = folder.load(80) if folder.saved else 0
    return folder


def left(folder):
    """As if its process had ended."""
    folder.lock_file.close()


def test_saved_and_found_again(tmp_path):
    first = folder_in(tmp_path)
    assert first.step == 0
    first.save(7, dict(weights=1), keep=3)
    with torch.no_grad():
        first.parts["model"].weight.add_(1)
    first.save(8, dict(weights=2))
    left(first)
    second = folder_in(tmp_path)
    assert second.step == 8 and torch.equal(second.parts["model"].weight, first.parts["model"].weight)
    ours, theirs = (folder.parts["optimizer"].state_dict()["state"][0] for folder in (first, second))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.load(tmp_path / "previous.pt")["step"] == torch.load(tmp_path / "epoch0003.pt")["step"] == 7
    assert torch.load(tmp_path / "encoder.pt") == dict(weights=2)
    assert not list(tmp_path.glob("*.tmp"))


def one_byte_of_the_weights(data):
    """One bit of the data of the weight is changed, which torch.load does not see."""
    place = data.index(toy_parts()["model"].weight.detach().numpy().tobytes()) + 5
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b"",
                                    lambda b: b"\x00" * len(b), one_byte_of_the_weights])
def test_a_truncated_checkpoint_falls_back(tmp_path, damage, capsys):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    folder.save(8, {})
    left(folder)
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    assert folder_in(tmp_path).step == 7
    assert "last.pt is damaged" in capsys.readouterr().out


def test_two_truncated_checkpoints_are_not_a_new_run(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    folder.save(8, {})
    left(folder)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SystemExit, match="last.pt and .*previous.pt cannot be read"):
        folder_in(tmp_path)


def test_killed_between_two_renames(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert folder_in(tmp_path).step == 7


def test_full_disk(tmp_path, monkeypatch, capsys):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64")):
        def save(state, f, error=error):
            f.write(b"half of a file")
            raise error
        monkeypatch.setattr(torch, "save", save)
        folder.save(8, {})
        assert "step 8 could not be saved" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="is the disk full"):
            folder.save(8, {}, must=True)
        assert not folder.write("debug-rank0.pt", dict(step=8))
        assert "debug-rank0.pt could not be saved" in capsys.readouterr().out
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    left(folder)
    assert folder_in(tmp_path).step == 7


def test_two_runs_in_one_folder(tmp_path):
    code = ("import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); "
            "sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(SystemExit, match="another run is writing"):
        folder_in(tmp_path)
    other.kill()                                                # a killed run leaves no lock
    other.wait()
    folder_in(tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot be written"):
        folder_in(tmp_path / "file")


def test_resuming_from_a_file_by_name(tmp_path):
    """The file starts an empty folder only: typed again, the same command goes on from last.pt."""
    folder = folder_in(tmp_path / "a")
    folder.save(7, {}, keep=3)
    left(folder)
    kept = str(tmp_path / "a" / "epoch0003.pt")
    other = folder_in(tmp_path / "b", resume=kept)
    assert other.step == 7
    other.save(9, {})
    left(other)
    assert folder_in(tmp_path / "b", resume=kept).step == 9
    with pytest.raises(SystemExit, match="absent.pt does not exist"):
        folder_in(tmp_path / "c", resume="absent.pt")
    torch.save(dict(method="toy", model={}), tmp_path / "encoder.pt")
    with pytest.raises(SystemExit, match="not the state of a run"):
        folder_in(tmp_path / "c", resume=str(tmp_path / "encoder.pt"))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        folder_in(tmp_path / "c", resume=str(tmp_path / "list.pt"))


def test_the_good_checkpoint_outlives_the_damaged_one(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    folder.save(8, {})
    left(folder)
    (tmp_path / "last.pt").write_bytes(b"half")
    folder = folder_in(tmp_path)
    folder.save(9, {})
    assert torch.load(tmp_path / "previous.pt")["step"] == 7 and torch.load(tmp_path / "last.pt")["step"] == 9
    folder.save(10, {})
    assert torch.load(tmp_path / "previous.pt")["step"] == 9


@pytest.mark.parametrize("change, words", [
    (dict(blr=1e-2), "blr was 0.001, is 0.01"), (dict(resume="none"), "--resume none"),
    (dict(dtype="bf16"), "dtype was auto, is bf16")])
def test_refusals(tmp_path, change, words):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    with pytest.raises(SystemExit, match=words):
        folder_in(tmp_path, **change)


def test_three_differences_and_how_many_more(tmp_path):
    """The data and the number of images come first: they explain the most."""
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    change = dict(blr=1e-2, norm_pix=False, dtype="bf16", data="other")
    three = r"\(data was imagenet, is other; (\w+ was [\w.]+, is [\w.]+; ){2}and 1 more\)"
    with pytest.raises(SystemExit, match=three) as stop:
        folder_in(tmp_path, **change)
    assert "\n" not in str(stop.value)
    with pytest.raises(SystemExit, match=r"is other; images was 50, is 49; .* and 2 more\)"):
        RunFolder(replace(Config(out=str(tmp_path)), **change), "toy", 0, 1, 49)
    change.pop("dtype")
    with pytest.raises(SystemExit) as stop:
        folder_in(tmp_path, **change)
    assert "more" not in str(stop.value) and str(stop.value).count(" was ") == 3


def test_free_options_may_change(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    assert folder_in(tmp_path, workers=3, log_every=1, save_every=9, device="cpu", compile=True).step == 7


def test_other_methods_data_and_processes(tmp_path, capsys):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    for args, words in ((("other", 0, 1, 50), "a checkpoint of toy, not of other"),
                        (("toy", 0, 1, 49), "images was 50, is 49")):
        with pytest.raises(SystemExit, match=words):
            RunFolder(Config(out=str(tmp_path)), *args)
    state = torch.load(tmp_path / "last.pt")
    torch.save(state | dict(world=4), tmp_path / "last.pt")
    assert folder_in(tmp_path).step == 7
    assert "no longer the same bit for bit" in capsys.readouterr().out
    del state["config"]["norm_pix"]                             # from before there was this option
    torch.save(state, tmp_path / "last.pt")
    assert folder_in(tmp_path).step == 7
    with pytest.raises(SystemExit, match="norm_pix was True, is False"):
        folder_in(tmp_path, norm_pix=False)


def test_an_old_spelling_in_a_checkpoint(tmp_path):
    folder = folder_in(tmp_path, pool="avg")
    folder.save(7, {})
    left(folder)
    state = torch.load(tmp_path / "last.pt")
    state["config"]["readout"] = state["config"].pop("pool")    # as it was written when the option was called so
    torch.save(state, tmp_path / "last.pt")
    assert folder_in(tmp_path, pool="avg").step == 7
    with pytest.raises(SystemExit, match="pool was avg, is cls"):
        folder_in(tmp_path)


def test_an_option_that_is_gone(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    state = torch.load(tmp_path / "last.pt")
    state["config"]["visualize"] = None
    torch.save(state, tmp_path / "last.pt")
    assert folder_in(tmp_path).step == 7


def changed(tmp_path, change):
    """A checkpoint of a run, as another program, an older version or a bad disk might leave it."""
    folder = folder_in(tmp_path)
    folder.save(7, {})
    left(folder)
    state = torch.load(tmp_path / "last.pt")
    change(state)
    torch.save(state, tmp_path / "last.pt")


def first_moments(state):
    return state["optimizer"]["state"][0]


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("model"), "does not fit this run"), (lambda s: s.update(model={}), "Missing key"),
    (lambda s: s.update(model=[1]), "does not fit this run"), (lambda s: s["model"].update(more=torch.ones(2)), "more"),
    (lambda s: s["model"].update(weight=torch.ones(4, 2)), "size mismatch"),
    (lambda s: s["model"]["weight"].mul_(math.nan), "NaN or infinity in weight of model"),
    (lambda s: s.update(step="7"), "step '7'"), (lambda s: s.update(step=-1), "step -1"),
    (lambda s: s.update(step=81), "step 81 of 80"), (lambda s: s.update(step=7.0), "step 7.0"),
    (lambda s: s.update(config=None), "not the structure"), (lambda s: s.pop("config"), "not the structure"),
    (lambda s: s.pop("world"), "not the structure"), (lambda s: s["config"].update(lr="x"), "lr was x, is None"),
    (lambda s: s.update(optimizer=3), "does not fit this run"), (lambda s: s["optimizer"].pop("state"), "does not fit"),
    (lambda s: s["optimizer"].update(param_groups=[]), "different number of parameter groups"),
    (lambda s: s["optimizer"]["param_groups"][0].update(params=[0]), "doesn't match the size"),
    (lambda s: first_moments(s).update(exp_avg=torch.zeros(4, 2)), r"exp_avg is \(4, 2\) for a parameter of \(2, 4\)"),
    (lambda s: first_moments(s).update(exp_avg_sq=torch.zeros(())), r"exp_avg_sq is \(\)"),
    (lambda s: first_moments(s).update(step=torch.ones(2)), "does not fit this run"),
    (lambda s: first_moments(s).update(step=torch.zeros(())), "step has the type torch.float32, or is below 1"),
    (lambda s: first_moments(s).pop("exp_avg_sq"), "the optimizer's state has step, exp_avg for a parameter"),
    (lambda s: first_moments(s).update(exp_avg="x"), "does not fit this run"),
    (lambda s: first_moments(s).update(exp_avg=torch.ones(2, 4, dtype=torch.int8)), "exp_avg has the type torch.int8"),
    (lambda s: s["model"].update(bias=torch.ones(2).double()), "bias has the type torch.float64"),
    (lambda s: s["optimizer"]["state"].pop(1), "it has moments for 1 of 2 parameters"),
    (lambda s: s["optimizer"]["state"].update({0: s["optimizer"]["state"][1]}), r"for a parameter of \(2, 4\)"),
    (lambda s: first_moments(s)["exp_avg"].fill_(math.inf), "NaN or infinity in state.0.exp_avg of optimizer"),
    (lambda s: s["optimizer"]["state"].update({9: {}}), "does not fit this run")])
def test_a_checkpoint_of_another_structure_is_refused(tmp_path, change, words):
    changed(tmp_path, change)
    with pytest.raises(SystemExit, match=words) as stop:
        folder = RunFolder(Config(out=str(tmp_path)), "toy", 0, 1, 50)
        folder.parts = toy_parts()
        folder.load(80)
    assert "\n" not in str(stop.value)


def test_options_of_the_optimizer_are_those_of_the_run(tmp_path):
    changed(tmp_path, lambda s: s["optimizer"]["param_groups"][0].pop("betas"))
    folder = folder_in(tmp_path)
    assert folder.step == 7 and folder.parts["optimizer"].param_groups[0]["betas"] == (0.9, 0.999)
    folder.parts["optimizer"].step()


def test_images_with_other_names_or_labels(classes, tmp_path):
    """As many, but a file has moved to another class: its label would be another from the kill on."""
    data = tmp_path / "data"
    shutil.copytree(classes, data)
    with pytest.raises(SystemExit):
        Training(tmp_path / "out", data, at={2: stop_signal})()
    shutil.copytree(data, tmp_path / "moved")
    os.rename(data / "train" / "a" / "003.png", data / "train" / "b" / "103.png")
    with pytest.raises(SystemExit, match="the images under .*data are not those .* with other names or labels"):
        Training(tmp_path / "out", data)
    os.rename(data / "train" / "b" / "103.png", data / "train" / "a" / "003.png")
    assert Training(tmp_path / "out", data).run.done == 2
    state = torch.load(tmp_path / "out" / "last.pt")
    del state["names"]                                          # as earlier versions wrote it
    torch.save(state, tmp_path / "out" / "last.pt")
    assert Training(tmp_path / "out", data).run.done == 2


def test_checkpoints_are_plain(tmp_path):
    folder = folder_in(tmp_path)
    folder.save(7, {})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["config"]["img_size"] == (224,) and state["method"] == "toy" and state["world"] == 1


@pytest.mark.parametrize("found, words", [
    ([(None, 7), ("its disk is gone", 7)], "its disk is gone"), ([(None, 7), (None, None)], "every node must see")])
def test_one_process_in_trouble_stops_all(tmp_path, monkeypatch, found, words):
    def all_gather_object(into, mine):
        into[:] = found
    monkeypatch.setattr(runtime.folder.dist, "all_gather_object", all_gather_object)
    with pytest.raises(SystemExit, match=words):
        RunFolder(Config(out=str(tmp_path)), "toy", 0, 2, 50)


# ----------------------------------------------------------------------------------------------------------------
# Whether to go on, and the log


def log_in(folder, rank=0, **change):
    return Log(replace(Config(out=str(folder)), **change), rank, CPU, 0, 100, 10)


def stop_check_in(folder, **change):
    log = log_in(folder, **change)
    log.last = 1                                                # the first row is written
    log.since = runtime.folder.time.perf_counter()
    return StopCheck(replace(Config(out=str(folder)), **change), CPU, 1, log), log


def test_a_signal_stops_at_the_next_step(tmp_path, capfd):
    stop_check, log = stop_check_in(tmp_path)
    calls = [stop_check(torch.tensor(0.0), [], 8)]
    capfd.readouterr()
    os.kill(os.getpid(), signal.SIGUSR1)
    told = capfd.readouterr().err                               # at once, not when the step has ended
    assert "signal: finishing this step" in told and "images may take a moment" in told and told.count("\n") == 1
    os.kill(os.getpid(), signal.SIGTERM)
    assert capfd.readouterr().err == ""                         # once is enough
    calls += [stop_check(torch.tensor(0.0), [], 8)]
    assert calls == [(None, False), ("signal", False)]
    log.rank = 1
    StopCheck(Config(out=str(tmp_path)), CPU, 1, log)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert capfd.readouterr().err == ""                         # of several processes, one says it


@pytest.mark.parametrize("first, second, ends", [("SIGTERM", "SIGTERM", True), ("SIGINT", "SIGTERM", True),
                                                 ("SIGHUP", "SIGINT", True), ("SIGUSR1", "SIGTERM", False)])
def test_a_second_signal_ends_a_process_at_once(tmp_path, first, second, ends):
    """Within the first second it is one, as torchrun forwards it; later it is the system's own. But a scheduler sends
    USR1, and TERM some time after, to a run that should still save."""
    code = """if True:
        import os, signal, sys, time
        from test_runtime import stop_check_in
        signal.signal(signal.SIGHUP, signal.SIG_DFL)            # under nohup it is ignored
        check, _ = stop_check_in(sys.argv[1])
        for _ in range(2):
            os.kill(os.getpid(), getattr(signal, sys.argv[2]))
        while not check.seconds:                                # of its clock, which a busy machine may delay
            time.sleep(0.1)
        print("still here", flush=True)
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
        print("and here", flush=True)
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path), first, second], capture_output=True, text=True,
                          timeout=60, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert done.returncode == (-getattr(signal, second) if ends else 0), done.stderr
    assert done.stdout == ("still here\n" if ends else "still here\nand here\n")


@pytest.mark.parametrize("accum, stuck_at, batch_norm, step, saved", [
    (1, 4, True, 3, 3), (2, 7, True, 3, 3), (2, 8, False, 3, 3), (2, 8, True, 3, 2)])
def test_a_step_that_waits_does_not_wait_for_ever(classes, tmp_path, capsys, monkeypatch, accum, stuck_at, batch_norm,
                                                  step, saved):
    """The state is whole and is saved, but in a later wait of a step of a network with BatchNorm."""
    def load_and_get_stuck(*args, load=runtime.run.load, **options):
        for number, batch in enumerate(load(*args, **options), 1):
            if number == stuck_at:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(60)
            yield batch
    monkeypatch.setattr(runtime.run, "load", load_and_get_stuck)
    monkeypatch.setattr(runtime.run, "PATIENCE", 2)
    training = Training(tmp_path, classes, epochs=3, accum=accum, save_every=2)
    if batch_norm:
        training.model.bn = nn.BatchNorm1d(3)
    with pytest.raises(SystemExit) as stop:
        training()
    assert stop.value.code == 0 and f"stopped by a signal after step {step}: the same" in capsys.readouterr().out
    assert torch.load(tmp_path / "last.pt")["step"] == saved


def test_a_signal_ends_a_probe(classes, tmp_path, capsys, monkeypatch):
    def probe(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    monkeypatch.setattr(runtime.run, "probe", probe)
    with pytest.raises(SystemExit) as stop:
        Training(tmp_path, classes, epochs=3, probe_every=1)()
    assert stop.value.code == 0 and "stopped by a signal after step 0" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems processes that decode are not forked")
@pytest.mark.parametrize("deaths", [1, 99])
def test_a_process_that_decodes_is_killed(classes, tmp_path, deaths):
    """As by a system that runs out of memory. New ones take over, and the run is the same; or it is saved and ends."""
    code = """if True:
        import os, signal, sys
        import data
        from runtime.run import launch
        from test_runtime import Training
        read, stamp = data.RandomCrops.readable, sys.argv[2] + "-died"
        def readable(self, index):
            if data.torch.utils.data.get_worker_info() and index == 7:
                with open(stamp, "a+") as f:
                    f.write("x")
                if os.path.getsize(stamp) <= int(sys.argv[3]):
                    os.kill(os.getpid(), signal.SIGKILL)
            return read(self, index)
        data.RandomCrops.readable = readable
        launch(Training(sys.argv[2], sys.argv[1], workers=2, epochs=3))
    """
    done = subprocess.run([sys.executable, "-c", code, str(classes), str(tmp_path / "a"), str(deaths)],
                          capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/tests"})
    assert done.stdout.count("warning: a process that decodes images has died") >= min(deaths, 3), done.stderr
    state = torch.load(tmp_path / "a" / "last.pt")
    if deaths == 99:
        assert done.returncode == 1 and done.stderr.startswith("processes that decode images died three times in a row")
        assert len(done.stderr.splitlines()) == 1 and state["step"] == max(logged(tmp_path / "a"))
        return
    whole = Training(tmp_path / "b", classes, epochs=3)()
    assert done.returncode == 0 and all(torch.equal(p, state["model"][k]) for k, p in whole.model.state_dict().items())


def test_non_finite_steps(tmp_path):
    stop_check, _ = stop_check_in(tmp_path, max_skipped=3)
    flags = [1, 1, 0, 1, 1, 1]
    found = [stop_check(torch.tensor(float(f)), [], 8) for f in flags]
    assert found == [(None, False)] * 5 + [("non-finite", True)]
    assert stop_check.skipped == 5


def test_unreadable_images(tmp_path, capsys):
    stop_check, log = stop_check_in(tmp_path)
    for _ in range(4):
        assert stop_check(torch.tensor(0.0), [("x.jpg", "cut short")], 64)[0] is None      # 1 in 64 is tolerated
    assert capsys.readouterr().out.count("x.jpg cannot be read; another image takes its place (cut short)") == 1
    verdicts = [stop_check(torch.tensor(0.0), [(f"{i}.jpg", "cut short") for i in range(32)], 64)[0] for _ in range(3)]
    assert verdicts[-1] == "unreadable"
    rows = [json.loads(line) for line in open(log.path)]
    assert [row["unreadable"] for row in rows if "unreadable" in row][:1] == ["x.jpg"]


def test_waiting_for_images_is_named_once(tmp_path, capsys, monkeypatch):
    clock = [0.0]                                               # not the machine's: it may be busy with other things
    monkeypatch.setattr(runtime.folder.time, "perf_counter", lambda: clock[0])
    for slow, told in ((0.1, 0), (0.5, 1)):
        log = log_in(tmp_path)

        def batches(slow=slow):
            for _ in range(9):
                clock[0] += slow
                yield 1
        for step, _ in enumerate(log.timed(batches())):
            clock[0] += 1 - slow
            log(step + 1, loss=1.0)
        assert capsys.readouterr().out.count("of a step waits for images; more --workers") == told


def test_log(tmp_path, capsys):
    log = log_in(tmp_path)
    for step, _ in enumerate(log.timed(range(5)), 1):
        if step % 2 == 0:
            log(step, loss=torch.tensor(0.5), lr=1e-3, bad=math.nan)
    rows = [json.loads(line) for line in open(log.path)]
    assert "config" in rows[0] and "commit" in rows[0] and rows[0]["steps"] == 100
    assert [row["step"] for row in rows[1:]] == [2, 4] and rows[1]["loss"] == 0.5 and rows[1]["bad"] == "nan"
    assert {"epoch", "lr", "img_s", "data_s", "step_s", "mem_gb"} <= set(rows[1])
    assert "step 4/100  epoch 0.40  loss 0.5" in capsys.readouterr().out


@pytest.mark.parametrize("total", [100, 10_000_000])
def test_the_status_line_has_at_most_120_characters(tmp_path, capsys, total):
    log, values = log_in(tmp_path), {f"value_{i}": -1.2345e-7 * i for i in range(1, 30)}
    log.total = total
    for step, _ in enumerate(log.timed(range(3)), 1):
        log(step, loss=torch.tensor(0.1234567), chance=1.0, **values, lr=1e-3, grad_norm=1.0, skipped=0)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 3 and all(len(line) <= 120 for line in lines)
    assert all(f"/{total}  epoch" in line and "  loss 0.1235  chance 1  value_1 -1.2" in line for line in lines)
    assert all(" img/s  data " in line and " GB  eta " in line for line in lines)
    assert all("skipped" not in line for line in lines)         # only where there is something to tell
    row = [json.loads(line) for line in open(log.path)][-1]     # the file has everything
    assert {"loss", "chance", "lr", "grad_norm", "skipped", *values} <= set(row)


def test_skipped_steps_are_shown(tmp_path, capsys):
    log = log_in(tmp_path)
    for step, _ in enumerate(log.timed(range(1)), 1):
        log(step, loss=1.0, skipped=3)
    assert "  skipped 3  " in capsys.readouterr().out


def test_log_on_a_full_disk(tmp_path, capsys):
    log = log_in(tmp_path)
    log.path = "/dev/full"
    log.note(step=1)
    assert "a row of /dev/full is lost" in capsys.readouterr().out


def test_curve_survives_restarts(tmp_path):
    pytest.importorskip("matplotlib")
    log = log_in(tmp_path)
    for step in (1, 2, 3, 2, 3, 4):
        if step == 3:
            open(log.path, "a").write('{"step": 3, "lo')         # killed while writing
        log.note(step=step, epoch=step / 10, loss=1 / step, chance=1.0)
    assert sum("loss" in line and line.endswith("}\n") for line in open(log.path)) == 6
    log.note(step=4, knn=10.0)
    draw_curve(str(tmp_path))
    assert (tmp_path / "loss.png").stat().st_size > 1000


# ----------------------------------------------------------------------------------------------------------------
# Writers of other packages


def events(folder, name):
    """step -> value of a series in TensorBoard's files, with what later starts took back left out, as it shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    found = EventAccumulator(str(folder), purge_orphaned_data=True).Reload()
    return {event.step: event.value for event in found.Scalars(name)}


def test_tensorboard_has_what_the_log_has(classes, tmp_path):
    pytest.importorskip("tensorboard")
    with pytest.raises(SystemExit):
        Training(tmp_path, classes, epochs=3, tensorboard=True, at={4: stop_signal})()
    for step in (5, 6):                                         # logged by a start that was killed before it could save
        lost = dict(loss=9.0, lr=9.0, chance=9.0, grad_norm=9.0)
        Training(tmp_path, classes, epochs=3, tensorboard=True).run.log.note(step=step, **lost)
    Training(tmp_path, classes, epochs=3, tensorboard=True)()
    for name in ("loss", "lr", "chance", "grad_norm"):
        assert events(tmp_path, name) == pytest.approx(logged(tmp_path, name)), name
    assert len(events(tmp_path, "loss")) == 15


class FakeWandb:
    """The three calls that are made of wandb, which has to be logged in to."""
    def __init__(self):
        self.starts, self.rows, self.finished, self.broken = [], [], 0, False

    def init(self, **options):
        self.starts.append(options)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, row):
        if self.broken:
            raise ConnectionError("no route to host\n...")
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def test_weights_and_biases(classes, tmp_path, monkeypatch, capsys):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(runtime.writers, "OPEN_WRITERS", [])
    monkeypatch.setattr(runtime.run, "OPEN_WRITERS", runtime.writers.OPEN_WRITERS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb")
    with pytest.raises(SystemExit):
        Training(tmp_path, classes, epochs=3, wandb="small", at={4: stop_signal})()
    Training(tmp_path, classes, epochs=3, wandb="small")()
    first, second = fake.starts
    assert first["project"] == "small" and first["id"] == second["id"] and first["resume"] == "allow"
    assert first["config"]["batch_size"] == 8 and not fake.finished
    for writers in runtime.run.OPEN_WRITERS:                    # as a process does that leaves
        writers.close()
    assert fake.finished == 2
    assert {row["step"]: row["loss"] for row in fake.rows} == logged(tmp_path)
    fake.broken = True
    capsys.readouterr()
    Training(tmp_path / "b", classes, epochs=3, wandb="small")()
    assert capsys.readouterr().out.count("--wandb is given up (no route to host ...); log.jsonl goes on") == 1
    assert len(logged(tmp_path / "b")) == 15


@pytest.mark.parametrize("option", [dict(wandb="x"), dict(tensorboard=True)])
def test_a_writer_that_is_not_installed(classes, tmp_path, monkeypatch, option):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs a package that is not installed: pip install"):
        Training(tmp_path, classes, **option)


# ----------------------------------------------------------------------------------------------------------------
# A whole run


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(3 * 8 * 8, 2)

    def forward(self, img):
        return self.net(img.flatten(1) / 255).square().mean()


class Training:
    """A script as small as can be. at: {step: a function of the loss and the model, called in its last pass}."""

    def __init__(self, out, data, at=(), each=lambda: None, noise=1, **change):
        cfg = replace(Config(out=str(out), data=str(data), img_size=(8,), workers=0, log_every=1), **change)
        self.run, self.at, self.each, self.noise, self.metrics_calls = Run(cfg, "toy"), dict(at), each, noise, 0
        self.run.datasets()
        self.model = Toy()
        optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.net = self.run.start(self.model, optimizer, dict(model=self.model.state_dict(), config={}))

    def metrics(self):
        self.metrics_calls += 1
        return dict(chance=1.0)

    def __call__(self):
        run = self.run
        for step, passes in run.steps(run.random_crops()):
            run.set_lr(warmup_cosine(step, run.total, run.warmup, run.peak))
            for img, _ in passes:
                with run.autocast():
                    loss = self.net(img + self.noise * torch.rand(()))      # what is drawn depends on the step
                loss = self.at[step + 1](loss, self.model) if step + 1 in self.at else loss
                run.backward(loss, twice=2 * loss)
            run.update(metrics=self.metrics, more=step)
            self.each()
        run.finish()
        return self


def rows_in(out):
    return [json.loads(line) for line in open(Path(out) / "log.jsonl")]


def logged(out, key="loss"):
    return {row["step"]: row[key] for row in rows_in(out) if "loss" in row}


def stop_signal(loss, model):
    os.kill(os.getpid(), signal.SIGUSR1)
    return loss


def test_a_run_that_is_stopped_goes_on_bit_for_bit(classes, tmp_path, capsys):
    whole = Training(tmp_path / "whole", classes, epochs=3)()
    assert whole.run.total == 15 and whole.run.done == 15
    for stop_at in (4, 9):
        with pytest.raises(SystemExit) as stop:
            Training(tmp_path / "part", classes, epochs=3, at={stop_at: stop_signal})()
        assert stop.value.code == 0 and f"stopped by a signal after step {stop_at}" in capsys.readouterr().out
        assert torch.load(tmp_path / "part" / "last.pt")["step"] == stop_at
    part = Training(tmp_path / "part", classes, epochs=3)
    assert part.run.done == 9
    part()
    assert logged(tmp_path / "part") == logged(tmp_path / "whole") and len(logged(tmp_path / "whole")) == 15
    assert all(torch.equal(a, b) for a, b in zip(part.model.parameters(), whole.model.parameters()))
    encoder = torch.load(tmp_path / "part" / "encoder.pt")
    assert encoder["method"] == "toy" and encoder["config"]["mean"] == part.run.mean
    assert torch.equal(encoder["model"]["net.weight"], part.model.net.weight)
    assert [row["start"] for row in rows_in(tmp_path / "part") if "config" in row] == [0, 4, 9]


def test_probes_of_another_set(classes, tmp_path, monkeypatch):
    """A set without labels is trained on, and probed on one that has some."""
    write_images(tmp_path / "flat", 16)
    with pytest.raises(SystemExit, match="needs the same classes .*--probe-data names a set that has them"):
        Training(tmp_path / "a", tmp_path / "flat", probe_every=1)
    seen = []
    monkeypatch.setattr(runtime.run, "probe", lambda features, train, val, *args: (
        seen.append((len(train), len(val), train.classes)), dict(knn=1.0, linear=2.0))[1])
    run = Training(tmp_path / "b", tmp_path / "flat", probe_every=2, epochs=3, probe_data=str(classes))().run
    assert seen == [(40, 8, ["a", "b"])] * 3 and run.train.classes is None
    assert [row["step"] for row in rows_in(tmp_path / "b") if "knn" in row] == [0, 4, 6]


def test_init_is_for_new_runs(classes, tmp_path):
    with pytest.raises(SystemExit):
        Training(tmp_path, classes, init="x.pt", at={2: stop_signal})()
    assert Training(tmp_path / "new", classes, init="x.pt").run.init == "x.pt"
    assert Training(tmp_path, classes, init="x.pt").run.init is None


def test_accumulation_changes_nothing_but_the_last_bits(classes, tmp_path):
    """Passes average the loss, its parts and the gradients of the batch."""
    for accum in (1, 4):
        Training(tmp_path / str(accum), classes, accum=accum, epochs=2, blr=0.1, noise=0)()
    one, four = (logged(tmp_path / name) for name in "14")
    assert four == pytest.approx(one, rel=1e-4) and len(one) == 10
    assert max(one.values()) > 1.1 * min(one.values())          # weights have changed


def test_rates_of_groups_and_logged_values(classes, tmp_path):
    training = Training(tmp_path, classes, epochs=2, log_every=4)
    group = training.run.optimizer.param_groups[0]
    training.run.optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(1))], lr_scale=0.5))
    training.run.set_lr(0.2)
    assert group["lr"] == 0.2 and training.run.optimizer.param_groups[1]["lr"] == 0.1
    training()
    assert list(logged(tmp_path)) == [1, 4, 8, 10]              # the first, every fourth, the last
    assert training.metrics_calls == 4                          # they may be dear: called for rows only
    for row in rows_in(tmp_path)[1:]:
        assert row["twice"] == pytest.approx(2 * row["loss"]) and row["chance"] == 1 and row["more"] == row["step"] - 1


def test_a_row_after_the_first_step_and_by_time(classes, tmp_path, monkeypatch):
    clock = [0.0]

    def perf_counter():
        clock[0] += 0.001
        return clock[0]

    def twelve_seconds():
        clock[0] += 12
    monkeypatch.setattr(runtime.folder.time, "perf_counter", perf_counter)
    Training(tmp_path, classes, epochs=2, log_every=100, each=twelve_seconds)()
    assert list(logged(tmp_path)) == [1, 4, 7, 10]              # 30 seconds and more after the last one


def test_a_checkpoint_at_least_every_ten_minutes(classes, tmp_path, monkeypatch):
    clock, saved = [0.0], []
    monkeypatch.setattr(runtime.run.time, "monotonic", lambda: clock[0])

    def four_minutes():
        clock[0] += 240
    save = RunFolder.save
    monkeypatch.setattr(RunFolder, "save", lambda self, step, *args: (saved.append(step), save(self, step, *args)))
    Training(tmp_path, classes, epochs=3, each=four_minutes)()
    assert saved == [3, 6, 9, 12, 15]                           # after 12 minutes each, and at the end
    assert torch.load(tmp_path / "previous.pt")["step"] == 12
    saved.clear()
    Training(tmp_path / "b", classes, epochs=3, save_every=4, keep_every=2)()
    assert saved == [4, 8, 10, 12, 15]                          # by steps; epoch 2 is kept


def test_too_many_non_finite_steps(classes, tmp_path):
    """Named is the loss, or the parameter whose gradient it is; the state is kept, no checkpoint is overwritten."""
    def bad_loss(loss, model):
        return loss * math.nan

    def bad_gradient(loss, model):
        return loss + (model.net.weight * 0).sum().sqrt()       # 0, with an infinite slope times 0
    for name, bad, words in (("a", bad_loss, "non-finite loss"),
                             ("b", bad_gradient, "non-finite gradient of net.weight")):
        out, at = tmp_path / name, dict.fromkeys((2, 7, 8, 9), bad)
        with pytest.raises(SystemExit, match=f"3 steps in a row, up to step 9, gave a {words} and were skipped"):
            Training(out, classes, max_skipped=3, at=at, save_every=6)()
        assert torch.load(out / "debug-rank0.pt")["step"] == 9 and torch.load(out / "last.pt")["step"] == 6
        assert logged(out, "skipped") == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1, 7: 2, 8: 3, 9: 4}
        state = torch.load(out / "debug-rank0.pt")
        assert state["batch"].shape == (8, 3, 8, 8) and state["model"]["net.weight"].isfinite().all()


def test_too_many_unreadable_images(tmp_path):
    write_images(tmp_path / "set", 50)
    for i in range(30):
        (tmp_path / "set" / f"{i:03}.png").write_bytes(b"damaged")
    with pytest.raises(SystemExit, match=r"of \d+ images could not be read, more than --max-unreadable 0.05"):
        Training(tmp_path / "out", tmp_path / "set")()
    assert sum("unreadable" in row for row in rows_in(tmp_path / "out")) == 30
    assert torch.load(tmp_path / "out" / "last.pt")["step"] == max(logged(tmp_path / "out"))


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems processes that decode are not forked")
def test_a_finished_run_waits_for_nobody():
    """A decoding process that hangs and, as all of them, does not heed SIGTERM; a message and its exit code arrive."""
    code = ("import multiprocessing, os, signal, time\n"
            "from runtime.options import fail\nfrom runtime.run import launch\n"
            "def hang():\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN); os.close(1); os.close(2); time.sleep(90)\n"
            "def main():\n"
            "    multiprocessing.get_context('fork').Process(target=hang, daemon=True).start(); time.sleep(0.5)\n"
            "    print('done'); END\n"
            "launch(main)")
    for end, (status, words) in {"return": (0, ""), "fail('why')": (1, "why"), "raise SystemExit": (0, ""),
                                 "raise ValueError('bug')": (1, "ValueError: bug")}.items():
        done = subprocess.run([sys.executable, "-c", code.replace("END", end)], capture_output=True, text=True,
                              timeout=60, cwd=ROOT)
        assert (done.returncode, done.stdout) == (status, "done\n") and words in done.stderr
