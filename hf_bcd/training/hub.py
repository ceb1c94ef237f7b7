"""The pushes of a run: checkpoints in the background while it trains, the finished student at its end."""

import logging
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from huggingface_hub import CommitInfo
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from ..hub.pushing import prepare_repository, push_checkpoint, push_folder
from ..utils.distributed import is_distributed
from ..utils.text import redacted


logger = logging.getLogger(__name__)

COPIES = "_push"  # checkpoints on their way, in the output folder


class HubCallback(TrainerCallback):
    """Pushes finished students and loadable checkpoints, as the arguments say now: no pickle, one commit each."""

    def __init__(self, args: TrainingArguments) -> None:
        self.folder = Path(args.output_dir or ".")
        self.repo_id = args.hub_model_id or self.folder.absolute().name  # the full name, once it is known
        self.private, self.revision, self.token = args.hub_private_repo, args.hub_revision, args.hub_token
        self.strategy, self.every_one = HubStrategy(args.hub_strategy), args.hub_always_push
        self.wanted, self.first = args.push_to_hub, args.process_index == 0
        self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")  # in their order
        self._last_upload: Future | None = None

    def prepare(self) -> None:
        """Creates the repository and the branch where missing, on the first rank, before anything is trained.

        Copies of checkpoints that a run left here when it was killed are removed.

        Raises:
            HubError: if the token does not allow a push.
        """
        if self.first:
            shutil.rmtree(self.folder / COPIES, ignore_errors=True)
        if self.wanted and self.first:
            options = {"private": self.private, "revision": self.revision, "token": self.token}
            self.repo_id = prepare_repository(self.repo_id, **options)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Pushes a checkpoint in the background; a failure is a warning, and training goes on."""
        if not self.wanted or self.strategy == HubStrategy.END:
            return
        if is_distributed():
            dist.barrier()  # each rank writes its own random state
        busy = self._last_upload is not None and not self._last_upload.done()
        if not self.first or (busy and not self.every_one):
            return
        checkpoint, copy = self.folder / f"checkpoint-{state.global_step}", self.folder / COPIES / str(time.time_ns())
        shutil.copytree(checkpoint, copy, symlinks=True)  # the checkpoint itself may be deleted before it is uploaded
        folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        options = {"revision": self.revision, "token": self.token, "step": state.global_step}
        push = partial(push_checkpoint, copy, folders.get(self.strategy), self.repo_id, **options)

        def push_or_warn() -> None:
            try:
                push()
            except Exception as error:  # whatever it is, hours of training must not end for it
                cause = redacted(str(error), token=self.token)
                logger.warning("%s was not pushed, and training goes on: %s", checkpoint.name, cause)
            finally:
                shutil.rmtree(copy, ignore_errors=True)

        self._last_upload = self._uploads.submit(push_or_warn)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the upload that is under way."""
        wait([self._last_upload] if self._last_upload is not None else [])

    def push(
        self, commit_message: str, blocking: bool, token: str | None, revision: str | None, private: bool | None
    ) -> CommitInfo | Future[CommitInfo]:
        """Pushes the finished student; what is None is as the arguments say. A Future unless `blocking`.

        Raises:
            HubError: if the push fails; the student stays in its folder, and the message says how to go on.
        """
        self.on_train_end()
        push = partial(
            push_folder,
            self.folder,
            self.repo_id,
            private=self.private if private is None else private,
            revision=revision or self.revision,
            token=token or self.token,
            commit_message=commit_message,
        )
        if blocking:
            return push()
        self._last_upload = self._uploads.submit(push)
        return self._last_upload
