"""
Plumbing with one right answer, shared by every script: command line, processes, precision, seeds, schedules, parameter
groups, steps that survive a NaN, signals, checkpoints that are never half written, and the log.

Nothing here knows what is being trained: functions take values and return values, nothing calls back into a script.
"""
import argparse
import fcntl
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import time
import traceback
import types
import typing
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta

import torch
import torch.distributed as dist


def die(message):
    """End the run with one sentence, said once: for mistakes that every rank sees alike."""
    raise SystemExit(message if os.environ.get("RANK", "0") == "0" else 1)


@contextmanager
def in_words():
    """Turn a ValueError of the rooms below (patches that do not tile, heads that do not divide) into that sentence."""
    try:
        yield
    except ValueError as error:
        die(str(error))


# ----------------------------------------------------------------------------------------------------------------
# Command line


def opt(default, help, least=None):
    """One line of a Config: its default, its meaning with the unit, its smallest value. None: the recipe decides."""
    return field(default=default, metadata=dict(help=help, least=least))


@dataclass
class Plumbing:
    """Options of every script that nobody experiments with. What a method is about stands in its own Config."""
    out: str | None = opt(None, "folder of the run: checkpoints, log, pictures (default: out/<script>)")
    dtype: str = opt("auto", "fp32, bf16 or fp16 products; auto: fp32 on a CPU, bf16 on a GPU that has it, else fp16")
    compile: bool | None = opt(None, "torch.compile the network (default: on a GPU only)")
    resume: str = opt("auto", "auto: go on from last.pt in --out; none: refuse to; or a file for an empty --out")
    seed: int = opt(0, "everything random follows from it", 0)
    device: str = opt("auto", "auto, cpu, cuda or mps")
    workers: int | None = opt(None, "processes that decode images, per training process (default: its cores)", 0)
    decode: str = opt("workers", "where JPEGs become crops: workers, or device (a GPU's decoder, if cores are few)")
    download: bool = opt(False, "fetch --data if it is a torchvision set that is not there yet")
    log_every: int = opt(20, "steps between rows of the log", 1)
    save_every: int = opt(500, "steps between checkpoints", 1)
    keep_every: int = opt(0, "epochs between checkpoints that are kept for good; 0: none is", 0)
    max_unreadable: float = opt(0.05, "share of unreadable images above which the run stops", 0)
    max_skipped: int = opt(20, "steps in a row with a non-finite gradient after which the run stops", 1)
    demo: bool = opt(False, "a small run on images made on the fly, minutes on a CPU")


# The numbers do not depend on these (on accum only through what is drawn, of a teacher the file itself is compared),
# so a run may go on with other values.
FREE = {"out", "compile", "distill_teacher", "teacher", "resume", "device", "workers", "download", "log_every",
        "save_every", "keep_every", "eval_every", "picture_every", "probe_every", "max_unreadable", "max_skipped",
        "accum"}


