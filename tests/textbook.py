"""Plain forms of the methods, for comparison only: tests check our numbers against them, tools/bench.py our speed."""
import copy
import io
import math
import random
from functools import partial

import torch
from einops import rearrange
from PIL import Image, ImageFilter, ImageOps
from torch import nn
from torchvision import transforms


class TextbookMAE(nn.Module):
    """MAE from timm's blocks in the order of the paper's text: embed all patches, drop the hidden ones, decode all
    positions, predict all of them, average the error over the hidden ones. Names are the published ones."""

    def __init__(self, img_size=224, patch_size=16, dim=192, depth=12, heads=12, decoder_dim=96, decoder_depth=1,
                 decoder_heads=3, norm_pix=True, mlp_ratio=4):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block
        block = dict(mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.patch_size, self.norm_pix = patch_size, norm_pix
        self.patch_embed = PatchEmbed(img_size, patch_size, 3, dim)
        patches = self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim), requires_grad=False)
        self.blocks = nn.ModuleList([Block(dim, heads, **block) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, decoder_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList([Block(decoder_dim, decoder_heads, **block) for _ in range(decoder_depth)])
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size ** 2 * 3)

    def forward(self, img, noise, mask_ratio=0.75):
        B, N = noise.shape
        keep = int(N * (1 - mask_ratio))
        shuffle = noise.argsort(1)
        restore = shuffle.argsort(1)

        x = self.patch_embed(img) + self.pos_embed[:, 1:]                                       # (B, N, D)
        x = x.gather(1, shuffle[:, :keep, None].expand(-1, -1, x.shape[-1]))                    # (B, keep, D)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(B, -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))                                                    # (B, 1 + keep, E)

        full = torch.cat([x[:, 1:], self.mask_token.expand(B, N - keep, -1)], 1)
        full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[-1]))                # (B, N, E)
        x = torch.cat([x[:, :1], full], 1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]                                   # (B, N, p * p * 3)

        target = rearrange(img, "b c (h p) (w q) -> b (h w) (p q c)", p=self.patch_size, q=self.patch_size)
        if self.norm_pix:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
        mask = (restore >= keep).float()                                                        # 1 = hidden
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum(), pred, mask


