import threading
import time

import numpy as np

from fermisvd import lapack


def test_pivoted_cholesky():
    """Reference: the product, and the rule that each pivot is the largest entry left on the diagonal, by numpy."""
    rng = np.random.default_rng(0)
    columns = rng.standard_normal((100, 150)) * np.logspace(0, -2, 100)[:, None]
    gram = columns.T @ columns
    left, expected = gram.copy(), []
    for _ in range(100):
        pivot = int(left.diagonal().argmax())
        left -= np.outer(left[pivot], left[pivot]) / left[pivot, pivot]
        expected.append(pivot)
    triangle = gram.copy()
    order, found = lapack.pivoted_cholesky(triangle, 1e-9)
    assert found == 100 and order[:100].tolist() == expected and sorted(order) == list(range(150))
    triangle = np.triu(triangle[:found])
    np.testing.assert_allclose(triangle.T @ triangle, gram[order][:, order], atol=1e-9)


def test_others_run_meanwhile():
    """A thread that wakes every millisecond goes on; scipy.linalg.lapack.dpstrf would stop it."""
    columns, done, ticks = np.random.default_rng(0).standard_normal((1500, 1500)), threading.Event(), []

    def tick() -> None:
        while not done.wait(0.001):
            ticks.append(time.perf_counter())

    gram = columns.T @ columns
    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    lapack.pivoted_cholesky(gram, 0.0)
    end = time.perf_counter()
    done.set()
    thread.join()
    assert sum(begin < moment < end for moment in ticks) > 3
