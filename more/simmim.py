"""
Masked image modelling on whole inputs: hidden patches become a mask token before the network, and a light head answers
for them. What is asked differs: pixels (SimMIM), oriented gradients (MaskFeat) or visual words (BEiT).
https://arxiv.org/abs/2111.09886, https://arxiv.org/abs/2112.09133, https://arxiv.org/abs/2106.08254

One node:   torchrun --standalone --nproc_per_node=8 -m more.simmim --model swin_lite --data imagenet --out out/simmim
MaskFeat:   torchrun ... -m more.simmim --target hog
BEiT:       torchrun ... -m more.simmim --target tokens --tokenizer tokenizer.pt2 (or ids.npy of `tools.pack ids`)
A teacher:  torchrun ... -m more.simmim --model swin_lite --distill-teacher simmim_swin_tiny.pth (D2-SimMIM)
A minute:   python -m more.simmim --demo (also with --target hog)
Preempted:  type the same command again
Expected:   not run yet at full size; docs/methods.md has the demo's last lines
"""
import copy
import math
import os
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import nn

import weights
from data import CenterCrops
from images.augment import denormalize, normalize, random_flip
from images.datasets import digest_of_names
from images.pictures import save_sheet
from nets.beit import BeitViT
from nets.hog import BINS, hog, strokes
from nets.masks import block_masks, to_patches, uniform_masks
from nets.swin_maps import WindowLogits, stage_outputs
from nets.tokens import load_tokenizer, read_ids, words_of
from runtime.folder import FileOfRun
from runtime.options import ProbeOptions, TrainingOptions, fail, opt, parse, read_command_line, value_errors_exit
from runtime.options import vit_config
from runtime.run import DTYPES, Run, decay_groups, launch, print_rank0, warmup_cosine
from vit import MODELS, SWINS, Swin, SwinBlock, gather_tokens, patchify
