"""FermiGrad as one of torchrun's processes; the first writes ranks and losses.

torchrun --nproc-per-node 2 -m tests.support.ranks_of_processes MODEL RESULT [--shard]
"""

import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from fermisvd.budget import Budget
from fermisvd.decomposition import data_aware_svd
from fermisvd.fermigrad import FermiGradSettings, optimise_ranks
from fermisvd.gates import install_gates
from fermisvd.groups import find_groups, stacked_weight
from fermisvd.hf import load_model
from fermisvd.running import distributed
from fermisvd.running.blocks import KEPT_ACTIVATIONS
from fermisvd.running.streaming import stream_model
from fermisvd.teacher import teach


def main(folder: Path, result: Path, shard: bool) -> None:
    with distributed.process_group("cpu"):
        dense = load_model(folder)
        groups = find_groups(dense, "separate")
        factors = {
            g.name: data_aware_svd(stacked_weight(dense, g), torch.eye(g.columns)).truncated(g.full_rank)
            for g in groups
        }
        model = stream_model(folder, "cpu")
        gated = install_gates(model, groups, lambda g: factors[g.name], shard)
        sharded = [isinstance(p, DTensor) for block in model.model.layers for p in block.parameters()]
        assert all(sharded) if shard else not any(sharded)
        windows = torch.randint(2048, (7, 16), generator=torch.Generator().manual_seed(0))  # 3 and 1 a batch
        kept = 0 if shard else KEPT_ACTIVATIONS  # so that blocks are checkpointed, too
        taught = teach(dense, windows, 3)
        budget, settings = Budget(0.7, "pivga"), FermiGradSettings(steps=8)
        mus, records = optimise_ranks(
            model, groups, gated, taught, budget, settings, batch_size=3, seed=0, kept_bytes=kept
        )
        if distributed.this_process() == 0:
            found = {"mus": mus, "kl": [r["kl"] for r in records], "processes": distributed.process_count()}
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), "--shard" in sys.argv)
