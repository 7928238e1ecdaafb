import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import training
from training import Health, Log, Plumbing, Run, Steps, die, fill, opt, parse, plan, warmup_cosine


@dataclass
class Config(Plumbing):
    batch_size: int = opt(8, "images per step, 100% of them")
    accum: int = opt(1, "passes", 1)
    epochs: float | None = opt(10, "epochs")
    warmup_epochs: float | None = opt(1, "epochs")
    blr: float = opt(1e-3, "rate")
    lr: float | None = opt(None, "rate")
    img_size: tuple[int, ...] = opt((224,), "pixels", 1)
    norm_pix: bool = opt(True, "standardise")


# ----------------------------------------------------------------------------------------------------------------
# Command line


def test_command_line():
    cfg, given = parse(Config, "", ["--batch_size", "16", "--img-size", "96", "160", "--no-norm_pix", "--blr=1e-4"])
    assert (cfg.batch_size, cfg.img_size, cfg.norm_pix, cfg.blr, cfg.lr) == (16, (96, 160), False, 1e-4, None)
    assert given == {"batch_size", "img_size", "norm_pix", "blr"}
    assert fill(cfg, given, dict(batch_size=1, epochs=3)) == replace(cfg, epochs=3)


@pytest.mark.parametrize("argv, words", [
    (["--bach-size", "4"], "--bach-size"), (["--batch", "4"], "--batch"), (["--batch-size", "four"], "four"),
    (["x"], "x"), (["--accum", "0"], "--accum must be at least 1, not 0"), (["--img-size", "8", "0"], "at least 1")])
def test_bad_command_lines_are_one_sentence(argv, words):
    with pytest.raises(SystemExit, match=words) as stop:
        parse(Config, "", argv)
    assert "\n" not in str(stop.value) and "--help" in str(stop.value)


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, "what it does", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "what it does" in text and "100% of them [8]" in text
    assert all("--" + name.replace("_", "-") in text for name in Config.__dataclass_fields__)


