"""Data-aware SVD of a group: the low-rank factors with the least error on the calibration inputs."""

import torch


def data_aware_svd(weight: torch.Tensor, gram: torch.Tensor, damping: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """U and sigma of svd(W S), where C = S S^T is the Gram matrix of the inputs.

    weight: W, (m x n); gram: C, (n x n), may be singular; damping: added to the diagonal of C, relative to its mean.
    Returns U (m x k, orthonormal columns) and sigma (k, descending), float64, k = min(m, n).
    Only U and sigma are needed, so C is never factorised: U is the eigenbasis of W C W^T when m <= n, else that of
    R C R^T carried back by Q, W = Q R (DESIGN, Data-aware SVD). Dead channels and fewer tokens than channels are fine.
    """
    weight, gram = weight.double(), gram.double()
    if damping:
        gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    basis, core = (None, weight) if weight.shape[0] <= weight.shape[1] else torch.linalg.qr(weight)
    squared = core @ gram @ core.T
    eigenvalues, vectors = torch.linalg.eigh((squared + squared.T) / 2)
    u = vectors.flip(1)
    sigma = eigenvalues.flip(0).clamp(min=0).sqrt()
    return (u if basis is None else basis @ u), sigma


def low_rank_factors(u: torch.Tensor, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A = U_r (m x r) and B = U_r^T W (r x n) in float64; A B X is the best rank-r fit to W X."""
    a = u[:, :rank].double()
    return a, a.T @ weight.double()