class TextbookDistilled(nn.Module):
    """D-MAE as its code does it: logits are formed and kept in every layer of both networks, the frozen teacher's
    encoder runs to its end, then the last layers are compared. student: a TextbookMAE; teacher: another, whose decoder
    is never run."""

    def __init__(self, student, teacher, heads, teacher_heads):
        super().__init__()
        self.model, self.teacher = student, [teacher.eval().requires_grad_(False)]
        self.adapter = nn.Conv2d(heads, teacher_heads, 1, bias=False)
        self.seen = {}
        for name, net in (("student", student), ("teacher", teacher)):
            for number, block in enumerate(net.blocks, 1):
                block.attn.forward = partial(self.attend, block.attn, (name, number))

    def attend(self, attn, where, x, **_):
        B, N, D = x.shape
        q, k, v = attn.qkv(x).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        logits = (q * attn.scale) @ k.transpose(-2, -1)                                         # (B, H, N, N)
        self.seen[where] = logits
        return attn.proj((logits.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))

    def forward(self, img, noise, weight=1.0):
        pixels = self.model(img, noise)[0]
        teacher, keep = self.teacher[0], int(noise.shape[1] * 0.25)
        with torch.no_grad():
            x = teacher.patch_embed(img) + teacher.pos_embed[:, 1:]
            x = x.gather(1, noise.argsort(1)[:, :keep, None].expand(-1, -1, x.shape[-1]))
            x = torch.cat([(teacher.cls_token + teacher.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1)
            for block in teacher.blocks:
                x = block(x)
            teacher.norm(x)
        ours, theirs = self.seen["student", len(self.model.blocks)], self.seen["teacher", len(teacher.blocks)]
        return pixels + weight * nn.functional.mse_loss(self.adapter(ours), theirs)


class TextbookMoCo(nn.Module):
    """MoCo v3 as its code does it, in one process: the online network on one view and then on the other, the momentum
    update, parameter by parameter, its copy on both; torch's BatchNorm. Names are the published ones."""

    def __init__(self, img_size=224, patch_size=16, dim=192, depth=12, heads=12, out=256, hidden=4096, temperature=0.2):
        super().__init__()
        from timm.models.vision_transformer import VisionTransformer
        self.base_encoder = VisionTransformer(img_size, patch_size, num_classes=0, embed_dim=dim, depth=depth,
                                              num_heads=heads, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.base_encoder.head = self.mlp(dim, hidden, hidden, out)
        self.base_encoder.pos_embed.requires_grad = False
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)
        self.predictor = self.mlp(out, hidden, out)
        self.temperature = temperature

    @staticmethod
    def mlp(*widths):
        layers = []
        for i in range(1, len(widths)):
            layers.append(nn.Linear(widths[i - 1], widths[i], bias=False))
            if i < len(widths) - 1:
                layers += [nn.BatchNorm1d(widths[i]), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, nn.BatchNorm1d(widths[-1], affine=False))

    def contrast(self, q, k):
        logits = nn.functional.normalize(q, dim=1) @ nn.functional.normalize(k, dim=1).T / self.temperature
        labels = torch.arange(len(q), device=q.device)
        return nn.functional.cross_entropy(logits, labels) * 2 * self.temperature

    def forward(self, one, two, momentum):
        q1, q2 = self.predictor(self.base_encoder(one)), self.predictor(self.base_encoder(two))
        with torch.no_grad():
            for slow, fast in zip(self.momentum_encoder.parameters(), self.base_encoder.parameters()):
                slow.data = slow.data * momentum + fast.data * (1 - momentum)
            k1, k2 = self.momentum_encoder(one), self.momentum_encoder(two)
        return self.contrast(q1, k2) + self.contrast(q2, k1)


class TextbookViews:
    """The two views of a crop as they are usually made: torchvision's transforms on a Pillow image, one after the
    other, in MoCo v3's order, to a normalised float tensor."""

    def __init__(self):
        self.first, self.second = self.pipeline(1.0, 0.0), self.pipeline(0.1, 0.2)

    @staticmethod
    def pipeline(blur, solarize):
        def blurred(img):
            return img.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))
        return transforms.Compose([
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8), transforms.RandomGrayscale(0.2),
            transforms.RandomApply([blurred], blur), transforms.RandomApply([ImageOps.solarize], solarize),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __call__(self, crops):
        """Pairs of PIL images -> (2B, 3, h, w)."""
        return torch.stack([self.first(one) for one, _ in crops] + [self.second(two) for _, two in crops])


class TextbookCKA:
    """Minibatch CKA as it is usually written: hooks keep the features of every layer of both networks, then the layers
    are compared two by two, each time from the features."""

    def __init__(self, *nets):
        self.nets, self.kept = nets, [[] for _ in nets]
        for net, kept in zip(nets, self.kept):
            for module in (*(block.norm1 for block in net.blocks), net.norm):
                module.register_forward_hook(lambda _, __, out, kept=kept: kept.append(out[:, 1:]))

    def look(self, img):
        for net, kept in zip(self.nets, self.kept):
            kept.clear()
            net(img)
        return self.kept

    @staticmethod
    def hsic(K, L):
        n, ones = len(K), K.new_ones(len(K), 1)
        corner = (ones.T @ K @ ones) * (ones.T @ L @ ones) / ((n - 1) * (n - 2))
        return (torch.trace(K @ L) + corner - 2 / (n - 2) * ones.T @ K @ L @ ones).squeeze() / (n * (n - 3))

    def compare(self, first, second):
        """Features (n, N, D) of every layer of both -> CKA of one batch, (layers of one, layers of the other)."""
        found = torch.zeros(len(first), len(second))
        for i, x in enumerate(first):
            K = (x.flatten(1) @ x.flatten(1).T).fill_diagonal_(0)
            own = self.hsic(K, K)
            for j, y in enumerate(second):
                L = (y.flatten(1) @ y.flatten(1).T).fill_diagonal_(0)
                found[i, j] = self.hsic(K, L) / (own * self.hsic(L, L)).sqrt()
        return found


class TextbookImages(torch.utils.data.Dataset):
    """The input path as it is usually written: Pillow, torchvision's transforms, one float tensor per image."""

    def __init__(self, source, size=224, scale=(0.08, 1.0)):
        self.source = source
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def __len__(self):
        return len(self.source)

    def __getitem__(self, i):
        img = Image.open(io.BytesIO(self.source.read(i))).convert("RGB")
        return self.transform(img), 0 if self.source.labels is None else int(self.source.labels[i])


class TextbookSwinBlock(nn.Module):
    """Swin's block in the order of its code: pad, roll, cut into windows, attend with explicit logits, undo it all."""

    def __init__(self, dim, heads, side, shift):
        super().__init__()
        self.heads, self.side, self.shift = heads, side, shift
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn.relative_position_bias_table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        at = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        down, across = (at[:, None] - at[None] + side - 1).unbind(-1)
        self.attn.register_buffer("relative_position_index", down * (2 * side - 1) + across)
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, 4 * dim), fc2=nn.Linear(4 * dim, dim)))
        self.masks = {}

    def mask(self, h, w, device):
        if (h, w) not in self.masks:
            area, M, s = torch.zeros(h, w), self.side, self.shift
            for i, y in enumerate((slice(0, -M), slice(-M, -s), slice(-s, None))):
                for j, x in enumerate((slice(0, -M), slice(-M, -s), slice(-s, None))):
                    area[y, x] = 3 * i + j
            area = rearrange(area, "(a y) (b x) -> (a b) (y x)", y=M, x=M)
            self.masks[h, w] = ((area[:, None] != area[:, :, None]) * -100.0).to(device)
        return self.masks[h, w]

    def forward(self, x, h, w):
        M, attn = self.side, self.attn
        y = rearrange(self.norm1(x), "b (h w) d -> b h w d", h=h)
        y = nn.functional.pad(y, (0, 0, 0, -w % M, 0, -h % M))
        down, across = y.shape[1:3]
        if self.shift:
            y = y.roll((-self.shift, -self.shift), (1, 2))
        y = rearrange(y, "b (a y) (c x) d -> (b a c) (y x) d", y=M, x=M)
        q, k, v = rearrange(attn.qkv(y), "n t (k h d) -> k n h t d", k=3, h=self.heads)
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        logits = logits + attn.relative_position_bias_table[attn.relative_position_index].permute(2, 0, 1)
        if self.shift:
            mask = self.mask(down, across, x.device)
            logits = (rearrange(logits, "(b n) h s t -> b n h s t", n=len(mask)) + mask[:, None]).flatten(0, 1)
        y = attn.proj(rearrange(logits.softmax(-1) @ v, "n h t d -> n t (h d)"))
        y = rearrange(y, "(b a c) (y x) d -> b (a y) (c x) d", a=down // M, c=across // M, y=M)
        if self.shift:
            y = y.roll((self.shift, self.shift), (1, 2))
        x = x + y[:, :h, :w].flatten(1, 2)
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class TextbookSwin(nn.Module):
    def __init__(self, img_size=224, patch_size=4, dim=96, depths=(2, 2, 6, 2), heads=(3, 6, 12, 24), window=7):
        super().__init__()
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, patch_size, patch_size),
                                              norm=nn.LayerNorm(dim, eps=1e-6)))
        self.layers, side = nn.ModuleList(), img_size // patch_size
        for s, depth in enumerate(depths):
            M, shift, wide = min(window, side), window // 2 if side > window else 0, dim * 2 ** s
            layer = dict(blocks=nn.ModuleList([TextbookSwinBlock(wide, heads[s], M, shift * (i % 2))
                                               for i in range(depth)]))
            if s < len(depths) - 1:
                layer["downsample"] = nn.ModuleDict(dict(reduction=nn.Linear(4 * wide, 2 * wide, bias=False),
                                                         norm=nn.LayerNorm(4 * wide, eps=1e-6)))
            self.layers.append(nn.ModuleDict(layer))
            side = (side + 1) // 2
        self.norm = nn.LayerNorm(wide, eps=1e-6)

    def forward(self, img):
        x = self.patch_embed.proj(img)
        h, w = x.shape[-2:]
        x = self.patch_embed.norm(x.flatten(2).transpose(1, 2))
        for layer in self.layers:
            for block in layer.blocks:
                x = block(x, h, w)
            if "downsample" in layer:
                x = nn.functional.pad(rearrange(x, "b (h w) d -> b h w d", h=h), (0, 0, 0, w % 2, 0, h % 2))
                x = torch.cat([x[:, i::2, j::2] for j in range(2) for i in range(2)], -1)
                h, w = x.shape[1:3]
                x = layer.downsample.reduction(layer.downsample.norm(x.flatten(1, 2)))
        return self.norm(x)


