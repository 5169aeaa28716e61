"""Several ranks on one GPU, where a machine has fewer GPUs than a layout has ranks: for tests of what layouts compute,
and for comparisons of it. The ranks' times mean nothing."""

from __future__ import annotations

import os

import torch


def gpu_of(rank: int, ranks: int) -> torch.device:
    """The GPU of one of the `ranks` of this node, made current. Call it before the process group is made.

    NCCL and torch's symmetric memory refuse ranks that share a GPU unless told otherwise. To NCCL each rank calls
    itself a host of its own, so that messages go through sockets. Symmetric memory works as it does between GPUs.
    """
    gpus = torch.cuda.device_count()
    if gpus < ranks:
        os.environ.update(NCCL_HOSTID=f"rank {rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    os.environ["LOCAL_RANK"] = str(rank % gpus)  # which DeepSpeed takes for the number of the GPU
    device = torch.device("cuda", rank % gpus)
    torch.cuda.set_device(device)
    return device
