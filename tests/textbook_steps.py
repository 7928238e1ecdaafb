"""
The textbook at work, for tools/bench.py: its optimizer steps, its input, its evaluation, as official code has them; and
made-up data. What the textbook computes stands in textbook.py. case: see tools/bench.py; ours: our network, whose
numbers the textbook's gets.
"""
import io
import tarfile

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from textbook import (
    TextbookBootMAE,
    TextbookCKA,
    TextbookDistilled,
    TextbookEsViT,
    TextbookHieraMAE,
    TextbookImages,
    TextbookMAE,
    TextbookMIM,
    TextbookMoCo,
)
from torch import nn
from torch.utils.data import DataLoader

from mae import MAE, RECIPES
from nets.chunk_attention import chunk_layout
from nets.hiera import HIERAS
from runtime.run import DTYPES, decay_groups
from vit import MODELS, SWINS


def mae(case, ours, inputs, device):
    """-> the network, a function of the inputs that gives the loss, and the inputs as this one wants them."""
    decoder = {name: RECIPES[case.model][name] for name in ("decoder_dim", "decoder_depth", "decoder_heads")}
    model = TextbookMAE(**MODELS[case.model], **decoder).to(device)
    model.load_state_dict((ours if isinstance(ours, MAE) else ours.model).state_dict())
    return model, lambda img, noise: model(img, noise)[0], inputs


def distill(case, ours, inputs, device):
    model = mae(case, ours, inputs, device)[0]
    base = TextbookMAE(**MODELS["vit_base"]).to(device)
    base.load_state_dict(torch.load(case.teacher)["model"], strict=False)
    both = TextbookDistilled(model, base, MODELS[case.model]["heads"], MODELS["vit_base"]["heads"]).to(device)
    both.adapter.load_state_dict(ours.distill_loss.adapters[0].state_dict())
    return both, both, inputs


def moco(case, ours, inputs, device):
    model = TextbookMoCo(**MODELS[case.model]).to(device)
    model.load_state_dict(ours.state_dict())
    views, = inputs                                             # ours has the two of an image side by side
    return model, lambda one, two: model(one, two, 0.99), (views[::2].contiguous(), views[1::2].contiguous())


def esvit_network(case, ours, device, swin, **head):
    model = TextbookEsViT(case.prototypes, **head, **SWINS[swin]).to(device)
    model.center, model.center_grid = model.center.to(device), model.center_grid.to(device)
    for net, plain in ((ours.student, model.student), (ours.teacher, model.teacher)):
        state = {}
        for name, tensor in net.state_dict().items():           # as torch's weight_norm names them
            name = name.replace("weight_g", "parametrizations.weight.original0")
            state[name.replace("weight_v", "parametrizations.weight.original1")] = tensor
        plain.load_state_dict(state)
    return model


def esvit(case, ours, inputs, device):
    model, (images,) = esvit_network(case, ours, device, "swin_tiny"), inputs
    crops = [len(x) for x in images]
    return model, lambda *images: model(images, crops, 0.04), [x.flatten(0, 1) for x in images]


def hiera(case, ours, inputs, device):
    model = TextbookHieraMAE(**HIERAS["hiera_lite"]).to(device)
    model.load_ours(ours)
    return model, model, inputs


def bootmae(case, ours, inputs, device):
    model = TextbookBootMAE(decoder_dim=ours.mask_token.shape[2], visible=ours.visible, **MODELS[case.model]).to(device)
    model.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("momentum_encoder.")})
    model.start_average()

    def loss_of(img, order):
        model.update_average(0.999)
        return model(img, order)
    return model, loss_of, inputs


def simmim(case, ours, inputs, device):
    model = TextbookMIM(ours.target, ours.decoder[0].out_channels, **MODELS[case.model]).to(device)
    model.load_state_dict(ours.state_dict())
    return model, lambda img, mask, crops: model(img, mask, crops if ours.target == "hog" else img), inputs


