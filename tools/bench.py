"""
Speed as ratios: a row times ours and the textbook's in the same process, in turns, and reports the median ratio.

python -m tools.bench --data SET     every row but index; writes results/bench-DATE-MACHINE.json
python -m tools.bench ROW ...        these rows alone:
    step distill moco esvit bootmae  an optimizer step on fixed images: MAE, D-MAE, MoCo v3, EsViT with Swin-T, BootMAE
    simmim maskfeat                  the same of SimMIM and MaskFeat on a ViT
    hiera networks                   a step of hiera_lite's MAE; images a second of Hiera, ViT-Tiny and Swin-lite
    tokens                           a step with a teacher of timm's, against its forward and the student's step alone
    esvit-loss                       EsViT's losses alone, at several numbers of prototypes
    dino-lightly                     DINO's head and loss, K = 16,384, against lightly's, if it is installed
    backbones chunks                 forward of EsViT's four networks against Swin-T's; ViL's sparse attention
    hog                              HOG of 64 images, against a loop over them, and scikit-image's if it is installed
    segment                          sliding windows over an image, against each window alone as mmsegmentation has them
    views                            MoCo v3's two views of a batch of crops, against Pillow and torchvision
    knn sweep cka                    k-NN for four k at once; 20 linear heads at once; CKA of all layers of two ViTs
    index                            a tar of 1,281,000 entries: gone through once, then opened from its index
    input both augment               with --data: files to batches; step and input together; fine-tuning's input
The textbook (tests/textbook.py) is MAE from timm's blocks as the official code does it: embed all, decode all, predict
all, plain AdamW; on a GPU it runs as that code runs: eager, fp16 autocast, GradScaler, the loss read at every step. Its
input is Pillow's decoding, then torchvision's RandomResizedCrop (bicubic), flip, ToTensor, Normalize in a DataLoader;
fine-tuning's is timm's, in one process.
"""
import argparse
import datetime
import itertools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
from dense.segment import Segmenter
from distill import DistilledMAE, Teacher, TokenStudent, TokenTeacher
from esvit import CrossEntropy, DINOHead, EsViT, Network, Outputs, pair_weights
from images.augment import IMAGENET_MEAN, IMAGENET_STD, normalize, random_flip
from images.datasets import describe, open_dataset
from images.mixing import erase
from images.randaugment import AugmentedCrops
from mae import MAE, RECIPES
from moco_v3 import MoCo, two_views
from more.bootmae import RECIPES as BOOTMAE
from more.bootmae import BootMAE
from more.hiera_mae import RECIPES as HIERA_MAE
from more.hiera_mae import HieraMAE
from more.simmim import SimMIM
from nets.chunk_attention import ChunkAttention
from nets.heads import accuracies, knn_counts, sweep
from nets.hiera import HIERAS, Hiera
from nets.hog import hog
from nets.masks import Masks
from nets.naming import PYRAMIDS
from runtime.options import fail
from runtime.run import DTYPES, decay_groups, finite_step, launch, setup
from runtime.windows import slide
from tools import pack
from tools.analyze import cka_of, gram, hsic, tokens_of
from vit import MODELS, SWINS, Swin, ViT
from weights.timm_vit import save_random_timm_vit

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
import textbook_steps  # noqa: E402
from textbook import TextbookViews, textbook_hog  # noqa: E402

CPU, KINDS = torch.device("cpu"), ("textbook", "ours")

# ----------------------------------------------------------------------------------------------------------------
# Timing in turns, rows and tables


def machine():
    """A name for files and tables: the GPU if there is one, else the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    facts = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    names = re.findall(r"model name\s*: (.*)", facts) or [platform.processor()]
    return f"{names[0]}, {os.cpu_count()} cores"


def now(device):
    """The time in seconds, once the device has done all that it was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def stopwatch(call, device):
    """Call a function -> the seconds that it took, and what it returned."""
    began, result = now(device), call()
    return now(device) - began, result


def in_turns(calls, count, device, warm=2, measure=stopwatch):
    """Measure each of {name: function} `count` times, in turns, after `warm` rounds that do not count (caches fill, and
    compilers work) -> {name: seconds}, and {name: what it returned in the last of these rounds, or in the only one}."""
    spent, found = {name: [] for name in calls}, {}
    for turn in range(warm + count):
        for name, call in calls.items():
            seconds, result = measure(call, device)
            if turn < max(warm, 1):
                found[name] = result
            if turn >= warm:
                spent[name].append(seconds)
    return spent, found