def test_die_is_said_once(monkeypatch):
    for rank, code in (("0", "words"), ("3", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as stop:
            die("words")
        assert stop.value.code == code


# ----------------------------------------------------------------------------------------------------------------
# Plans and schedules


def test_plan():
    cfg = Config(batch_size=512, blr=1.5e-4)
    steps, peak = plan(cfg, 1_281_167, world=8)
    assert steps == Steps(25020, 2502, 2502) and peak == pytest.approx(3e-4)
    assert plan(replace(cfg, lr=0.1), 1_281_167, 8)[1] == 0.1
    assert plan(replace(cfg, batch_size=4096), 1_281_167, 8)[0].per_epoch == 312


@pytest.mark.parametrize("change, world, words", [
    (dict(batch_size=10), 4, "does not divide among 4 processes x 1"), (dict(accum=3), 1, "x 3 accumulation"),
    (dict(batch_size=64), 1, "50 images, less than one"), (dict(warmup_epochs=10), 1, "leaves nothing"),
    (dict(epochs=0), 1, "no training"), (dict(epochs=math.nan), 1, "no training")])
def test_what_cannot_be_run(change, world, words):
    with pytest.raises(SystemExit, match=words):
        plan(replace(Config(), **change), 50, world)


def test_learning_rates():
    """The published schedule at ImageNet's size: 400 epochs of 312 steps, 40 of warm-up, peak 2.4e-3."""
    for step, expected in ((0, 0), (1, 1.9230769e-7), (312, 6e-5), (6240, 1.2e-3), (12480, 2.4e-3),
                           (40000, 2.0617142e-3), (68640, 1.2e-3), (124799, 4.694e-13)):
        assert warmup_cosine(step, 124800, 12480, 2.4e-3) == pytest.approx(expected, rel=1e-4 if step > 1e5 else 1e-7)
    for step, expected in ((1, 6.3949e-7), (1251, 8e-4), (100000, 3.3963895e-3), (375299, 1.00000007e-6)):
        found = warmup_cosine(step, 375300, 6255, 4e-3, floor=1e-6)
        assert found == pytest.approx(expected, rel=1e-4 if step == 1 else 1e-7)


def test_due():
    steps = Steps(100, 0, 10)
    assert [done for done in range(1, 101) if steps.due(done, 4)] == [40, 80]
    assert steps.due(80, 4) == 8 and steps.due(80, 0) is None


# ----------------------------------------------------------------------------------------------------------------
# Checkpoints


def run_in(folder, **change):
    torch.manual_seed(0)
    model = nn.Linear(4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    cfg = replace(Config(out=str(folder)), **change)
    return Run(cfg, "toy", 0, 1, 50, model=model, optimizer=optimizer)


def released(run):
    """As if its process had ended."""
    run.lock.close()


def test_saved_and_found_again(tmp_path):
    first = run_in(tmp_path)
    assert first.step == 0
    first.save(7, dict(weights=1), keep=3)
    with torch.no_grad():
        first.parts["model"].weight.add_(1)
    first.save(8, dict(weights=2))
    released(first)
    second = run_in(tmp_path)
    assert second.step == 8 and torch.equal(second.parts["model"].weight, first.parts["model"].weight)
    ours, theirs = (run.parts["optimizer"].state_dict()["state"][0] for run in (first, second))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert torch.load(tmp_path / "previous.pt")["step"] == torch.load(tmp_path / "epoch0003.pt")["step"] == 7
    assert torch.load(tmp_path / "encoder.pt") == dict(weights=2)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b[:-1], lambda b: b"",
                                    lambda b: b"\x00" * len(b)])
def test_a_truncated_checkpoint_falls_back(tmp_path, damage, capsys):
    run = run_in(tmp_path)
    run.save(7, {})
    run.save(8, {})
    released(run)
    (tmp_path / "last.pt").write_bytes(damage((tmp_path / "last.pt").read_bytes()))
    assert run_in(tmp_path).step == 7
    assert "last.pt is damaged" in capsys.readouterr().out


def test_two_truncated_checkpoints_are_not_a_new_run(tmp_path):
    run = run_in(tmp_path)
    run.save(7, {})
    run.save(8, {})
    released(run)
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(SystemExit, match="last.pt and .*previous.pt cannot be read"):
        run_in(tmp_path)


def test_killed_between_two_renames(tmp_path):
    run = run_in(tmp_path)
    run.save(7, {})
    released(run)
    os.replace(tmp_path / "last.pt", tmp_path / "previous.pt")
    assert run_in(tmp_path).step == 7


def test_full_disk(tmp_path, monkeypatch, capsys):
    run = run_in(tmp_path)
    run.save(7, {})
    for error in (OSError(errno.ENOSPC, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64")):
        def save(state, f, error=error):
            f.write(b"half of a file")
            raise error
        monkeypatch.setattr(torch, "save", save)
        run.save(8, {})
        assert "step 8 could not be saved" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="is the disk full"):
            run.save(8, {}, must=True)
    monkeypatch.undo()
    assert not list(tmp_path.glob("*.tmp"))
    released(run)
    assert run_in(tmp_path).step == 7


def test_two_runs_in_one_folder(tmp_path):
    code = ("import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); "
            "sys.stdin.read()")
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(SystemExit, match="another run is writing"):
        run_in(tmp_path)
    other.kill()                                                # a killed run leaves no lock
    other.wait()
    run_in(tmp_path)


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SystemExit, match="cannot be written"):
        run_in(tmp_path / "file")


def test_resuming_from_a_file_by_name(tmp_path):
    """The file starts an empty folder only: typed again, the same command goes on from last.pt."""
    run = run_in(tmp_path / "a")
    run.save(7, {}, keep=3)
    released(run)
    kept = str(tmp_path / "a" / "epoch0003.pt")
    other = run_in(tmp_path / "b", resume=kept)
    assert other.step == 7
    other.save(9, {})
    released(other)
    assert run_in(tmp_path / "b", resume=kept).step == 9
    with pytest.raises(SystemExit, match="absent.pt does not exist"):
        run_in(tmp_path / "c", resume="absent.pt")
    torch.save(dict(method="toy", model={}), tmp_path / "encoder.pt")
    with pytest.raises(SystemExit, match="no run to go on with"):
        run_in(tmp_path / "c", resume=str(tmp_path / "encoder.pt"))
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(SystemExit, match="cannot be read as a checkpoint"):
        run_in(tmp_path / "c", resume=str(tmp_path / "list.pt"))


def test_the_good_checkpoint_outlives_the_damaged_one(tmp_path):
    run = run_in(tmp_path)
    run.save(7, {})
    run.save(8, {})
    released(run)
    (tmp_path / "last.pt").write_bytes(b"half")
    run = run_in(tmp_path)
    run.save(9, {})
    assert torch.load(tmp_path / "previous.pt")["step"] == 7 and torch.load(tmp_path / "last.pt")["step"] == 9
    run.save(10, {})
    assert torch.load(tmp_path / "previous.pt")["step"] == 9


@pytest.mark.parametrize("change, words", [
    (dict(blr=1e-2), "blr was 0.001, is 0.01"), (dict(resume="none"), "--resume none"),
    (dict(dtype="bf16"), "dtype was auto, is bf16")])
def test_refusals(tmp_path, change, words):
    run = run_in(tmp_path)
    run.save(7, {})
    released(run)
    with pytest.raises(SystemExit, match=words):
        run_in(tmp_path, **change)


def test_free_options_may_change(tmp_path):
    run = run_in(tmp_path)
    run.save(7, {})
    released(run)
    assert run_in(tmp_path, workers=3, log_every=1, save_every=9, device="cpu", compile=True).step == 7


def test_other_methods_data_and_processes(tmp_path, capsys):
    run = run_in(tmp_path)
    run.save(7, {})
    released(run)
    for args, words in ((("other", 0, 1, 50), "a checkpoint of toy, not of other"),
                        (("toy", 0, 1, 49), "images was 50, is 49")):
        with pytest.raises(SystemExit, match=words):
            Run(Config(out=str(tmp_path)), *args, **run.parts)
    state = torch.load(tmp_path / "last.pt")
    torch.save(state | dict(world=4), tmp_path / "last.pt")
    assert run_in(tmp_path).step == 7
    assert "no longer the same bit for bit" in capsys.readouterr().out
    del state["config"]["norm_pix"]                             # from before there was this option
    torch.save(state, tmp_path / "last.pt")
    assert run_in(tmp_path).step == 7
    with pytest.raises(SystemExit, match="norm_pix was True, is False"):
        run_in(tmp_path, norm_pix=False)


def test_checkpoints_are_plain(tmp_path):
    run = run_in(tmp_path)
    run.save(7, {})
    state = torch.load(tmp_path / "last.pt", weights_only=True)
    assert state["config"]["img_size"] == (224,) and state["method"] == "toy" and state["world"] == 1


# ----------------------------------------------------------------------------------------------------------------
# Health and log


def health_in(folder, **change):
    cfg = replace(Config(out=str(folder)), **change)
    log = Log(cfg, 0, torch.device("cpu"), 0, Steps(100, 0, 10))
    return Health(cfg, torch.device("cpu"), 1, log), log


def test_a_signal_stops_at_the_next_step(tmp_path):
    health, _ = health_in(tmp_path)
    calls = [health(torch.tensor(0.0), [], 8)]
    os.kill(os.getpid(), signal.SIGUSR1)
    calls += [health(torch.tensor(0.0), [], 8)]
    assert calls == [None, "signal"]
    with pytest.raises(SystemExit) as stop:
        health.leave("signal", run_in(tmp_path), 3, nn.Linear(1, 1), torch.tensor(0.0), None)
    assert stop.value.code == 0


def test_waiting_for_images_is_named_once(tmp_path, capsys, monkeypatch):
    clock = [0.0]                                               # not the machine's: it may be busy with other things
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    for slow, said in ((0.1, 0), (0.5, 1)):
        log = Log(Config(out=str(tmp_path)), 0, torch.device("cpu"), 0, Steps(100, 0, 10))

        def batches(slow=slow):
            for _ in range(9):
                clock[0] += slow
                yield 1
        for step, _ in enumerate(log.waiting(batches())):
            clock[0] += 1 - slow
            log(step + 1, loss=1.0)
        assert capsys.readouterr().out.count("of a step waits for images; more --workers") == said


def test_a_second_interrupt_means_now(tmp_path, monkeypatch):
    health_in(tmp_path)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")              # torchrun forwards what the terminal has sent already
    os.kill(os.getpid(), signal.SIGINT)


def test_non_finite_steps(tmp_path):
    health, _ = health_in(tmp_path, max_skipped=3)
    flags = [1, 1, 0, 1, 1, 1]
    assert [health(torch.tensor(float(f)), [], 8) for f in flags] == [None] * 5 + ["non-finite"]
    assert health.skipped == 5
    model = nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), float("nan"))
    run = run_in(tmp_path)
    with pytest.raises(SystemExit, match="3 steps in a row, up to step 9, gave a non-finite gradient of weight"):
        health.leave("non-finite", run, 9, model, torch.tensor(0.0), torch.zeros(1))
    assert torch.load(tmp_path / "debug-rank0.pt")["step"] == 9 and not (tmp_path / "last.pt").exists()


