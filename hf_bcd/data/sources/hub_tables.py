"""Data sets of the Hub, and folders in its formats, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from ...hub.errors import explained
from ...utils.messages import UserError
from ...utils.text import shortened
from .tables import TableRows, read_tables


def load_hub(
    repo: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    data_dir: str | None = None,
    data_files: Mapping[str, str] | None = None,
    load: Callable[..., Any] | None = None,
) -> Any:
    """Loads a data set with `datasets.load_dataset`, without ever running its code.

    Args:
        repo: Hub id or folder.
        config: configuration, if there are several.
        revision: branch, tag or commit.
        data_dir: folder inside the repository.
        data_files: glob pattern of the files of each split.
        load: `datasets.load_dataset_builder`, to look at the files only.

    Raises:
        HubError: the repository cannot be read.
        UserError: it holds no data, a loading script, or several configurations of which none is chosen.
    """
    import datasets
    from datasets.exceptions import DatasetsError

    files = None if data_files is None else dict(data_files)
    try:
        with explained("data set", repo, revision=revision):
            path, load = repo, load or datasets.load_dataset
            if load is datasets.load_dataset and (files or data_dir) and not Path(repo).is_dir():
                # datasets itself cannot find a part of a repository in its cache again without the network
                patterns = list(files.values()) if files else [f"{data_dir}/*"]
                path = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
                Path(path).mkdir(exist_ok=True)  # not there if no file fits
            return load(path, name=config, revision=revision, data_dir=data_dir, data_files=files)
    except FileNotFoundError as error:
        where = data_dir or ", ".join((files or {}).values())
        raise UserError(
            f"{repo}: no data found{f' in {where}' if where else ''}. Expected folders {{train,val,test}}/{{images,masks}}, "
            "an imagefolder whose metadata.jsonl has file_name and mask_file_name, or parquet files."
        ) from error
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
        raise UserError(
            f"{repo}: the data set is a loading script, which datasets no longer runs. The Hub may keep a converted copy: "
            "try revision refs/convert/parquet (`--dataset_revision`) with the configuration's folder as data_dir."
        ) from error
    except DatasetsError as error:
        said = shortened(f"{type(error).__name__}: {error.__cause__ or error}")
        raise UserError(
            f"{repo}: its files cannot be read as one table ({said}). If they belong to several configurations, choose one "
            "(`--dataset_config`), or its folder (`--data_dir`)."
        ) from error
    except ValueError as error:
        said = " ".join(str(error).partition("\nExample")[0].split())
        if said.startswith(("Config name is missing", "BuilderConfig")):
            raise UserError(f"{repo}: {said}. Choose one with config (`--dataset_config`).") from error
        if said.startswith(("Couldn't find cache", "There are multiple")):
            raise UserError(
                f"{repo}: it cannot be read from the Hub, and the cache holds another configuration of it ({said}). Check "
                "name, configuration and revision, or run once online."
            ) from error
        raise


def load_tables(
    repo: str, name: str, image_column: str | None = None, label_column: str | None = None, **options: Any
) -> dict[str, TableRows]:
    """Stores a data set and gives the rows of its splits: `load_hub(repo, **options)`, then `read_tables`."""
    return read_tables(load_hub(repo, **options), name, image_column, label_column)


def hub_names(repo: str, revision: str | None = None) -> Path | None:
    """Fetches `id2label.json` of a dataset repository; None if it has none, or it is offline and was never fetched."""
    with explained("data set", repo, revision=revision):
        try:
            return Path(hf_hub_download(repo, "id2label.json", repo_type="dataset", revision=revision))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError) and not constants.is_offline_mode():
                raise
    return None
