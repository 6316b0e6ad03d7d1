"""The parts of a vLLM layer, a class for each kind, as fermisvd.modules has them for transformers.

A part is a group of the checkpoint, or a member that stayed dense beside groups. Its class says which tensors it has,
how they become factors, and how they multiply: x -> t, the part's shared product, -> y, its members' outputs. A layer
asks for t of all its parts of a kind at once, since kinds save products, or launches, by that.

A new kind of part is a class here and its line in fermisvd_vllm.kinds. No vLLM here: linear.py brings what multiplies.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from fermisvd.errors import FormatError
from fermisvd.format import INTERPOLATION, LOWRANK_A, LOWRANK_B, PERMUTATION, SKELETON, WEIGHT, Group
from fermisvd_vllm.factors import Factor, Multiplies, Products, filled_up
from fermisvd_vllm.layout import LayerSizes, Loaded, Parallel, Stored
from fermisvd_vllm.tuning import noise

AnyTensor = TypeVar("AnyTensor", bound=torch.Tensor)  # a parameter stays one


class Part(nn.Module):
    """Base of the kinds: y = t second^T for the members at these positions of the layer.

    It stays the same object, and its tensors keep their storage, when weights are reloaded.
    """

    one_product: ClassVar[bool] = True  # y is that product alone: our op may do it for all parts of a layer together
    on_grid: ClassVar[bool] = False  # whether its factors are (fermisvd_vllm.grid_parts)
    group: Group | None = None  # None for a dense member
    second: Multiplies

    def __init__(self, members: Sequence[int]):
        super().__init__()
        self.members = tuple(members)
        self.kept: dict[str, Any] = {}  # what captured graphs read; a reload writes into it

    def check(self, sizes: LayerSizes) -> None:
        """Raises FormatError if the part does not fit the layer."""

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        """Its tensors in the checkpoint; what members share is with the first of them."""
        raise NotImplementedError

    @classmethod
    def take_all(cls, parts: Sequence[Self], loaded: Loaded, products: Products) -> None:
        """Makes the factors of all parts of this kind in a layer."""
        for part in parts:
            part.take(loaded, products)

    def take(self, loaded: Loaded, products: Products) -> None:
        """Makes the part's own factors, views of what was loaded or, filled up, copies."""
        raise NotImplementedError

    @classmethod
    def shared_of_all(cls, parts: Sequence[Self], x: torch.Tensor) -> Sequence[torch.Tensor]:
        """x: (..., n) -> t of each part of this kind in a layer, (..., r)."""
        return [part.shared(x) for part in parts]

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """t of one part, for kinds that gain nothing by doing all at once."""
        raise NotImplementedError

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        """t: (..., r) -> y: (..., m), members side by side."""
        return self.second(t)

    def write(self, t: torch.Tensor, y: torch.Tensor) -> None:
        """t (tokens, r) -> y (tokens, m), written there: what a CPU does instead."""
        if self.one_product:
            self.second.write(t, y)
        else:
            y.copy_(self.outputs(t))

    def factor(self, name: str, matrix: torch.Tensor, products: Products, packed: bool = True) -> Factor:
        """A factor in the storage that the part's factor of this name had before, if any."""
        factor = Factor(matrix, products, packed)
        factor.weight = self.keep(name, factor.weight)
        return factor

    def keep(self, name: str, tensor: AnyTensor) -> AnyTensor:
        """The tensor, in the storage that the part's tensor of this name had before, if any."""
        kept = self.kept.setdefault(name, tensor)
        if kept is not tensor:
            kept.data.copy_(tensor)
        return kept


class DensePart(Part):
    """A member that stayed dense: y = x W^T, so t is x. W: (m, n)."""

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        [member] = self.members
        yield Stored(WEIGHT, member, (sizes.member_rows[member], sizes.inputs), outputs=0, inputs=1)

    def take(self, loaded: Loaded, products: Products) -> None:
        weight = loaded.stacked(WEIGHT, self.members)
        self.second = self.factor(WEIGHT, weight, products, packed=not products.joins_outputs)

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        return x


