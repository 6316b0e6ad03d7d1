"""Work ahead of the writer, with a made-up function in place of PivGa."""

import threading
from contextlib import closing

import pytest

from fermisvd.errors import NumericalError
from fermisvd_convert.ahead import in_order, workers_beside


def test_results_come_in_order_whatever_is_done_first():
    """Each piece waits until the one behind it is done: the second is there before the first."""
    done = [threading.Event() for _ in range(8)]
    done[7].set()

    def work(item: int) -> int:
        if item % 2 == 0:
            assert done[item + 1].wait(10)
        done[item].set()
        return item * item

    assert list(in_order(work, range(8), "cpu", 2)) == [item * item for item in range(8)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_no_more_than_the_workers_are_ahead(workers):
    begun: list[int] = []
    with closing(in_order(begun.append, range(20), "cpu", workers)) as results:
        for taken, _ in enumerate(results):
            assert len(begun) - (taken + 1) <= (workers if workers > 1 else 0)
    assert sorted(begun) == list(range(20))


def test_one_worker_works_in_the_callers_thread():
    assert set(in_order(lambda _: threading.current_thread(), range(3), "cpu", 1)) == {threading.current_thread()}
    assert threading.current_thread() not in set(in_order(lambda _: threading.current_thread(), range(3), "cpu", 2))


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_out_in_its_place_and_ends_the_work(workers):
    begun, taken, before = [], [], threading.active_count()

    def work(item: int) -> int:
        begun.append(item)
        if item == 2:
            raise NumericalError("the factors overflow")
        return item

    with pytest.raises(NumericalError, match="the factors overflow"):
        for result in in_order(work, range(50), "cpu", workers):
            taken.append(result)
    assert taken == [0, 1] and len(begun) < 10 and threading.active_count() == before


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_what_ends_the_writer_ends_the_work(end):
    """Ctrl-C or a full disk, while others work: what has begun is waited for, nothing else begins."""
    begun, before = [], threading.active_count()
    with pytest.raises(end), closing(in_order(begun.append, range(50), "cpu", 3)) as results:
        next(results)
        raise end
    assert len(begun) < 10 and threading.active_count() == before


@pytest.mark.parametrize(
    ("device", "gib", "expected"), [("cpu", 80, 1), ("cuda", 80, 8), ("cuda:1", 8, 2), ("cuda", 1, 1)]
)
def test_a_small_gpu_holds_fewer_groups(device, gib, expected):
    """The gate of Llama-3.1-8B, 14,336 x 4,096, takes about 1.5 GiB."""
    assert workers_beside(device, gib * 2**30, 28 * 14336 * 4096) == expected
    assert workers_beside("cuda", 2**30, 0) == 8
