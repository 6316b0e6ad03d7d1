"""Data-aware SVD of a group: the low-rank factors with the least error that the calibration sees.

`input` whitening weighs an error by the inputs it meets, svd(W S) with C = S S^T (the paper's). `kfac` also weighs it
by what the loss makes of it, svd(L^T W S) with G = L L^T, the covariance of the loss gradient at the layer's output
(docs/method.md, Whitening).

What is factorised and decomposed is float64, also of a C that was rounded to float32; only the factors' products may
be narrower (`_product_type`). Of C, which may be by far the largest matrix, no second one is made where it is not the
side that is decomposed.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from fermisvd.groups import LinearGroup

DAMPING = 1e-6  # of the median channel's energy: orders directions that calibration never saw, changes no other
OUTPUT_DAMPING = 0.1  # of each member's mean(diag G); measured, docs/decisions.md
FAINT = 1e-4  # of the group's mean(diag G): a member with less is damped as if it had that
SLICE = 1024  # columns of C, or rows of W, that are multiplied at a time
SMALLEST_DAMPING = 1e-9  # what `kfac` damps C by at least before it factorises it
NEGLIGIBLE = 1e-15  # pivots and eigenvalues below this part of a matrix with a unit diagonal are rounding


@dataclass(frozen=True)
class Factors:
    """W = a b, ordered: a[:, :r] b[:r] is the best rank-r fit, with squared error sum_{j>=r} sigma_j^2.

    a: (m x k); b: (k x n); float64, or float32 if W was no wider. sigma: (k,) descending, float64. k = min(m, n).
    orthonormal: whether a's columns are, so that b = a^T W.
    """

    a: torch.Tensor
    b: torch.Tensor
    sigma: torch.Tensor
    orthonormal: bool = False

    def truncated(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A (m x r) and B (r x n)."""
        return self.a[:, :rank], self.b[:rank]


@dataclass(frozen=True)
class OutputGram:
    """Gradient covariance of a group's output, on the side of W that is smaller.

    matrix: G (m x m) when m <= n, else W^T G W (n x n), so that nothing wider than k is ever kept; mean: of diag G.
    """

    matrix: torch.Tensor
    mean: float


def data_aware_svd(weight: torch.Tensor, gram: torch.Tensor, damping: float = 0.0) -> Factors:
    """`input` whitening: svd(W S), A = U_r, B = U_r^T W.

    weight: W, (m x n); gram: C, (n x n), may be singular; damping: of C, by `input_ridge`.
    Only U and sigma are needed, so C is never factorised: U is the eigenbasis of W C W^T when m <= n, else that of
    R C R^T carried back by Q, W = Q R (docs/method.md, Data-aware SVD). Dead channels and fewer
    tokens than channels are fine. Neither argument is changed.
    """
    product = _product_type(weight)
    ridge = input_ridge(gram, damping)
    if weight.shape[0] <= weight.shape[1]:
        sigma, u = _descending_eigenbasis(_input_response(weight, gram, ridge))
        u = u.to(product)
        return Factors(u, u.T @ weight.to(product), sigma, orthonormal=True)
    q, r = torch.linalg.qr(weight.double())
    sigma, u = _descending_eigenbasis(_input_response(r, gram, ridge))
    return Factors(q.to(product) @ u.to(product), (u.T @ r).to(product), sigma, orthonormal=True)


