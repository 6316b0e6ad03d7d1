"""What inductor makes of residual, norm and a PivGa layer: on a GPU the permutation has no kernel of its own."""

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


PRODUCT = "torch.ops._C.onednn_mm"  # vLLM's, on a CPU
LAYER = "torch.ops.fermisvd.layer_product"


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


def test_on_a_cpu_the_graph_does_not_show_ranks_or_groups(calls):
    """A layer is one op, so that all decoder blocks share what is compiled."""
    before, norm, layer = calls["norm, columns of one group", ""]
    assert layer == LAYER
    assert "rsqrt" in norm
    assert calls["norm, columns of three", ""] == [before, norm, layer]


def test_rows_on_a_cpu(calls):
    layer, norm, _ = calls["rows, norm", ""]
    assert layer == LAYER
    assert "rsqrt" in norm
