"""`fermisvd` as one of torchrun's processes, models divided among all as if none had room for a whole one.

torchrun --nproc-per-node 2 -m tests.support.converted_divided convert MODEL OUT ...
"""

from dataclasses import replace
from typing import Any

from torch.distributed.tensor import DTensor

from fermisvd_convert import cli, preflight
from fermisvd_convert.memory import Limits, Passes
from fermisvd_convert.stages import joining

fitting, loading = preflight.passes_that_fit, joining.load_products


def divided(*arguments: Any) -> tuple[Passes, Limits]:
    passes, limit = fitting(*arguments)
    return replace(passes, parts=arguments[-1]), limit


def checked(*arguments: Any) -> Any:
    student = loading(*arguments)
    assert sum(isinstance(parameter, DTensor) for parameter in student.parameters()) > 10
    return student


if __name__ == "__main__":
    preflight.passes_that_fit, joining.load_products = divided, checked
    cli.app()
