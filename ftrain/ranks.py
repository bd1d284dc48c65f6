"""Many ranks in one process, as threads: how plans are checked on a laptop, without a launcher.

The code under test is the code that trains: the same process groups and collectives, carried by
torch's threaded backend. Eager only, CPU only.
"""

import sys
import threading
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

T = TypeVar("T")


def run_ranks(world: int, fn: Callable[[int], T]) -> list[T]:
    """`fn(rank)` on each of `world` ranks at once -> their results, by rank.

    Inside, torch.distributed is initialised. Raises the first error of any rank; the others end.
    """
    results: list = [None] * world
    errors: list[tuple[int, BaseException]] = []
    store = dist.HashStore()

    def rank_main(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=world, store=store)
        try:
            results[rank] = fn(rank)
        except BaseException as error:  # SystemExit is how the backend ends the other ranks
            if not isinstance(error, SystemExit):
                errors.append((rank, error))
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads_before, hook_before = torch.get_num_threads(), sys.excepthook  # each process group wraps the hook anew
    torch.set_num_threads(1)
    threaded._install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        threads = [threading.Thread(target=rank_main, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        threaded._uninstall_threaded_pg()
        threaded.ProcessLocalGroup.reset()
        torch.set_num_threads(threads_before)
        sys.excepthook = hook_before
    if errors:
        raise errors[0][1]
    return results