def make_row(spent, images=None, ours="ours", textbook="textbook", **facts):
    """A row of a table: the facts; for each name of `spent` the median, in images per second if a call treats `images`,
    else in seconds; the textbook's time over ours of each turn, sorted, and the median of these ratios."""
    row = dict(facts)
    for name, seconds in spent.items():
        median = statistics.median(seconds)
        row |= {f"img_s_{name}": round(images / median, 1)} if images else {f"seconds_{name}": round(median, 4)}
    row["ratios"] = sorted(round(t / o, 3) for t, o in zip(spent[textbook], spent[ours]))
    row["ratio"] = round(statistics.median(row["ratios"]), 3)
    return row


def cell(value):
    if isinstance(value, list):                                 # ratios: the median, the lowest, the highest
        return f"**{statistics.median(value):.2f}** ({value[0]:.2f}-{value[-1]:.2f})"
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return str(value)


def print_table(rows):
    """Print rows as they come, as the lines of a table -> a list of them."""
    kept = []
    for row in rows:
        shown = {name: cell(value) for name, value in row.items() if name != "ratio"}   # it stands among the ratios
        if not kept:
            print(f"| {' | '.join(shown)} |\n{'|---' * len(shown)}|")
        print(f"| {' | '.join(shown.values())} |", flush=True)
        kept.append(row)
    return kept


