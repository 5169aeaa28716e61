"""The smallest distributed job: every rank says where it runs and what the sum over all ranks is."""

import argparse
import json
import os
import socket

import torch
import torch.distributed as dist

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, help="given by the deepspeed launcher; the environment has it as well")
parser.add_argument("folder", help="where each rank writes RANK.json")
arguments = parser.parse_args()

dist.init_process_group("gloo")
total = torch.tensor(2 ** dist.get_rank())
dist.all_reduce(total)
report = {"host": socket.gethostname(), "local_rank": int(os.environ["LOCAL_RANK"]), "total": int(total)}
report["environment"] = dict(os.environ)
with open(os.path.join(arguments.folder, f"{dist.get_rank()}.json"), "w") as file:
    json.dump(report, file)
dist.destroy_process_group()
