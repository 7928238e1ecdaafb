"""Checkpoints: every public layout in (reading.py); ours out for timm, as safetensors, as ONNX (export.py)."""
# ruff: noqa: F401, I001
from weights.reading import Weights, digest, file_and_key, read, summary
from weights.reading import build, encoder_options, grid_of, is_swin, layer_of, mlp_ratio_of
from weights.reading import load_classifier, load_encoder, load_into, swin_options, vit_options
