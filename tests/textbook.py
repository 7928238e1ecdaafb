"""Plain forms of the methods, for comparison only: tests check our numbers against them, bench.py our speed."""
import io
from functools import partial

import torch
from einops import rearrange
from PIL import Image
from torch import nn
from torchvision import transforms


class TextbookMAE(nn.Module):
    """MAE from timm's blocks in the order of the paper's text: embed all patches, drop the hidden ones, decode all
    positions, predict all of them, average the error over the hidden ones. Names are the published ones."""

    def __init__(self, img_size=224, patch_size=16, dim=192, depth=12, heads=12, decoder_dim=96, decoder_depth=1,
                 decoder_heads=3, norm_pix=True):
        super().__init__()
        from timm.layers import PatchEmbed
        from timm.models.vision_transformer import Block
        block = dict(mlp_ratio=4, qkv_bias=True, norm_layer=partial(nn.LayerNorm, eps=1e-6))
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