def test_unreadable_images(tmp_path, capsys):
    health, log = health_in(tmp_path)
    for _ in range(4):
        assert health(torch.tensor(0.0), ["x.jpg"], 64) is None             # 1 in 64 is tolerated
    assert capsys.readouterr().out.count("x.jpg cannot be read") == 1
    verdicts = [health(torch.tensor(0.0), [f"{i}.jpg" for i in range(32)], 64) for _ in range(3)]
    assert verdicts[-1] == "unreadable"
    rows = [json.loads(line) for line in open(log.path)]
    assert [row["unreadable"] for row in rows if "unreadable" in row][:1] == ["x.jpg"]
    with pytest.raises(SystemExit, match="of .* images could not be read"):
        health.leave("unreadable", run_in(tmp_path), 3, nn.Linear(1, 1), torch.tensor(0.0), None)


def test_log(tmp_path, capsys):
    _, log = health_in(tmp_path)
    for step, _ in enumerate(log.waiting(range(5)), 1):
        if step % 2 == 0:
            log(step, loss=torch.tensor(0.5), lr=1e-3, bad=math.nan)
    rows = [json.loads(line) for line in open(log.path)]
    assert "config" in rows[0] and "commit" in rows[0] and rows[0]["steps"] == 100
    assert [row["step"] for row in rows[1:]] == [2, 4] and rows[1]["loss"] == 0.5 and rows[1]["bad"] == "nan"
    assert {"epoch", "lr", "img_s", "data_s", "step_s", "mem_gb"} <= set(rows[1])
    assert "step 4/100  epoch 0.40  loss 0.5" in capsys.readouterr().out


