"""What BCDTrainer pushes to the Hub, and when."""

import logging
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from ..hub.pushing import prepare_repository, push_checkpoint, push_folder
from ..utils.text import redacted
from .config import BCDConfig


logger = logging.getLogger(__name__)


class HubTrainer(Trainer):
    """Trainer that pushes finished students and loadable checkpoints: no pickled arguments, one commit each."""

    args: BCDConfig
    hub_model_id: str | None
    _uploads: ThreadPoolExecutor | None = None
    _last_upload: Future | None = None

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Creates the repository and the branch where missing, on the first rank; an evaluation needs neither.

        Raises:
            HubError: before training, if the token does not allow what pushing needs.
        """
        if self.train_dataset is None or not self.is_world_process_zero():
            return
        self.hub_model_id = prepare_repository(
            repository_name(self.args),
            private=self.args.hub_private_repo if private is None else private,
            revision=self.args.hub_revision,
            token=token or self.args.hub_token,
        )

    def push_to_hub(  # type: ignore[override] # the base class says CommitInfo, and returns these three too
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Saves the student with its card and pushes both in one commit, from the first rank; None on the others.

        Args:
            commit_message: first line of the commit.
            blocking: wait for the end of the upload; otherwise a Future is returned.
            token: access token; `hub_token` or the stored one by default.
            revision: branch; `hub_revision` by default.
            private: visibility of a new repository; `hub_private_repo` by default.
            kwargs: passed to `create_model_card`.

        Raises:
            HubError: if the push fails; the student stays in the output folder, and the message says how to go on.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**kwargs)
        self._finish_current_push()
        push = partial(
            push_folder,
            self.args.output_dir or ".",
            self.hub_model_id or repository_name(self.args),
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
            commit_message=commit_message or "End of training",
        )
        return push() if blocking else self._in_background(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes a checkpoint in the background; a failure is a warning, and training goes on."""
        if self.args.hub_strategy == HubStrategy.END:
            return
        self.accelerator.wait_for_everyone()  # each rank writes its own random state
        if not self.is_world_process_zero():
            return
        if self._last_upload is not None and not self._last_upload.done() and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        checkpoint, copy = Path(checkpoint_folder), Path(self.args.output_dir or ".") / "_push" / str(time.time_ns())
        shutil.copytree(checkpoint, copy)  # the checkpoint itself may be deleted before it is uploaded
        folders = {HubStrategy.CHECKPOINT: "last-checkpoint", HubStrategy.ALL_CHECKPOINTS: checkpoint.name}
        push = partial(
            push_checkpoint,
            copy,
            folders.get(HubStrategy(self.args.hub_strategy)),
            self.hub_model_id or repository_name(self.args),
            revision=self.args.hub_revision,
            token=self.args.hub_token,
            step=self.state.global_step,
        )

        def push_or_warn() -> None:
            try:
                push()
            except Exception as error:  # whatever it is, hours of training must not end for it
                cause = redacted(str(error), token=self.args.hub_token)
                logger.warning("%s was not pushed, and training goes on: %s", checkpoint.name, cause)
            finally:
                shutil.rmtree(copy, ignore_errors=True)

        self._in_background(push_or_warn)

    def _finish_current_push(self) -> None:
        """Waits for the uploads that are under way, at the end of training and before the final push."""
        if self._last_upload is not None:
            wait([self._last_upload])

    def _in_background(self, call: Callable[[], Any]) -> Future:
        """Runs a call after those before it, while training goes on."""
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="upload")
        self._last_upload = self._uploads.submit(call)
        return self._last_upload


def repository_name(args: BCDConfig) -> str:
    """The repository a run pushes to: `hub_model_id`, or one named like the output folder."""
    return args.hub_model_id or Path(args.output_dir or ".").absolute().name
