"""The processes of one build, as ``torchrun`` and ``accelerate-launch --multi_gpu`` start them.

``accelerate launch``, with a space, imports torchvision through timm before it starts anything. Where
torchvision was not built for the torch beside it, that fails in accelerate's own process, which
``cure_torchvision`` cannot reach; ``accelerate-launch`` is the same launcher and imports neither. Without
``--multi_gpu`` it starts one process where there is no accelerator.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed

_PATIENCE = timedelta(days=30)  # one process may have work for long after the others are done


@dataclass(frozen=True)
class Processes:
    """This process among the others.

    Attributes:
        rank: Its number.
        count: How many there are.
        local_rank: Its number on this machine, which is that of its accelerator.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the process that lists, assembles and speaks."""
        return self.rank == 0

    def wait_for_all(self) -> None:
        """Return when every process got here."""
        if self.count > 1:
            torch.distributed.barrier()


@contextmanager
def join_processes() -> Iterator[Processes]:
    """Join the other processes that the launcher started; alone without one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    torch.distributed.init_process_group("gloo", timeout=_PATIENCE)  # only waits: features go through files
    try:
        yield Processes(int(os.environ["RANK"]), count, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        torch.distributed.destroy_process_group()
