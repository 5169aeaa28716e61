"""Attention kernels behind one protocol, and the choice among them.

A kernel is two pure functions: forward gives out and log-sum-exp, backward takes them back, so that ring attention can
run any of them block by block. Importing this package imports no flash-attention package; asking for availability does.
"""

from model.kernels.mask import AttentionMask, Documents
from model.kernels.operator import AttentionOperator, KernelOperator
from model.kernels.protocol import AttentionKernel, Capabilities, KernelUnavailable
from model.kernels.select import BACKENDS, KERNELS, select_kernel

__all__ = [
    "BACKENDS",
    "KERNELS",
    "AttentionKernel",
    "AttentionMask",
    "AttentionOperator",
    "Capabilities",
    "Documents",
    "KernelOperator",
    "KernelUnavailable",
    "select_kernel",
]
