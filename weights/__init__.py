"""Checkpoints: every public layout in (reading.py); ours out for others (export.py)."""
# ruff: noqa: F401, I001
from nets.naming import build, layer_of
from weights.reading import Weights, damage_in, digest, encoder_options, file_and_key, grid_of, hiera_options
from weights.reading import init_mlp_ratio, is_pyramid, is_swin, kind_of, load_classifier, load_encoder, load_into
from weights.reading import mlp_ratio_of, read, summary, swin_options, vit_options
