"""Healing as one of torchrun's processes; the first writes the rounded factors and the losses.

torchrun --nproc-per-node 2 -m tests.support.healed_in_processes DENSE CHECKPOINT RESULT [--shard]
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from fermisvd.healing import HealingSettings, heal, rounded_factors, trained_factors
from fermisvd.hf import load_model
from fermisvd.running import distributed
from fermisvd.running.blocks import KEPT_ACTIVATIONS
from fermisvd.running.streaming import fill_all, stream_model
from fermisvd.teacher import teach


def main(dense: Path, checkpoint: Path, result: Path, shard: bool) -> None:
    with distributed.process_group("cpu"):
        windows = torch.randint(2048, (9, 16), generator=torch.Generator().manual_seed(0))
        taught, student = teach(load_model(dense), windows, 3), stream_model(checkpoint, "cpu")
        fill_all(student, shard)
        sharded = [isinstance(factor, DTensor) for factor in trained_factors(student).values()]
        assert all(sharded) if shard else not any(sharded)
        settings, kept = HealingSettings(steps=6, learning_rate=3.0), 0 if shard else KEPT_ACTIVATIONS
        record = heal(student, taught, taught[:3], settings, batch_size=5, seed=0, at_once=2, kept_bytes=kept)
        factors = rounded_factors(student, torch.float32)
        if distributed.this_process() == 0:
            save_file(factors, result, {"record": json.dumps(record | {"processes": distributed.process_count()})})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), "--shard" in sys.argv)
