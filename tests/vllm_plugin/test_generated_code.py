"""What inductor makes of residual, norm and a PivGa layer: the permutation has no kernel of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "generated_code.py"


@pytest.fixture(scope="module")
def kernels():
    """(case, option of the script) -> names of the compiled kernels, products left out."""
    found = {}
    for option in ("", "--triton"):
        command = [sys.executable, str(SCRIPT), *option.split()]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
        for section in printed.strip().split("\n\n"):
            case, *calls = (line.strip(" :") for line in section.strip().splitlines())
            found[case, option] = [call for call in calls if call.startswith(("cpp_fused", "triton_"))]
    return found


@pytest.mark.parametrize("option", ["", "--triton"])
@pytest.mark.parametrize("groups", [1, 2])
def test_norm_stores_what_each_group_wants(kernels, groups, option):
    (norm,) = kernels[f"norm, columns of {groups} group(s)", option]
    assert "index_put" in norm
    assert "rsqrt" in norm


def test_norm_loads_outputs_of_a_rows_layer_in_order_on_a_gpu(kernels):
    (norm,) = kernels["rows, norm, loaded in order", "--triton"]
    assert "where" in norm
    assert "rsqrt" in norm


def test_outputs_of_a_rows_layer_are_stored_once_on_a_cpu(kernels):
    """One kernel for z, which the product after it reads, and the norm's own, which stores the rest."""
    first, norm = kernels["rows, norm, stored in order", ""]
    assert "index_put" in first
    assert "rsqrt" in norm
