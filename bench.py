"""
Speed as ratios: a row times ours and the textbook's in the same process, in turns, and reports the median ratio.

python bench.py --data SET           every row that fits this machine; writes results/bench-DATE-MACHINE.json
python bench.py step                 the optimizer step alone, on fixed images
python bench.py distill              the same with a ViT-Base teacher (D-MAE)
python bench.py moco                 the same of MoCo v3, on fixed views
python bench.py esvit esvit-loss     EsViT's step, 2 x 224 + 8 x 96 pixels; its losses alone, at several K
python bench.py views                MoCo v3's two views of a batch of crops against Pillow and torchvision
python bench.py input --data TAR     files to normalised float batches, alone: from the files as they are, and packed
python bench.py knn sweep            k-NN for four k at once; 20 linear heads at once
python bench.py cka                  CKA of all layers of two ViT-Tiny, 128 images at a time
python bench.py index                a tar of 1,281,000 entries: gone through once, then opened from its index
python bench.py both --data TAR      step and input together: how much of a step waits for images
python bench.py augment --data SET   fine-tuning's input against timm's: RandAugment, erasing; one process, one core
The textbook (tests/textbook.py) is MAE from timm's blocks as the official code does it: embed all, decode all, predict
all, plain AdamW; on a GPU it runs as that code runs: eager, fp16 autocast, GradScaler, the loss read at every step. Its
input is Pillow's decoding, then torchvision's RandomResizedCrop (bicubic), flip, ToTensor, Normalize in a DataLoader.
"""
import argparse
import datetime
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import data
import training
from analyze import CKA, gram, layers_of
from augment import IMAGENET_MEAN, IMAGENET_STD, erase, normalize, random_flip
from distill import Lesson, Teacher
from esvit import EsViT, Network, Seen, clipped_step
from mae import MAE, RECIPES, Distilled
from moco_v3 import MoCo, two_views
from probe import accuracies, knn_counts, sweep
from randaugment import AugmentedCrops
from sources import describe, find
from vit import MODELS, SWINS, Swin, ViT

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
from textbook import (  # noqa: E402
    TextbookCKA,
    TextbookDistilled,
    TextbookEsViT,
    TextbookImages,
    TextbookMAE,
    TextbookMoCo,
    TextbookViews,
)