def kfac_svd(
    weight: torch.Tensor,
    gram: torch.Tensor,
    output: OutputGram,
    damping: float = 0.0,
    output_damping: float = OUTPUT_DAMPING,
) -> Factors:
    """`kfac` whitening: svd(L^T W S), A = L^{-T} U_r, B = U_r^T L^T W, which equals A = W S V_r, B = V_r^T S^{-1}.

    The first is used when m <= n, the second when m > n: only the smaller side is factorised, by a Cholesky
    decomposition of the damped matrix. damping: of C, by `input_ridge`; output_damping: added to the diagonal of G,
    relative to its mean. A group whose gradients or inputs vanish is decomposed by `input` whitening. No argument is
    changed.
    """
    if output.mean == 0 or not gram.any():
        return data_aware_svd(weight, gram, damping)
    product = _product_type(weight)
    root, squared = _between_roots(weight, gram, output, damping, output_damping)
    sigma, vectors = _descending_eigenbasis(squared)
    if weight.shape[0] <= weight.shape[1]:
        a = torch.linalg.solve_triangular(root.T, vectors, upper=True).to(product)
        return Factors(a, (root @ vectors).T.to(product) @ weight.to(product), sigma)
    b = torch.linalg.solve_triangular(root.T, vectors, upper=True).T.to(product)
    return Factors(weight.to(product) @ (root @ vectors).to(product), b, sigma)


def group_output_gram(
    members: Sequence[OutputGram], weights: Sequence[torch.Tensor], damping: float = 0.0
) -> OutputGram:
    """The members' gradient covariances as the group's, one output space per member: block-diagonal, without the
    correlation between members. weights: W_i, (m_i x n).

    damping: added to the diagonal of each member's G, relative to its own mean, so that a joint group weighs an error
    as its members do alone: v's gradients, which are the larger, would drown q's and k's in a common damping.
    """
    rows, columns = sum(len(w) for w in weights), weights[0].shape[1]
    mean = sum(g.mean * len(w) for g, w in zip(members, weights, strict=True)) / rows
    ridges = [damping * max(g.mean, FAINT * mean) for g in members]
    wide = [len(w) <= columns for w in weights]
    sides = [
        gram.matrix + ridge * torch.eye(len(weight)).to(gram.matrix) if kept else _output_response(weight, gram, ridge)
        for gram, weight, ridge, kept in zip(members, weights, ridges, wide, strict=True)
    ]
    if rows <= columns:
        return OutputGram(torch.block_diag(*sides), mean)
    total = torch.zeros(columns, columns, dtype=torch.float64, device=weights[0].device)
    for side, weight, kept in zip(sides, weights, wide, strict=True):
        total += weight.double().T @ side.double() @ weight.double() if kept else side
    return OutputGram(total, mean)


def group_factors(
    weights: Sequence[torch.Tensor],
    gram: torch.Tensor,
    outputs: Sequence[OutputGram] | None,
    change: torch.Tensor | None = None,
) -> Factors:
    """Factors of a group's W, its members' W_i (m_i x n) stacked, or of W M where `change` is M (n x n).

    gram: C of the inputs, (n x n); outputs: the members' gradient covariances, None for `input` whitening.
    """
    dense = weight = torch.cat(list(weights))  # as stored: made wider where it must be
    if change is not None:
        weight = dense.double() @ change
    if outputs is None:
        return data_aware_svd(weight, gram, DAMPING)
    output = group_output_gram(outputs, weights, OUTPUT_DAMPING)
    if change is not None and len(dense) > dense.shape[1]:  # W^T G W becomes M^T W^T G W M
        output = OutputGram(change.T @ output.matrix @ change, output.mean)
    return kfac_svd(weight, gram, output, DAMPING, output_damping=0.0)  # each member's is damped


def group_spectrum(
    weights: Sequence[torch.Tensor], gram: torch.Tensor, outputs: Sequence[OutputGram] | None
) -> torch.Tensor:
    """sigma of `group_factors`, (k,) descending, without the factors: eigenvalues cost a fraction of a basis."""
    weight, output = torch.cat(list(weights)), None
    if outputs is not None:
        output = group_output_gram(outputs, weights, OUTPUT_DAMPING)
    if output is not None and output.mean and gram.any():
        squared = _between_roots(weight, gram, output, DAMPING, 0.0)[1]
    else:
        narrow = weight if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight.double(), mode="r")[1]
        squared = _input_response(narrow, gram, input_ridge(gram, DAMPING))
    return torch.linalg.eigvalsh(squared).flip(0).clamp(min=0).sqrt()


