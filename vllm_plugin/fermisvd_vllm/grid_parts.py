"""The parts of a vLLM layer whose factors lie on grids, a class for each kind, as fermisvd_vllm.parts has them for
floating-point factors. They multiply alike; what is loaded and what multiplies differ."""

from collections.abc import Iterator, Sequence
from typing import ClassVar, Self

import torch

from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, MATRIX, PERMUTATION, SKELETON, Group
from fermisvd.schemes import PACKED, PER_INT32, SCALE, SCHEMES, SHAPE
from fermisvd_vllm.factors import Multiplies, Products
from fermisvd_vllm.layout import LayerSizes, Loaded, Stored
from fermisvd_vllm.parts import GroupPart, load, loaded_in_order, put


class GridPart(GroupPart):
    """Base of the kinds. A reload makes factors anew; on a GPU they then go into the storage of those before."""

    on_grid: ClassVar[bool] = True

    def __init__(self, members: Sequence[int], group: Group):
        super().__init__(members, group)
        self.schemes = {factor: SCHEMES[name] for factor, name in (group.schemes or {}).items()}

    def tensors(
        self, factor: str, member: int, rows: int, width: int, outputs: int | None = None, inputs: int | None = None
    ) -> Iterator[Stored]:
        """Those of a factor (rows x width) in this process. outputs, inputs: as of Stored, of the factor itself."""
        scheme = self.schemes[factor]
        for name, shape in scheme.shapes(factor, rows, width).items():
            if name.endswith(SHAPE):
                yield Stored(name, member, shape, dtype=torch.int64)
                continue
            shares = inputs  # inputs that one column stands for: 1, those of a scale, or of an int32
            per = (scheme.group_size or 1) if name.endswith(SCALE) else PER_INT32 if scheme.packed else 1
            if name.endswith(SCALE) and scheme.group_size is None:
                shares = None
            yield Stored(name, member, shape, outputs, shares, scheme.type_of(name), per)

    def of_grid(
        self, factor: str, members: Sequence[int], width: int, loaded: Loaded, products: Products
    ) -> Multiplies:
        """What multiplies by a factor of these members; the one before, with the new weights, where graphs hold it."""
        scheme = self.schemes[factor]
        numbers = loaded.stacked(f"{factor}{PACKED}" if scheme.packed else factor, members)
        made = products.grid_factor(scheme, numbers, loaded.stacked(f"{factor}{SCALE}", members), width)
        before = self.kept.get(factor)
        if before is None or products.on_cpu:  # where kernels hold what they made of the weights
            self.kept[factor] = before = made
        else:
            before.take_over(made)
        return before