NETWORKS = dict(step=mae, distill=distill, moco=moco, esvit=esvit, bootmae=bootmae, simmim=simmim, maskfeat=simmim,
                hiera=hiera)


class TextbookStep:
    """One optimizer step as official code makes it: a function of images, or else on the fixed inputs."""

    def __init__(self, case, ours, inputs, device):
        self.case, self.device = case, device
        self.model, self.loss_of, self.inputs = NETWORKS[case.row](case, ours, inputs, device)
        if case.compiled:
            self.model.compile(dynamic=False)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, 0.05), 1e-4, betas=(0.9, 0.95))
        self.scaler = torch.amp.GradScaler(device.type, enabled=case.dtype == "fp16")

    def __call__(self, img=None):
        inputs = self.inputs if img is None else (img, *self.inputs[1:])
        with torch.autocast(self.device.type, DTYPES[self.case.dtype], enabled=self.case.dtype != "fp32"):
            loss = self.loss_of(*inputs)
        self.scaler.scale(loss).backward()
        loss.item()                                             # to look for NaN
        if self.case.row == "esvit":
            self.scaler.unscale_(self.optimizer)
            for p in self.model.student.parameters():
                nn.utils.clip_grad_norm_(p, 3.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.case.row == "esvit":
            with torch.no_grad():
                for slow, fast in zip(self.model.teacher.parameters(), self.model.student.parameters()):
                    slow.mul_(0.996).add_(0.004 * fast)
        self.optimizer.zero_grad()
        return loss.detach()


def esvit_losses(case, ours, student, teacher, device):
    """EsViT's losses alone -> the network, and a function of nothing. student, teacher: Outputs (see esvit.py); the
    textbook wants one crop after the other."""
    model = esvit_network(case, ours, device, "swin_mini", hidden=8)
    crops, tokens = zip(*student.layout)

    def by_crop(x, layout):
        parts = x.split([n * t for n, t in layout], 1)
        return torch.cat([part.unflatten(1, (n, t)).transpose(0, 1).flatten(0, 2)
                          for part, (n, t) in zip(parts, layout)])

    def logits(net, seen):
        return (net.head.last_layer(seen.z.transpose(0, 1).flatten(0, 1)),
                net.head_dense.last_layer(by_crop(seen.z_regions, seen.layout)), by_crop(seen.regions, seen.layout))

    def loss_of():
        with torch.no_grad():
            theirs = logits(model.teacher, teacher)
        return model.loss((*logits(model.student, student), tokens), theirs, crops, tokens[0], 0.04)
    return model, loss_of


def lightly_dino(heads, x, y, K):
    """lightly's head and loss with the weights of `heads` (student's and teacher's) on features of all crops
    x (B, V, D) and of the teacher's y (B, 2, D) -> {how it is called: a step}, or None where lightly is absent."""
    try:
        from lightly.loss import DINOLoss
        from lightly.models.modules import DINOProjectionHead
    except ImportError:
        return None
    theirs, loss_of = [], DINOLoss(K, teacher_temp=0.04)
    for head in heads:
        theirs.append(DINOProjectionHead(x.shape[-1], 2048, 256, K, norm_last_layer=False))
        theirs[-1].load_state_dict({k.replace("mlp.", "layers."): v for k, v in head.state_dict().items()})
    student, teacher = theirs

    def step(one_call):
        loss_of.center.zero_()
        views, seen = x.transpose(0, 1), y.transpose(0, 1)
        with torch.no_grad():
            answers = teacher(seen.flatten(0, 1)).chunk(2) if one_call else [teacher(view) for view in seen]
        said = student(views.flatten(0, 1)).chunk(len(views)) if one_call else [student(view) for view in views]
        loss = loss_of(list(answers), list(said), teacher_temp=0.04)
        loss.backward()
        student.zero_grad()
        return loss.detach()
    return dict(stacked=lambda: step(True), one_by_one=lambda: step(False))


def shifted_chunks(attn, x, grid):
    """What a ChunkAttention computes, the usual way: the map of keys is shifted for each chunk that is looked into, and
    each shift multiplied by itself. Weights of the attention, global tokens first, exact 0, shared weights."""
    g, s, H, (h, w) = attn.tokens, attn.side, attn.heads, grid
    _, seen = chunk_layout(h, w, s, 0, x.device)
    chunks = attn.chunks(x.device)

    def cut(t):
        t = rearrange(t, "b (h w) (e d) -> b e h w d", h=h, e=H)
        t = F.pad(t, (0, 0, 0, -w % s, 0, -h % s))
        return rearrange(t, "b e (y s) (x t) d -> b e y x (s t) d", s=s, t=s)

    def shifted(t, chunk):
        return t.roll((1 - chunk // 3, 1 - chunk % 3), (2, 3))
    kv = attn.kv(x)
    k, v = kv.chunk(2, -1)
    asked = attn.query(x) * (x.shape[-1] // H) ** -0.5
    q, k_map, v_map = cut(asked[:, g:]), cut(k[:, g:]), cut(v[:, g:])
    q_all, k_all, v_all = (rearrange(t, "b n (e d) -> b e n d", e=H) for t in (asked, k, v))
    first = torch.einsum("beyxtd,begd->beyxtg", q, k_all[:, :, :g]) + attn.g2l_relative_position_bias[1].view(
        1, H, 1, 1, 1, g)
    logits = torch.cat([torch.einsum("beyxtd,beyxud->beyxtu", q, shifted(k_map, c)) for c in chunks.tolist()], -1)
    offsets = attn.offsets.index_select(1, chunks).flatten(1)
    logits = logits + attn.local_relative_position_bias_table[offsets].permute(2, 0, 1)[None, :, None, None]
    mask = ~seen.index_select(2, chunks).flatten(2)
    logits = logits.masked_fill(mask.view(1, 1, *q.shape[2:4], *mask.shape[1:]), float("-inf"))
    p = torch.cat([first, logits], -1).softmax(-1)
    out = torch.einsum("beyxtg,begd->beyxtd", p[..., :g], v_all[:, :, :g])
    for share, c in zip(p[..., g:].split(s * s, -1), chunks.tolist()):
        out = out + torch.einsum("beyxtu,beyxud->beyxtd", share, shifted(v_map, c))
    out = rearrange(out, "b e y x (s t) d -> b (y s) (x t) (e d)", s=s)[:, :h, :w].flatten(1, 2)
    to_local = attn.g2l_relative_position_bias[0].unsqueeze(2).expand(-1, -1, h * w)
    all_ = q_all[:, :, :g] @ k_all.mT + torch.cat([attn.g2g_relative_position_bias, to_local], 2)
    first = rearrange(all_.softmax(-1) @ v_all, "b e g d -> b g (e d)")
    return attn.proj(torch.cat([first, out], 1))


def cka_step(nets, img, features=None):
    """CKA of two networks' layers on one batch, as a function; of given features without the networks."""
    plain = TextbookCKA(*nets)
    return lambda: plain.compare(*features or plain.look(img)).double()


# ----------------------------------------------------------------------------------------------------------------


def batches(kind, source, batch, order, workers, device):
    """Normalised float batches on the device. kind: textbook, for pre-training, or timm, for fine-tuning."""
    images = TextbookImages(source)
    if kind == "timm":
        from timm.data import auto_augment, create_transform
        # Of levels that reach 10 timm wants 0 bits, for which Pillow 13 raises: it gets one.
        auto_augment.NAME_TO_OP["PosterizeIncreasing"] = lambda img, n, **_: auto_augment.posterize(img, max(n, 1))
        images.transform = create_transform(224, is_training=True, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25,
                                            re_mode="pixel", re_count=1, interpolation="bicubic", hflip=0.5,
                                            color_jitter=None)
    for img, _ in DataLoader(images, batch, sampler=order, drop_last=True, num_workers=workers,
                             pin_memory=device.type == "cuda"):
        yield img.to(device, non_blocking=True)


def scikit_image_hog(crops):
    """HOG of uint8 images (B, C, h, w), as one would get it from scikit-image: an image and a channel at a time."""
    from skimage.feature import hog
    return [hog(channel, 9, (8, 8), (1, 1), feature_vector=False) for img in crops.numpy() for channel in img]


def knn(train, train_labels, test, test_labels, k, classes):
    """As DINO's evaluation: the test set in a hundred parts, a search for this k, votes by one-hot rows, a sort."""
    right = 0
    for part, labels in zip(test.chunk(100), test_labels.chunk(100)):
        similarity, places = (part @ train.T).topk(k)
        rows = part.new_zeros(len(part) * k, classes).scatter_(1, train_labels[places].view(-1, 1), 1.0)
        votes = (rows.view(len(part), k, classes) * similarity.div(0.07).exp().unsqueeze(2)).sum(1)
        right += (votes.sort(1, descending=True).indices[:, 0] == labels).sum().item()
    return 100 * right / len(test)


def train_head(x, labels, classes, epochs, batch=128):
    """One linear head for features (n, D), as it is usually trained."""
    layer = nn.Linear(x.shape[1], classes, device=x.device)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for part in torch.randperm(len(x), device=x.device).split(batch)[:len(x) // batch]:
            optimizer.zero_grad()
            F.cross_entropy(layer(x[part]), labels[part]).backward()
            optimizer.step()
        schedule.step()


# ----------------------------------------------------------------------------------------------------------------
# Made-up data


def esvit_outputs(layout, batch, device, width=768, bottleneck=256):
    """Features of views (B, V, D), their unit vectors before the prototypes (B, V, E), and both of regions."""
    made = []
    for n in (sum(n for n, _ in layout), sum(n * t for n, t in layout)):
        made += [torch.randn(batch, n, width, device=device),
                 F.normalize(torch.randn(batch, n, bottleneck, device=device), dim=-1)]
    return made


def blobs(count, dim, classes, device):
    """Normalised features (count, dim) in classes that overlap, and labels."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=generator)
    x = 0.1 * torch.randn(classes, dim, generator=generator)[labels] + torch.randn(count, dim, generator=generator)
    return F.normalize(x, dim=1).to(device), labels.to(device)


def write_tar(path, entries):
    """A tar of one-pixel images in classes of 1,281."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "JPEG")
    body = buffer.getvalue() + bytes(-len(buffer.getvalue()) % 512)
    with open(path, "wb") as f:
        for k in range(entries):
            info = tarfile.TarInfo(f"train/n{k // 1281:08}/{k}.JPEG")
            info.size = len(buffer.getvalue())
            f.write(info.tobuf(tarfile.USTAR_FORMAT) + body)
        f.write(bytes(1024))


def made_crops(count, size):
    """Smooth uint8 images (count, 3, size, size), as the workers send them, and the same as Pillow images."""
    coarse = F.interpolate(torch.rand(count, 3, 28, 28) * 255, (size, size), mode="bicubic")
    crops = coarse.clamp(0, 255).byte().contiguous(memory_format=torch.channels_last)
    return crops, [Image.fromarray(crop.numpy()) for crop in crops.permute(0, 2, 3, 1)]


def slide(logits_of, img, window, stride, classes):
    """Sliding windows as mmsegmentation has them: one after the other, each padded to the image's size and added."""
    height, width = img.shape[-2:]
    total, count = img.new_zeros(1, classes, height, width), img.new_zeros(1, 1, height, width)
    for row in range(max(height - window + stride - 1, 0) // stride + 1):
        for column in range(max(width - window + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + window, height), min(column * stride + window, width)
            top, left = max(bottom - window, 0), max(right - window, 0)
            logits = logits_of(img[:, :, top:bottom, left:right])
            total += F.pad(logits, (left, width - right, top, height - bottom))
            count[:, :, top:bottom, left:right] += 1
    return total / count
