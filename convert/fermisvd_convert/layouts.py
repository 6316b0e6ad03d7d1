"""What other methods call the factors of a layer in their checkpoints: W = A B, A (m x r), B (r x n).

A layout is two ends of tensor names; a new one is a new line of LAYOUTS. docs/importing.md says whose each is, and
where it was read.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fermisvd.errors import FormatError

Shapes = Mapping[str, tuple[int, ...]]  # of tensors, by name
PIVOTS, OTHERS = ".false_idx", ".true_idx"  # PIFA's names of the rows that are kept, and of the others
WEIGHT, BIAS = ".weight", ".bias"


@dataclass(frozen=True)
class Layout:
    """A layer q_proj has its A under `a` behind the name, its B under `b`; where the name itself is changed, `layer` is
    what both stand for: q_u_proj and q_v_proj for q_proj."""

    name: str
    a: str
    b: str
    layer: str = ""


LAYOUTS = (
    Layout("SVD-LLM", "_u_proj", "_v_proj", "_proj"),
    Layout("ASVD", ".ALinear", ".BLinear"),  # LowRankArena's and PIFA's too, and Dobi-SVD's the other way round
    Layout("LEMS", ".mod_b", ".mod_a"),
    Layout("AA-SVD", ".U", ".V"),
    Layout("Zero-Sum-SVD", ".u_proj", ".v_proj"),
    Layout("nn.Sequential", ".1", ".0"),
)


@dataclass(frozen=True)
class Found:
    """The tensors of a layer in a checkpoint, by their names there. pivots, others: of PIFA, which rows of W are B's,
    and which A makes of them; else A and B are the factors."""

    method: str
    a: str
    b: str
    bias: str | None = None
    pivots: str | None = None
    others: str | None = None

    @property
    def names(self) -> list[str]:
        """All but the bias'."""
        return [name for name in (self.a, self.b, self.pivots, self.others) if name]

    def factors(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A (m x r) and B (r x n), float64."""
        a, b = tensors[self.a].double(), tensors[self.b].double()
        if self.pivots and self.others:
            rows = torch.cat([tensors[self.pivots].flatten(), tensors[self.others].flatten()]).long()
            if sorted(rows.tolist()) != list(range(len(a) + len(b))):
                raise FormatError(f"{self.pivots} and {self.others}: not each row of the layer once; copy it again")
            whole = a.new_empty(len(a) + len(b), len(b))
            whole[rows] = torch.cat([torch.eye(len(b), dtype=torch.float64), a])
            a = whole
        return a, b


def find_layers(stored: Shapes, weights: Shapes) -> dict[str, Found]:
    """Layer -> its tensors. weights: shapes of the dense model's parameters; only their layers are looked for.

    Which of the two is A is told by the shapes, since methods differ. Raises FormatError for a layer that has one
    factor alone, whose factors do not make its weight, or that two layouts fit.
    """
    found: dict[str, Found] = {}
    for weight, shape in weights.items():
        layer = weight.removesuffix(WEIGHT)
        if layer == weight or len(shape) != 2:
            continue
        for layout in LAYOUTS:
            stem = layer.removesuffix(layout.layer) if layer.endswith(layout.layer) else None
            names = {stem + end + WEIGHT for end in (layout.a, layout.b)} if stem else set()
            if not (there := names & stored.keys()):
                continue
            if there != names:
                raise FormatError(
                    f"{layer}: {min(there)} is there, as {layout.name} has it, and not {min(names - there)}; "
                    "copy the checkpoint again"
                )
            if layer in found:
                raise FormatError(f"{layer}: factors as {found[layer].method} and as {layout.name} have them")
            found[layer] = _oriented(layer, layout, stem or "", stored, shape)
    return found


def _oriented(layer: str, layout: Layout, stem: str, stored: Shapes, shape: tuple[int, ...]) -> Found:
    """Raises FormatError unless the two make a matrix of that shape, in one way."""
    sizes = [stored[stem + end + WEIGHT] for end in (layout.a, layout.b)]
    said = f"{layer}: factors of shapes {sizes[0]} and {sizes[1]}"
    if any(len(size) != 2 for size in sizes):
        raise FormatError(f"{said}, where matrices were expected")
    if layer + PIVOTS in stored and layer + OTHERS in stored:
        (others, r), (rank, n) = sizes
        indices = [stored[layer + end] for end in (PIVOTS, OTHERS)]
        if r != rank or (others + rank, n) != tuple(shape) or indices != [(rank,), (others,)]:
            raise FormatError(f"{said} and indices of shapes {indices[0]} and {indices[1]} make no {tuple(shape)}")
        return Found("PIFA", stem + layout.a + WEIGHT, stem + layout.b + WEIGHT, None, layer + PIVOTS, layer + OTHERS)
    ways = []
    for a, b in ((layout.a, layout.b), (layout.b, layout.a)):
        m, r = stored[stem + a + WEIGHT]
        k, n = stored[stem + b + WEIGHT]
        if (m, n) == tuple(shape) and r == k:
            bias = stem + a + BIAS
            ways.append(Found(layout.name, stem + a + WEIGHT, stem + b + WEIGHT, bias if bias in stored else None))
    if len(ways) != 1:
        raise FormatError(f"{said} make {tuple(shape)} in {len(ways)} ways")
    return ways[0]
