"""Checkpoints: every public layout in (reading.py); ours out for others (export.py)."""
# ruff: noqa: F401, I001
from nets.naming import build, layer_of
from weights.reading import Weights, damage_in, digest, encoder_options, file_and_key, grid_of, init_mlp_ratio
from weights.reading import is_pyramid, is_swin, load_classifier, load_encoder, load_into, mlp_ratio_of, read
from weights.reading import summary, swin_options, vit_options
