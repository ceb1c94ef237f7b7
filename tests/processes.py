"""Processes forked from one that has imported the package already, which would take each of them several seconds."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quick  # noqa: F401
import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes


multiprocessing.set_forkserver_preload(["hf_bcd.commands.distill", "torch.testing"])


def run_ranks(folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What `function(*args)` returns, tensors among it, in two processes with the variables that `torchrun` sets."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    start_processes(_rank, (port, folder, function, args), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(rank: int, port: int, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.save(_run(function, args), folder / f"rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def exit_code(function: Callable[..., None], *args: Any) -> int | None:
    """How a process ends that runs `function(*args)`: minus a signal's number if that has killed it."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(function, args))
    process.start()
    process.join()
    return process.exitcode


def _run(function: Callable[..., Any], args: tuple) -> Any:
    # its own data workers are started as in any process, not by the server that has forked this one
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    return function(*args)