def matmul_peak(device, dtype):
    """What this machine reaches on a large square product, in GFLOP/s: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n ** 3 / min(stopwatch(lambda: a @ a, device)[0] for _ in range(10)) / 1e9


# ----------------------------------------------------------------------------------------------------------------
# Steps. A function for each method builds our network, from which the textbook's gets its numbers.


@dataclass
class Case:
    """What is measured: a step of a row, by ours or by the textbook. A child process gets it as JSON."""
    row: str
    model: str
    batch: int = 2
    kind: str = "ours"
    dtype: str = "fp32"
    compiled: bool = False
    prototypes: int = 0                                         # of EsViT
    teacher: str = ""                                           # of D-MAE, its file


def mae_case(case, device):
    """MAE, or with a teacher D-MAE -> the network, a function inputs -> loss, and fixed inputs."""
    decoder = {name: RECIPES[case.model][name] for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    model = MAE(**decoder, **MODELS[case.model])
    patches = model.patches
    if case.teacher:
        run = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device, cfg=case)
        model = DistilledMAE(model, Teacher(case.teacher, None, "attention", None, model.config, model.depth, run))
    model = model.to(device)
    torch.manual_seed(1)
    inputs = torch.randn(case.batch, 3, 224, 224, device=device), torch.rand(case.batch, patches, device=device)
    return model, lambda img, noise: model(img, noise.argsort(1)), inputs


def moco_case(case, device):
    """MoCo v3, see mae_case, on two views of each image."""
    model = MoCo(ViT(**MODELS[case.model], positions="sincos_yx")).to(device)
    torch.manual_seed(1)
    return model, lambda views: model(views, 0.99)[0], (torch.randn(2 * case.batch, 3, 224, 224, device=device),)


def esvit_network(case, device, swin, **head):
    return EsViT(*(Network(Swin(**SWINS[swin]), case.prototypes, unit=False, **head) for _ in range(2))).to(device)


def esvit_case(case, device):
    """EsViT with Swin-T, see mae_case, on 2 x 224 + 8 x 96 pixels. The teacher follows at the beginning of a step."""
    model, finite = esvit_network(case, device, "swin_tiny"), torch.zeros((), device=device)
    torch.manual_seed(1)
    images = [torch.randn(n, case.batch, 3, side, side, device=device) for n, side in ((2, 224), (8, 96))]

    def loss_of(images):
        model.update_ema(0.996)
        loss, found = model(images, 0.04, True)
        model.update_center(found["means"], finite)
        return loss
    return model, loss_of, (images,)


def hiera_case(case, device):
    """The MAE of hiera_lite, see mae_case."""
    options = {name: HIERA_MAE["hiera_lite"][name] for name in
               ("decoder_dim", "decoder_depth", "decoder_heads", "mask_ratio")}
    model = HieraMAE(**options, **HIERAS["hiera_lite"]).to(device)
    torch.manual_seed(1)
    inputs = torch.randn(case.batch, 3, 224, 224, device=device), torch.rand(case.batch, model.units, device=device)
    return model, lambda img, noise: model(img, noise.argsort(1)), inputs


def bootmae_case(case, device):
    """BootMAE, see mae_case, on fixed orders of the patches. The average follows at the beginning of a step."""
    model = BootMAE(BOOTMAE[case.model]["decoder_dim"], **MODELS[case.model]).to(device)
    torch.manual_seed(1)
    inputs = torch.randn(case.batch, 3, 224, 224, device=device), model.random_order(case.batch, device)

    def loss_of(img, order):
        model.update_ema(0.999)
        return sum(model(img, order))
    return model, loss_of, inputs


def simmim_case(case, device):
    """SimMIM or MaskFeat on a ViT, see mae_case, on images, masks and 8-bit images, whose HOG is part of the step."""
    target, mask, ratio, unit = "pixels", "uniform", 0.6, 32
    if case.row == "maskfeat":
        target, mask, ratio, unit = ("hog", "blocks", 0.4, 16)
    model = SimMIM(ViT(**MODELS[case.model], positions="learned"), target).to(device)
    masks = Masks(mask, model.patches, 16, unit, ratio)
    model.most = masks.cells
    torch.manual_seed(1)
    crops = torch.randint(256, (case.batch, 3, 224, 224), dtype=torch.uint8)
    inputs = normalize(crops, IMAGENET_MEAN, IMAGENET_STD), masks.draw(case.batch), crops
    return model, lambda img, mask, crops: model(img, mask, model.ask(crops, img)), [x.to(device) for x in inputs]


NETWORKS = dict(step=mae_case, distill=mae_case, moco=moco_case, esvit=esvit_case, bootmae=bootmae_case,
                simmim=simmim_case, maskfeat=simmim_case, hiera=hiera_case)


class Step:
    """One optimizer step of ours: a function of images, or else on the fixed inputs."""

    def __init__(self, case, model, loss_of, inputs, device):
        self.model, self.loss_of, self.inputs = model, loss_of, inputs
        self.clip = 3.0 if case.row == "esvit" else None
        if case.compiled:
            model.compile(dynamic=False)
        self.autocast = partial(torch.autocast, device.type, DTYPES[case.dtype], enabled=case.dtype != "fp32")
        self.optimizer = torch.optim.AdamW(decay_groups(model, 0.05), 1e-4, betas=(0.9, 0.95), fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "fp16")

    def __call__(self, img=None):
        inputs = self.inputs if img is None else (img, *self.inputs[1:])
        with self.autocast():
            loss = self.loss_of(*inputs)
        self.scaler.scale(loss).backward()
        finite_step(self.optimizer, self.scaler, self.clip, per_tensor=True)
        self.optimizer.zero_grad()
        return loss.detach()


def esvit_loss_step(case, device):
    """Forward and backward of EsViT's losses alone, as a function: from fixed features of Swin-T's 2 x 49 + 8 x 9
    regions, and fixed vectors before the prototypes."""
    model = esvit_network(case, device, "swin_mini", hidden=8)
    torch.manual_seed(1)
    student, teacher = (Outputs(*textbook_steps.esvit_outputs(layout, case.batch, device), layout)
                        for layout in (((2, 49), (8, 9)), ((2, 49),)))
    student.z.requires_grad_(), student.z_regions.requires_grad_()
    ours, loss_of = model, lambda: ours.losses(student, teacher, 0.04)[0]
    if case.kind == "textbook":
        model, loss_of = textbook_steps.esvit_losses(case, ours, student, teacher, device)

    def step():
        loss = loss_of()
        loss.backward()
        model.zero_grad()
        student.z.grad = student.z_regions.grad = None
        return loss.detach()
    return step


def cka_step(case, device):
    """CKA of all layers of two networks on one batch, as a function; row cka-gram: from given features."""
    nets = [ViT(**MODELS[case.model]).eval().requires_grad_(False).to(device) for _ in range(2)]
    img = torch.randn(case.batch, 3, 7, 7, device=device).repeat_interleave(32, 2).repeat_interleave(32, 3)
    features = [tokens_of(net, img) for net in nets] if case.row == "cka-gram" else None
    if case.kind == "textbook":
        return textbook_steps.cka_step(nets, img, features)

    def step():
        grams = [torch.stack([gram(x) for x in layers]) for layers in features or (tokens_of(net, img) for net in nets)]
        both = torch.cat(grams).cpu().double()
        return cka_of(hsic(both, both), len(grams[0]))
    return step


def make_step(case, device):
    """The step of a case, as a function. What is random in it is the same for ours and for the textbook's."""
    torch.manual_seed(0)
    if case.row not in NETWORKS:
        return esvit_loss_step(case, device) if case.row == "esvit-loss" else cka_step(case, device)
    model, loss_of, inputs = NETWORKS[case.row](case, device)
    if case.kind == "textbook":
        return textbook_steps.TextbookStep(case, model, inputs, device)
    return Step(case, model, loss_of, inputs, device)


# ----------------------------------------------------------------------------------------------------------------
# What a step costs, and rows of steps


def gflop(case):
    """Forward and backward of one image, in GFLOP; attention counted as its matrix products."""
    step = make_step(case, CPU)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step.loss_of(*step.inputs).backward()
    return counter.get_total_flops() / case.batch / 1e9


