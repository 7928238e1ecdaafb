"""
A training run: processes, precision, seeds, schedules, the loop over steps, non-finite gradients, signals.

`Run` does what every script does alike. It takes values and returns values, and knows nothing of what is being trained.
"""
import io
import math
import os
import select
import signal
import sys
import textwrap
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import fields, replace

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

from data import batch_keys, load
from images.augment import statistics
from images.datasets import describe, digest_of_names, same_classes, train_and_val
from images.device import CROPS
from images.pictures import draw_curve
from images.workers import WorkersDied
from runtime.folder import RESUME_MAY_CHANGE, Log, RunFolder
from runtime.options import fail, value_errors_exit
from runtime.probes import probe
from runtime.writers import OPEN_WRITERS
from vit import pair

PATIENCE = 20                                                   # seconds; torchrun kills its processes after 30
DTYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)

# ----------------------------------------------------------------------------------------------------------------
# Processes, precision, seeds


def setup(device="auto"):
    """Join the other processes, if torchrun started any -> (rank, world, device). The environment decides, no flag."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if device == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        device = found.type if found and found.type in ("cuda", "mps") else "cpu"
    if device not in ("cpu", "cuda", "mps") or device == "mps" and not torch.backends.mps.is_available():
        fail(f"--device {device} is not available here: give auto, cpu, cuda or mps")
    if device == "cuda":
        device = choose_gpu(local)
    elif "OMP_NUM_THREADS" not in os.environ:                   # a core is left to the workers, however many there are:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) - 1))        # the last bits of a sum depend on this number
    device = torch.device(device)
    if world > 1:
        join_processes(device)
    return rank, world, device


def join_processes(device):
    gpu = device.type == "cuda"
    dist.init_process_group("nccl" if gpu else "gloo", device_id=device if gpu else None)


def choose_gpu(local):
    if local >= torch.cuda.device_count():
        raise SystemExit(f"process {local} of this machine finds {torch.cuda.device_count()} GPUs: start fewer "
                         "processes, or give --device cpu")
    torch.cuda.set_device(local)
    torch.set_float32_matmul_precision("high")
    return f"cuda:{local}"


class Screen(io.FileIO):
    """Standard output or error. What it cannot take (it is closed, its disk is full) is lost, but raises nothing."""

    def write(self, data):
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


def protect_screens():
    """Replace standard output and error by Screens. A name that they have no letters for is printed with escapes."""
    for name, fd in (("stdout", 1), ("stderr", 2)):
        encoding = getattr(getattr(sys, name), "encoding", None)
        if encoding is None:                                    # it is closed: the next file would take its place
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        screen = io.BufferedWriter(Screen(fd, "w", closefd=False))
        setattr(sys, name, io.TextIOWrapper(screen, encoding, errors="backslashreplace", line_buffering=True))


def launch(main):
    """Run a script's main and leave at once: the interpreter's shutdown may hang with a decoding process, or abort."""
    protect_screens()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)            # Ctrl-C just ends it until there is something to save
    try:
        main()
    except (SystemExit, Exception) as error:                    # leave in here: to release its frames waits for workers
        leave(code_of(error))
    leave(0)


def code_of(error):
    """Print why main ended -> the exit code of the process."""
    if not isinstance(error, SystemExit):                       # a mistake of ours, on one process or on all
        traceback.print_exception(error)
        return 1
    if isinstance(error.code, str):
        time.sleep(0 if os.environ.get("RANK", "0") == "0" else 3)         # if all say it, rank 0 ends the others first
        print(error.code, file=sys.stderr)
    return int(bool(error.code))


def leave(code):
    for writers in OPEN_WRITERS:
        writers.close()
    if dist.is_initialized() and not code:                      # after a failure the others still sit in a collective
        dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(code)


def print_rank0(text):
    if os.environ.get("RANK", "0") == "0":
        print(text)


def precision(name, device):
    """Resolve --dtype auto: bf16 only where the hardware has it, because fp16 is faster than an emulated bf16."""
    if name == "auto" and device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    return "fp32" if name == "auto" else name


def seed_for(seed, step, rank):
    """Randomness is a function of these three, never of history: a resumed run draws what an uninterrupted one did."""
    torch.manual_seed(((seed * 1_000_003 + step) * 4099 + rank) % 2 ** 63)


def mean_over_ranks(value):
    if dist.is_initialized():
        value = value / dist.get_world_size()
        dist.all_reduce(value)
    return value


# ----------------------------------------------------------------------------------------------------------------
# Schedules, parameter groups, the optimizer's step


def warmup_cosine(step, steps, warmup, peak, floor=0.0, start=0.0):
    """Learning rate of step `step` (from 0): linear from `start` over `warmup` steps, then half a cosine to `floor`."""
    if step < warmup:
        return start + (peak - start) * step / warmup           # the very first step has rate 0, as published for MAE
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


# cls and mask tokens are 3-D and so are decayed, as in both MAE codes; frozen tables of positions are in no group.
def decay_groups(model, weight_decay):
    """AdamW's groups in the published order: 1-D parameters and biases without weight decay, then the rest with it."""
    groups = [dict(params=[], weight_decay=0.0), dict(params=[], weight_decay=weight_decay)]
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[0 if p.dim() <= 1 or name.endswith(".bias") else 1]["params"].append(p)
    return groups


