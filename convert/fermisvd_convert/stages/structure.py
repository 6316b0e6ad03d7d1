"""Which linear layers there are, in which groups, and which matrices stay dense."""

from dataclasses import asdict, dataclass

from fermisvd.groups import LinearGroup, find_groups, left_dense
from fermisvd.kept_dense import SPLIT_PLAINLY, reasons
from fermisvd_convert.conversion import Conversion, timed


@dataclass(frozen=True)
class Structure:
    """groups: of the linear layers; left_dense: matrices in no group (experts, routers) and their parameters; why: of
    those of them that no rank was looked for, the reason."""

    groups: list[LinearGroup]
    left_dense: dict[str, int]
    why: dict[str, str]


@timed("calibrate")
def find_structure(conversion: Conversion) -> Structure:
    """Found by a forward pass of a few tokens."""
    partition = conversion.options.partition

    def make() -> dict:
        model = conversion.stream()
        groups = find_groups(model, partition)
        left = left_dense(model, groups)
        return {"groups": [asdict(group) for group in groups], "left_dense": left, "why": reasons(model, left)}

    found = conversion.workspace.stage("structure", conversion.key, partition, SPLIT_PLAINLY).json(make)
    return Structure([group_of(entry) for entry in found["groups"]], found["left_dense"], found["why"])


def group_of(entry: dict) -> LinearGroup:
    """A group from its JSON form."""
    names = ("columns", "side", "source", "transposed")
    return LinearGroup(tuple(entry["members"]), tuple(entry["member_rows"]), **{name: entry[name] for name in names})