def parse(Config, doc, argv=None):
    """A Config dataclass as a command line -> (config, names of the options given). - and _ are alike; booleans have
    --x and --no-x; an unknown option or a bad value ends in one sentence."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS, description=doc,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: die(f"{parser.prog}: {message} (--help lists every option)")
    hints, plumbing = typing.get_type_hints(Config), {f.name for f in fields(Plumbing)}
    for f in sorted(fields(Config), key=lambda f: f.name in plumbing):
        kind = hints[f.name]
        kind = typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind      # `int | None` reads an int
        shown = " ".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = f.metadata["help"] + ("" if f.default is None else f" [{shown}]")
        how = dict(dest=f.name, help=text.replace("%", "%%"))
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kind) is tuple:
            how.update(type=typing.get_args(kind)[0], nargs="+", metavar="N")
        else:
            how.update(type=kind, metavar=kind.__name__.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), **how)
    argv = [re.sub("^--[^=]*", lambda m: m[0].replace("_", "-"), a) for a in (sys.argv[1:] if argv is None else argv)]
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}
    for f in fields(Config):
        value, least = given.get(f.name), f.metadata["least"]
        if None not in (value, least) and not all(v >= least for v in (value if type(value) is tuple else (value,))):
            parser.error(f"--{f.name.replace('_', '-')} must be at least {least}, not {value}")
    return Config(**given), set(given)


def fill(cfg, given, values):
    """cfg with `values` for every option that is not in `given`."""
    return replace(cfg, **{k: v for k, v in values.items() if k not in given})


# ----------------------------------------------------------------------------------------------------------------
# Processes, device, precision, seeds


def setup(device="auto"):
    """Join the other processes, if torchrun started any -> (rank, world, device). The environment decides, no flag."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found and found.type in ("cuda", "mps") else "cpu"
    if device not in ("cpu", "cuda", "mps") or device == "mps" and not torch.backends.mps.is_available():
        die(f"--device {device} is not here: auto, cpu, cuda and mps are known")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise SystemExit(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start fewer "
                             "processes, or give --device cpu")
        torch.cuda.set_device(local)
        torch.set_float32_matmul_precision("high")
    elif "OMP_NUM_THREADS" not in os.environ:
        # A core is left to the workers: threads that wait for each other by spinning lose more than it would add. Not
        # a matter of --workers, because the last bits of a sum depend on the number of threads.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))
    device = torch.device(device, local) if device == "cuda" else torch.device(device)
    if world > 1:
        gpu = device.type == "cuda"
        dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)
    return rank, world, device


def launch(main):
    """Run a script's main, and leave at once, without the interpreter's goodbyes. These wait for a process that decodes
    images for ever, if it hangs (seen once on busy cores after a finished run). Of several processes, when one fails,
    the others sit in a collective and would be waited for, until torchrun sees this one gone and ends them; and when
    one is done, a thread of Gloo's may still ask for the interpreter that is being taken down, and abort a finished run
    (seen now and then with torch 2.15)."""
    code = 1
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(bool(stop.code))
        if isinstance(stop.code, str):
            if os.environ.get("RANK", "0") != "0":              # if rank 0 says the same, this one is ended first
                time.sleep(3)
            print(stop.code, file=sys.stderr)
    except Exception:                                           # a mistake of ours, on one process or on all
        traceback.print_exc()
    if dist.is_initialized() and not code:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def precision(name, device):
    """--dtype resolved: bf16 only where the hardware has it, for where it is emulated fp16 is faster."""
    if name == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        name = "bf16" if bf16 else "fp16" if device.type == "cuda" else "fp32"
    if name not in ("fp32", "bf16", "fp16"):
        die(f"--dtype is auto, fp32, bf16 or fp16, not {name}")
    return name


DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)


def autocast(device, name):
    return torch.autocast(device.type, DTYPES[name], enabled=name != "fp32")


def compile_if(cfg, device, *modules):
    """torch.compile in place what --compile asks for: inside DDP, where accumulating without a sync compiles once."""
    for module in modules:
        if cfg.compile or cfg.compile is None and device.type == "cuda":
            module.compile(dynamic=False)


