"""Networks beyond the plain ViT and Swin of vit.py."""
