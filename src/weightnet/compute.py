"""Where and how widely to compute: settled by the environment, never by params; and the worker
processes, none of which outlives its work."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.queues import Queue
from typing import Any

import torch
from threadpoolctl import threadpool_limits

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS's sums in a fixed order


def single_thread() -> None:
    """Let this process compute with one thread.

    Processes that share cores wait for each other's threads, and NumPy's linear algebra rounds
    otherwise for each number of threads (`torch.set_num_threads` does not reach it).
    """
    torch.set_num_threads(1)
    threadpool_limits(1)


def default_device() -> torch.device:
    """The device that WEIGHTNET_DEVICE names, else CUDA if available, else the CPU.

    Raises:
        ValueError: if the variable names no device, or one that is not there.
    """
    name = os.environ.get("WEIGHTNET_DEVICE", "")
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # where kernels run and graphs are recorded
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"WEIGHTNET_DEVICE must name an available device such as cpu or cuda, "
            f"however: WEIGHTNET_DEVICE={name} ({reason})"
        ) from None
    return device


def default_jobs() -> int:
    """Worker processes: WEIGHTNET_JOBS, else one per core (one in all on a GPU).

    Raises:
        ValueError: if the variable is not a positive number.
    """
    text = os.environ.get("WEIGHTNET_JOBS", "")
    if text:
        if not text.isdigit() or int(text) < 1:
            raise ValueError(
                f"WEIGHTNET_JOBS must be a positive number, however: WEIGHTNET_JOBS={text!r}"
            )
        return int(text)
    return len(os.sched_getaffinity(0)) if default_device().type == "cpu" else 1


_notes: Queue[str] | None = None  # of a worker process


@contextmanager
def worker_pool(jobs: int) -> Iterator[tuple[ProcessPoolExecutor, Queue[str]]]:
    """Yield single-threaded worker processes, and the queue of what they `tell`.

    They end with the block, at once if it fails, and with this process, even if it is killed.
    Ctrl-C, which a terminal sends to all processes, is left to this one.

    Raises:
        BrokenProcessPool: if one is killed, even while others are being started.
    """
    context = multiprocessing.get_context("spawn")
    notes: Queue[str] = context.Queue()
    pool = ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_start_worker, initargs=(notes,)
    )
    try:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # children inherit it
        try:
            for _ in range(jobs):
                pool.submit(int)  # a process is started for each
        except (OSError, ValueError):
            pool.submit(int)  # refused if one was killed, which closed what the next is given
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield pool, notes
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def spread_map(tasks: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Yield ``map``, whose calls run in worker processes as far as there are cores and tasks, in
    this process if one is enough. Functions and arguments must be picklable."""
    jobs = min(default_jobs(), tasks)
    if jobs <= 1:
        yield map
        return
    with worker_pool(jobs) as (pool, _):
        yield pool.map


def tell(note: str) -> None:
    """Send a note from a worker process to the one that started it."""
    if _notes is not None:
        _notes.put(note)


def _start_worker(notes: Queue[str]) -> None:
    global _notes
    _notes = notes
    _end_with_parent()
    single_thread()


def _end_with_parent() -> None:
    """Watch the process that started this one, and end when it does: nobody else would."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
