"""LAPACK's pivoted Cholesky without Python's lock: scipy.linalg.lapack.dpstrf holds it while it runs, so that no other
thread could give a GPU work meanwhile (measured, docs/decisions.md). The routine is scipy's all the same."""

import ctypes
from collections.abc import Callable
from importlib import import_module

import numpy as np


def _routine(name: str, arguments: int) -> Callable[..., None]:
    """A routine of scipy.linalg.cython_lapack; all arguments are addresses."""
    capsule, api = import_module("scipy.linalg.cython_lapack").__pyx_capi__[name], ctypes.pythonapi
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    get = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(get(capsule, get_name(capsule)))


_DPSTRF = _routine("dpstrf", 9)


def pivoted_cholesky(matrix: np.ndarray, enough: float) -> tuple[np.ndarray, int]:
    """The order (n,) of the pivots and how many were found, with R in the upper triangle of M (n x n), in place:
    M[order][:, order] = R^T R in as many rows. The next pivot is the largest entry left on the diagonal; the first that
    is not above `enough` ends it.

    matrix: symmetric, float64, contiguous.
    """
    assert matrix.dtype == np.float64 and matrix.flags.c_contiguous and matrix.flags.writeable
    size, found, info = (np.array([value], np.intc) for value in (len(matrix), 0, 0))
    order, work = np.zeros(len(matrix), np.intc), np.empty(2 * len(matrix))
    # LAPACK's matrices lie by columns: what it makes the lower triangle is the upper one here
    arguments = [size, matrix, size, order, found, np.array([enough]), work, info]
    _DPSTRF(b"L", *(array.ctypes.data for array in arguments))
    return order.astype(np.int64) - 1, int(found[0])
