"""torch.distributed, as the conversion's steps use it; in a single process each function is the identity."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed.tensor import DTensor, distribute_tensor

from fermisvd.errors import FermiSVDError, reason

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # what one process does alone, the others wait for


def launched(name: str) -> int:
    """torchrun's variable of that name as a number: RANK, LOCAL_RANK, WORLD_SIZE or LOCAL_WORLD_SIZE; without torchrun,
    where WORLD_SIZE is 1, empty or not there, that of a single process. Raises FermiSVDError if it is no number."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}[name]
    try:
        count = int(os.environ.get("WORLD_SIZE") or 1)
        found = int(os.environ.get(name) or alone)
    except ValueError:
        raise FermiSVDError(f"{name} or WORLD_SIZE is no number; start with torchrun, or unset them") from None
    if count > 1 and "MASTER_ADDR" not in os.environ:
        raise FermiSVDError("WORLD_SIZE is set, but not MASTER_ADDR; start with torchrun, or unset WORLD_SIZE")
    return found if count > 1 else alone


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """The process group of a program that torchrun has started; gives the device of this process ("cuda:1").

    Outside torchrun, and inside a group that is there already, nothing is done.
    """
    if launched("WORLD_SIZE") == 1 or distributed.is_initialized():
        yield device
        return
    if device == "cuda":
        if launched("LOCAL_RANK") >= torch.cuda.device_count():
            raise FermiSVDError(f"{torch.cuda.device_count()} GPUs for more processes; give --nproc-per-node so many")
        torch.cuda.set_device(launched("LOCAL_RANK"))
        device = f"cuda:{launched('LOCAL_RANK')}"
    distributed.init_process_group("cpu:gloo,cuda:nccl" if "cuda" in device else "gloo", timeout=PATIENCE)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


_alone = False


@contextmanager
def alone() -> Iterator[None]:
    """What one process does while the others wait: inside it is the only one."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def process_count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() and not _alone else 1


def this_process() -> int:
    """This process' number; 0 writes what all have made together."""
    return distributed.get_rank() if distributed.is_initialized() and not _alone else 0


def own_part(items: Sequence[T]) -> list[T]:
    """This process' part of the items: every process_count()-th, from this_process() on."""
    return list(items[this_process() :: process_count()])


def own_run(items: Sequence[T]) -> list[T]:
    """This process' part of the items, as many as any other's to one, that stand beside each other."""
    start, stop = (number * len(items) // process_count() for number in (this_process(), this_process() + 1))
    return list(items[start:stop])


def own_passes(numbers: torch.Tensor, at_once: int) -> list[tuple[torch.Tensor, float]]:
    """This process' part of a batch's windows, given by their numbers, so many at once, each with its share of the
    batch. There are as many in every process, since all take part in every pass: where there is nothing left to do it
    is the first window again, of no share."""
    own = [part for part in numbers[this_process() :: process_count()].split(at_once) if len(part)]
    most = -(-len(numbers) // process_count())
    found = [(part, len(part) / len(numbers)) for part in own]
    return found + [(numbers[:1], 0.0)] * (-(-most // at_once) - len(own))


def sum_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, added up in place. Raises FermiSVDError if another process has ended."""
    if process_count() > 1:
        with _all_there():
            distributed.all_reduce(tensor)
    return tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process' part of a tensor that FSDP2 has divided; another tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 has divided, put together in every process; another tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_part(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy a value, which every process has whole, into a tensor, or into this process' part of one that is divided."""
    if isinstance(tensor, DTensor):
        value = value.to(tensor.device, tensor.dtype)
        value = distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None)
    local(tensor).copy_(local(value))


def from_first(value: T) -> T:
    """What process 0 has; of the others only that they ask."""
    if process_count() == 1:
        return value
    box = [value]
    with _all_there():
        distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def received() -> Any:
    """What process 0 gives by `from_first`, for the others."""
    return from_first(None)


@contextmanager
def _all_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FermiSVDError(
            f"process {distributed.get_rank()}: another process has ended, see its message ({reason(error)})"
        ) from None


def wait_for_all() -> None:
    """Until every process has come here."""
    sum_over_processes(torch.zeros(1))
