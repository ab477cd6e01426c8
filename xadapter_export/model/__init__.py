"""The X-adapter in PyTorch: plug-in layers, the frozen PLM and CLIP they sit between, and the checkpoint."""
