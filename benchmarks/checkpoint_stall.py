"""What a checkpoint costs: how long training waits for it, and how fast it is written.

    python benchmarks/checkpoint_stall.py --millions 30 --directory /tmp

One process on the CPU (or a GPU: --device cuda) trains a model of about so many million parameters; its state is 12
bytes for each. Prints, for a synchronous and an asynchronous save, the wait of the training thread (median of some
saves), the whole time until the checkpoint is complete, the bytes written per second, and a step's time while it is
written.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch.distributed as dist

from launch.build import build_engine
from launch.config import JobConfig
from launch.data.batches import Batches, SequenceSampler
from launch.data.corpus import Corpus
from launch.environment import choose_device, place_in_world
from launch.saving import resume_checks
from launch.saving.checkpoint import Checkpoints
from launch.saving.checkpoint_records import Progress
from launch.saving.storage import storage_at
from launch.stepper import Stepper
from parallel.mesh import ParallelMesh

_LENGTH, _BATCH = 64, 1


def job(millions: float, precision: str) -> JobConfig:
    """Eight layers; a layer has about 16 x hidden_size^2 parameters."""
    hidden = max(64, round((millions * 1e6 / (8 * 14)) ** 0.5 / 64) * 64)
    return JobConfig.from_yaml(
        f"""
        model:
          {{vocab_size: 256, hidden_size: {hidden}, intermediate_size: {hidden * 10 // 3}, num_hidden_layers: 8,
           num_attention_heads: {hidden // 64}, num_key_value_heads: {hidden // 64}, attention_backend: math}}
        data: {{source: files, files: [unused]}}
        optimizer: {{learning_rate: 0.001}}
        training:
          {{sequence_length: {_LENGTH}, global_batch_size: {_BATCH}, micro_batch_size: {_BATCH}, max_steps: 1000000,
           precision: {precision}, compile: false}}
        """
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=30, help="parameters of the model, in millions")
    parser.add_argument("--directory", help="disk to write to (default: the temporary directory)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--saves", type=int, default=3)
    options = parser.parse_args()
    device, _ = choose_device(options.device, place_in_world())
    from parallel.zero import initialize_distributed

    initialize_distributed(device.type)
    wanted = job(options.millions, "fp32" if options.device == "cpu" else "bf16")
    mesh = ParallelMesh.create(wanted.mesh_shape(1))
    engine, _ = build_engine(wanted, mesh, device)
    tokens = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    sampler = SequenceSampler(Corpus.from_documents("training", tokens, [len(tokens)], "0"), _LENGTH, seed=0)
    batches = Batches(sampler, _BATCH, _BATCH, 1, 0)
    stepper = Stepper(wanted, mesh, engine)
    step = 0

    def train() -> float:
        """Seconds of one step."""
        nonlocal step
        begun = time.perf_counter()
        float(stepper.train(step, stepper.cut(batches.micro_batches(step))).loss)
        step += 1
        return time.perf_counter() - begun

    train()
    alone = statistics.median(train() for _ in range(5))
    size = 12 * wanted.num_parameters
    print(f"{wanted.num_parameters / 1e6:.1f} million parameters, state {size / 1e6:.0f} MB, {device.type}")
    print(f"a step alone takes {alone:.3f} s")
    print("save           training waits      complete after      written      a step meanwhile")
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        for asynchronous in (False, True):
            checkpoints = Checkpoints(
                storage_at(str(Path(folder) / str(asynchronous))),
                keep_last=1,
                settings=resume_checks.settings(wanted),
                asynchronous=asynchronous,
            )
            stalls, wholes, steps = [], [], []
            for number in range(options.saves + 1):
                begun = time.perf_counter()
                checkpoints.save(engine, Progress(step), batches)
                stall = time.perf_counter() - begun
                during = [train()]
                while not (saved := checkpoints.outcome(wait=False)):
                    during.append(train())
                assert saved.error is None, saved.error
                if number:  # the first one also makes the host buffer
                    stalls.append(stall)
                    wholes.append(saved.seconds)
                    steps.extend(during)
            whole = statistics.median(wholes)
            print(
                f"{'asynchronous' if asynchronous else 'synchronous':<14} {statistics.median(stalls):>10.3f} s "
                f"{whole:>17.3f} s {size / whole / 1e6:>9.0f} MB/s {statistics.median(steps):>17.3f} s"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
