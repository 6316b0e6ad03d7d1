"""What inductor makes of residual, norm and a PivGa layer: the permutation has no kernel of its own."""

import subprocess
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("triton")
pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def calls():
    """(case, option of the script) -> names of what the compiled graph calls."""
    found = {}
    for option in ("", "--gpu"):
        command = [sys.executable, "-m", "benchmarks.speed.generated_code", *option.split()]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
        for section in printed.strip().split("\n\n"):
            case, *names = (line.strip(" :") for line in section.strip().splitlines())
            found[case, option] = [name.removesuffix(".default").removesuffix(".run") for name in names]
    return found


def generated(names):
    return [name for name in names if name.startswith(("cpp_fused", "triton_"))]


PRODUCT = "torch.ops._C.onednn_mm"  # vLLM's, on a CPU


def test_one_group_on_a_gpu(calls):
    """The norm stores its output in the skeleton's order; two products follow."""
    _, norm, *layer = calls["norm, columns of one group", "--gpu"]
    assert "index_put" in norm
    assert "rsqrt" in norm
    assert layer == ["torch.ops.fermisvd.columns", PRODUCT]


def test_three_groups_on_a_gpu(calls):
    _, norm, *layer = calls["norm, columns of three", "--gpu"]
    assert "index_put" in norm
    assert "rsqrt" in norm
    assert layer == ["torch.ops.fermisvd.columns", "torch.ops.fermisvd.outputs"]


def test_rows_on_a_gpu(calls):
    """Two products; the norm loads from both in order."""
    first, second, norm, _ = calls["rows, norm", "--gpu"]
    assert first == second == PRODUCT
    assert "where" in norm
    assert "rsqrt" in norm


@pytest.mark.parametrize("case", ["norm, columns of one group", "norm, columns of three"])
def test_columns_on_a_cpu(calls, case):
    """The norm stores for all groups; what comes after it adds and joins."""
    norm, *others = generated(calls[case, ""])
    assert "index_put" in norm
    assert "rsqrt" in norm
    assert not any(word in name for name in others for word in ("index", "gather", "scatter"))


def test_rows_on_a_cpu(calls):
    """Outputs are stored in order, those of D where the norm is computed."""
    *first, norm = generated(calls["rows, norm", ""])
    assert len(first) <= 1
    assert "index_put" in norm
    assert "rsqrt" in norm
