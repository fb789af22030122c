"""qpass: a PyTorch compiler pass that makes transformers smaller and faster."""