def machine():
    """A name for files and tables: the GPU if there is one, else the processor and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    names = re.findall(r"model name\s*: (.*)", open("/proc/cpuinfo").read()) if os.path.exists("/proc/cpuinfo") else []
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(kind, model, teacher, device, dtype, compiled=False):
    """The two MAEs of a preset, with the same numbers in them, or D-MAEs with the teacher of a file. Returns (module,
    images and noise -> loss, images and noise -> the teacher's signals)."""
    shape, r = MODELS[model], RECIPES[model]
    decoder = {k: r[k] for k in ("decoder_dim", "decoder_depth", "decoder_heads")}
    torch.manual_seed(0)
    ours = MAE(ViT(**shape), **decoder)
    if kind == "ours":
        if not teacher:
            return ours.to(device), lambda img, noise: ours(img, noise), None
        wise = Teacher(teacher, None, "attention", None, ours.config, IMAGENET_MEAN, IMAGENET_STD, device,
                       training.DTYPES[dtype], str)
        if compiled:
            wise.compile(dynamic=False)
        both = Distilled(ours, Lesson(ours.config, wise.shape, wise.pairs)).to(device)

        def order_of(img, noise):
            return ours.shuffle(img, noise)[0]

        def hear(img, order):
            return wise(img, order[:, :ours.visible])
        return (both, lambda img, noise: both(img, order := order_of(img, noise), hear(img, order)).sum(),
                lambda img, noise: hear(img, order_of(img, noise)))
    textbook = TextbookMAE(**shape, **decoder)
    textbook.load_state_dict(ours.state_dict())
    if not teacher:
        return textbook.to(device), lambda img, noise: textbook(img, noise)[0], None
    base = TextbookMAE(**MODELS["vit_base"]).to(device)
    base.load_state_dict(torch.load(teacher)["model"], strict=False)
    both = TextbookDistilled(textbook, base, shape["heads"], MODELS["vit_base"]["heads"]).to(device)
    return both, both, None


def build_moco(kind, model, device):
    """The two MoCos of a preset, with the same numbers in them: as `build`; noise is not used, and images are views."""
    torch.manual_seed(0)
    ours = MoCo(ViT(**MODELS[model], positions="sincos_yx"))
    if kind == "ours":
        return ours.to(device), lambda views, noise: ours(views, 0.99)[0], None
    textbook = TextbookMoCo(**MODELS[model])
    textbook.load_state_dict(ours.state_dict())
    return textbook.to(device), lambda views, noise: textbook(*views.chunk(2), 0.99), None


def make_step(kind, model, batch, device, dtype, compiled, teacher=None, moco=False):
    """One optimizer step as a function, of images or else on fixed random ones; of MoCo, on two views of each."""
    module, loss_of, hear = build_moco(kind, model, device) if moco else build(kind, model, teacher, device, dtype,
                                                                               compiled)
    if compiled:
        module.compile(dynamic=False)
    groups = training.decay_groups(module, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True if kind == "ours" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    size, patch = 224, MODELS[model]["patch_size"]
    torch.manual_seed(1)                                        # the same for both
    fixed = torch.randn(batch * (1 + moco), 3, size, size, device=device)
    if moco and kind != "ours":                                 # ours takes the two views of an image side by side
        fixed = torch.cat([fixed[::2], fixed[1::2]])
    noise = torch.rand(batch, (size // patch) ** 2, device=device)

    def step(img=fixed):
        with training.autocast(device, dtype):
            loss = loss_of(img, noise)
        scaler.scale(loss).backward()
        if kind == "ours":
            training.finite_step(optimizer, scaler)
        else:
            scaler.step(optimizer)
            scaler.update()
            loss.item()                                         # as the official code does, to look for NaN
        optimizer.zero_grad()
        return loss

    step.hear = lambda: hear(fixed, noise)
    return step


def gflop(kind, model, teacher=None, moco=False):
    """Forward and backward of one image, in GFLOP; attention counted as its matrix products."""
    cpu = torch.device("cpu")
    loss_of = (build_moco(kind, model, cpu) if moco else build(kind, model, teacher, cpu, "fp32"))[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        noise = torch.rand(2, (224 // MODELS[model]["patch_size"]) ** 2)
        loss_of(torch.randn(2 * (1 + moco), 3, 224, 224), noise).backward()
    return counter.get_total_flops() / 2e9


def matmul_peak(device, dtype):
    """What this machine reaches on a large square product, in GFLOP/s: the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a, best = torch.randn(n, n, device=device, dtype=dtype), 0
    for _ in range(10):
        synchronize(device)
        began = time.perf_counter()
        a @ a
        synchronize(device)
        best = max(best, 2 * n ** 3 / (time.perf_counter() - began) / 1e9)
    return best


def chosen_step(kind, a, batch, device, dtype, compiled):
    if a.cka:
        return cka_step(kind, a.model, batch, device)
    if a.esvit:
        return esvit_step(kind, *a.esvit, batch, device, dtype, compiled)
    return make_step(kind, a.model, batch, device, dtype, compiled, a.teacher, a.moco)


def memory(kind, a, dtype, compiled, batch):
    """Peak memory of training steps in MB: on a GPU all of it; on a CPU what they add, in a process of their own."""
    if a.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step = chosen_step(kind, a, batch, a.device, dtype, compiled)
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    args = ["--memory", kind, dtype, "compiled" if compiled else "eager", "--threads", str(a.threads),
            "--model", a.model, "--batch", str(batch), *(["--teacher", a.teacher] if a.teacher else []),
            *["--moco"] * a.moco, *["--cka"] * a.cka, *(["--esvit", *map(str, a.esvit)] if a.esvit else [])]
    # glibc is told to give freed memory back at once: what it would keep depends on luck, not on the step.
    at_once = dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    done = subprocess.run([sys.executable, __file__, *args], env=os.environ | at_once, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(done.stdout)


def resident(kind):
    """VmHWM, the peak, or VmRSS, now, in MB (Linux). getrusage would not do: a child inherits its parent's peak."""
    return int(re.search(kind + r":\s+(\d+)", open("/proc/self/status").read())[1]) / 1e3


def measure_memory(a):
    """The child of `memory`: prints how far two steps raised this process's peak."""
    torch.set_num_threads(a.threads)
    kind, dtype, compiled = a.memory
    cpu, compiled = torch.device("cpu"), compiled == "compiled"
    step = chosen_step(kind, a, a.batch[0], cpu, dtype, compiled)
    with open("/proc/self/clear_refs", "w") as f:               # forget the peak of building and reading
        f.write("5")
    before = resident("VmRSS")
    step(), step()
    print(resident("VmHWM") - before)


def row(a, batch, ours, textbook):
    """One comparison; ours and textbook are (dtype name, compiled)."""
    torch._dynamo.reset()                                       # so that each row compiles for its own shapes
    steps = {kind: make_step(kind, a.model, batch, a.device, dtype, compiled, a.teacher, a.moco)
             for kind, (dtype, compiled) in (("textbook", textbook), ("ours", ours))}
    times = {kind: [] for kind in steps}
    for _ in range(2):
        losses = [step().item() for step in steps.values()]     # the first is for caches and compilers
    assert abs(losses[0] - losses[1]) < 0.02 * losses[0], "the two steps do not compute the same"
    for _ in range(a.pairs):
        for kind, step in steps.items():
            synchronize(a.device)
            began = time.perf_counter()
            step()
            synchronize(a.device)
            times[kind].append(time.perf_counter() - began)
    if a.teacher:
        times["teacher"] = []
        for _ in range(a.pairs):
            began = time.perf_counter()
            steps["ours"].hear()
            synchronize(a.device)
            times["teacher"].append(time.perf_counter() - began)
    del steps, step
    result = dict(batch=batch, gflop=a.gflop, ours=f"{ours[0]} {'compiled' if ours[1] else 'eager'}",
                  textbook=f"{textbook[0]} {'compiled' if textbook[1] else 'eager'}",
                  ratios=sorted(round(t / o, 3) for t, o in zip(times["textbook"], times["ours"])))
    result["speed_ratio"] = round(statistics.median(result["ratios"]), 3)
    for kind, (dtype, compiled) in (("ours", ours), ("textbook", textbook)):
        rate = batch / statistics.median(times[kind])
        result[f"img_s_{kind}"] = round(rate, 1)
        result[f"peak_share_{kind}"] = round(rate * a.gflop[kind] / a.peak[dtype], 3)
        result[f"memory_mb_{kind}"] = round(memory(kind, a, dtype, compiled, batch))
    if a.teacher:
        result["teacher_share"] = round(statistics.median(times["teacher"]) / statistics.median(times["ours"]), 3)
    result["memory_ratio"] = round(result["memory_mb_ours"] / result["memory_mb_textbook"], 3)
    r = argparse.Namespace(**result)
    if a.teacher:
        print(f"the teacher's share of our next step: {r.teacher_share:.0%}")
    print(f"| {batch} | {r.ours} | {r.textbook} | {r.img_s_ours:.0f} / {r.img_s_textbook:.0f} "
          f"| **{r.speed_ratio:.2f}** ({r.ratios[0]:.2f}-{r.ratios[-1]:.2f}) | {r.memory_ratio:.2f} "
          f"| {r.peak_share_ours:.0%} / {r.peak_share_textbook:.0%} |", flush=True)
    return result


def step_rows(a):
    """The optimizer step of MAE, with a.teacher of D-MAE, with a.moco of MoCo v3."""
    a.gflop = {kind: gflop(kind, a.model, a.teacher, a.moco) for kind in ("ours", "textbook")}
    print(f"GFLOP per image, forward and backward: {a.gflop['ours']:.2f} ours, {a.gflop['textbook']:.2f} textbook")
    print("| batch | ours | textbook | images/s | ratio (lowest-highest) | memory | share of matmul peak |")
    print("|---" * 7 + "|")
    if a.device.type == "cuda":
        official = ("fp16", False)
        pairs = [(("bf16", True), official), (("bf16", False), official), (("bf16", True), ("bf16", True))]
        rows = [row(a, batch, *pair) for pair in pairs for batch in a.batch]
    else:
        middle = a.batch[len(a.batch) // 2]
        rows = [row(a, batch, ("fp32", False), ("fp32", False)) for batch in a.batch]
        if not a.teacher and not a.moco:
            rows += [row(a, middle, pair, pair) for pair in (("fp32", True), ("bf16", False), ("bf16", True))]
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Input


def views_rows(a, count=256, size=224):
    """Both views of 256 images from uint8 crops, ours in one call, the textbook's from Pillow images, in turns."""
    coarse = torch.nn.functional.interpolate(torch.rand(2 * count, 3, 28, 28) * 255, (size, size), mode="bicubic")
    crops = coarse.clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)       # as the workers send them
    images = [Image.fromarray(crop.numpy()) for crop in crops.permute(0, 2, 3, 1)]
    pairs, textbook, times = list(zip(images[::2], images[1::2])), TextbookViews(), dict(ours=[], textbook=[])
    for _ in range(a.pairs + 1):
        for kind, spent in times.items():
            synchronize(a.device)
            began = time.perf_counter()
            two_views(crops.to(a.device), IMAGENET_MEAN, IMAGENET_STD) if kind == "ours" else textbook(pairs)
            synchronize(a.device)
            spent.append(time.perf_counter() - began)
    times = {kind: spent[1:] for kind, spent in times.items()}
    ratios = sorted(round(t / o, 2) for o, t in zip(times["ours"], times["textbook"]))
    r = dict(images=count, size=size, ratios=ratios, ratio=statistics.median(ratios),
             img_s={kind: round(count / statistics.median(spent), 1) for kind, spent in times.items()})
    print(f"two views of an image: {r['img_s']['ours']:.0f} / {r['img_s']['textbook']:.0f} images/s, "
          f"**{r['ratio']:.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)
    return [r]


def index_rows(folder):
    """Seconds to open a tar of 1,000 classes x 1,281 one-pixel images without and with its index."""
    path, buffer, rows = os.path.join(folder, "big.tar"), io.BytesIO(), []
    Image.new("L", (1, 1)).save(buffer, "JPEG")
    body = buffer.getvalue() + bytes(-len(buffer.getvalue()) % 512)
    with open(path, "wb") as f:
        for k in range(1_281_000):
            info = tarfile.TarInfo(f"train/n{k // 1281:08}/{k}.JPEG")
            info.size = len(buffer.getvalue())
            f.write(info.tobuf(tarfile.USTAR_FORMAT) + body)
        f.write(bytes(1024))
    for how in ("gone through", "from its index"):
        began = time.perf_counter()
        count = len(find(path))
        rows.append(dict(entries=count, how=how, seconds=round(time.perf_counter() - began, 3)))
        print(f"| {count:,} | {how} | {rows[-1]['seconds']:.2f} s |", flush=True)
    return rows


def batches_of(kind, source, batch, count, workers, device):
    """Endless-looking normalised float batches on the device, `count` of them."""
    order = torch.randperm(count * batch, generator=torch.Generator().manual_seed(0)) % len(source)
    if kind == "textbook":
        for img, _ in torch.utils.data.DataLoader(TextbookImages(source), batch, sampler=order.tolist(), drop_last=True,
                                                  num_workers=workers, pin_memory=device.type == "cuda"):
            yield img.to(device, non_blocking=True)
        return
    crops = data.RandomCrops(source, (224, 224), 3, 0, (0.08, 1.0), "bicubic")
    plan = [[(0, i) for i in part] for part in order.view(count, batch).tolist()]
    for img, _, failed in data.load(crops, plan, workers, device.type == "cuda"):
        assert not failed, failed
        yield normalize(random_flip(img.to(device, non_blocking=True)), IMAGENET_MEAN, IMAGENET_STD)


def timed(batches, skip, device):
    """Images per second, after `skip` batches in which the workers start."""
    count = 0
    for i, img in enumerate(batches):
        if i == skip - 1:
            synchronize(device)
            began = time.perf_counter()
        elif i >= skip:
            count += len(img)
    synchronize(device)
    return count / (time.perf_counter() - began)


def input_rows(a, original, packed):
    """Ours from originals and packed, with each decoder, against the textbook from the originals and the packed."""
    rows, found = [], data.decode_jpeg
    print("| workers | ours | images/s | textbook, from originals | ratio (lowest-highest) | from packed | ratio |")
    print("|---" * 7 + "|")
    for workers in a.workers:
        skip = 2 * workers + 1
        for name, source in (("originals", original), ("packed", packed)):
            for decode_jpeg in ([found] if found else []) + [None]:
                data.decode_jpeg, rates = decode_jpeg, {}
                for _ in range(a.pairs // 2 + 1):
                    for key, kind, images in (("ours", "ours", source), ("originals", "textbook", original),
                                              ("packed", "textbook", packed)):
                        batches = batches_of(kind, images, 64, skip + 12 * workers, workers, a.device)
                        rates.setdefault(key, []).append(timed(batches, skip, a.device))
                r = dict(workers=workers, images=name, decoder=data.decoder(),
                         img_s={k: round(statistics.median(v), 1) for k, v in rates.items()})
                for k in ("originals", "packed"):
                    r[f"ratios_{k}"] = sorted(round(o / t, 2) for o, t in zip(rates["ours"], rates[k]))
                    r[f"ratio_{k}"] = statistics.median(r[f"ratios_{k}"])
                span = r["ratios_originals"]
                speed = [f"{r['img_s'][k]:.0f}" for k in ("ours", "originals", "packed")]
                print(f"| {workers} | {name}, {r['decoder']} | {speed[0]} | {speed[1]} | "
                      f"**{r['ratio_originals']:.2f}** ({span[0]:.2f}-{span[-1]:.2f}) | {speed[2]} | "
                      f"{r['ratio_packed']:.2f} |", flush=True)
                rows.append(r)
    data.decode_jpeg = found
    return rows


def both_rows(a, original, packed):
    """MAE's step fed by the input path: images per second, and the share of the time that is waiting."""
    rows, gpu = [], a.device.type == "cuda"
    batch, steps, workers = (512, 60, a.workers[-1]) if gpu else (64, 8, 1)
    print("| ours | images | images/s | waiting | textbook, from originals | waiting | ratio |\n" + "|---" * 7 + "|")
    for name, source in (("originals", original), ("packed", packed)):
        found = {}
        for kind, images, dtype in (("ours", source, "bf16" if gpu else "fp32"),
                                    ("textbook", original, "fp16" if gpu else "fp32")):
            step, waited, rates = make_step(kind, a.model, batch, a.device, dtype, gpu and kind == "ours"), 0.0, 0
            batches = batches_of(kind, images, batch, steps + 3, workers, a.device)
            for i in range(steps + 3):
                if i == 3:
                    synchronize(a.device)
                    began, waited = time.perf_counter(), 0.0
                asked = time.perf_counter()
                img = next(batches)
                waited += time.perf_counter() - asked
                step(img)
            synchronize(a.device)
            rates = time.perf_counter() - began
            found[kind] = dict(img_s=round(batch * steps / rates, 1), waiting=round(waited / rates, 3))
        ratio = round(found["ours"]["img_s"] / found["textbook"]["img_s"], 2)
        rows.append(dict(images=name, batch=batch, workers=workers, ratio=ratio, **found))
        print(f"| batch {batch}, {workers} workers | {name} | {found['ours']['img_s']:.0f} | "
              f"{found['ours']['waiting']:.0%} | {found['textbook']['img_s']:.0f} | {found['textbook']['waiting']:.0%} "
              f"| {ratio:.2f} |", flush=True)
    return rows


def finetuning_batches(kind, source, batch, count, device):
    """`count` normalised float batches as fine-tuning's recipes want them, all made in this process."""
    order = torch.randperm(count * batch, generator=torch.Generator().manual_seed(0)) % len(source)
    if kind == "timm":
        from timm.data import auto_augment, create_transform
        # Of levels that reach 10 timm wants 0 bits, for which Pillow 13 raises: it gets one.
        auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda img, n, **_: auto_augment.posterize(img, max(n, 1))
        images = TextbookImages(source)
        images.transform = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25,
                                            re_mode="pixel", re_count=1, interpolation="bicubic", hflip=0.5,
                                            color_jitter=None)
        for img, _ in torch.utils.data.DataLoader(images, batch, sampler=order.tolist()):
            yield img.to(device)
        return
    crops = AugmentedCrops(source, (224, 224), 3, 0, (0.08, 1.0), "bicubic", 9, (124, 116, 104))
    for img, _, failed in data.load(crops, [[(0, i) for i in part] for part in order.view(count, batch).tolist()], 0):
        assert not failed, failed
        yield erase(normalize(random_flip(img.to(device)), IMAGENET_MEAN, IMAGENET_STD), 0.25)


def augment_rows(a, original, packed):
    """Fine-tuning's input, ours against timm's from the same images, in turns: images per second of one process."""
    rows, found = [], data.decode_jpeg
    print("| images, our decoder | ours | timm | ratio (lowest-highest) |\n" + "|---" * 4 + "|")
    for name, source in (("originals", original), ("packed", packed)):
        for decode_jpeg in ([found] if found else []) + [None]:
            data.decode_jpeg, rates = decode_jpeg, dict(ours=[], timm=[])
            for _ in range(a.pairs // 2 + 1):
                for kind, rate in rates.items():
                    rate.append(timed(finetuning_batches(kind, source, 64, 9, a.device), 1, a.device))
            ratios = sorted(round(o / t, 2) for o, t in zip(rates["ours"], rates["timm"]))
            r = dict(images=name, decoder=data.decoder(), ratios=ratios, ratio=statistics.median(ratios),
                     img_s={k: round(statistics.median(v), 1) for k, v in rates.items()})
            print(f"| {name}, {r['decoder']} | {r['img_s']['ours']:.0f} | {r['img_s']['timm']:.0f} | "
                  f"**{r['ratio']:.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f}) |", flush=True)
            rows.append(r)
    data.decode_jpeg = found
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Frozen features


def in_turns(a, count, **calls):
    """{name: seconds of each call}, `count` times in turns after one that warms up, and what the calls returned."""
    spent, found = {name: [] for name in calls}, {}
    for _ in range(count + 1):
        for name, call in calls.items():
            synchronize(a.device)
            began = time.perf_counter()
            found[name] = call()
            synchronize(a.device)
            spent[name].append(time.perf_counter() - began)
    return {name: seconds[1:] for name, seconds in spent.items()}, found


def blobs(count, dim, classes, device):
    """Normalised features (count, dim) in classes that overlap, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    x = 0.1 * torch.randn(classes, dim, generator=generator)[labels] + torch.randn(count, dim, generator=generator)
    return torch.nn.functional.normalize(x, dim=1).to(device), labels.to(device)


def textbook_knn(train, train_labels, test, test_labels, k, classes):
    """As DINO's evaluation: the test set in a hundred parts, a search for this k, votes by one-hot rows, a sort."""
    right = 0
    for part, labels in zip(test.chunk(100), test_labels.chunk(100)):
        similarity, places = (part @ train.T).topk(k)
        rows = part.new_zeros(len(part) * k, classes).scatter_(1, train_labels[places].view(-1, 1), 1.0)
        votes = (rows.view(len(part), k, classes) * similarity.div(0.07).exp().unsqueeze(2)).sum(1)
        right += (votes.sort(1, descending=True).indices[:, 0] == labels).sum().item()
    return 100 * right / len(test)


def knn_rows(a, count=50_000, tests=5_000, dim=384, classes=10):
    """The k-NN accuracy of 5,000 features among 50,000, for several k and for one."""
    (x, y), rows = blobs(count + tests, dim, classes, a.device), []
    sets = x[:count], y[:count], x[count:], y[count:]
    for ks in ((10, 20, 100, 200), (10,), (200,)):
        spent, found = in_turns(
            a, a.pairs // 2, textbook=lambda ks=ks: [textbook_knn(*sets, k, classes) for k in ks],
            ours=lambda ks=ks: [accuracies(c)["test_acc1"] for c in knn_counts(*sets, ks, classes).values()])
        assert max(abs(o - t) for o, t in zip(*found.values())) < 0.05, found
        ratios = sorted(round(t / o, 2) for t, o in zip(spent["textbook"], spent["ours"]))
        rows.append(dict(k=ks, ratios=ratios, ratio=statistics.median(ratios),
                         seconds={name: round(statistics.median(s), 3) for name, s in spent.items()}))
        print(f"k {' '.join(map(str, ks))}: {rows[-1]['seconds']}, **{rows[-1]['ratio']:.2f}** ({ratios[0]:.2f}-"
              f"{ratios[-1]:.2f})", flush=True)
    return rows


def sweep_rows(a, count=10_000, dim=192, classes=10, epochs=20):
    """Twenty learning rates on kept features against one, by probe.sweep and as one head is usually trained."""
    x, y = blobs(count + 2_000, dim, classes, a.device)
    rates = [10 ** (-4 + i * 5 / 19) for i in range(20)]

    def plain(batch=128):
        layer = torch.nn.Linear(dim, classes, device=a.device)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in range(epochs):
            for part in torch.randperm(count, device=a.device).split(batch)[:count // batch]:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(layer(x[part]), y[part]).backward()
                optimizer.step()
            schedule.step()

    def ours(rates):
        return sweep(x[:count], y[:count], x[count:], y[count:], rates, classes, epochs)

    spent, _ = in_turns(a, a.pairs, twenty=lambda: ours(rates), one=lambda: ours(rates[10:11]), plain=plain)
    r = dict(seconds={name: round(statistics.median(s), 3) for name, s in spent.items()})
    for name in ("one", "plain"):
        ratios = sorted(round(t / o, 2) for t, o in zip(spent["twenty"], spent[name]))
        r[f"ratio_{name}"], r[f"ratios_{name}"] = statistics.median(ratios), ratios
        print(f"20 rates / {name}: **{r[f'ratio_{name}']:.2f}** ({ratios[0]:.2f}-{ratios[-1]:.2f})", flush=True)
    return [r]


def cka_step(kind, model, batch, device, features=None):
    """CKA of two networks' layers on one batch, as a function; of given features, without the networks, the same."""
    torch.manual_seed(0)
    nets = [ViT(**MODELS[model]).eval().requires_grad_(False).to(device) for _ in range(2)]
    img = torch.randn(batch, 3, 7, 7, device=device).repeat_interleave(32, 2).repeat_interleave(32, 3)
    if kind == "textbook":
        textbook = TextbookCKA(*nets)
        return lambda: textbook.compare(*features or textbook.look(img))

    def step():
        found = CKA()
        found.add(*(torch.stack([gram(x) for x in layers]).cpu() for layers in features or [
            (layer.tokens for layer in layers_of(net, img)) for net in nets]))
        return found.value()
    return step


def cka_rows(a, batch=128):
    """The whole and its Gram part, on the same features, with the peak memory of the whole; 1,152 images are 9 such
    batches."""
    a.cka, rows, kinds = True, [], ("textbook", "ours")
    depth, dim, patch = (MODELS[a.model][k] for k in ("depth", "dim", "patch_size"))
    features = [[torch.randn(batch, (224 // patch) ** 2, dim, device=a.device) for _ in range(depth + 1)] for _ in "ab"]
    for part, given, pairs in (("Gram part", features, a.pairs), ("whole", None, a.pairs // 3)):
        spent, found = in_turns(a, pairs, **{kind: cka_step(kind, a.model, batch, a.device, given) for kind in kinds})
        torch.testing.assert_close(*(x.cpu().double() for x in found.values()), rtol=0, atol=0.02)  # its sums are fp32
        ratios = sorted(round(t / o, 2) for t, o in zip(spent["textbook"], spent["ours"]))
        rows.append(dict(part=part, batch=batch, ratios=ratios, ratio=statistics.median(ratios),
                         seconds={kind: round(statistics.median(s), 3) for kind, s in spent.items()}))
        print(f"CKA, {part}: {rows[-1]['seconds']} seconds, **{rows[-1]['ratio']:.2f}** ({ratios[0]:.2f}-"
              f"{ratios[-1]:.2f})", flush=True)
        given = features = None
    rows[-1]["memory_mb"] = {kind: round(memory(kind, a, "fp32", False, batch)) for kind in kinds}
    print(f"peak memory in MB: {rows[-1]['memory_mb']}; 1,152 images take {9 * rows[-1]['seconds']['ours']:.0f} s")
    a.cka = False
    return rows


# ----------------------------------------------------------------------------------------------------------------
# EsViT


def esvit_step(kind, what, prototypes, batch, device, dtype, compiled):
    """A step of EsViT as a function, with the same numbers in both: a whole one of Swin-T (what "step"), or ("loss")
    forward and backward of the losses alone, from fixed features and vectors before the prototypes."""
    swin = dict(SWINS["swin_tiny" if what == "step" else "swin_mini"])
    K, crops = int(prototypes), (2, 8)
    torch.manual_seed(0)
    options = {} if what == "step" else dict(hidden=8)
    ours = EsViT(*(Network(Swin(**swin), K, unit=False, **options) for _ in range(2))).to(device)
    model = ours
    if kind == "textbook":
        model = TextbookEsViT(K, *options.values(), **swin).to(device)
        model.center, model.center_grid = model.center.to(device), model.center_grid.to(device)
        for net, theirs in ((ours.student, model.student), (ours.teacher, model.teacher)):
            theirs.load_state_dict({k.replace("weight_g", "parametrizations.weight.original0").replace(
                "weight_v", "parametrizations.weight.original1"): v for k, v in net.state_dict().items()})
        del ours, net, theirs
    elif compiled:
        model.compile(dynamic=False)
    torch.manual_seed(1)
    if what == "loss":
        return losses_step(kind, model, batch, device)
    images = [torch.randn(n, batch, 3, side, side, device=device) for n, side in zip(crops, (224, 96))]
    optimizer = torch.optim.AdamW(training.decay_groups(model, 0.04), 1e-4, fused=True if kind == "ours" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")

    def step():
        with training.autocast(device, dtype):
            if kind == "ours":
                loss, found = model(images, 0.04, True)
            else:
                loss = model([x.flatten(0, 1) for x in images], crops, 0.04)
        scaler.scale(loss).backward()
        if kind == "ours":
            _, skipped = clipped_step(optimizer, scaler, 3.0)
            model.follow(0.996)
            model.recentre(found["means"], skipped)
        else:
            loss.item()                                         # as the official code does, to look for NaN
            scaler.unscale_(optimizer)
            for p in model.student.parameters():
                torch.nn.utils.clip_grad_norm_(p, 3.0)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                for slow, fast in zip(model.teacher.parameters(), model.student.parameters()):
                    slow.mul_(0.996).add_(0.004 * fast)
        optimizer.zero_grad()
        return loss
    return step


def losses_step(kind, model, batch, device, width=768, bottleneck=256):
    """The losses of Swin-T's features of 2 x 49 + 8 x 9 regions, and the prototypes' gradients."""
    def seen(layout):
        views, regions = sum(n for n, _ in layout), sum(n * t for n, t in layout)
        z = [torch.nn.functional.normalize(torch.randn(batch, n, bottleneck, device=device), dim=-1)
             for n in (views, regions)]
        views, regions = (torch.randn(batch, n, width, device=device) for n in (views, regions))
        return Seen(views, z[0].requires_grad_(), regions, z[1].requires_grad_(), layout)

    def by_crop(x, layout):
        parts = x.split([n * t for n, t in layout], 1)
        return torch.cat([part.unflatten(1, (n, t)).transpose(0, 1).flatten(0, 2)
                          for part, (n, t) in zip(parts, layout)])

    student, teacher = seen(((2, 49), (8, 9))), seen(((2, 49),))
    teacher = teacher._replace(z=teacher.z.detach(), z_regions=teacher.z_regions.detach())

    def looked(net, seen):
        return (net.head.last_layer(seen.z.transpose(0, 1).flatten(0, 1)),
                net.head_dense.last_layer(by_crop(seen.z_regions, seen.layout)), by_crop(seen.regions, seen.layout))

    def step():
        if kind == "ours":
            loss = model.losses(student, teacher, 0.04)[0]
        else:
            with torch.no_grad():
                theirs = looked(model.teacher, teacher)
            loss = model.loss((*looked(model.student, student), [49, 9]), theirs, (2, 8), 49, 0.04)
        loss.backward()
        model.zero_grad()
        student.z.grad = student.z_regions.grad = None
        return loss
    return step


def esvit_rows(a, what, cases):
    """Ours against the textbook's for (batch, K) in turns, and the peak memory of both."""
    gpu, rows = a.device.type == "cuda", []
    print("| batch | K | ours, ms | textbook, ms | ratio (lowest-highest) | peak MB | memory |\n" + "|---" * 7 + "|")
    for batch, K in cases:
        modes = dict(textbook=("fp16" if gpu else "fp32", False), ours=("bf16" if gpu else "fp32", gpu))
        a.esvit, steps = (what, K), {kind: esvit_step(kind, what, K, batch, a.device, *mode)
                                     for kind, mode in modes.items()}
        losses = [step().item() for step in steps.values()]
        assert abs(losses[0] - losses[1]) < 0.02 * losses[0], "the two steps do not compute the same"
        spent, _ = in_turns(a, a.pairs, **steps)
        del steps
        ratios = sorted(round(t / o, 2) for t, o in zip(spent["textbook"], spent["ours"]))
        r = dict(batch=batch, prototypes=K, ratios=ratios, ratio=statistics.median(ratios),
                 ms={kind: round(1e3 * statistics.median(s), 1) for kind, s in spent.items()},
                 memory_mb={kind: round(memory(kind, a, *mode, batch)) for kind, mode in modes.items()})
        r["memory_ratio"] = round(r["memory_mb"]["ours"] / r["memory_mb"]["textbook"], 3)
        print(f"| {batch} | {K} | {r['ms']['ours']:.0f} | {r['ms']['textbook']:.0f} | **{r['ratio']:.2f}** "
              f"({ratios[0]:.2f}-{ratios[-1]:.2f}) | {r['memory_mb']['ours']} / {r['memory_mb']['textbook']} | "
              f"{r['memory_ratio']:.2f} |", flush=True)
        rows.append(r)
    a.esvit = None
    return rows


def keep(facts, rows):
    """Write the rows into the day's file, where other rows of the same day stay."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["machine"]).strip("-")
    path = os.path.join("results", f"bench-{facts['date']}-{name}.json")
    os.makedirs("results", exist_ok=True)
    if os.path.exists(path):
        with open(path) as f:
            old = json.load(f)
        facts = old | facts | dict(command=f"{old['command']}; {facts['command']}")
    with open(path, "w") as f:
        json.dump(dict(facts, **rows), f, indent=1)
    print(f"wrote {path}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="step, distill, moco, esvit, esvit-loss, views, knn, sweep, cka, "
                                                "index, input, both, augment [the first 9; with --data the last 3 too]")
    parser.add_argument("--data", help="images for input and both, some thousand at most")
    parser.add_argument("--workers", type=int, nargs="+", help="decoding processes [1 2; 16 on a GPU machine]")
    parser.add_argument("--model", default="vit_tiny", choices=[m for m in MODELS if MODELS[m]["patch_size"] > 4])
    parser.add_argument("--batch", type=int, nargs="+", help="images per step [16 64 256 on a CPU, 256 1024 on a GPU]")
    parser.add_argument("--pairs", type=int, default=7, help="how often each step is timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    parser.add_argument("--moco", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--esvit", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--cka", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory:
        return measure_memory(a)
    _, _, a.device = training.setup(a.device)
    torch.set_num_threads(a.threads)
    gpu = a.device.type == "cuda"
    a.batch = a.batch or ([256, 1024] if gpu else [16, 64, 256])
    a.workers = a.workers or ([16] if gpu else [1, 2])
    a.what = a.what or ("step distill moco esvit esvit-loss views knn sweep cka".split() +
                        ["input", "both", "augment"] * bool(a.data))
    names = ("fp32", "bf16", "fp16") if gpu else ("fp32", "bf16")
    a.peak = {name: matmul_peak(a.device, training.DTYPES[name]) for name in names}
    facts = dict(date=str(datetime.date.today()), machine=machine(), torch=str(torch.__version__), threads=a.threads,
                 model=a.model, command=" ".join(sys.argv), matmul_peak_gflop_s=a.peak)
    print(json.dumps(facts, indent=1))
    rows = {}
    if "step" in a.what:
        rows["step"] = step_rows(a)
    if "distill" in a.what:
        with tempfile.TemporaryDirectory() as folder:
            a.teacher, batches = os.path.join(folder, "base.pth"), a.batch
            a.batch = a.batch if gpu else [16, 64]
            torch.save(dict(model=ViT(**MODELS["vit_base"]).state_dict()), a.teacher)
            rows["distill"] = step_rows(a)
            a.teacher, a.batch = None, batches
    if "moco" in a.what:
        a.moco, a.batch, batches = True, a.batch if gpu else [n for n in a.batch if n <= 64] or a.batch, a.batch
        rows["moco"] = step_rows(a)
        a.moco, a.batch = False, batches
    if "esvit" in a.what:
        rows["esvit"] = esvit_rows(a, "step", [(32, 65536)] if gpu else [(2, 65536), (4, 65536)])
    if "esvit-loss" in a.what:
        batch = 32 if gpu else 8
        rows["esvit-loss"] = esvit_rows(a, "loss", [(batch, K) for K in (4096, 16384, 65536)])
    if "views" in a.what:
        rows["views"] = views_rows(a)
    rows |= {name: measure(a) for name, measure in (("knn", knn_rows), ("sweep", sweep_rows), ("cka", cka_rows))
             if name in a.what}
    if "index" in a.what:
        with tempfile.TemporaryDirectory() as folder:
            rows["index"] = index_rows(folder)
    if {"input", "both", "augment"} & set(a.what):
        original = find(a.data or training.die("input, both and augment need --data, some hundred images or more"))
        if len(original) > 20_000:
            training.die(f"{describe(original)}: they are packed first, so give some thousand of them at most")
        with tempfile.TemporaryDirectory() as folder:
            packed = os.path.join(folder, "packed.tar")
            data.command_line(["pack", a.data, packed])
            facts["images"] = describe(original)
            for name, measure in (("input", input_rows), ("both", both_rows), ("augment", augment_rows)):
                if name in a.what:
                    rows[name] = measure(a, original, find(packed))
    keep(facts, rows)


if __name__ == "__main__":
    main()