def one_factor(factors: Factors) -> dict[str, torch.Tensor]:
    """What `both_factors` makes Factors of again, with W: sigma and one factor, the smaller one where it may be.

    That is the square one, a Cholesky root of a damped matrix times an orthogonal matrix: it has an inverse whatever W
    is, and the other factor is W times that. An orthonormal `a` (`input` whitening) is kept instead of b = a^T W, which
    is as singular as W.
    """
    name = "basis" if factors.orthonormal else "a" if len(factors.a) <= factors.b.shape[1] else "b"
    return {name: factors.b if name == "b" else factors.a, "sigma": factors.sigma}


def both_factors(weight: torch.Tensor, kept: Mapping[str, torch.Tensor]) -> Factors:
    """Factors of W (m x n) from what `one_factor` gave, a and b in its type.

    The inverse is of the factor as it was rounded, in float64, so that a b = W but for the rounding of the factor that
    is made here. Besides the result, a few k x k matrices and a slice of W are held in float64.
    """
    sigma = kept["sigma"]
    if "b" in kept:
        b, inverse = kept["b"], torch.linalg.inv(kept["b"].double())
        return Factors(torch.cat([(part.double() @ inverse).to(b) for part in weight.split(SLICE)]), b, sigma)
    orthonormal = "basis" in kept
    a = kept["basis" if orthonormal else "a"]
    inverse = a.double().T if orthonormal else torch.linalg.inv(a.double())
    b = torch.cat([(inverse @ part.double()).to(a) for part in weight.split(SLICE, dim=1)], dim=1)
    return Factors(a, b, sigma, orthonormal)


