"""
Speed as ratios: a row times ours and the textbook's in the same process, in turns, and reports the median ratio.

python bench.py --data SET           every row that fits this machine; writes results/bench-DATE-MACHINE.json
python bench.py step                 the optimizer step alone, on fixed images
python bench.py distill              the same with a ViT-Base teacher (D-MAE)
python bench.py input --data TAR     files to normalised float batches, alone: from the files as they are, and packed
python bench.py index                a tar of 1,281,000 entries: gone through once, then opened from its index
python bench.py both --data TAR      step and input together: how much of a step waits for images
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
from augment import IMAGENET_MEAN, IMAGENET_STD, normalize, random_flip
from distill import Lesson, Teacher
from mae import MAE, RECIPES, Distilled
from sources import describe, find
from vit import MODELS, ViT

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests"))
from textbook import TextbookDistilled, TextbookImages, TextbookMAE  # noqa: E402


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


def make_step(kind, model, batch, device, dtype, compiled, teacher=None):
    """One optimizer step as a function, of images or else on fixed random ones."""
    module, loss_of, hear = build(kind, model, teacher, device, dtype, compiled)
    if compiled:
        module.compile(dynamic=False)
    groups = training.decay_groups(module, 0.05)
    optimizer = torch.optim.AdamW(groups, 1e-4, betas=(0.9, 0.95), fused=True if kind == "ours" else None)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == "fp16")
    size, patch = 224, MODELS[model]["patch_size"]
    fixed = torch.randn(batch, 3, size, size, device=device)
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


def gflop(kind, model, teacher=None):
    """Forward and backward of one image, in GFLOP; attention counted as its matrix products."""
    loss_of = build(kind, model, teacher, torch.device("cpu"), "fp32")[1]
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss_of(torch.randn(2, 3, 224, 224), torch.rand(2, (224 // MODELS[model]["patch_size"]) ** 2)).backward()
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


def memory(kind, a, dtype, compiled, batch):
    """Peak memory of training steps in MB: on a GPU all of it; on a CPU what they add, in a process of their own."""
    if a.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        step = make_step(kind, a.model, batch, a.device, dtype, compiled, a.teacher)
        torch.cuda.reset_peak_memory_stats()
        step(), step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    args = ["--memory", kind, dtype, "compiled" if compiled else "eager", "--threads", str(a.threads),
            "--model", a.model, "--batch", str(batch), *(["--teacher", a.teacher] if a.teacher else [])]
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
    step = make_step(kind, a.model, a.batch[0], torch.device("cpu"), dtype, compiled == "compiled", a.teacher)
    with open("/proc/self/clear_refs", "w") as f:               # forget the peak of building and reading
        f.write("5")
    before = resident("VmRSS")
    step(), step()
    print(resident("VmHWM") - before)


def row(a, batch, ours, textbook):
    """One comparison; ours and textbook are (dtype name, compiled)."""
    torch._dynamo.reset()                                       # so that each row compiles for its own shapes
    steps = {kind: make_step(kind, a.model, batch, a.device, dtype, compiled, a.teacher)
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
    """The optimizer step of MAE, or with a.teacher of D-MAE."""
    a.gflop = {kind: gflop(kind, a.model, a.teacher) for kind in ("ours", "textbook")}
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
        if not a.teacher:
            rows += [row(a, middle, pair, pair) for pair in (("fp32", True), ("bf16", False), ("bf16", True))]
    return rows


# ----------------------------------------------------------------------------------------------------------------
# Input


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", help="step, distill, index, input, both [step distill; with --data both of "
                                                "them, and input both]")
    parser.add_argument("--data", help="images for input and both, some thousand at most")
    parser.add_argument("--workers", type=int, nargs="+", help="decoding processes [1 2; 16 on a GPU machine]")
    parser.add_argument("--model", default="vit_tiny", choices=[m for m in MODELS if MODELS[m]["patch_size"] > 4])
    parser.add_argument("--batch", type=int, nargs="+", help="images per step [16 64 256 on a CPU, 256 1024 on a GPU]")
    parser.add_argument("--pairs", type=int, default=7, help="how often each step is timed")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.memory:
        return measure_memory(a)
    _, _, a.device = training.setup(a.device)
    torch.set_num_threads(a.threads)
    gpu = a.device.type == "cuda"
    a.batch = a.batch or ([256, 1024] if gpu else [16, 64, 256])
    a.workers = a.workers or ([16] if gpu else [1, 2])
    a.what = a.what or ["step", "distill"] + ["input", "both"] * bool(a.data)
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
    if "index" in a.what:
        with tempfile.TemporaryDirectory() as folder:
            rows["index"] = index_rows(folder)
    if "input" in a.what or "both" in a.what:
        original = find(a.data or training.die("input and both need --data, some hundred to thousand images"))
        if len(original) > 20_000:
            training.die(f"{describe(original)}: they are packed first, so give some thousand of them at most")
        with tempfile.TemporaryDirectory() as folder:
            packed = os.path.join(folder, "packed.tar")
            data.command_line(["pack", a.data, packed])
            facts["images"] = describe(original)
            for name, measure in (("input", input_rows), ("both", both_rows)):
                if name in a.what:
                    rows[name] = measure(a, original, find(packed))
    name = re.sub(r"[^A-Za-z0-9]+", "-", facts["machine"]).strip("-")
    path = os.path.join("results", f"bench-{facts['date']}-{name}.json")
    os.makedirs("results", exist_ok=True)
    if os.path.exists(path):                                    # other rows of the same day stay
        with open(path) as f:
            old = json.load(f)
        facts = old | facts | dict(command=f"{old['command']}; {facts['command']}")
    with open(path, "w") as f:
        json.dump(dict(facts, **rows), f, indent=1)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