def seed_for(seed, step, rank):
    """Randomness is a function of these three, never of history: a resumed run draws what an uninterrupted one did."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2 ** 63)


def sync_if(last, net):
    """Context for one of several backward passes of a step: gradients are all-reduced in the last one only."""
    return nullcontext() if last or not hasattr(net, "no_sync") else net.no_sync()


def mean_over_ranks(value):
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


# ----------------------------------------------------------------------------------------------------------------
# Schedules, parameter groups, steps


class Steps(typing.NamedTuple):
    """A run counted in optimizer steps."""
    total: int
    warmup: int
    per_epoch: int                                              # whole batches only: an epoch's odd rest is left out

    def due(self, done, epochs):
        """The number of the epoch that has just ended if it is a multiple of `epochs`, else (or for 0) None."""
        epoch, within = divmod(done, self.per_epoch)
        return epoch if epochs and not within and epoch % epochs == 0 else None


def plan(cfg, images, world, repeat=1):
    """-> Steps and the peak learning rate. repeat: crops of one image in a batch. What cannot be run is refused in a
    sentence."""
    if cfg.batch_size % (world * cfg.accum * repeat):
        die(f"--batch-size {cfg.batch_size} does not divide among {world} processes x {cfg.accum} accumulation passes" +
            f" x {repeat} crops of an image" * (repeat > 1))
    if images < cfg.batch_size:
        die(f"the training set has {images} images, less than one --batch-size of {cfg.batch_size}: lower it")
    if not cfg.epochs > 0:
        die(f"--epochs {cfg.epochs:g} is no training: give more than 0")
    if cfg.warmup_epochs >= cfg.epochs:
        die(f"--warmup-epochs {cfg.warmup_epochs:g} leaves nothing of --epochs {cfg.epochs:g}: lower it")
    per_epoch = images // cfg.batch_size
    steps = Steps(max(1, round(cfg.epochs * per_epoch)), round(cfg.warmup_epochs * per_epoch), per_epoch)
    return steps, cfg.blr * cfg.batch_size / 256 if cfg.lr is None else cfg.lr


def warmup_cosine(step, steps, warmup, peak, floor=0.0, start=0.0):
    """Learning rate of step `step` (from 0): linear from `start` over `warmup` steps, then half a cosine to `floor`."""
    if step < warmup:
        return start + (peak - start) * step / warmup           # the very first step has rate 0, as published for MAE
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def set_lr(optimizer, lr):
    """The rate of every group: lr, times the group's lr_scale if it has one, which scales the floor as well."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def decay_groups(model, weight_decay):
    """AdamW groups in the published order: 1-D parameters and biases without decay, then the rest with it.

    cls and mask tokens are 3-D and so are decayed, as in both MAE codes; frozen position tables are in no group.
    """
    plain, decayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.dim() <= 1 or name.endswith(".bias") else decayed).append(p)
    return [dict(params=plain, weight_decay=0.0), dict(params=decayed, weight_decay=weight_decay)]


def finite_step(optimizer, scaler, clip=None):
    """Clip, then step unless the gradient is not finite -> (its norm, 1.0 if skipped else 0.0), both on the device.

    Gradients are all-reduced by now, so every rank skips or none does. The decision never visits the host: a fused
    AdamW reads `found_inf` on the device, which is how GradScaler talks to it too.
    """
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if clip:
        scale = (clip / (norm + 1e-6)).clamp(max=1.0)           # if not finite, they are left to be looked at
        torch._foreach_mul_(grads, torch.where(norm.isfinite(), scale, 1.0))
    skipped = 1.0 - norm.isfinite().float()
    optimizer.found_inf = skipped
    scaler.step(optimizer)
    scaler.update()
    return norm, skipped


