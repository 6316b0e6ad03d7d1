"""How calibration's matrices are kept."""

import pytest
import torch

from fermisvd.decomposition import OutputGram
from fermisvd_convert.ahead import in_order
from fermisvd_convert.stages.calibration import STRIP, Statistics, strip_bytes
from fermisvd_convert.workspace import Workspace

CPU = torch.device("cpu")


@pytest.mark.parametrize("width", [1, STRIP - 1, STRIP, 2 * STRIP, 3 * STRIP + 7])
def test_half_of_a_symmetric_matrix_is_kept_and_gives_the_whole(tmp_path, width):
    """Reference: the matrix, rounded to float32; and the bytes of the files."""
    workspace = Workspace(tmp_path)
    statistics = Statistics(workspace.stage("gram", 1), workspace.stage("outputs", 1))
    scale = torch.logspace(-12, 12, width, dtype=torch.float64)
    inputs, gradients = (x.T @ x for x in torch.randn(2, 50, width, dtype=torch.float64) * scale)
    statistics.keep({"a": inputs}, {"b": OutputGram(gradients, 0.1)})
    assert torch.equal(statistics.gram("a", CPU), inputs.float())
    output = statistics.output("b", CPU)
    assert torch.equal(output.matrix, gradients.float().double()) and output.mean == 0.1
    most_header = 200 + 200 * (width // STRIP + 1)
    for stage in (statistics.inputs, statistics.outputs):
        assert stage is not None and 0 < stage.bytes_written() - strip_bytes(width) < most_header
    assert strip_bytes(width) <= 4 * (width * (width + STRIP) // 2 + STRIP**2 / 2)


def test_several_threads_keep_matrices_of_one_name(tmp_path):
    """As beside a GPU: an input's and an output's of one layer at the same moment."""
    workspace = Workspace(tmp_path)
    statistics = Statistics(workspace.stage("gram", 1), workspace.stage("outputs", 1))
    matrices = [torch.full((STRIP, STRIP), float(number), dtype=torch.float64) for number in range(20)]

    def keep(number: int) -> None:
        if number % 2:
            statistics.keep({str(number // 2): matrices[number]}, {})
        else:
            statistics.keep({}, {str(number // 2): OutputGram(matrices[number], 0.1)})

    assert len(list(in_order(keep, range(20), "cpu", 4))) == 20
    for number in range(0, 20, 2):
        assert torch.equal(statistics.output(str(number // 2), CPU).matrix, matrices[number])
        assert torch.equal(statistics.gram(str(number // 2), CPU), matrices[number + 1].float())
