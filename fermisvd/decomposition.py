"""Data-aware SVD of a group: the low-rank factors with the least error that the calibration sees.

`input` whitening weighs an error by the inputs it meets, svd(W S) with C = S S^T (the paper's). `kfac` also weighs it
by what the loss makes of it, svd(L^T W S) with G = L L^T, the covariance of the loss gradient at the layer's output
(DESIGN, Whitening).
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Factors:
    """W = a b, ordered: a[:, :r] b[:r] is the best rank-r fit, with squared error sum_{j>=r} sigma_j^2.

    a: (m x k); b: (k x n); sigma: (k,) descending; k = min(m, n). float64.
    """

    a: torch.Tensor
    b: torch.Tensor
    sigma: torch.Tensor

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

    weight: W, (m x n); gram: C, (n x n), may be singular; damping: added to the diagonal of C, relative to its mean.
    Only U and sigma are needed, so C is never factorised: U is the eigenbasis of W C W^T when m <= n, else that of
    R C R^T carried back by Q, W = Q R (DESIGN, Data-aware SVD). Dead channels and fewer tokens than channels are fine.
    """
    weight, gram = weight.double(), damped(gram, damping)
    basis, core = (None, weight) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight)
    sigma, u = _descending_eigenbasis(core @ gram @ core.T)
    u = u if basis is None else basis @ u
    return Factors(u, u.T @ weight, sigma)


def kfac_svd(
    weight: torch.Tensor, gram: torch.Tensor, output: OutputGram, damping: float = 0.0, output_damping: float = 0.1
) -> Factors:
    """`kfac` whitening: svd(L^T W S), A = L^{-T} U_r, B = U_r^T L^T W, which equals A = W S V_r, B = V_r^T S^{-1}.

    The first is used when m <= n, the second when m > n: only the smaller side is factorised, by an eigendecomposition
    of the damped matrix. output_damping: added to the diagonal of G, relative to its mean; damping: the same for C.
    A group whose gradients or inputs vanish is decomposed by `input` whitening.
    """
    if output.mean == 0 or not gram.any():
        return data_aware_svd(weight, gram, damping)
    weight, ridge = weight.double(), output_damping * output.mean
    if weight.shape[0] <= weight.shape[1]:
        left, left_inverse = _root(output.matrix.double() + ridge * _eye(output.matrix))
        whitened = left.T @ weight
        sigma, u = _descending_eigenbasis(whitened @ damped(gram, damping) @ whitened.T)
        return Factors(left_inverse.T @ u, u.T @ whitened, sigma)
    right, right_inverse = _root(damped(gram, max(damping, 1e-9)))
    response = output.matrix.double() + ridge * (weight.T @ weight)
    sigma, v = _descending_eigenbasis(right.T @ response @ right)
    return Factors(weight @ right @ v, v.T @ right_inverse, sigma)


def damped(gram: torch.Tensor, damping: float) -> torch.Tensor:
    """C with `damping` times its mean diagonal added to the diagonal, float64."""
    gram = gram.double()
    return gram + damping * gram.diagonal().mean() * _eye(gram) if damping else gram


def _eye(matrix: torch.Tensor) -> torch.Tensor:
    return torch.eye(len(matrix), dtype=torch.float64, device=matrix.device)


def _descending_eigenbasis(squared: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Square roots of the eigenvalues, descending, and the eigenvectors."""
    eigenvalues, vectors = torch.linalg.eigh((squared + squared.T) / 2)
    return eigenvalues.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _root(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric square root of a positive definite matrix, and its inverse."""
    eigenvalues, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    roots = eigenvalues.clamp(min=1e-15 * eigenvalues[-1].item()).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
