"""One rank of a run on a stream, for test_streaming_two_processes.py: which images it trained on, and what came out."""

import sys
import zlib
from pathlib import Path

import torch


sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from hf_bcd.runs.arguments import DataArguments
from hf_bcd.runs.experiment import load_data


def main() -> None:
    folder, workers = Path(sys.argv[1]), int(sys.argv[2])
    arguments = DataArguments(dataset_name=str(folder / "data"), streaming=True, shuffle_buffer=4)
    run = tiny.trainer(
        folder / "run",
        model=tiny.freeze_batchnorm(tiny.tiny_timm(dropout=0.0)),
        data=load_data(arguments),
        max_steps=10,
        per_device_train_batch_size=1,
        dataloader_num_workers=workers,
    )
    transform = run.train_dataset.transform
    run.train_dataset.transform = lambda sample: {
        **transform(sample),
        "image": zlib.crc32(sample["image"].tobytes()),
    }
    collate, images = run.data_collator, []

    def recording(samples):
        images.extend([sample["index"], sample["image"]] for sample in samples)
        return collate(samples)

    run.data_collator = recording
    run.train()
    run.data_collator = collate
    result = {
        "images": images,
        "steps": run.state.global_step,
        "parameters": {name: p.detach() for name, p in run.distiller.named_parameters()},
        "scores": run.evaluate()["eval_mean_iou"],
        "shards": run.train_dataset.dataset.rows.num_shards,
    }
    torch.save(result, folder / f"rank{run.args.process_index}.pt")


if __name__ == "__main__":
    main()
