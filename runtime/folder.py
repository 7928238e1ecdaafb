"""
The folder of a run: its lock, checkpoints that are never half written, going on from them, and the log.
"""
import fcntl
import json
import math
import os
import resource
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import timedelta

import torch
import torch.distributed as dist

from runtime.options import fail
from runtime.writers import Writers
from weights import damage_in, digest, file_and_key

# The numbers of a run do not depend on these options (on accum only through what is drawn; a teacher's file is compared
# by itself), so it may be resumed with other values.
RESUME_MAY_CHANGE = {"out", "compile", "distill_teacher", "teacher", "teacher_file", "resume", "device", "workers",
                     "download", "log_every", "save_every", "keep_every", "eval_every", "picture_every", "probe_every",
                     "probe_data", "tensorboard", "wandb", "max_unreadable", "max_skipped", "accum"}


def write_atomic(state, path, previous=None):
    """Write beside, flush, rename: never half a file. Raises OSError. previous: where the old file stays."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:                    # torch's zip writer makes a full disk a RuntimeError
        raise remove_partial_file(path, error) from error
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f"{path}.tmp", path)


def remove_partial_file(path, error):
    """Remove a file that is half written -> an OSError that says why it is."""
    with suppress(OSError):
        os.remove(f"{path}.tmp")
    return OSError(str(error).splitlines()[0])


def read_checkpoint(path):
    """A checkpoint of ours, or None, with a warning, if it is damaged."""
    try:
        damage = damage_in(path)                                # a changed byte, at which torch.load does not look
        saved = None if damage else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # one cut short fails as zip, pickle, EOF or unicode
        saved, damage = None, f"{type(error).__name__} {' '.join(str(error).split())[:60]}"
    if damage is not None:
        print(f"warning: {path} is damaged ({damage})")
    return saved if isinstance(saved, dict) else None


# What an optimizer keeps for each parameter; its own load_state_dict does not look.
MOMENTS = dict(AdamW={"step", "exp_avg", "exp_avg_sq"}, SGD={"momentum_buffer"}, LARS={"momentum_buffer"})


def load_optimizer(optimizer, state):
    """Load the moments of a checkpoint; the options of the groups stay those of this run. Raises nearly anything where
    the moments are not those of these parameters."""
    for moments in state["state"].values():
        for name, x in moments.items():
            if x.dtype != torch.float32 or name == "step" and x < 1:        # another type would be converted
                raise ValueError(f"{name} has the type {x.dtype}, or is below 1")
    options = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, options):
        group.update(values)
    for p, moments in optimizer.state.items():
        if set(moments) != MOMENTS[type(optimizer).__name__]:
            raise ValueError(f"the optimizer's state has {', '.join(map(str, moments)) or 'nothing'} for a parameter")
        for name, x in moments.items():
            wanted = () if name == "step" else tuple(p.shape)
            if tuple(x.shape) != wanted:
                raise ValueError(f"{name} is {tuple(x.shape)} for a parameter of {tuple(p.shape)}")


def load_part(part, state):
    """Load the state of any other part. ValueError where a tensor has another type: it would be converted."""
    own = part.state_dict()
    for name, x in state.items():
        if torch.is_tensor(own.get(name)) and x.dtype != own[name].dtype:
            raise ValueError(f"{name} has the type {x.dtype}, and {own[name].dtype} was expected")
    part.load_state_dict(state)


def not_finite(state, name=""):
    """The name of the first tensor in nested dicts that holds NaN or infinity, or None."""
    if isinstance(state, dict):
        return next(filter(None, (not_finite(value, f"{name}.{key}") for key, value in state.items())), None)
    is_bad = torch.is_tensor(state) and state.is_floating_point() and not state.isfinite().all()
    return name.lstrip(".") if is_bad else None


class FileOfRun:
    """A file that a run stands on, such as a teacher's: checkpoints hold its digest, and a resumed run compares it."""

    def __init__(self, path):
        self.path, self.sha256 = path, digest(path) + file_and_key(path)[1]

    def state_dict(self):
        return dict(sha256=self.sha256)

    def load_state_dict(self, state):
        if state["sha256"] != self.sha256:
            raise SystemExit(f"{self.path} is not the file that this run began with: give that one, or another --out")