class Decomposition(ABC):
    """The groups' factors, each made once: those found, and those that they are joined to. Where weights, matrices and
    factors are kept is a subclass's."""

    @abstractmethod
    def factors(self, group: LinearGroup) -> Factors:
        """A (m x k), B (k x n), float32, and sigma (k,) of W = A B; what `made` gives, kept."""

    @abstractmethod
    def weights(self, group: LinearGroup) -> torch.Tensor:
        """W of a group, its members' stacked by rows, (m x n), as stored."""

    @abstractmethod
    def gram(self, source: str) -> torch.Tensor:
        """C of the input of a layer, (n x n)."""

    @abstractmethod
    def outputs(self, group: LinearGroup, device: torch.device) -> list[OutputGram] | None:
        """G of each member's output; None with `input` whitening."""

    def fit(self, group: LinearGroup, change: torch.Tensor | None, gram: torch.Tensor) -> Factors:
        """Factors of W, or of W M where `change` is M (n x n), for inputs with this Gram matrix (n x n)."""
        weights = self.weights(group).to(gram.device).split(list(group.member_rows))
        return group_factors(weights, gram, self.outputs(group, gram.device), change)

    def made(self, group: LinearGroup) -> Factors:
        """Factors of W, a and b rounded to float32."""
        exact = self.fit(group, None, self.gram(group.source))
        return replace(exact, a=exact.a.float(), b=exact.b.float())

    def whole(self, group: LinearGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """A (m x k) and B (k x n), W = A B."""
        factors = self.factors(group)
        return factors.a, factors.b

    def spectrum(self, group: LinearGroup) -> torch.Tensor:
        """sigma of a group whose factors may never be needed: not kept."""
        gram = self.gram(group.source)
        weights = self.weights(group).to(gram.device).split(list(group.member_rows))
        return group_spectrum(weights, gram, self.outputs(group, gram.device))

    def sigma(self, group: LinearGroup) -> torch.Tensor:
        """Singular values of a group's whitened W, (k,) descending, float64."""
        return self.factors(group).sigma


def _product_type(weight: torch.Tensor) -> torch.dtype:
    """float32 does for the factors of a W that is no wider (docs/scale.md), but not where torch is allowed to round
    what it multiplies in float32 (TF32)."""
    return torch.float32 if weight.dtype != torch.float64 and float32_is_whole() else torch.float64


def float32_is_whole() -> bool:
    """Whether torch may not round what it multiplies in float32 further."""
    return torch.get_float32_matmul_precision() == "highest"


def input_ridge(gram: torch.Tensor, damping: float) -> float:
    """What is added to the diagonal of C (n x n): the damping times the median energy of channels that are not dead.

    The mean would follow a few channels: in a language model one may have a million times the energy of the others. Nor
    may each channel's own energy be the measure, since such channels are large in the same tokens: C is then nearly
    singular between them, and a ridge of their size is not small there.
    """
    energy = gram.diagonal()
    seen = energy[energy > 0]
    return damping * seen.median().item() if len(seen) else 0.0


def _input_response(weight: torch.Tensor, gram: torch.Tensor, ridge: float) -> torch.Tensor:
    """W (C + ridge I) W^T, (m x m), float64. Besides W in float64 only SLICE columns of W C are held."""
    weight = weight.double()
    total = weight.new_zeros(len(weight), len(weight))
    for part, columns in zip(weight.split(SLICE, dim=1), gram.split(SLICE, dim=1), strict=True):
        total.addmm_((weight @ columns.double()).add_(part, alpha=ridge), part.T)
    return total


def _output_response(weight: torch.Tensor, output: OutputGram, ridge: float) -> torch.Tensor:
    """W^T (G + ridge I) W, (n x n), float64, of a W with more rows than columns. Only SLICE rows are made wider."""
    total = output.matrix.to(torch.float64, copy=True)
    for part in weight.split(SLICE):
        part = part.double()
        total.addmm_(part.T, part, alpha=ridge)
    return total


def _between_roots(
    weight: torch.Tensor, gram: torch.Tensor, output: OutputGram, damping: float, output_damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and L^T W C W^T L when m <= n, else S and S^T W^T G W S, (k x k), of the damped G and C."""
    output_ridge = output_damping * output.mean
    if weight.shape[0] <= weight.shape[1]:
        left = _root(output.matrix, output_ridge)
        return left, left.T @ _input_response(weight, gram, input_ridge(gram, damping)) @ left
    right = _root(gram, input_ridge(gram, max(damping, SMALLEST_DAMPING)))
    return right, right.T @ _output_response(weight, output, output_ridge) @ right


def _descending_eigenbasis(squared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the eigenvalues, descending, and the eigenvectors. Only the lower triangle is read."""
    eigenvalues, vectors = torch.linalg.eigh(squared)
    return eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _root(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    """Lower triangular L with L L^T = M + ridge I, float64: Cholesky's.

    Any square root gives the same factors, and this one costs a thirtieth of an eigendecomposition. A matrix that is
    singular all the same (no ridge, or M indefinite by its own rounding to float32), its channels scaled to a unit
    diagonal, has its eigenvalues lifted to the ridge's share of the largest channel, or to what is not rounding, and
    its root made triangular.
    """
    damped = matrix.to(torch.float64, copy=True)
    damped.diagonal().add_(ridge)
    energy = damped.diagonal().clone()
    root, failed = torch.linalg.cholesky_ex(damped)
    if not failed and (root.diagonal().square() > NEGLIGIBLE * energy).all():
        return root
    del root
    energy = energy.clamp(min=NEGLIGIBLE * energy.max())
    scale = energy.sqrt()
    eigenvalues, vectors = torch.linalg.eigh(damped.div_(scale[:, None]).div_(scale))
    least = max(ridge / energy.max().item(), NEGLIGIBLE * eigenvalues[-1].item())
    vectors.mul_(scale[:, None]).mul_(eigenvalues.clamp(min=least).sqrt())
    return torch.linalg.qr(vectors.T, mode="r")[1].T
