"""`--num_processes N`: a command in several processes, by the launcher of accelerate."""

import os
import sys
from collections.abc import Sequence

import torch
from accelerate.commands.launch import launch_command, launch_command_parser
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..utils.messages import UserError


def launch(command: str, arguments: Sequence[str], number: str) -> None:
    """Runs `hf-bcd COMMAND ARGUMENTS` in processes that talk to each other, as `accelerate launch -m hf_bcd` does.

    Each has a GPU of its own; on a machine without any they talk over gloo. Ends the process if one of them fails, which has said
    why.

    Args:
        command: name of the command.
        arguments: its own, without `--num_processes`.
        number: how many processes, as it was typed.

    Raises:
        UserError: no whole number above 0, or more than there are GPUs; or the processes are started by a launcher already.
    """
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"--num_processes is {number!r}; give a whole number of at least 1.")
    if "LOCAL_RANK" in os.environ:
        raise UserError("--num_processes stands in a command that a launcher has started; leave one of both out.")
    devices = torch.accelerator.device_count()
    if 0 < devices < int(number):
        raise UserError(
            f"--num_processes is {number}, but this machine has {devices} GPU(s), and each process needs one."
        )
    if not devices:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # which the launcher passes on to one process only
    several = ["--multi_gpu"] if int(number) > 1 else []  # also without GPUs: `--cpu` silently starts one process
    options = [
        *several, "--num_processes", number, "--num_machines", "1", "--main_process_port", "0", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--module", "hf_bcd",
    ]  # fmt: skip
    try:
        launch_command(launch_command_parser().parse_args([*options, command, *arguments]))
    except ChildFailedError as error:
        sys.exit(next((one.exitcode for one in error.failures.values() if one.exitcode > 0), 1))
    except SignalException:
        sys.exit(130)
