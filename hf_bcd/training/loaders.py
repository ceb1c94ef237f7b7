"""Loaders and samples that the base class would divide, pad or draw otherwise."""

from collections.abc import Callable
from typing import Any

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Subset

from ..data import TransformedStream
from ..tasks import Task
from .config import BCDConfig


def stream_loader(
    stream: TransformedStream, args: BCDConfig, batch_size: int, collate: Callable[..., Any]
) -> DataLoader:
    """A loader of this process's part of a stream, which divides itself among processes and loader workers."""
    loader = DataLoader(
        stream.for_rank(args.process_index, args.world_size, args.dataloader_num_workers),
        batch_size=batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )
    # as Accelerator.prepare does, but for one process: more would divide the stream a second time
    return prepare_data_loader(
        loader, args.device, num_processes=1, process_index=0, put_on_device=True, dispatch_batches=False
    )


def part_of_process(samples: Any, task: Task, args: BCDConfig, *, whole: bool = False) -> DataLoader:
    """A loader of every n-th sample for the n processes, nothing padded, dropped or read twice; or of the `whole`."""
    mine = samples if whole else Subset(samples, range(args.process_index, len(samples), args.world_size))
    workers = args.dataloader_num_workers
    return DataLoader(
        mine,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=task.collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
    )


def spread_samples(dataset: Any, count: int) -> list[Any]:
    """Up to `count` samples spread over a data set; the first ones of a stream. The same on every process."""
    if isinstance(dataset, TransformedStream):
        return dataset.first(count)
    count = min(count, len(dataset))
    return [dataset[int(index * len(dataset) / count)] for index in range(count)]
