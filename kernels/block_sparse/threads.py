"""Many small jobs on the CPU, each on one thread.

Torch splits every single operation over all threads and waits for the last of them. Jobs of a dozen short operations
spend much of their time in those waits, above all where other programs share the cores.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Job = TypeVar("Job")
Result = TypeVar("Result")


def each_on_one_thread(work: Callable[[Job], Result], jobs: Iterable[Job]) -> Iterator[Result]:
    """``map(work, jobs)`` with as many jobs at a time as torch uses threads; not for work that records gradients."""
    threads = torch.get_num_threads()
    return _pool(threads).map(work, jobs) if threads > 1 else map(work, jobs)


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    started = threading.Barrier(threads)

    def start() -> None:
        torch.get_num_threads()  # a thread takes over the process's number when it first asks: before its own is set
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(threads, "block-sparse", start)
    list(pool.map(lambda _: None, range(threads)))
    torch.set_num_threads(threads)  # setting it in any thread sets the process's number too
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked process has none of the threads