class GroupPart(Part):
    """Base of the kinds that stand for a group. unsplittable: how a layer may not be split, since that would split what
    the group's permutation is over."""

    unsplittable: ClassVar[Parallel | None] = None
    group: Group

    def __init__(self, members: Sequence[int], group: Group):
        super().__init__(members)
        self.group, self.rank = group, group.rank

    def check(self, sizes: LayerSizes) -> None:
        """Raises FormatError for a skeleton on the side that tensor parallelism splits, or a rank above the matrix."""
        if sizes.tp_size > 1 and sizes.parallel == self.unsplittable:
            raise FormatError(
                f"{sizes.layer}: skeleton of {self.group.name} is on {self.group.side}, the side that tensor "
                "parallelism splits; serve with --tensor-parallel-size 1 or convert again"
            )
        limit = sizes.smaller_side(self.members)
        if self.rank > limit:
            raise FormatError(
                f"{sizes.layer}: rank {self.rank} of group {self.group.name} is larger than the matrix, side {limit}"
            )


class SvdPart(GroupPart):
    """svd: t = x B^T; y = t A^T. B: (r, n); A: (m, r).

    A layer's first one has B of all of them, on top of each other, for one product instead of several.
    """

    lowrank_b: Factor  # (sum of r, n)

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        yield Stored(LOWRANK_B, self.members[0], (self.rank, sizes.inputs), inputs=1)
        for member in self.members:
            yield Stored(LOWRANK_A, member, (sizes.member_rows[member], self.rank), outputs=0)

    @classmethod
    def take_all(cls, parts: Sequence[Self], loaded: Loaded, products: Products) -> None:
        b = loaded.stacked(LOWRANK_B, [member for part in parts for member in part.members])
        if products.tile > 1:
            each = b.split([part.rank for part in parts])
            b = torch.cat([filled_up(own, products.filled(len(own)), own.shape[1]) for own in each])
        parts[0].lowrank_b = parts[0].factor(LOWRANK_B, b, products)
        super().take_all(parts, loaded, products)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.width = products.filled(self.rank)
        a = loaded.stacked(LOWRANK_A, self.members)
        a = filled_up(a, len(a), self.width)
        self.second = self.factor(LOWRANK_A, a, products, packed=not products.joins_outputs)

    @classmethod
    def shared_of_all(cls, parts: Sequence[Self], x: torch.Tensor) -> Sequence[torch.Tensor]:
        return parts[0].lowrank_b(x).split([part.width for part in parts], dim=-1)


class PivGaColumnsPart(GroupPart):
    """pivga, columns: t = x[skel] + x[rest] D^T; y = t C_skel^T. D: (r, n-r); C_skel: (m, r).

    places: of each input its place in s = [x[skel] | x[rest]], where it is stored. On a CPU s is loaded instead, by
    sources, which a layer's first part has for all of them. Where ranks are filled up, t is so many inputs of s wide
    and the rest begins that much earlier: D and C_skel are zero there.
    """

    unsplittable = "row"
    interpolation: Factor
    places: torch.Tensor
    sources: torch.Tensor

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        yield Stored(INTERPOLATION, self.members[0], (self.rank, sizes.inputs - self.rank))
        yield Stored(PERMUTATION, self.members[0], (sizes.inputs,), dtype=torch.int32)
        for member in self.members:
            yield Stored(SKELETON, member, (sizes.member_rows[member], self.rank), outputs=0)

    @classmethod
    def take_all(cls, parts: Sequence[Self], loaded: Loaded, products: Products) -> None:
        super().take_all(parts, loaded, products)
        if products.on_cpu:
            sources = torch.cat([loaded.stacked(PERMUTATION, part.members) for part in parts]).long()
            parts[0].register_buffer("sources", parts[0].keep("sources", sources))
        if not products.uses_own_ops:
            return
        from fermisvd_vllm.kernels import COLUMNS  # here: there need not be a Triton where there is no GPU

        if all(part.rank < len(part.places) for part in parts):
            d = [part.interpolation.weight for part in parts]
            products.measure(COLUMNS, [noise(each, len(parts[0].places)) for each in d], d)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.uses_own_ops, self.on_cpu = products.uses_own_ops, products.on_cpu
        d = loaded.stacked(INTERPOLATION, self.members)
        self.width, self.rest = products.filled(self.rank), products.filled(d.shape[1])
        d = filled_up(d, self.width, self.rest, before=True)
        self.interpolation = self.factor(INTERPOLATION, d, products, packed=not products.uses_own_ops)
        if not self.on_cpu:
            places = torch.argsort(loaded.stacked(PERMUTATION, self.members).long())
            self.register_buffer("places", self.keep("places", places))
        c = loaded.stacked(SKELETON, self.members)
        c = filled_up(c, len(c), self.width)
        self.second = self.factor(SKELETON, c, products, packed=not products.joins_outputs)

    @classmethod
    def shared_of_all(cls, parts: Sequence[Self], x: torch.Tensor) -> Sequence[torch.Tensor]:
        if parts[0].on_cpu:
            s = x.new_empty(len(x), len(parts) * x.shape[-1])
            load(s, parts[0].sources, x)
            return [part.interpolated(own) for part, own in zip(parts, s.split(x.shape[-1], dim=-1), strict=True)]
        s = [part.skeleton_first(x) for part in parts]
        if parts[0].uses_own_ops:  # t in the place of s_skel
            torch.ops.fermisvd.columns(s, [part.interpolation.weight for part in parts])
            return [own[..., : part.rank] for own, part in zip(s, parts, strict=True)]
        return [part.interpolated(own) for own, part in zip(s, parts, strict=True)]

    def skeleton_first(self, x: torch.Tensor) -> torch.Tensor:
        """s, the skeleton's inputs before the rest."""
        s = torch.empty_like(x, memory_format=torch.contiguous_format)
        put(s, self.places, x)
        return s

    def interpolated(self, s: torch.Tensor) -> torch.Tensor:
        """t of s by plain products."""
        t = s[..., : self.width]
        return self.interpolation(s[..., s.shape[-1] - self.rest :]).add_(t) if self.rest else t