class TextbookEsViT(nn.Module):
    """EsViT as its code does it: all logits of all crops' regions, for every pair of crops the matched rows of the
    teacher's softmax gathered and a log-softmax of the student's. student, teacher: dicts of backbone, head,
    head_dense (see `network`)."""

    def __init__(self, prototypes=65536, hidden=2048, bottleneck=256, **swin):
        super().__init__()
        self.student, self.teacher = (self.network(prototypes, hidden, bottleneck, swin) for _ in range(2))
        self.teacher.requires_grad_(False)
        self.center, self.center_grid = (torch.zeros(1, prototypes) for _ in range(2))

    @staticmethod
    def network(prototypes, hidden, bottleneck, swin):
        def head(dim):
            last = nn.utils.parametrizations.weight_norm(nn.Linear(bottleneck, prototypes, bias=False))
            return nn.ModuleDict(dict(mlp=nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                                        nn.GELU(), nn.Linear(hidden, bottleneck)), last_layer=last))
        backbone = TextbookSwin(**swin)
        dim = len(backbone.norm.weight)
        return nn.ModuleDict(dict(backbone=backbone, head=head(dim), head_dense=head(dim)))

    @staticmethod
    def look(net, groups):
        """Lists of (n * B, 3, h, w), crop after crop -> logits of views and of regions, regions' features, counts."""
        tokens = [net.backbone(img) for img in groups]
        views = torch.cat([x.mean(1) for x in tokens])
        regions = torch.cat([x.flatten(0, 1) for x in tokens])
        views, logits = (head.last_layer(nn.functional.normalize(head.mlp(x), dim=-1))
                         for head, x in ((net.head, views), (net.head_dense, regions)))
        return views, logits, regions, [x.shape[1] for x in tokens]

    def forward(self, groups, crops, temperature, student_temp=0.1):
        """groups: as for look; crops: how many of each size."""
        with torch.no_grad():
            t_views, t_logits, t_features, (N, *_) = self.look(self.teacher, groups[:1])
        return self.loss(self.look(self.student, groups), (t_views, t_logits, t_features), crops, N, temperature,
                         student_temp)

    def loss(self, student, teacher, crops, N, temperature, student_temp=0.1):
        (views, logits, features, counts), (t_views, t_logits, t_features) = student, teacher
        B, V = len(t_views) // 2, sum(crops)
        per_crop = [t for n, t in zip(crops, counts) for _ in range(n)]
        views = (views / student_temp).chunk(V)
        logits = (logits / student_temp).split([B * t for t in per_crop])
        features = features.split([B * t for t in per_crop])
        p_views = ((t_views - self.center) / temperature).softmax(-1).detach().chunk(2)
        p_logits = ((t_logits - self.center_grid) / temperature).softmax(-1).detach().chunk(2)
        t_features, total = t_features.chunk(2), 0.0
        for i in range(2):
            for v in range(V):
                if v == i:
                    continue
                loss = 0.5 * torch.sum(-p_views[i] * views[v].log_softmax(-1), -1)
                ours, theirs = features[v].view(B, per_crop[v], -1), t_features[i].view(B, N, -1)
                similarity = nn.functional.normalize(ours, dim=-1) @ nn.functional.normalize(theirs, dim=-1).mT
                index = similarity.argmax(-1, keepdim=True).expand(-1, -1, p_logits[i].shape[-1])
                target = p_logits[i].view(B, N, -1).gather(1, index)
                dense = torch.sum(-target * logits[v].view(B, per_crop[v], -1).log_softmax(-1), -1)
                total = total + (loss + 0.5 * dense.mean(-1)).mean()
        self.center = 0.9 * self.center + 0.1 * t_views.mean(0, keepdim=True)
        self.center_grid = 0.9 * self.center_grid + 0.1 * t_logits.mean(0, keepdim=True)
        return total / (2 * (V - 1))


