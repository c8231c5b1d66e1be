"""Runs a function on several ranks: processes of their own, joined by gloo."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = [
    "cachedit",
    "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.qwenimage.pipeline_qwenimage",
    "diffusers.pipelines.wan.pipeline_wan",
]


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, seconds: float = 120, collective: float = 60
) -> list:
    """What `function(*args)` returns on each rank, by rank; a rank's exception is returned in words in its place.

    `seconds` limits the whole run, `collective` a single wait for other ranks. The function is found again by its
    module's file and its name, as test modules can't be imported by name.
    """
    context = multiprocessing.get_context("forkserver")  # imports once, for all ranks of all tests
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(world):
            receive, send = context.Pipe(duplex=False)
            code = (function.__code__.co_filename, function.__name__, args)
            process = context.Process(target=_rank, args=(rank, world, f"{folder}/store", collective, send, *code))
            process.start()
            send.close()
            processes.append(process)
            pipes.append(receive)
        try:
            return _collect(pipes, time.monotonic() + seconds)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"only ranks {sorted(results)} of {len(pipes)} have finished: {results}")
        for pipe in ready:
            try:
                results[pipes.index(pipe)] = pipe.recv()
            except EOFError:
                results[pipes.index(pipe)] = "the process has died"
    return [results[rank] for rank in range(len(pipes))]


def _rank(
    rank: int, world: int, store: str, collective: float, send: Connection, path: str, name: str, args: tuple
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        timeout = timedelta(seconds=collective)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        result = getattr(module, name)(*args)
        with contextlib.suppress(RuntimeError):  # another rank has failed, which is its own result
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        result = traceback.format_exc()
    send.send(result)