class SvdGridPart(GridPart):
    """svd: t = x B^T; y = t A^T. A layer's first one has B of all of them, where they lie on one grid."""

    lowrank_b: Multiplies
    follows: bool  # whether an earlier part of the layer has B of this one
    ranks: list[int]  # of the parts whose B this one has

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        yield from self.tensors(LOWRANK_B, self.members[0], self.rank, sizes.inputs, inputs=1)
        for member in self.members:
            yield from self.tensors(LOWRANK_A, member, sizes.member_rows[member], self.rank, outputs=0)

    @classmethod
    def take_all(cls, parts: Sequence[Self], loaded: Loaded, products: Products) -> None:
        together = len({part.schemes[LOWRANK_B] for part in parts}) == 1
        for part in parts:
            of = [part] if not together else parts if part is parts[0] else []
            part.follows = not of
            part.ranks = [each.rank for each in of]
            if of:
                firsts = [each.members[0] for each in of]
                part.lowrank_b = part.of_grid(LOWRANK_B, firsts, loaded.inputs, loaded, products)
        super().take_all(parts, loaded, products)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.second = self.of_grid(LOWRANK_A, self.members, self.rank, loaded, products)

    @classmethod
    def shared_of_all(cls, parts: Sequence[Self], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return [t for part in parts if not part.follows for t in part.lowrank_b(x).split(part.ranks, dim=-1)]


class PivGaColumnsGridPart(GridPart):
    """pivga, columns: t = x[skel] + x[rest] D^T; y = t C_skel^T.

    On a CPU x is loaded in that order for all groups of a layer at once.
    """

    unsplittable = "row"
    interpolation: Multiplies | None
    places: torch.Tensor
    sources: torch.Tensor

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        yield from self.tensors(INTERPOLATION, self.members[0], self.rank, sizes.inputs - self.rank)
        yield Stored(PERMUTATION, self.members[0], (sizes.inputs,), dtype=torch.int32)
        for member in self.members:
            yield from self.tensors(SKELETON, member, sizes.member_rows[member], self.rank, outputs=0)

    @classmethod
    def take_all(cls, parts: Sequence[Self], loaded: Loaded, products: Products) -> None:
        super().take_all(parts, loaded, products)
        if products.on_cpu:
            sources = torch.cat([loaded.stacked(PERMUTATION, part.members) for part in parts]).long()
            parts[0].register_buffer("sources", parts[0].keep("sources", sources))

    def take(self, loaded: Loaded, products: Products) -> None:
        self.on_cpu, width = products.on_cpu, loaded.inputs - self.rank
        self.interpolation = self.of_grid(INTERPOLATION, self.members[:1], width, loaded, products) if width else None
        if not self.on_cpu:
            places = torch.argsort(loaded.stacked(PERMUTATION, self.members).long())
            self.register_buffer("places", self.keep("places", places))
        self.second = self.of_grid(SKELETON, self.members, self.rank, loaded, products)

    @classmethod
    def shared_of_all(cls, parts: Sequence[Self], x: torch.Tensor) -> Sequence[torch.Tensor]:
        if parts[0].on_cpu:
            s = x.new_empty(len(x), len(parts) * x.shape[-1])
            load(s, parts[0].sources, x)
            each = s.split(x.shape[-1], dim=-1)
        else:
            each = [part.skeleton_first(x) for part in parts]
        return [part.interpolated(own) for part, own in zip(parts, each, strict=True)]

    def skeleton_first(self, x: torch.Tensor) -> torch.Tensor:
        """s, the skeleton's inputs before the rest."""
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
        put(s, self.places, x)
        return s

    def interpolated(self, s: torch.Tensor) -> torch.Tensor:
        kept = s[..., : self.rank]
        return kept if self.interpolation is None else self.interpolation(s[..., self.rank :]) + kept


class PivGaRowsGridPart(GridPart):
    """pivga, rows: t = z = x R_skel^T; y = P [z ; z D^T]. order: of each output its place in [z | z D^T]."""

    one_product = False
    unsplittable = "column"
    skeleton: Multiplies
    interpolation: Multiplies | None
    order: torch.Tensor

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        [member] = self.members
        rows = sizes.member_rows[member]
        yield from self.tensors(SKELETON, member, self.rank, sizes.inputs, inputs=1)
        yield from self.tensors(INTERPOLATION, member, rows - self.rank, self.rank)
        yield Stored(PERMUTATION, member, (rows,), dtype=torch.int32)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.on_cpu = products.on_cpu
        self.skeleton = self.of_grid(SKELETON, self.members, loaded.inputs, loaded, products)
        order = torch.argsort(loaded.stacked(PERMUTATION, self.members).long())
        self.register_buffer("order", self.keep("order", order))
        rest = len(order) - self.rank
        self.interpolation = self.of_grid(INTERPOLATION, self.members, self.rank, loaded, products) if rest else None

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return self.skeleton(x)

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        p = t[..., :1] if self.interpolation is None else self.interpolation(t)
        return loaded_in_order(t, p, self.order)

    def write(self, t: torch.Tensor, y: torch.Tensor) -> None:
        q = t if self.interpolation is None else torch.cat([t, self.interpolation(t)], dim=-1)
        load(y, self.order, q)


class DenseGridPart(GridPart):
    """dense: y = x W^T, so t is x."""

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        for member in self.members:
            yield from self.tensors(MATRIX, member, sizes.member_rows[member], sizes.inputs, outputs=0, inputs=1)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.second = self.of_grid(MATRIX, self.members, loaded.inputs, loaded, products)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return x