def clip_grads(grads, norms, clip):
    """Scale gradients down to the norm `clip`: all by their one norm (), or each by its own of norms (P,). Non-finite
    gradients stay unchanged, so that the debug checkpoint shows them."""
    scale = torch.where(norms.isfinite(), (clip / (norms + 1e-6)).clamp(max=1.0), 1.0)
    torch._foreach_mul_(grads, list(scale) if scale.dim() else scale)


# Gradients are all-reduced by now, so every rank skips or none does. The decision never visits the host: a fused AdamW
# reads found_inf on the device, which is how GradScaler talks to it too.
def finite_step(optimizer, scaler, clip=None, per_tensor=False):
    """Clip (per_tensor: each tensor alone); step, unless the gradient is not finite -> norm, 1.0 if skipped or 0."""
    scaler.unscale_(optimizer)
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    norm = torch.linalg.vector_norm(norms)
    if clip:
        clip_grads(grads, norms if per_tensor else norm, clip)
    optimizer.found_inf = skipped = 1.0 - norm.isfinite().float()
    scaler.step(optimizer)
    scaler.update()
    return norm, skipped


# ----------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """One run of a script: cfg is its resolved config, method the name that its checkpoints bear.

    rank, world, device    of this process
    total, warmup, peak    optimizer steps, those of the warm-up, the highest learning rate; per_epoch: of an epoch
    size, mean, std        of the images
    init                   --init, if there is one and the folder holds no checkpoint to go on from; else None
    done                   optimizer steps done
    skipped                1.0, on the device, if the last step was not finite and so changed nothing; else 0.0

    datasets   opens --data -> the images to train on, and those to evaluate on or None; plans the steps, locks the
               folder. shrink_batch: a set smaller than a batch makes the batch smaller; opened: both, if open already
    start      goes on from the folder's checkpoint, if it has one; compiles; wraps. encoder: what encoder.pt gets,
               dict(model=state dict, config=...); the tensors of a state dict are the network's own, and so are always
               up to date. features: images -> (B, D), what probes look at. ddp: options of DistributedDataParallel.
               split: checkpoints hold the children of the model, by name. parts: what else they hold, or None
    steps      yields (step, passes) from the step to go on from; passes yield (crops, labels) on the device, --accum
               times. images: of a step, over all processes (default: the batch). After the loop's body a step is saved
               and probed if that is due, and the run ends if it has to
    backward   adds a pass's gradients; the loss and its named parts are averaged over passes, for the log over ranks
    interruptible    within it, a signal that is `patience` seconds old ends the run though no step ends. unchanged:
               nothing has changed since the last step, so the state is saved; else the last checkpoint has to do
    update     makes one optimizer step, unless the gradient is not finite, and a row of the log if it is due: losses,
               values, and metrics, a function of no arguments -> dict, called only then and averaged over ranks
    """

    def __init__(self, cfg, method):
        self.rank, self.world, self.device = setup(cfg.device)
        self.cfg, self.method = replace(cfg, dtype=precision(cfg.dtype, self.device)), method
        self.repeat, self.probe_every = getattr(cfg, "repeat", 1), getattr(cfg, "probe_every", None)

    def datasets(self, shrink_batch=False, opened=None):
        cfg = self.cfg
        self.train, self.val = train, val = opened or train_and_val(
            cfg.data, cfg.fraction, cfg.seed, cfg.download, cfg.in_chans, cfg.bits, cfg.value_range)
        parts = self.world * cfg.accum * self.repeat
        if len(train) < cfg.batch_size:
            self.cfg = cfg = self.smaller_batch(len(train), parts, shrink_batch)
        if cfg.batch_size % parts or not cfg.epochs > cfg.warmup_epochs:
            self.refuse(parts)
        self.per_epoch = len(train) // cfg.batch_size           # whole batches: an epoch's rest is left out
        self.total = max(1, round(cfg.epochs * self.per_epoch))
        self.warmup = round(cfg.warmup_epochs * self.per_epoch)
        self.peak = cfg.blr * cfg.batch_size / 256 if cfg.lr is None else cfg.lr
        self.probing = self.probe_every or self.probe_every == 0 and cfg.demo and cfg.data == "shapes"
        if self.probing:
            self.probe_sets = self.open_probe_sets(cfg.probe_data)
        with value_errors_exit():
            self.size, (self.mean, self.std) = pair(cfg.img_size), statistics(cfg.in_chans, cfg.mean, cfg.std)
        self.folder = RunFolder(cfg, self.method, self.rank, self.world, len(train),
                                [source and digest_of_names(source) for source in (train, val)])
        self.init = None if self.folder.saved else cfg.init
        torch.manual_seed(cfg.seed)                             # from here on all ranks build the same weights
        return train, val

    def refuse(self, parts):
        if self.cfg.batch_size % parts:
            fail(f"--batch-size {self.cfg.batch_size} does not divide among {self.world} processes x {self.cfg.accum} "
                 f"passes x {self.repeat} crops of an image")
        fail(f"--epochs {self.cfg.epochs:g} must be more than --warmup-epochs {self.cfg.warmup_epochs:g}")

    def open_probe_sets(self, probe_data=None):
        """The labelled sets to probe on: those of --probe-data, else of --data."""
        cfg, sets = self.cfg, (self.train, self.val)
        if probe_data:
            sets = train_and_val(probe_data, 1.0, 0, cfg.download, cfg.in_chans, cfg.bits, cfg.value_range)
        if not same_classes(*sets):
            fail("--probe-every needs the same classes in train/ and in val/: --probe-data names a set that has them")
        return sets

    def smaller_batch(self, images, parts, allowed):
        """The config with the largest batch that a small set fills, if that is allowed and there is one."""
        fitting = images // parts * parts
        if not fitting:
            fail(f"the training set has {images} images, and a step of {self.world} processes x {self.cfg.accum} "
                 f"passes x {self.repeat} crops of an image needs {parts}: give more images, or fewer of those")
        if not allowed:
            fail(f"the training set has {images} images, less than one batch: give --batch-size {fitting}")
        print_rank0(f"the training set has {images} images, less than one batch: --batch-size is now {fitting}")
        return replace(self.cfg, batch_size=fitting)

    def start(self, model, optimizer, encoder, features=None, ddp=None, split=False, **parts):
        """A model on the device -> the network to call, restored if the folder has a checkpoint."""
        cfg, self.model, self.optimizer, self.features = self.cfg, model, optimizer, features
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=cfg.dtype == "fp16")
        stored = dict(encoder["config"], mean=self.mean, std=self.std)
        self.encoder = {"method": self.method, **encoder, "config": stored}
        whole = dict(model.named_children()) if split else dict(model=model)
        parts = dict(parts, **whole, optimizer=optimizer, scaler=self.scaler)
        self.folder.parts = {name: part for name, part in parts.items() if part is not None}
        self.done = self.folder.load(self.total) if self.folder.saved else 0
        if cfg.compile or cfg.compile is None and self.device.type == "cuda":
            model.compile(dynamic=False)                        # inside DDP: passes without a sync compile only once
        self.net = model if self.world == 1 else DDP(model, broadcast_buffers=False, **(ddp or {}))
        self.log = Log(cfg, self.rank, self.device, self.done, self.total, self.per_epoch, images=len(self.train),
                       world=self.world)
        self.stop_check, self.saved_at = StopCheck(cfg, self.device, self.world, self.log), time.monotonic()
        self.banner()
        if self.probing and not self.done:
            self.probe()
        return self.net

    def banner(self):
        """Print what is about to happen: the data, the resolved options, sizes, steps."""
        cfg, parts = self.cfg, self.model.named_children()
        needs = {f.name: f.metadata["needs"] for f in fields(cfg)}             # options that have an effect are shown
        shown = [f"{k} {v}" for k, v in vars(cfg).items() if v not in (None, False) and k not in RESUME_MAY_CHANGE
                 and (needs[k] is None or getattr(cfg, needs[k]))]
        sizes = [f"{name} {sum(p.numel() for p in part.parameters()) / 1e6:.2f}" for name, part in parts
                 if next(part.parameters(), None) is not None]
        print_rank0(f"{describe(self.train)}\n{textwrap.fill(', '.join(shown), 120)}")
        print_rank0(f"million parameters: {', '.join(sizes)}\n"
                    f"batch {cfg.batch_size} = {self.world} processes x {cfg.accum} passes x "
                    f"{cfg.batch_size // self.world // cfg.accum} images on {self.device}; {self.done} of {self.total} "
                    f"steps done, {self.warmup} of them warm-up, peak lr {self.peak:.3g}")

    def random_crops(self, repeat=None):
        cfg, repeat = self.cfg, repeat or self.repeat           # decoded in the workers, or on the device
        return CROPS[cfg.decode](self.train, self.size, cfg.in_chans, cfg.seed, (cfg.min_crop, 1.0), cfg.interpolation,
                                 repeat)

    def steps(self, crops, images=None, accum=None):
        cfg, self.accum = self.cfg, accum or self.cfg.accum
        keys = batch_keys(len(self.train), images or cfg.batch_size // self.repeat, self.accum, self.world, self.rank,
                          cfg.seed, self.done, self.total)
        batches = load(crops, keys, cfg.workers, pin=self.device.type == "cuda")
        batches = self.log.timed(crops.finish(batches, self.device))
        for step in range(self.done, self.total):
            seed_for(cfg.seed, step, self.rank)
            self.unreadable, self.losses = [], {}
            yield step, self.passes(batches)
            self.done = step + 1
            self.end_step()                                     # after the loop's body: save, stop, probe if due

    def passes(self, batches):
        for number in range(1, self.accum + 1):
            with self.interruptible(1 if self.world == number == 1 else PATIENCE, unchanged=number == 1):
                crops, labels, unreadable = next(batches)
            self.unreadable += unreadable
            if self.world > 1:                                  # gradients are all-reduced in the last pass only
                self.net.require_backward_grad_sync = number == self.accum
            several = isinstance(crops, list)                   # crops of several sizes
            crops = [img.to(self.device, non_blocking=True) for img in (crops if several else [crops])]
            self.batch = crops[0]
            yield crops if several else crops[0], labels.to(self.device, non_blocking=True)

    @contextmanager
    def interruptible(self, patience=1, unchanged=True):
        self.stop_check.patience = patience
        try:
            yield
        except (Interrupted, WorkersDied) as reason:
            self.stop_between_steps(reason, unchanged)
        self.stop_check.patience = None

    def stop_between_steps(self, reason, unchanged):
        self.stop_check.patience = None
        # Before the optimizer steps, passes change nothing but the statistics of a BatchNorm.
        unchanged = unchanged or not any("running_mean" in name for name, _ in self.model.named_buffers())
        if unchanged:
            self.save(must=True)
        if isinstance(reason, WorkersDied):
            raise reason
        print_rank0(f"stopped by a signal after step {self.done}: the same command goes on from "
                    f"{'there' if unchanged else 'the last checkpoint'}")
        raise SystemExit(0) from None

    def set_lr(self, lr):
        self.lr = lr
        for group in self.optimizer.param_groups:               # layer decay scales the floor of the schedule as well
            group["lr"] = lr * group.get("lr_scale", 1.0)

    def autocast(self):
        return torch.autocast(self.device.type, DTYPES[self.cfg.dtype], enabled=self.cfg.dtype != "fp32")

    def backward(self, loss, **parts):
        self.scaler.scale(loss / self.accum).backward()
        for name, part in dict(loss=loss, **parts).items():
            self.losses[name] = self.losses.get(name, 0.0) + part.detach() / self.accum

    def update(self, metrics=None, per_tensor=False, **values):
        done, clip = self.done + 1, getattr(self.cfg, "clip_grad", None)
        grad_norm, self.skipped = finite_step(self.optimizer, self.scaler, clip, per_tensor)
        self.stop_reason, log_now = self.stop_check(self.skipped, self.unreadable, self.cfg.batch_size // self.world)
        if done % self.cfg.log_every == 0 or done == self.total or self.stop_reason or log_now:
            row = self.losses | (metrics() if metrics else {})
            if self.world > 1:
                row |= self.means_over_ranks(row)
            self.log(done, **row, lr=self.lr, **values, grad_norm=grad_norm, skipped=self.stop_check.skipped)

    def means_over_ranks(self, row):
        on_device = {name: x for name, x in row.items() if torch.is_tensor(x) and x.device == self.device}
        return {name: mean_over_ranks(x) for name, x in on_device.items()}

    def due(self, epochs, step=None):
        """The number of the epoch that has just ended if it is a multiple of `epochs`, else (or for 0) None."""
        epoch, rest = divmod(self.done if step is None else step, self.per_epoch)
        return epoch if epochs and not rest and epoch % epochs == 0 else None

    def end_step(self):
        keep, must = self.due(self.cfg.keep_every), self.stop_reason or self.done == self.total
        due = keep or self.done % self.cfg.save_every == 0 or time.monotonic() - self.saved_at > 600
        if (must or due) and self.stop_reason != "non-finite":
            self.save(keep, must)
        if self.stop_reason:
            self.leave(self.stop_reason)
        self.optimizer.zero_grad()
        if self.due(self.probe_every) and self.done < self.total:
            self.probe()

    def save(self, keep=None, must=False):
        self.folder.save(self.done, self.encoder, keep, must)
        self.saved_at = time.monotonic()

    def probe(self):
        """k-NN and linear accuracy of the frozen features, in the log and on the screen."""
        with self.interruptible():
            found = probe(self.features, *self.probe_sets, self.size, len(self.mean), self.mean, self.std, self.device,
                          self.cfg.workers)
        if self.rank == 0:
            self.log.note(step=self.done, **found)
            print_rank0(f"frozen features after step {self.done}: k-NN {found['knn']:.1f}%, linear "
                       f"{found['linear']:.1f}%")

    def finish(self, also=""):                                  # a probe, the curve of the loss, and the last word
        if self.probing:
            self.probe()
        if self.rank == 0 and self.total > 1:
            draw_curve(self.cfg.out)
        print_rank0(f"done: {self.cfg.out} has encoder.pt for downstream use, last.pt, log.jsonl{also}")

    def leave(self, reason):
        """Say why the run ends early, and end it. Only a signal is not a failure."""
        check, step = self.stop_check, self.done
        if dist.is_initialized():                               # a process that fails is the end of those still saving
            dist.barrier()
        if reason == "signal":
            print_rank0(f"stopped by a signal after step {step}: the same command goes on from there")
            raise SystemExit(0)
        if reason == "unreadable":
            fail(f"{check.unreadable} of {check.images} images could not be read, more than --max-unreadable "
                 f"{self.cfg.max_unreadable:g} allows: {self.log.path} names them, last.pt holds step {step}")
        # The loss is this rank's own: a rank that made the trouble keeps its batch, and rank 0 keeps one in any case.
        if self.rank == 0 or not self.losses["loss"].isfinite():
            self.folder.write(f"debug-rank{self.rank}.pt", dict(self.folder.state(step), batch=self.batch.cpu()))
        bad = [f"gradient of {name}" for name, p in self.model.named_parameters()
               if p.grad is not None and not p.grad.isfinite().all()]
        what = (bad or ["gradient"])[0] if mean_over_ranks(self.losses["loss"]).isfinite() else "loss"
        fail(f"{check.in_a_row} steps in a row, up to step {step}, gave a non-finite {what} and were skipped: "
             f"{self.cfg.out}/debug-rank*.pt have the state and the batches; try --clip-grad 1, a lower --lr or "
             "--dtype fp32")


class Interrupted(BaseException):
    """A signal has come where nothing is half done. It is no Exception, because decoding takes every one of those for
    a damaged image."""


class StopCheck:
    """Whether to go on: one decision for all ranks at every step boundary.

    Signals only set a flag. Flags and counts are summed over ranks, so that all stop together. On a GPU the sums are
    read one step late, when they have long arrived: reading this step's would wait for the device. Called after each
    step with finite_step's flag and the names of this rank's unreadable images, out of `images`, it returns the reason
    to stop, "signal", "unreadable", "non-finite" or None; and whether a row of the log is due by time.

    A step that waits for its images may wait for ever. So a signal also starts a clock: `patience` seconds later it
    raises Interrupted, wherever patience is a number, because nothing is half done there.
    """

    def __init__(self, cfg, device, world, log):
        self.cfg, self.device, self.world, self.log = cfg, device, world, log
        self.signal, self.seconds, self.patience, self.late, self.names = 0, 0, None, None, set()
        self.skipped = self.in_a_row = self.unreadable = self.images = 0
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self.on_clock)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:          # nohup has it ignored
                signal.signal(number, self.on_signal)

    def on_signal(self, number, frame):
        if self.signal:
            return
        self.signal = number
        signal.setitimer(signal.ITIMER_REAL, 1, 1)
        if self.log.rank == 0:                                  # print may be at work already, and cannot be entered
            Screen(2, "w", closefd=False).write(b"signal: finishing this step, whose images may take a moment, then "
                                                b"saving\n")

    def on_clock(self, number, frame):
        """Every second after a signal. From now on another one ends the process at once; only not within five seconds
        under torchrun, which forwards a Ctrl-C that the terminal has already sent."""
        self.seconds += 1
        if self.seconds >= (5 if "TORCHELASTIC_RUN_ID" in os.environ else 1):
            for number in {self.signal, signal.SIGINT} | ({signal.SIGTERM} if self.signal != signal.SIGUSR1 else set()):
                signal.signal(number, signal.SIG_DFL)           # a scheduler sends USR1, and later TERM, to save twice
        for fd in (1, 2):
            with suppress(OSError, ValueError):                 # it is closed
                if not select.select([], [fd], [], 0)[1]:       # nobody reads what fills it: drop all that follows
                    os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
        if self.patience is not None and self.seconds >= self.patience:
            self.patience = None
            raise Interrupted

    def __call__(self, skipped, unreadable, images):
        if unreadable:
            self.name_once(unreadable)
        flags = [self.signal > 0, len(unreadable), images, self.log.overdue(), 0]
        # Through pinned memory: a plain copy would make the host wait for all work queued on the GPU.
        sums = torch.tensor(flags, dtype=torch.float32, pin_memory=self.device.type == "cuda")
        sums = sums.to(self.device, non_blocking=True)
        sums[4] = skipped / self.world
        if dist.is_initialized():
            dist.all_reduce(sums)
        if self.device.type == "cuda":
            sums = self.one_step_late(sums)
        stop, bad, images, log_now, skip = sums.tolist()
        self.skipped, self.in_a_row = self.skipped + round(skip), self.in_a_row + 1 if skip else 0
        self.unreadable, self.images = self.unreadable + round(bad), self.images + round(images)
        if self.in_a_row >= self.cfg.max_skipped:
            return "non-finite", True
        if self.images >= 200 and self.unreadable > self.cfg.max_unreadable * self.images:
            return "unreadable", True
        return "signal" if stop else None, log_now > 0

    def name_once(self, unreadable):
        for name, reason in sorted(set(unreadable) - self.names):
            print(f"warning: {name} cannot be read; another image takes its place ({reason})")
            self.log.note(unreadable=name, reason=reason)
        self.names.update(unreadable)

    def one_step_late(self, sums):
        """Start to copy this step's sums from the GPU -> those of the step before, zeros at first."""
        now = torch.empty(sums.shape, pin_memory=True).copy_(sums, non_blocking=True), torch.cuda.Event()
        now[1].record()
        before, self.late = self.late or (torch.zeros(5), None), now
        if before[1]:
            before[1].synchronize()
        return before[0]