class Health:
    """Whether to go on: one decision for all ranks at every step boundary.

    Signals only set a flag. Flags and counts are summed over ranks, so that all stop together. On a GPU the sums are
    read one step late, when they have long arrived: reading this step's would wait for the device.
    """

    def __init__(self, cfg, device, world, log):
        self.cfg, self.device, self.world, self.log = cfg, device, world, log
        self.signal, self.late, self.names = 0, None, set()
        self.skipped = self.in_a_row = self.unreadable = self.images = 0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        # A second Ctrl-C means now; not under torchrun, which forwards the one that the terminal has already sent.
        if self.signal == number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise KeyboardInterrupt
        self.signal = number

    def __call__(self, skipped, unreadable, images):
        """skipped: finite_step's flag; unreadable: names of this rank's bad images, out of `images`. -> None to go on,
        or why to stop: "signal", "non-finite" (max_skipped steps in a row), "unreadable" (above max_unreadable)."""
        for name in sorted(set(unreadable) - self.names):
            print(f"warning: {name} cannot be read; another image takes its place", flush=True)
            self.log.note(unreadable=name)
        self.names.update(unreadable)
        gpu = self.device.type == "cuda"
        # Through pinned memory both ways: a plain copy would make the host wait for all work queued on the GPU.
        sums = torch.tensor([float(self.signal > 0), len(unreadable), images, 0.0], pin_memory=gpu)
        sums = sums.to(self.device, non_blocking=True)
        sums[3] = skipped / self.world
        if dist.is_initialized():
            dist.all_reduce(sums)
        if gpu:
            now = torch.empty(sums.shape, pin_memory=True).copy_(sums, non_blocking=True), torch.cuda.Event()
            now[1].record()
            if self.late:
                self.late[1].synchronize()
            sums, self.late = self.late[0] if self.late else torch.zeros(4), now
        stop, bad, images, skip = sums.tolist()
        self.skipped, self.in_a_row = self.skipped + round(skip), self.in_a_row + 1 if skip else 0
        self.unreadable, self.images = self.unreadable + round(bad), self.images + round(images)
        if self.in_a_row >= self.cfg.max_skipped:
            return "non-finite"
        if self.images >= 200 and self.unreadable > self.cfg.max_unreadable * self.images:
            return "unreadable"
        return "signal" if stop else None

    def leave(self, why, run, step, model, loss, img):
        """Say why the run ends early, and end it. Only a signal is not a failure."""
        if dist.is_initialized():                               # a process that fails is the end of those still saving
            dist.barrier()
        if why == "signal":
            if run.rank == 0:
                print(f"stopped by a signal after step {step}: the same command goes on from there", flush=True)
            raise SystemExit(0)
        if why == "unreadable":
            die(f"{self.unreadable} of {self.images} images could not be read, more than --max-unreadable "
                f"{self.cfg.max_unreadable:g} allows: {self.log.path} names them, last.pt holds step {step}")
        # The loss is this rank's own: a rank that made the trouble keeps its batch, and rank 0 keeps one in any case.
        if run.rank == 0 or not loss.isfinite():
            run.save_debug(step, img)
        bad = [f"gradient of {n}" for n, p in model.named_parameters()
               if p.grad is not None and not p.grad.isfinite().all()]
        what = "loss" if not mean_over_ranks(loss).isfinite() else (bad or ["gradient"])[0]
        die(f"{self.in_a_row} steps in a row, up to step {step}, gave a non-finite {what} and were skipped: "
            f"{self.cfg.out}/debug-rank*.pt have the state and the batches; try --clip-grad 1, a lower --lr or "
            "--dtype fp32")


# ----------------------------------------------------------------------------------------------------------------
# The run's folder: lock, checkpoints, log


def write(state, path, previous=None):
    """Write beside, flush, rename: a reader sees the old file or the new one, never half of one. Raises OSError.
    previous: a path under which the old file stays."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError) as error:                    # torch's zip writer makes a full disk a RuntimeError
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")
        raise OSError(str(error).splitlines()[0]) from error
    if previous and os.path.exists(path):
        os.replace(path, previous)
    os.replace(f"{path}.tmp", path)


def read_back(path):
    """A checkpoint of ours, or None, with a warning, if it is damaged."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                  # one cut short fails as zip, pickle, EOF or unicode
        print(f"warning: {path} is damaged ({(str(error).splitlines() or [''])[0][:60]})", flush=True)


