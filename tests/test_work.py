"""The FLOPs of benchmarks.cost.work against torch's own counter, stage by stage of a real conversion."""

from functools import wraps

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.cost import work
from benchmarks.cost.shaped import SMALL, random_model, write_text
from benchmarks.cost.work import GRAM, MODEL, NARROW_PRODUCT, Run, conversion_work, opened_numbers, separate_groups
from fermisvd.fermigrad import optimise_ranks
from fermisvd.healing import heal
from fermisvd_convert import convert as program

STAGES = {"calibrate": "calibration", "choose_ranks": "FermiGrad", "heal_factors": "healing"}
SHAPE = SMALL | {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
RUN = Run(samples=64, length=32, batch_size=4, steps=10, heal_steps=4)


class Counter(TorchDispatchMode):
    """torch's formulas, without the tracking of modules in FlopCounterMode, which hooks of streamed ones break."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet is torch.ops.aten.addmm_:  # torch leaves it out
            self.flops += 2 * out.shape[0] * out.shape[1] * args[1].shape[1]
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        return out


@pytest.fixture(scope="module", params=["activations kept", "computed again"])
def counted(tmp_path_factory, request):
    """What torch counts of each stage."""
    folder, found = tmp_path_factory.mktemp("work"), {}
    random_model(folder / "model", SHAPE, "cpu")
    write_text(folder / "text.txt")

    def counting(run, name):
        @wraps(run)
        def stage(*arguments):
            with Counter() as counter:
                result = run(*arguments)
            found[name] = counter.flops
            return result

        return stage

    options = dict(samples=RUN.samples, gradient_samples=RUN.samples, sequence_length=RUN.length, steps=RUN.steps)
    options |= dict(batch_size=RUN.batch_size, heal_steps=RUN.heal_steps, groups="separate", bos=False, align=1)
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "computed again":
            patch.setattr(work, "KEPT_ACTIVATIONS", 0)
            for step in (optimise_ranks, heal):
                assert step.__kwdefaults__
                patch.setitem(step.__kwdefaults__, "kept_bytes", 0)
        for stage, name in STAGES.items():
            patch.setattr(program, stage, counting(getattr(program, stage), name))
        text = [str(folder / "text.txt")]
        done = program.convert(
            str(folder / "model"), folder / "out", 0.2, calibration=text, work=folder / "work", **options
        )
        groups = {group.name: group for group in separate_groups(SHAPE)}
        groups = [groups[name] for name in done.trace.groups]
        shares = [[1.0] * len(groups), *(step.share for step in done.trace.steps[:-1])]  # that a step begins with
        mus = [[s * g.full_rank for s, g in zip(each, groups, strict=True)] for each in shares]
        opened = [opened_numbers(groups, each) for each in mus]
        expected = {
            name: sum(flops for kind, _, flops in pieces if kind in (MODEL, GRAM, NARROW_PRODUCT))
            for name, pieces in conversion_work(SHAPE, 0.2, RUN, sum(opened) / len(opened)).items()
        }
    return {name: (flops, expected[name]) for name, flops in found.items()}


@pytest.mark.parametrize("stage", STAGES.values())
def test_flops_of_a_stage_are_torchs(counted, stage):
    torchs, ours = counted[stage]
    print(stage, torchs / ours)
    assert torchs == pytest.approx(ours, rel=0.05)