class TextbookBootMAE(nn.Module):
    """BootMAE as its code does it: both decoders get all tokens in reading order, all patches are predicted, a copy of
    the whole network gives the features of all of them, and the errors are masked afterwards. Names are published."""

    class Attention(nn.Module):
        def __init__(self, dim, heads, source=None):
            super().__init__()
            self.heads, inner = heads, dim // heads * heads
            if source:
                self.q, self.kv = nn.Linear(dim, inner, bias=False), nn.Linear(source, 2 * inner, bias=False)
            else:
                self.qkv = nn.Linear(dim, 3 * inner, bias=False)
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
            self.proj = nn.Linear(inner, dim)

        def forward(self, x, source=None):
            q, k, v = self.qkv(x).chunk(3, -1) if source is None else (self.q(x), *self.kv(source).chunk(2, -1))
            q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q + self.q_bias, k, v + self.v_bias))
            logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
            return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))

    class Block(nn.Module):
        def __init__(self, dim, heads, ratio, source=None):
            super().__init__()
            hidden, norm = int(dim * ratio), partial(nn.LayerNorm, eps=1e-6)
            self.norm1, self.attn = norm(dim), TextbookBootMAE.Attention(dim, heads)
            if source:
                self.norm3, self.norm4 = norm(dim), norm(source)
                self.c_attn = TextbookBootMAE.Attention(dim, heads, source)
            self.norm2 = norm(dim)
            self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(dim, hidden), fc2=nn.Linear(hidden, dim)))

        def forward(self, x, source=None):
            x = x + self.attn(self.norm1(x))
            if source is not None:
                x = x + self.c_attn(self.norm3(x), self.norm4(source))
            return x + self.mlp["fc2"](nn.functional.gelu(self.mlp["fc1"](self.norm2(x))))

    def __init__(self, img_size=224, patch_size=16, dim=192, depth=12, heads=12, decoder_dim=128, decoder_depth=2,
                 visible=49, mlp_ratio=4):
        super().__init__()
        p, N, norm = patch_size, (img_size // patch_size) ** 2, partial(nn.LayerNorm, eps=1e-6)
        self.patch_size, self.visible = p, visible
        self.cls_token, self.pos_embed = (nn.Parameter(torch.zeros(1, n, dim)) for n in (1, 1 + N))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, dim, p, p)))
        self.blocks = nn.ModuleList([self.Block(dim, heads, mlp_ratio) for _ in range(depth)])
        self.norm = norm(dim)
        self.de_pos_embed = nn.Parameter(torch.zeros(1, 1 + N, decoder_dim))
        self.mask_token, self.mask_token_1 = (nn.Parameter(torch.zeros(1, 1, d)) for d in (decoder_dim, dim))
        self.down, self.down_1 = nn.Linear(dim, decoder_dim), nn.Linear(dim, dim)
        self.decode_blocks, self.decode_blocks_1 = (
            nn.ModuleList([self.Block(d, heads, mlp_ratio, dim) for _ in range(decoder_depth)])
            for d in (decoder_dim, dim))
        self.decode_norm, self.decode_norm_1 = norm(decoder_dim), norm(dim)
        self.lm_head = nn.ModuleDict(dict(proj=nn.ConvTranspose2d(decoder_dim, 3, p, p)))
        self.lm_head_1 = nn.Linear(dim, dim)
        for table in (self.pos_embed, self.de_pos_embed):
            table.requires_grad = False

    def start_average(self):
        self.average = [copy.deepcopy(self).requires_grad_(False)]         # in a list, so that it is no part of this
        return self

    def encode(self, img, keep=None):
        x = self.patch_embed["proj"](img).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[-1]))
        x, after = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1), x], 1), []
        for block in self.blocks:
            x = block(x)
            after.append(x)
        return after

    def decode(self, x, source, restore, mask_token, positions, blocks):
        B, N = restore.shape
        hidden = mask_token + positions[:, 1:].expand(B, -1, -1)
        hidden = hidden.gather(1, restore.argsort(1)[:, self.visible:, None].expand(-1, -1, x.shape[-1]))
        patches = torch.cat([x[:, 1:], hidden], 1).gather(1, restore[..., None].expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], patches], 1)
        for block in blocks:
            x = block(x, source)
        return x[:, 1:]

    def forward(self, img, order, feature_weight=1.0):
        p, restore = self.patch_size, order.argsort(1)
        after = self.encode(img, order[:, :self.visible])
        x, (h, w) = self.norm(after[-1]), (side // p for side in img.shape[2:])
        pixels = self.decode_norm(self.decode(self.down(x), after[0], restore, self.mask_token, self.de_pos_embed,
                                              self.decode_blocks))
        pixels = self.lm_head["proj"](pixels.transpose(1, 2).unflatten(2, (h, w)))              # an image
        features = self.lm_head_1(self.decode_norm_1(self.decode(
            self.down_1(x), after[-1], restore, self.mask_token_1, self.pos_embed, self.decode_blocks_1)))
        with torch.no_grad():
            target = self.average[0].encode(img)[-1][:, 1:]
            cells = rearrange(img, "b c (h p) (w q) -> b c h w (p q)", p=p, q=p)
            cells = (cells - cells.mean(-1, keepdim=True)) / (cells.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            cells = rearrange(cells, "b c h w (p q) -> b c (h p) (w q)", p=p, q=p)
            mask = (restore >= self.visible).float().unflatten(1, (h, w)).unsqueeze(1)          # 1 = hidden
            weight = mask * (1 + nn.functional.avg_pool2d(mask, 3, 1, 1))
            weight_of_pixels = weight.repeat_interleave(p, 2).repeat_interleave(p, 3)
        pixel_loss = (weight_of_pixels * (pixels - cells) ** 2).mean() / mask.mean()
        features, target = (nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6) for x in (features, target))
        feature_loss = (weight.flatten(1)[..., None] * (features - target) ** 2).mean() / mask.mean()
        return pixel_loss + feature_weight * feature_loss

    @torch.no_grad()
    def update_average(self, momentum):
        slow, fast = self.average[0].state_dict(), self.state_dict()
        for name, value in slow.items():
            value.copy_(value * momentum + (1 - momentum) * fast[name])


def textbook_hog(img, cell=8):
    """Images (B, C, H, W) -> histograms of oriented gradients (B, C, 9, H / cell, W / cell), channel by channel."""
    sobel = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]], dtype=img.dtype, device=img.device)
    found = []
    for image in img:
        for channel in image:
            x = nn.functional.pad(channel[None, None], (1, 1, 1, 1), mode="reflect")
            gx, gy = (nn.functional.conv2d(x, kernel[None, None])[0] for kernel in (sobel, sobel.T))
            bins = (torch.atan2(gx, gy) / math.pi * 9).floor().long() % 9
            votes = torch.zeros(9, *channel.shape, dtype=img.dtype, device=img.device)
            votes.scatter_(0, bins, (gx ** 2 + gy ** 2).sqrt())
            sums = votes.unfold(1, cell, cell).unfold(2, cell, cell).sum((3, 4))
            found.append(nn.functional.normalize(sums, dim=0))
    return torch.stack(found).view(*img.shape[:2], 9, img.shape[2] // cell, img.shape[3] // cell)


class TextbookMIM(nn.Module):
    """SimMIM, MaskFeat and BEiT on a ViT of timm's blocks, in the order of the papers' text: mask tokens, positions,
    blocks, an answer for every patch, every patch asked, the error averaged over the hidden ones."""

    def __init__(self, target, answers, img_size=224, patch_size=16, dim=192, depth=12, heads=12, mlp_ratio=4):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block
        block = dict(mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
        self.target, self.patch_size, self.encoder = target, patch_size, nn.Module()
        self.encoder.patch_embed = PatchEmbed(img_size, patch_size, 3, dim)
        self.encoder.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.encoder.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.encoder.patch_embed.num_patches, dim))
        self.encoder.blocks = nn.ModuleList([Block(dim, heads, **block) for _ in range(depth)])
        self.encoder.norm = nn.LayerNorm(dim, eps=1e-6)
        self.decoder = nn.Sequential(nn.Conv2d(dim, answers, 1))

    def forward(self, img, mask, asked):
        """img (B, 3, H, W), mask (B, h, w), 1 where hidden; asked: img, its 8-bit values, or words (B, 1, h, w)."""
        net, p, hidden = self.encoder, self.patch_size, mask.flatten(1).float()                 # (B, N)
        x = net.patch_embed(img)                                                                # (B, N, D)
        x = x * (1 - hidden.unsqueeze(2)) + net.mask_token * hidden.unsqueeze(2)
        x = torch.cat([net.cls_token.expand(len(x), -1, -1), x], 1) + net.pos_embed
        for block in net.blocks:
            x = block(x)
        x = rearrange(net.norm(x)[:, 1:], "b (h w) d -> b d h w", h=mask.shape[1])
        answer = rearrange(self.decoder(x), "b a h w -> b (h w) a").float()                     # (B, N, A)
        if self.target == "tokens":
            each = nn.functional.cross_entropy(answer.flatten(0, 1), asked.flatten(), reduction="none")
            return (each.view(hidden.shape) * hidden).sum() / hidden.sum()
        if self.target == "hog":
            asked, p = textbook_hog(asked.float(), 8).flatten(1, 2), p // 8
        asked = rearrange(asked, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        each = (answer - asked).square() if self.target == "hog" else (answer - asked).abs()
        return (each.mean(2) * hidden).sum() / hidden.sum()
