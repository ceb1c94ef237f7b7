"""Runs a teacher once over augmented views of the training pictures, and stores what losses read of it.

    hf-bcd reinforce --teacher nvidia/segformer-b4-finetuned-ade-512-512 --dataset_name ade20k --views 8 --output_dir stores/ade
    hf-bcd reinforce --config RECIPE.yaml --data_dir path/to/data --views 8 --output_dir stores/d --push_to_hub me/d-reinforced
    hf-bcd distill --config RECIPE.yaml --data_dir path/to/data --teacher_store stores/d

--views N          augmented views of each picture (8)
--precision P      compact, half (float16) or exact (float32)
--columns C ...    further tensors to store: logits, features/<level>, pyramid/<level>; of several teachers <teacher>/logits ...
--with_images      also store the pictures and their label maps, as the configuration `pictures`
--push_to_hub ID   push the store as a data set, with its card

The recipe's losses and training transform decide what is stored. Several teachers, '[A, B]', fill one store with columns each. Several processes write one store: `accelerate launch -m hf_bcd
reinforce ...`. A store that was interrupted goes on with the same command.
"""

import argparse
import logging
from pathlib import Path

from ..hub.pushing import prepare_repository, push_store
from ..runs.arguments import parse_arguments
from ..runs.experiment import alone_in, load_data, name_classes
from ..runs.reinforce import build_reinforcers, make_store
from ..runs.store_report import describe_store, score_teacher, summary, write_pictures
from ..stores.writing import PRECISIONS
from ..training.hardware import limit_threads
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Makes the store that the arguments describe; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--views", type=int, default=8)
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    parser.add_argument("--columns", nargs="+", default=[])
    parser.add_argument("--with_images", action="store_true")
    parser.add_argument("--push_to_hub", metavar="USER/NAME")
    own, rest = parser.parse_known_args(argv)
    model_args, data_args, config = parse_arguments(rest, description=__doc__)
    if own.views < 1:
        raise UserError(f"--views is {own.views}; store at least one view of each picture.")
    model_args.teacher_store = None  # a recipe may name the store that it is trained with
    if config.output_dir is None:
        raise UserError("no --output_dir: name the folder of the store.")
    limit_threads()
    logging.basicConfig(level=logging.INFO if config.should_log else logging.ERROR, format="%(message)s")
    folder, repo_id = Path(config.output_dir), None
    if own.push_to_hub is not None and config.should_save:  # before hours of the teacher's work
        repo_id = prepare_repository(
            own.push_to_hub,
            private=config.hub_private_repo,
            revision=config.hub_revision,
            token=config.hub_token,
            kind="dataset",
        )
    with alone_in(folder, config):
        data = name_classes(model_args, load_data(data_args))
        parts = build_reinforcers(model_args, config, data)
        make_store(folder, parts, own.views, own.precision, own.columns)
        for name, part in parts.items():
            score_teacher(folder, part, data, name)
        if not config.should_save:
            return
        if own.with_images:
            write_pictures(folder, next(iter(parts.values())))
        describe_store(folder, repo_id)
        print(summary(folder))
        if repo_id is not None:
            commit = push_store(folder, repo_id, revision=config.hub_revision, token=config.hub_token)
            print(f"pushed: {commit.commit_url}")