class RunFolder:
    """The folder --out of one run. saved: the checkpoint to go on from, or None; parts: what a checkpoint holds, by
    name, which is to be set before `load` or `save`.

    Damaged files, another method's, or other options end in a sentence: nothing is restarted silently. The lock is the
    process's own, so a killed run leaves none behind. save writes last.pt (the one before stays as previous.pt),
    encoder.pt for others to read, and a copy under the epoch number `keep`; what cannot be written leaves the old files
    whole: a warning, or, if it `must` be, the end.
    """

    def __init__(self, cfg, method, rank, world, images, names=(None, None)):
        self.cfg, self.method, self.rank, self.world, self.images, self.names = cfg, method, rank, world, images, names
        self.last, self.previous = os.path.join(cfg.out, "last.pt"), os.path.join(cfg.out, "previous.pt")
        self.damaged, self.saved, self.parts, self.lock_file, problem = False, None, {}, None, None
        try:
            self.lock()
            self.saved = self.find_checkpoint()
        except (SystemExit, OSError) as error:
            problem = error.code if isinstance(error, SystemExit) else self.go_on_unlocked(error)
        problem = self.agree(problem) if world > 1 else problem
        if problem:
            fail(problem)

    def agree(self, problem):
        """One process's problem is everybody's, and so are different steps to go on from."""
        found = [None] * self.world
        dist.all_gather_object(found, (problem, self.saved and self.saved["step"]))
        problem = next((problem for problem, _ in found if problem), None)
        if not problem and len({step for _, step in found}) > 1:
            problem = f"processes would go on from different steps {found}: every node must see the same --out"
        return problem

    def lock(self):
        os.makedirs(self.cfg.out, exist_ok=True)
        self.lock_file = open(os.path.join(self.cfg.out, ".lock"), "a")
        if self.rank == 0:                                      # lockf, not flock, which decoding processes inherit
            fcntl.lockf(self.lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def go_on_unlocked(self, error):
        """What speaks against going on without the lock, in words; or a warning, where there are no locks at all."""
        if not self.lock_file:
            return f"--out {self.cfg.out} cannot be written: {error}"
        if isinstance(error, (BlockingIOError, PermissionError)):
            return f"another run is writing to {self.cfg.out}: stop it, or give another --out"
        print(f"warning: {self.cfg.out} cannot be locked ({error}): see that only one run writes there")
        try:
            self.saved = self.find_checkpoint()
        except SystemExit as stop:
            return stop.code

    def find_checkpoint(self):
        """The checkpoint to go on from, or None in an empty folder."""
        there, resume = [path for path in (self.last, self.previous) if os.path.exists(path)], self.cfg.resume
        if resume == "none" and there:
            raise SystemExit(f"{there[0]} exists and --resume none was given: give another --out, or move it away")
        if resume not in ("auto", "none") and not there:        # later starts of the same command go on from last.pt
            there = [resume]
        return self.choose(there) if there else None

    def choose(self, paths):
        """The first of these checkpoints that is whole, and of this very run."""
        for path in paths:
            if not os.path.exists(path):
                raise SystemExit(f"--resume {path} does not exist")
            saved = read_checkpoint(path)
            if saved:
                try:
                    self.check(path, saved)
                except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                    raise SystemExit(f"{path} has not the structure of a checkpoint ({error!r:.80}): give another "
                                     "--out, or start from its weights with --init") from None
                return saved
            self.damaged = True                                 # then previous.pt is the good one and must stay
        raise SystemExit(f"{' and '.join(paths)} cannot be read as a checkpoint: move it away to start anew")

    def check(self, path, saved):
        """End in a sentence if a checkpoint is not one of this very run."""
        if not {"step", "optimizer", "images"} <= set(saved):
            raise SystemExit(f"{path} holds weights but not the state of a run: give last.pt, or start from its "
                             "weights with --init")
        if saved.get("method") != self.method:
            raise SystemExit(f"{path} is a checkpoint of {saved.get('method', 'something else')}, not of "
                             f"{self.method}: give another --out")
        old, new = dict(images=saved["images"]), dict(asdict(self.cfg), images=self.images)
        for f in fields(self.cfg):                              # its option may have had another name, or not exist
            old[f.name] = saved["config"].get(f.name, saved["config"].get(f.metadata["old"], f.default))
        # The most telling come first; the warm-up, which mostly follows from the epochs, last.
        names = sorted(new, key=lambda name: (name not in ("data", "images", "model"), name == "warmup_epochs"))
        differ = [f"{name} was {old[name]}, is {new[name]}" for name in names
                  if name not in RESUME_MAY_CHANGE and old[name] != new[name]]
        if differ:
            more = f"; and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise SystemExit(f"{path} belongs to a run with other options ({'; '.join(differ[:3])}{more}): give those, "
                             "or another --out")
        train, val = saved.get("names", self.names)             # digests of names and labels
        if train != self.names[0]:
            raise SystemExit(f"the images under {self.cfg.data} are not those that {path} was trained on: as many, but "
                             "with other names or labels; restore them, or give another --out")
        if val != self.names[1]:
            print("warning: the images to evaluate on have changed: accuracies before and after do not compare")
        if (saved["world"], old["accum"]) != (self.world, self.cfg.accum) and self.rank == 0:
            print(f"warning: {saved['world']} processes x {old['accum']} passes go on as {self.world} x "
                  f"{self.cfg.accum}: no longer the same bit for bit")

    def load(self, steps):
        """Load the checkpoint into the parts -> the number of optimizer steps done, at most `steps`."""
        try:
            step = self.saved["step"]
            if not isinstance(step, int) or not 0 <= step <= steps:
                raise ValueError(f"it is of step {step!r} of {steps}")
            moments = len(self.saved["optimizer"]["state"])
            if moments != self.saved.get("moments", moments):
                raise ValueError(f"it has moments for {moments} of {self.saved['moments']} parameters")
            for name, part in self.parts.items():
                bad = not_finite(self.saved[name])
                if bad:
                    raise SystemExit(f"the checkpoint in {self.cfg.out} holds NaN or infinity in {bad} of {name}: the "
                                     "run has diverged, or the file was changed; give another --out")
                if isinstance(part, torch.optim.Optimizer):
                    load_optimizer(part, self.saved[name])
                else:
                    load_part(part, self.saved[name])
        except Exception as error:                              # what has another structure raises almost anything
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise SystemExit(f"the checkpoint in {self.cfg.out} does not fit this run ({reason}): it was made with a "
                             "teacher or without one, or by an older version; give another --out, or --init for its "
                             "weights") from None
        self.saved = None                                       # its memory is free again
        return step

    def state(self, step):
        """Everything needed to go on from optimizer step `step`, in plain types and tensors."""
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return dict(method=self.method, step=step, config=asdict(self.cfg), world=self.world, images=self.images,
                    names=self.names, moments=len(parts["optimizer"]["state"]), torch=str(torch.__version__), **parts)

    def save(self, step, encoder, keep=None, must=False):
        if self.rank:
            return
        try:
            write_atomic(self.state(step), self.last, None if self.damaged else self.previous)
            self.damaged = False
            write_atomic(encoder, os.path.join(self.cfg.out, "encoder.pt"))
            if keep:
                write_atomic(self.state(step), os.path.join(self.cfg.out, f"epoch{keep:04}.pt"))
        except OSError as error:
            self.not_saved(f"step {step} could not be saved in {self.cfg.out} (is the disk full?): {error}", must)

    def not_saved(self, message, must):
        if must:
            raise SystemExit(f"{message}; the earlier files are intact")
        print(f"warning: {message}; the run goes on and tries again")

    def write(self, name, content):
        """Write another file -> whether that worked. If not, there is a warning and an earlier file is intact."""
        try:
            write_atomic(content, os.path.join(self.cfg.out, name))
            return True
        except OSError as error:
            print(f"warning: {name} could not be saved in {self.cfg.out} (is the disk full?): {error}; the run goes on")
            return False


