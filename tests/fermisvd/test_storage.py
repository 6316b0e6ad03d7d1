import pytest
import torch

from fermisvd.budget import Form, RankedGroup
from fermisvd.groups import LinearGroup, Side
from fermisvd.storage import compressed_tensors, stored_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("form", "members", "side"),
    [("svd", 3, "columns"), ("svd", 1, "rows"), ("pivga", 3, "columns"), ("pivga", 1, "columns"), ("pivga", 1, "rows")],
)
def test_bytes_are_known_beforehand(form: Form, members: int, side: Side, dtype):
    """Reference: the tensors themselves."""
    group = LinearGroup(("q", "k", "v")[:members], (12, 6, 4)[:members], 10, side, "q")
    a, b = torch.randn(group.rows, 5), torch.randn(5, 10)
    tensors = compressed_tensors(RankedGroup(group, 5, form), (a, b), dtype)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    assert list(stored_bytes(RankedGroup(group, 5, form), dtype).items()) == list(sizes.items())