class PivGaRowsPart(GroupPart):
    """pivga, rows: t = z = x R_skel^T; y = P [z ; z D^T]. R_skel: (r, n); D: (m-r, r).

    order: of each output its place in [z | z D^T]; on a CPU in q = [z D^T | z], where both are written side by side.
    """

    one_product = False
    unsplittable = "column"
    skeleton: Factor
    interpolation: Factor
    order: torch.Tensor

    def stored(self, sizes: LayerSizes) -> Iterator[Stored]:
        [member] = self.members
        rows = sizes.member_rows[member]
        yield Stored(SKELETON, member, (self.rank, sizes.inputs), inputs=1)
        yield Stored(INTERPOLATION, member, (rows - self.rank, self.rank))
        yield Stored(PERMUTATION, member, (rows,), dtype=torch.int32)

    def take(self, loaded: Loaded, products: Products) -> None:
        self.on_cpu = products.on_cpu
        r, d = (loaded.stacked(name, self.members) for name in (SKELETON, INTERPOLATION))
        self.width, self.rest = products.filled(self.rank), products.filled(len(d))
        self.skeleton = self.factor(SKELETON, filled_up(r, self.width, r.shape[1]), products)
        self.interpolation = self.factor(INTERPOLATION, filled_up(d, self.rest, self.width), products)
        places = torch.argsort(loaded.stacked(PERMUTATION, self.members).long())
        if self.on_cpu:
            places = torch.where(places < self.rank, places + self.rest, places - self.rank)
        self.register_buffer("order", self.keep("order", places))

    def shared(self, x: torch.Tensor) -> torch.Tensor:
        """z, on a CPU at the end of q."""
        if not self.on_cpu:
            return self.skeleton(x)
        q = x.new_empty(len(x), self.rest + self.width)
        self.skeleton.write(x, q[:, self.rest :])
        return q

    def outputs(self, t: torch.Tensor) -> torch.Tensor:
        p = self.interpolation(t) if self.rank < len(self.order) else t[..., :1]
        return loaded_in_order(t, p, self.order)

    def write(self, t: torch.Tensor, y: torch.Tensor) -> None:
        if self.rest:
            self.interpolation.write(t[:, self.rest :], t[:, : self.rest])
        load(y, self.order, t)


def load(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """y = x[..., index], eagerly on a CPU. As integers, since torch's gather of 16-bit floats copies x and y."""
    if x.element_size() == 2:
        x, y = x.view(torch.int16), y.view(torch.int16)
    torch.gather(x, -1, index.expand(y.shape), out=y)


def put(y: torch.Tensor, index: torch.Tensor, x: torch.Tensor) -> None:
    """y[..., index] = x: a compiled norm stores x straight into y, where a gather is done apart (docs/decisions.md)."""
    if torch.compiler.is_compiling():
        y[..., index] = x
    else:  # eager, scatter_ is three times as fast; compiled it costs a copy of y
        y.scatter_(-1, index.expand(x.shape), x)


def loaded_in_order(z: torch.Tensor, p: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[z | p][..., places], without joining the two: a compiled residual add or norm loads from both."""
    rank = z.shape[-1]
    return torch.where(places < rank, z[..., places.clamp(max=rank - 1)], p[..., (places - rank).clamp(min=0)])