class Log:
    """log.jsonl, with the config and the git commit as first row (again after each resume), and a line to read.
    start: the step gone on from; total, per_epoch: steps of the run and of an epoch; facts: for the first row."""

    def __init__(self, cfg, rank, device, start, total, per_epoch, **facts):
        self.path, self.rank, self.device = os.path.join(cfg.out, "log.jsonl"), rank, device
        self.start, self.last, self.total, self.per_epoch, self.batch = start, start, total, per_epoch, cfg.batch_size
        self.waited, self.since, self.hinted = 0.0, None, False
        self.writers = Writers(cfg, rank, start) if cfg.tensorboard or cfg.wandb else None
        if rank == 0:
            self.note(config=asdict(cfg), commit=git_commit(), torch=str(torch.__version__), start=start, steps=total,
                      **facts)

    def note(self, **row):
        """Append one row, on a line of its own even after a row cut short; any rank may. A full disk costs the row."""
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with open(self.path, "a+b") as f:
                f.seek(max(0, f.tell() - 1))
                start = b"" if f.read(1) in (b"\n", b"") else b"\n"
                f.write(start + json.dumps(row).encode() + b"\n")
        except OSError as error:
            print(f"warning: a row of {self.path} is lost: {error}")
        if self.writers:
            self.writers.write(row)

    def timed(self, batches):
        """Yield the same batches and count the time spent waiting for them, except for the first: workers start."""
        batches, began = iter(batches), time.perf_counter()
        for batch in batches:
            self.waited += time.perf_counter() - began
            if self.since is None:
                self.began = self.since = time.perf_counter()
                self.waited = 0.0
            yield batch
            began = time.perf_counter()

    def overdue(self):
        """Whether rank 0 wants a row by time: after the first step, and 30 seconds after the last row."""
        return self.rank == 0 and (self.last == self.start or time.perf_counter() - self.since > 30)

    def __call__(self, step, **values):
        """Log the steps since the last row; only here are tensors read. The screen gets what fits 120 characters."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        now, done = time.perf_counter(), step - self.last
        each, wait = (now - self.since) / done, self.waited / done
        self.since, self.waited, self.last = now, 0.0, step
        if self.rank:
            return
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
        if self.device.type == "cuda":                          # else of the process: bytes on macOS, KiB on Linux
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
        self.note(step=step, epoch=round(step / self.per_epoch, 4), **values, img_s=round(self.batch / each, 1),
                  data_s=round(wait, 5), step_s=round(each, 5), mem_gb=round(memory, 3))
        left = timedelta(seconds=round((now - self.began) / (step - self.start) * (self.total - step)))
        text = f"step {step}/{self.total}  epoch {step / self.per_epoch:.2f}"
        end = f"  {self.batch / each:.0f} img/s  data {wait / each:.0%}  {memory:.1f} GB  eta {left}"
        for part in [f"  {name} {value:.4g}" for name, value in values.items() if value or name != "skipped"]:
            if len(text + part + end) <= 120:
                text += part
        print(text + end)
        if wait > 0.2 * each:
            self.hint_once(wait / each)

    def hint_once(self, share):
        if not self.hinted:
            print(f"hint: {share:.0%} of a step waits for images; more --workers, or a set packed once by "
                  "`python -m tools.pack`, would help")
        self.hinted = True


def git_commit():
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    with suppress(OSError):                                     # no git on this machine
        return subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(__file__)).stdout.strip()
