"""The Triton kernels of qpass: every module registers its own with `qpass.runtime.gpu`."""