class Run:
    """A folder that belongs to one run: lock, checkpoints, going on.

    parts: modules, optimizer, scaler by name. If the folder holds a checkpoint of this very run, they are loaded from
    it and `step` is where to go on; otherwise `step` is 0. Damaged files, another method's, or other options end in a
    sentence: nothing is restarted in silence. The lock is the process's own, so a killed run leaves none.
    """

    def __init__(self, cfg, method, rank, world, images, **parts):
        self.cfg, self.method, self.rank, self.world, self.images, self.parts = cfg, method, rank, world, images, parts
        self.last, self.previous = (os.path.join(cfg.out, name) for name in ("last.pt", "previous.pt"))
        self.damaged = False
        problem, self.step = None, 0
        try:
            self.lock_folder()
            self.step = self.restore()
        except SystemExit as stop:
            problem = stop.code
        if world > 1:                                           # one rank's trouble is everybody's
            found = [None] * world
            dist.all_gather_object(found, (problem, self.step))
            problem = next((problem for problem, _ in found if problem), None)
            if not problem and len({step for _, step in found}) > 1:
                problem = f"processes would go on from different steps {found}: every node must see the same --out"
        if problem:
            die(problem)

    def lock_folder(self):
        try:
            os.makedirs(self.cfg.out, exist_ok=True)
            self.lock = open(os.path.join(self.cfg.out, ".lock"), "a")
        except OSError as error:
            raise SystemExit(f"--out {self.cfg.out} cannot be written: {error}") from None
        try:                                                    # lockf, not flock, which decoding processes inherit
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB) if self.rank == 0 else None
        except (BlockingIOError, PermissionError):
            raise SystemExit(f"another run is writing to {self.cfg.out}: stop it, or choose another --out") from None
        except OSError as error:
            print(f"warning: {self.cfg.out} cannot be locked ({error}): see that only one run writes there")

    def restore(self):
        cfg, there = self.cfg, [path for path in (self.last, self.previous) if os.path.exists(path)]
        if cfg.resume == "none" and there:
            raise SystemExit(f"{there[0]} exists and --resume none was given: choose another --out, or move it away")
        if cfg.resume not in ("auto", "none") and not there:    # later starts of the same command go on from last.pt
            there = [cfg.resume]
            if not os.path.exists(cfg.resume):
                raise SystemExit(f"--resume {cfg.resume} does not exist")
        if not there:
            return 0
        for path in there:
            saved = read_back(path)
            if isinstance(saved, dict):
                break
            self.damaged = True                                 # then previous.pt is the good one and must stay
        else:
            raise SystemExit(f"{' and '.join(there)} cannot be read as a checkpoint" +
                             ": move it away to start anew" * (there[0] == self.last))
        if not {"step", "optimizer", "images"} <= set(saved):
            raise SystemExit(f"{path} has weights but no run to go on with: give last.pt, or --init for its weights")
        if saved.get("method") != self.method:
            raise SystemExit(f"{path} is a checkpoint of {saved.get('method', 'something else')}, not of "
                             f"{self.method}: choose another --out")
        known = {f.name: f.default for f in fields(cfg)} | saved["config"]      # it may be older than an option
        old, new = (dict(c, images=n) for c, n in ((known, saved["images"]), (asdict(cfg), self.images)))
        differ = [f"{k} was {old.get(k)}, is {new.get(k)}" for k in {**old, **new}
                  if k not in FREE and old.get(k) != new.get(k)]
        if differ:
            raise SystemExit(f"{path} belongs to a run with other options ({'; '.join(differ)}): give those, or "
                             "another --out")
        shares = (saved["world"], old["accum"]), (self.world, cfg.accum)
        if shares[0] != shares[1] and self.rank == 0:
            print("warning: {} processes x {} passes go on as {} x {}: no longer the same bit for bit".format(
                *shares[0], *shares[1]))
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["step"]

    def state(self, step):
        """Everything needed to go on from optimizer step `step`, in plain types and tensors."""
        return dict(method=self.method, step=step, config=asdict(self.cfg), world=self.world, images=self.images,
                    torch=str(torch.__version__), **{name: part.state_dict() for name, part in self.parts.items()})

    def save(self, step, encoder, keep=None, must=False):
        """Write last.pt (the one before stays as previous.pt), encoder.pt for others to read, and a copy under the
        epoch number `keep`. What cannot be written leaves the old files whole: a warning, or, if it `must`, the end."""
        if self.rank:
            return
        try:
            write(self.state(step), self.last, None if self.damaged else self.previous)
            self.damaged = False
            write(encoder, os.path.join(self.cfg.out, "encoder.pt"))
            if keep:
                write(self.state(step), os.path.join(self.cfg.out, f"epoch{keep:04}.pt"))
        except OSError as error:
            message = f"step {step} could not be saved in {self.cfg.out} (is the disk full?): {error}; "
            if must:
                raise SystemExit(message + "the files saved before are whole") from error
            print(f"warning: {message}the run goes on and tries again", flush=True)

    def save_debug(self, step, img):
        try:
            write(dict(self.state(step), batch=img.cpu()), os.path.join(self.cfg.out, f"debug-rank{self.rank}.pt"))
        except OSError as error:
            print(f"warning: the state for debugging could not be saved: {error}", flush=True)