def memory(case, cfg):
    """Peak memory of two steps in MB: on a GPU all of it; on a CPU what they add, in a process of their own."""
    if cfg.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step = make_step(case, cfg.device)
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6)
    # glibc is told to give freed memory back at once: what it would keep depends on luck, not on the step.
    at_once = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    command = [sys.executable, "-m", "tools.bench", "--memory", json.dumps(asdict(case)), "--threads", str(cfg.threads)]
    done = subprocess.run(command, env=os.environ | at_once, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        fail(done.stderr)
    return round(float(done.stdout.split()[-1]))


def measure_memory(case):
    """The child of `memory`: print how far two steps raised this process's peak, in MB (Linux)."""
    def resident(kind):                                         # getrusage would give the peak of the parent, too
        return int(re.search(kind + r":\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e3

    step = make_step(case, CPU)
    Path("/proc/self/clear_refs").write_text("5")               # forget the peak of building and reading
    before = resident("VmRSS")
    step(), step()
    print(resident("VmHWM") - before)


def compare(cfg, case, modes, gflops):
    """A row: ours against the textbook's. modes: of each (dtype, compiled); gflops: of each, for an image. First both
    must have computed the same."""
    torch._dynamo.reset()                                       # so that each row compiles for its own shapes
    cases = {kind: replace(case, kind=kind, dtype=dtype, compiled=on) for kind, (dtype, on) in modes.items()}
    calls = {kind: make_step(one, cfg.device) for kind, one in cases.items()}
    if case.teacher:                                            # its share of our step is measured, too
        (img, _), both = calls["ours"].inputs, calls["ours"].model
        keep = torch.arange(both.model.visible, device=cfg.device).expand(case.batch, -1)
        ask = torch.compile(both.teacher.__call__, dynamic=False) if cases["ours"].compiled else both.teacher
        calls["teacher"] = lambda: ask(img, keep)
    spent, found = in_turns(calls, cfg.pairs, cfg.device)
    rtol, atol = (0.0, 0.02) if case.row.startswith("cka") else (0.02, 0.0)     # of CKA, which is between 0 and 1
    torch.testing.assert_close(found["ours"], found["textbook"], rtol=rtol, atol=atol)
    calls = both = ask = None                                   # their memory is not to be measured
    how = {kind: f"{one.dtype} {'compiled' if one.compiled else 'eager'}" for kind, one in cases.items()}
    row = dict(row=case.row, batch=case.batch, prototypes=case.prototypes, **how) | make_row(spent, case.batch)
    for kind, one in cases.items():
        row[f"memory_mb_{kind}"] = memory(one, cfg)
        if gflops:
            row[f"peak_share_{kind}"] = round(row[f"img_s_{kind}"] * gflops[kind] / cfg.peak[one.dtype], 3)
    return dict(row, memory_ratio=round(row["memory_mb_ours"] / max(1, row["memory_mb_textbook"]), 3))


# Images per step on a CPU and on a GPU; numbers of prototypes. 1,152 images are 9 batches of CKA.
PLANS = {"step": ((16, 64, 256), (256, 1024), [0]), "distill": ((16, 64), (256, 1024), [0]),
         "moco": ((16, 64), (256, 1024), [0]), "esvit": ((2, 4), (32,), [65536]),
         "bootmae": ((16, 64), (256, 1024), [0]),
         "simmim": ((16, 64), (256, 1024), [0]), "maskfeat": ((16, 64), (256, 1024), [0]),
         "hiera": ((16, 64), (256, 1024), [0]),
         "esvit-loss": ((8,), (32,), [4096, 16384, 65536]), "cka-gram": ((128,), (128,), [0]),
         "cka": ((128,), (128,), [0])}


def step_rows(cfg, name):
    """The rows of one of PLANS. On a GPU the textbook is the official mode, eager in fp16."""
    plain, teacher, gflops = ("fp32", False), "", None
    if name == "distill":
        teacher = os.path.join(cfg.folder, "base.pth")
        torch.save(dict(model=ViT(**MODELS["vit_base"]).state_dict()), teacher)
    on_cpu, on_gpu, prototypes = PLANS[name]
    batches, modes = cfg.batch or (on_gpu if cfg.gpu else on_cpu), [(plain, plain)]
    if cfg.gpu and not name.startswith("cka"):
        modes = [(("bf16", True), ("fp16", False))]
        if name in ("step", "distill", "moco"):
            modes += [(("bf16", False), ("fp16", False)), (("bf16", True), ("bf16", True))]
    todo = list(itertools.product(modes, batches, prototypes))
    if name == "step" and not cfg.gpu:
        middle = batches[len(batches) // 2]
        todo += [((mode, mode), middle, 0) for mode in (("fp32", True), ("bf16", False), ("bf16", True))]
    case = Case(name, cfg.model, prototypes=prototypes[0], teacher=teacher)
    if name in NETWORKS:
        gflops = {kind: gflop(replace(case, kind=kind)) for kind in KINDS}
        print(f"GFLOP per image, forward and backward: {gflops['ours']:.2f} ours, {gflops['textbook']:.2f} textbook")
    for (ours, theirs), batch, K in todo:
        yield compare(cfg, replace(case, batch=batch, prototypes=K), dict(textbook=theirs, ours=ours), gflops)


def tokens_rows(cfg, name="vit_small_patch14_reg4_dinov2"):
    """A step that learns the final tokens of a ViT-S/14, and its two parts: the teacher's forward on images of 196
    pixels, and the student's step without a teacher."""
    file = os.path.join(cfg.folder, "teacher.pth")
    save_random_timm_vit(name, file)
    for batch in cfg.batch or ((256,) if cfg.gpu else (16, 64)):
        case = Case("tokens", cfg.model, batch, dtype="bf16" if cfg.gpu else "fp32", compiled=cfg.gpu)
        run = SimpleNamespace(mean=IMAGENET_MEAN, std=IMAGENET_STD, device=cfg.device, cfg=case)
        vit, student = (ViT(**MODELS[cfg.model]).to(cfg.device) for _ in range(2))
        teacher = TokenTeacher(f"timm:{name}", file, None, vit.grid, run)
        model, img = TokenStudent(vit, teacher).to(cfg.device), torch.randn(batch, 3, 224, 224, device=cfg.device)
        alone = Step(case, student, lambda img, vit=student: vit.encode(img).square().mean(), (img,), cfg.device)
        calls = dict(teacher=partial(teacher, img), student=alone, ours=Step(case, model, model, (img,), cfg.device))
        spent, _ = in_turns(calls, cfg.pairs, cfg.device)
        spent["parts"] = [a + b for a, b in zip(spent["teacher"], spent["student"])]
        yield make_row(spent, batch, textbook="parts", batch=batch)


@torch.no_grad()
def networks_rows(cfg):
    """Features of images of 224 pixels, without gradients, by lightweight networks; the ratio is ViT-Tiny's time over
    Hiera's."""
    for batch in cfg.batch or ((256,) if cfg.gpu else (16,)):
        img = torch.randn(batch, 3, 224, 224, device=cfg.device)
        nets = dict(vit_tiny=ViT(**MODELS["vit_tiny"]), swin_lite=Swin(**SWINS["swin_lite"]),
                    hiera_lite=Hiera(**HIERAS["hiera_lite"]))
        calls = {name: partial(net.eval().to(cfg.device), img) for name, net in nets.items()}
        spent, _ = in_turns(calls, cfg.pairs, cfg.device)
        yield make_row(spent, batch, ours="hiera_lite", textbook="vit_tiny", batch=batch)


# ----------------------------------------------------------------------------------------------------------------
# Rows of input and of frozen features


def lightly_rows(cfg, K=16384, batch=8, views=10, dim=768):
    """DINO's head and loss on 2 + 8 crops of 8 images, forward and backward: against lightly's with all crops stacked
    in one call of the head, and one crop at a time, as its documentation has it."""
    heads = [DINOHead(dim, K, unit=False) for _ in range(2)]
    x, y = torch.randn(batch, views, dim), torch.randn(batch, 2, dim)
    calls = textbook_steps.lightly_dino(heads, x, y, K)
    if calls is None:
        print("lightly is not installed (pip install lightly): this row is left out")
        return
    weights = pair_weights(((2, 1), (8, 1)), CPU)[0].expand(batch, -1, -1) / batch

    def ours():
        with torch.no_grad():
            z, theirs = heads[1].bottleneck(y), heads[1].prototypes()
        loss = CrossEntropy.apply(heads[0].bottleneck(x), heads[0].prototypes(), z, theirs, torch.zeros(1, K),
                                  (0.1, 0.04), weights)
        loss.backward()
        heads[0].zero_grad()
        return loss.detach()
    spent, found = in_turns(dict(calls, ours=ours), cfg.pairs, CPU)
    for name in calls:
        torch.testing.assert_close(found["ours"], found[name], rtol=1e-4, atol=1e-4)
        yield make_row({k: spent[k] for k in (name, "ours")}, textbook=name, prototypes=K, batch=batch, lightly=name)


def backbones_rows(cfg):
    """Forward of images of 224 pixels in evaluation, each network in turns with Swin-T; the ratio is of images/s."""
    batch = (cfg.batch or [64 if cfg.gpu else 4])[0]
    img = torch.randn(batch, 3, 224, 224, device=cfg.device)
    nets = {name: PYRAMIDS[name][0](**PYRAMIDS[name][1]) for name in ("swin_tiny", "vil_tiny", "cvt_tiny")}
    nets["deit_small"] = ViT(**MODELS["vit_small"] | dict(heads=6))
    nets = {name: net.eval().requires_grad_(False).to(cfg.device) for name, net in nets.items()}
    for name, net in nets.items():
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            net(img[:1])
        calls = dict(swin=partial(nets["swin_tiny"], img), ours=partial(net, img))
        spent, _ = in_turns(calls, cfg.pairs, cfg.device)
        yield make_row(spent, batch, textbook="swin", network=name, gflop=round(counter.get_total_flops() / 2e9, 2),
                       million=round(sum(p.numel() for p in net.parameters()) / 1e6, 2))


def chunks_rows(cfg):
    """ViL's sparse attention, forward and backward, against nine shifted maps (tests/textbook_steps.py): with all
    chunks, and as its training has it, with two."""
    for mode, (dim, side, batch) in itertools.product((0, 1), ((96, 56, 2), (192, 28, 4), (96, 24, 8))):
        attn = ChunkAttention(dim, dim // 32, 1, 7, True, mode, 0, True).to(cfg.device)
        x = torch.randn(batch, 1 + side ** 2, dim, device=cfg.device, requires_grad=True)

        def step(form, x=x, side=side):
            torch.manual_seed(0)                                # both draw the same chunk
            out = form(x, (side, side))
            out.square().sum().backward()
            return out.detach()
        calls = dict(textbook=partial(step, partial(textbook_steps.shifted_chunks, attn)), ours=partial(step, attn))
        spent, found = in_turns(calls, cfg.pairs, cfg.device)
        torch.testing.assert_close(found["ours"], found["textbook"], rtol=1e-3, atol=1e-4)
        yield make_row(spent, batch, dim=dim, map=side, mode=mode, batch=batch)


def views_rows(cfg, count=256, size=224):
    """Both views of 256 images from uint8 crops, ours in one call, the textbook's from Pillow images."""
    crops, images = textbook_steps.made_crops(2 * count, size)
    pairs, plain = list(zip(images[::2], images[1::2])), TextbookViews()
    calls = dict(ours=lambda: two_views(crops.to(cfg.device), IMAGENET_MEAN, IMAGENET_STD),
                 textbook=lambda: plain(pairs))
    spent, _ = in_turns(calls, cfg.pairs, cfg.device, warm=1)
    yield make_row(spent, count, crops=2 * count, size=size)


def hog_rows(cfg, count=64, size=224):
    """Histograms of 64 colour images: ours in one call, the textbook's channel by channel."""
    crops = textbook_steps.made_crops(count, size)[0]
    plain = dict(loop=lambda: textbook_hog(crops.to(cfg.device).float()))
    if find_spec("skimage"):
        plain["scikit-image"] = partial(textbook_steps.scikit_image_hog, crops)
    for name, textbook in plain.items():
        calls = dict(ours=lambda: hog(crops.to(cfg.device).float()), textbook=textbook)
        yield make_row(in_turns(calls, cfg.pairs, cfg.device, warm=1)[0], count, textbook_is=name)


def index_rows(cfg, entries=1_281_000):
    """Seconds to open a tar of one-pixel images in classes of 1,281, without and with its index."""
    path = os.path.join(cfg.folder, "big.tar")
    textbook_steps.write_tar(path, entries)
    for how in ("gone through", "from its index"):
        seconds, source = stopwatch(lambda: open_dataset(path), CPU)
        yield dict(entries=len(source), how=how, seconds=round(seconds, 3))


def batches_of(kind, source, batch, count, workers, device):
    """Yield `count` normalised float batches on the device. kind: ours or textbook, for pre-training; augmented or
    timm, as fine-tuning's recipes want them."""
    order = torch.randperm(count * batch, generator=torch.Generator().manual_seed(0)) % len(source)
    if kind in ("textbook", "timm"):
        yield from textbook_steps.batches(kind, source, batch, order.tolist(), workers, device)
        return
    how = source, (224, 224), 3, 0, (0.08, 1.0), "bicubic"
    crops = data.RandomCrops(*how) if kind == "ours" else AugmentedCrops(*how, 9, (124, 116, 104))
    plan = [[(0, i) for i in part] for part in order.view(count, batch).tolist()]
    for img, _, failed in data.load(crops, plan, workers, device.type == "cuda"):
        assert not failed, failed
        img = normalize(random_flip(img.to(device, non_blocking=True)), IMAGENET_MEAN, IMAGENET_STD)
        yield img if kind == "ours" else erase(img, 0.25)


def drain(call, device, skip, count, use=None):
    """Take `count` of the batches that a function yields, and `use` each, after `skip` in which workers start -> the
    seconds that they took, and how many of these went by in waiting for a batch."""
    batches = call()
    for number in range(skip + count):
        if number == skip:
            began, waited = now(device), 0.0
        asked = time.perf_counter()
        img = next(batches)
        if number >= skip:
            waited += time.perf_counter() - asked
        if use:
            use(img)
    return now(device) - began, waited


def input_rows(cfg, kinds=("ours", "textbook"), workers=None, crossed=True):
    """Images per second with each decoder that is here: ours and theirs from originals and packed, each with each."""
    batch, best = (cfg.batch or [64])[0], data.decode_jpeg
    for some, *names in itertools.product(workers or cfg.workers, cfg.sources, cfg.sources):
        skip, count = 2 * some + 1, 12 * some or 8
        for data.decode_jpeg in dict.fromkeys([best, None]) if crossed or names[0] == names[1] else ():
            calls = {kind: partial(batches_of, kind, cfg.sources[name], batch, skip + count, some, cfg.device)
                     for kind, name in zip(kinds, names)}
            spent, _ = in_turns(calls, cfg.pairs // 2 + 1, cfg.device, 0, partial(drain, skip=skip, count=count))
            package = "torchcodec" if data.decode_jpeg else "Pillow"
            row = make_row(spent, batch * count, *kinds, workers=some, decoder=f"{package} {version(package)}")
            yield dict(zip(kinds, names)) | row
        data.decode_jpeg = best


def both_rows(cfg):
    """MAE's step fed by the input path: images per second, and the share of the time that is waiting."""
    batch, count, workers = (512, 60, cfg.workers[-1]) if cfg.gpu else (64, 8, 1)
    batch, modes = (cfg.batch or [batch])[0], dict.fromkeys(KINDS, ("fp32", False))
    if cfg.gpu:
        modes = dict(ours=("bf16", True), textbook=("fp16", False))
    for name, source in cfg.sources.items():
        spent, waiting = {}, {}
        for kind, images in (("ours", source), ("textbook", cfg.sources["originals"])):
            step = make_step(Case("step", cfg.model, batch, kind, *modes[kind]), cfg.device)
            batches = partial(batches_of, kind, images, batch, count + 3, workers, cfg.device)
            seconds, waited = drain(batches, cfg.device, 3, count, step)
            spent[kind], waiting[f"waiting_{kind}"] = [seconds], round(waited / seconds, 3)
        yield make_row(spent, batch * count, source=name, batch=batch, workers=workers, **waiting)


def segment_rows(cfg, window=224, stride=149):
    """Logits of one image of 448 x 600 pixels by 12 windows: ViT-Tiny with Semantic-FPN, 150 classes. The second row is
    against our own windows one after the other."""
    model = Segmenter(ViT(**MODELS["vit_tiny"], img_size=window), 150).to(cfg.device).eval()
    img = torch.randn(1, 3, 448, 600, device=cfg.device)
    ours = partial(slide, model.logits, img, (window, window), (stride, stride))
    others = {"mmsegmentation's": partial(textbook_steps.slide, model.logits, img, window, stride, 150),
              "each alone": partial(ours, batch=1)}
    for name, other in others.items():
        with torch.no_grad():
            spent, found = in_turns(dict(textbook=other, ours=ours), cfg.pairs, cfg.device)
        torch.testing.assert_close(found["ours"], found["textbook"], rtol=1e-3, atol=1e-3)
        yield make_row(spent, images=1, against=name, window=window, stride=stride)


def knn_rows(cfg, count=50_000, tests=5_000, dim=384, classes=10):
    """The k-NN accuracy of 5,000 features among 50,000, for several k and for one."""
    x, y = textbook_steps.blobs(count + tests, dim, classes, cfg.device)
    sets = x[:count], y[:count], x[count:], y[count:]
    for ks in ((10, 20, 100, 200), (10,), (200,)):
        def ours(ks=ks):
            return [accuracies(counts)["test_acc1"] for counts in knn_counts(*sets, ks, classes).values()]

        def plain(ks=ks):
            return [textbook_steps.knn(*sets, k, classes) for k in ks]

        spent, found = in_turns(dict(textbook=plain, ours=ours), max(1, cfg.pairs // 2), cfg.device, warm=1)
        assert max(abs(o - t) for o, t in zip(*found.values())) < 0.05, found
        yield make_row(spent, k=" ".join(map(str, ks)))


def sweep_rows(cfg, count=10_000, dim=192, classes=10, epochs=20):
    """Twenty learning rates on kept features: how much longer than one rate, and than one head trained as usual."""
    x, y = textbook_steps.blobs(count + 2_000, dim, classes, cfg.device)
    sets, rates = (x[:count], y[:count], x[count:], y[count:]), [10 ** (-4 + i * 5 / 19) for i in range(20)]
    calls = dict(twenty=lambda: sweep(*sets, rates, classes, epochs),
                 one=lambda: sweep(*sets, rates[10:11], classes, epochs),
                 usual=lambda: textbook_steps.train_head(*sets[:2], classes, epochs))
    spent, _ = in_turns(calls, cfg.pairs, cfg.device, warm=1)
    for name in ("one", "usual"):
        yield make_row(spent, ours=name, textbook="twenty", twenty_over=name)


# ----------------------------------------------------------------------------------------------------------------

ROWS = {**{name: partial(step_rows, name=name) for name in PLANS}, "tokens": tokens_rows, "views": views_rows,
        "dino-lightly": lightly_rows, "backbones": backbones_rows, "chunks": chunks_rows, "hog": hog_rows,
        "segment": segment_rows, "knn": knn_rows, "sweep": sweep_rows, "index": index_rows, "input": input_rows,
        "both": both_rows, "networks": networks_rows,
        "augment": partial(input_rows, kinds=("augmented", "timm"), workers=[0], crossed=False)}
OF_IMAGES = ("input", "both", "augment")                        # these need --data


def write(folder, facts, rows):
    """Write the rows into the day's file, where other rows of the same day stay."""
    os.makedirs(folder, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["machine"]).strip("-")
    path = Path(folder, f"bench-{facts['date']}-{name}.json")
    if path.exists():
        old = json.loads(path.read_text())
        facts = old | facts | dict(command=f"{old['command']}; {facts['command']}")
    path.write_text(json.dumps(dict(facts, **rows), indent=1))
    print(f"wrote {path}")


def command_line(argv):
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=f"{', '.join(ROWS)} [all but index; with --data the last 3, too]")
    parser.add_argument("--data", help="images for input, both and augment: some thousand at most")
    parser.add_argument("--out", default="results", help="folder of the table [results]")
    parser.add_argument("--workers", type=int, nargs="+", help="decoding processes [1 2; 16 on a GPU machine]")
    parser.add_argument("--model", default="vit_tiny", choices=[m for m in MODELS if MODELS[m]["patch_size"] > 4])
    parser.add_argument("--batch", type=int, nargs="+", help="images per step [of each row its own]")
    parser.add_argument("--pairs", type=int, default=7, help="how often each step is timed [7]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--memory", type=json.loads, help=argparse.SUPPRESS)
    cfg = parser.parse_args(argv)
    cfg.rows = cfg.rows or [name for name in ROWS if name != "index" and (cfg.data or name not in OF_IMAGES)]
    for name in cfg.rows:
        if name not in ROWS:
            fail(f"tools.bench: {name} is not one of {', '.join(ROWS)}")
        if name in OF_IMAGES and not cfg.data:
            fail(f"tools.bench: {name} needs --data, some hundred images or more")
    if {"cka", "cka-gram"} & {*cfg.rows} and min(cfg.batch or [4]) < 4:
        fail("tools.bench: CKA needs --batch 4 or more")
    return cfg


def main(argv=None):
    cfg = command_line(argv)
    _, _, cfg.device = setup(cfg.device)
    torch.set_num_threads(cfg.threads)                          # setup has changed it
    if cfg.memory:
        return measure_memory(Case(**cfg.memory))
    cfg.gpu = cfg.device.type == "cuda"
    cfg.workers = cfg.workers or ([16] if cfg.gpu else [1, 2])
    cfg.peak = {name: matmul_peak(cfg.device, DTYPES[name]) for name in DTYPES if cfg.gpu or name != "fp16"}
    facts = dict(date=str(datetime.date.today()), machine=machine(), torch=str(torch.__version__), threads=cfg.threads,
                 model=cfg.model, command=" ".join(sys.argv), matmul_peak_gflop_s=cfg.peak)
    print(json.dumps(facts, indent=1))
    with tempfile.TemporaryDirectory() as cfg.folder:
        if cfg.data:
            original, packed = open_dataset(cfg.data), os.path.join(cfg.folder, "packed.tar")
            facts["images"] = describe(original)
            if len(original) > 20_000:
                fail(f"{facts['images']}: they are packed first, so give some thousand of them at most")
            pack.command_line(["pack", cfg.data, packed])
            cfg.sources = dict(originals=original, packed=open_dataset(packed))
        rows = {}
        for name in cfg.rows:
            print(f"\n{name}")
            rows[name] = print_table(ROWS[name](cfg))
    write(cfg.out, facts, rows)


if __name__ == "__main__":
    launch(main)