def test_log_on_a_full_disk(tmp_path, capsys):
    _, log = health_in(tmp_path)
    log.path = "/dev/full"
    log.note(step=1)
    assert "a row of /dev/full is lost" in capsys.readouterr().out


def test_curve_survives_restarts(tmp_path):
    pytest.importorskip("matplotlib")
    _, log = health_in(tmp_path)
    for step in (1, 2, 3, 2, 3, 4):
        if step == 3:
            open(log.path, "a").write('{"step": 3, "lo')         # killed while writing
        log.note(step=step, epoch=step / 10, loss=1 / step, chance=1.0)
    assert sum("loss" in line and line.endswith("}\n") for line in open(log.path)) == 6
    log.note(step=4, knn=10.0)
    training.draw_curve(str(tmp_path))
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_precision_and_seeds():
    assert training.precision("auto", torch.device("cpu")) == "fp32"
    with pytest.raises(SystemExit, match="not fp8"):
        training.precision("fp8", torch.device("cpu"))
    draws = set()
    for args in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        training.seed_for(*args)
        draws.add(torch.rand(()).item())
    assert len(draws) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="on other systems processes that decode are not forked")
def test_a_finished_run_waits_for_nobody():
    """A decoding process that hangs and, as all of them, does not heed SIGTERM; a message and its exit code arrive."""
    code = ("import multiprocessing, os, signal, time, training\n"
            "def hang():\n"
            "    signal.signal(signal.SIGTERM, signal.SIG_IGN); os.close(1); os.close(2); time.sleep(90)\n"
            "def main():\n"
            "    multiprocessing.get_context('fork').Process(target=hang, daemon=True).start(); time.sleep(0.5)\n"
            "    print('done'); END\n"
            "training.launch(main)")
    for end, (status, words) in {"return": (0, ""), "training.die('why')": (1, "why"), "raise SystemExit": (0, ""),
                                 "raise ValueError('bug')": (1, "ValueError: bug")}.items():
        done = subprocess.run([sys.executable, "-c", code.replace("END", end)], capture_output=True, text=True,
                              timeout=60, cwd=os.path.dirname(training.__file__))
        assert (done.returncode, done.stdout) == (status, "done\n") and words in done.stderr