class Log:
    """log.jsonl, and a line to read. The first row, and the first after each resume: the config and the git commit."""

    def __init__(self, cfg, rank, device, start, steps, **facts):
        self.path, self.rank, self.device = os.path.join(cfg.out, "log.jsonl"), rank, device
        self.start, self.last, self.steps, self.batch = start, start, steps, cfg.batch_size
        self.waited, self.since, self.hinted = 0.0, None, False
        if rank == 0:
            try:
                here = os.path.dirname(os.path.abspath(__file__))
                commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True,
                                        text=True, cwd=here).stdout.strip()
            except OSError:                                     # no git on this machine
                commit = ""
            self.note(config=asdict(cfg), commit=commit, torch=str(torch.__version__), start=start, steps=steps.total,
                      **facts)

    def note(self, **row):
        """Append one row, on a line of its own even after a row cut short. Any rank may: a short append is atomic. A
        full disk costs the row, not the run."""
        row = {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        try:
            with open(self.path, "a+b") as f:
                if f.tell():
                    f.seek(-1, os.SEEK_END)
                f.write((b"" if f.read(1) in (b"\n", b"") else b"\n") + json.dumps(row).encode() + b"\n")
        except OSError as error:
            print(f"warning: a row of {self.path} is lost: {error}", flush=True)

    def waiting(self, batches):
        """The same batches, counting the time spent waiting for them; not for the first, while the workers start."""
        batches = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waited += time.perf_counter() - began
            if self.since is None:
                self.began = self.since = time.perf_counter()
                self.waited = 0.0
            yield batch

    def __call__(self, step, **values):
        """A row for the steps since the last one, after `step` steps. Only here are scalar tensors read."""
        values = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in values.items()}
        if self.rank:
            return
        now, done = time.perf_counter(), step - self.last
        each, wait = (now - self.since) / done, self.waited / done
        if self.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
        else:                                                   # macOS counts bytes where Linux counts KiB
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** (30 if sys.platform == "darwin" else 20)
        self.note(step=step, epoch=round(step / self.steps.per_epoch, 4), **values, img_s=round(self.batch / each, 1),
                  data_s=round(wait, 5), step_s=round(each, 5), mem_gb=round(memory, 3))
        left = timedelta(seconds=round((now - self.began) / (step - self.start) * (self.steps.total - step)))
        text = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        print(f"step {step}/{self.steps.total}  epoch {step / self.steps.per_epoch:.2f}  {text}  "
              f"{self.batch / each:.0f} img/s  data {100 * wait / each:.0f}%  {memory:.1f} GB  eta {left}", flush=True)
        if wait > 0.2 * each and not self.hinted:
            self.hinted = True
            print(f"hint: {100 * wait / each:.0f}% of a step waits for images; more --workers, a set packed once by "
                  "`python data.py pack`, or --repeat 2 would help", flush=True)
        self.since, self.waited, self.last = now, 0.0, step


def draw_curve(folder):
    """loss.png from log.jsonl, where matplotlib is present; a step that a resumed run repeated is drawn once."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = {}
    with open(os.path.join(folder, "log.jsonl")) as f:
        for line in f:
            try:
                row = json.loads(line)
            except ValueError:                                  # cut short by a kill
                continue
            if isinstance(row.get("loss"), float):
                rows[row["step"]] = row
    rows = list(rows.values())
    figure, axis = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axis.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], label="loss")
    axis.plot([row["epoch"] for row in rows], [row["chance"] for row in rows], "--", color="gray", label="chance")
    axis.set(xlabel="epoch", ylabel="loss", ylim=(0, None))
    axis.legend()
    figure.savefig(os.path.join(folder, "loss.png"), dpi=150)
    plt.close(figure)
