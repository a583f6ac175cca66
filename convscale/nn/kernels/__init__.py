"""Kernels for GPUs, in Triton, each beside a plain PyTorch twin that defines it and serves every other device.

They are **off** until a committed record of a card generation shows a gain there: none was run on a card yet.
``CONVSCALE_KERNELS=1`` turns them on where Triton and a GPU are.
"""
