"""One rank of a run that test_two_processes.py compares with a run of one process."""

import os
import signal
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback


sys.path.insert(0, str(Path(__file__).parent.parent))

import tiny

from hf_bcd.training.hardware import limit_threads


class Press(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 3:
            os.kill(os.getpid(), signal.SIGINT)


def main() -> None:
    limit_threads()  # as every command does
    folder, kind, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    options = {"max_steps": 5, "per_device_train_batch_size": batch, "train_sampling_strategy": "sequential"}
    if kind == "frozen":
        model = tiny.freeze_batchnorm(tiny.tiny_timm(dropout=0.0))
        data = {"train": tiny.TensorSamples(8, void=True), "validation": tiny.scenes(validation=5)["validation"]}
        run = tiny.trainer(folder, model=model, data=data, calibration_images=8, **options)
        # temperatures that move, so that their statistics over all ranks are compared too
        run.distiller.criterion.losses["bcd"].context_temperature.threshold = 0.03
        scores = run.evaluate()
        run.train()
    elif kind == "interrupt":  # one rank alone gets the signal, and nothing is logged or saved for a long time
        options |= {"max_steps": 40, "logging_steps": 1000}
        run = tiny.trainer(folder, model=tiny.tiny_timm(dropout=0.0), data={"train": tiny.TensorSamples(8)}, **options)
        run.add_callback(Press())
        try:
            run.train()
        except KeyboardInterrupt as interrupt:
            torch.save({"message": str(interrupt)}, folder / f"rank{run.args.process_index}.pt")
        return
    else:  # real BatchNorm: running statistics drift apart between ranks, evaluation must not
        data = tiny.scenes(train=8, validation=5)
        run = tiny.trainer(folder, model=tiny.tiny_timm(dropout=0.0), data=data, learning_rate=0.1, **options)
        run.train()
        statistics = [b.clone() for n, b in run.student.named_buffers() if "running" in n]
        scores = run.evaluate()
        shared = [b.clone() for n, b in run.student.named_buffers() if "running" in n]
        torch.save({"before": statistics, "after": shared}, folder / f"buffers{run.args.process_index}.pt")
    scores = {key: scores[key] for key in ("eval_mean_iou", "eval_boundary_f@3", "eval_per_class_iou")}
    epochs = getattr(run.train_dataset, "_epoch", None)
    result = {
        "log": [entry for entry in run.state.log_history if "loss_task" in entry],
        "parameters": {n: p.detach() for n, p in run.distiller.named_parameters()},
        "temperature": run.distiller.criterion.losses["bcd"].context_temperature.value,
        "scores": scores,
        "world_size": run.args.world_size,
        "epoch": None if epochs is None else int(epochs),
        "threads": torch.get_num_threads(),
    }
    torch.save(result, folder / f"rank{run.args.process_index}.pt")


if __name__ == "__main__":
    main()
