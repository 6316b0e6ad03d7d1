"""What can be said of a folder without vLLM: it is whole, fits its model, and no group reaches out of a layer of vLLM's
as far as these are known (fermisvd.fused)."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from fermisvd.errors import FormatError, OptionError
from fermisvd.files import TensorInfo, read_headers
from fermisvd.format import WEIGHT, CheckpointConfig, stacked_shape, validate_checkpoint
from fermisvd.fused import FUSED, fused_with
from fermisvd.hf import check_architecture
from fermisvd_vllm.answer import Answer, kind_of
from fermisvd_vllm.kinds import parts_of
from fermisvd_vllm.layout import LayerSizes, numbers_held, slots_of


def ask_arithmetic(found: Answer, folder: Path, tensor_parallel_size: int) -> None:
    """Fills in the answer for one process. Raises FermiSVDError naming group, tensor or option."""
    if tensor_parallel_size > 1:
        raise OptionError(
            "--tensor-parallel-size: which layers are split, and how, is vLLM's to say, and it is not installed here"
        )
    config = validate_checkpoint(folder)
    check_architecture(folder)
    headers = read_headers(folder)
    groups, shapes = config.group_of(), shapes_of(config, headers, folder)
    held, compressed = [(0, 0)], Counter()
    for members in dict.fromkeys(tuple(m for m in fused_with(name) if m in shapes) for name in groups):
        layer = " + ".join(members)
        check_known(config, members)
        parts = parts_of(members, groups, layer)
        assert parts is not None  # one of its members has a group
        columns = shapes[members[0]][1]
        sections = [((shapes[m][0], shapes[m][0]),) for m in members]
        held.append(numbers_held(slots_of(parts, LayerSizes(sections, (columns, columns), "replicated", 1, layer))))
        last = [name.rpartition(".")[2] for name in members]
        compressed[kind_of(f"{members[0].rpartition('.')[0]}.{' + '.join(last)}")] += 1
    found.compressed, found.loaded = dict(compressed), len(headers)
    found.held = {
        "factors": sum(map(sum, held)),
        "replicated": 0,
        "dense": sum(rows * columns for name, (rows, columns) in shapes.items()),
    }


def shapes_of(config: CheckpointConfig, headers: Mapping[str, TensorInfo], folder: Path) -> dict[str, tuple[int, int]]:
    """(rows, columns) of the groups' members, and of dense layers that vLLM fuses with them."""
    shapes: dict[str, tuple[int, int]] = {}
    for group in config.groups:
        rows, columns = stacked_shape(group, headers, folder)
        shapes |= {name: (own, columns) for name, own in zip(group.members, rows, strict=True)}
    for name in [other for member in shapes for other in fused_with(member)]:
        if name not in shapes and (info := headers.get(f"{name}.{WEIGHT}")):
            rows, columns = info.shape
            shapes[name] = rows, columns
    return shapes


def check_known(config: CheckpointConfig, members: tuple[str, ...]) -> None:
    """Raises FormatError for a joint group of layers of which it is not known here whether vLLM fuses them."""
    group = config.group_of().get(members[0])
    known = {last for names in FUSED for last in names}
    if group and len(group.members) > 1 and not any(m.rpartition(".")[2] in known for m in group.members):
        raise FormatError(
            f"group {group.name}: whether vLLM fuses {' and '.join(group.members)} is vLLM's to say, and it is not "
            "installed here; ask where it is, or convert again with --groups separate"
        )
