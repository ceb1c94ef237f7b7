"""Every wrong picture, mask, name, folder and table ends in one line that says so; see wrong_pictures.py."""

from pathlib import Path
from typing import Any

import datasets
import pytest
import wrong_pictures as cases
from campaign_outcome import told


@pytest.fixture(autouse=True)
def table_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize("name", cases.STORAGE)
def test_how_files_store_their_numbers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, words, options = cases.STORAGE[name]
    root = cases.folder(tmp_path / "data", **options)
    told(kind, words, lambda: cases.first_label(root), caplog)


@pytest.mark.parametrize("name", cases.LABELS)
def test_what_ids_mean(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, words, options, given = cases.LABELS[name]
    root = cases.folder(tmp_path / "data", **options)
    told(kind, words, lambda: cases.first_label(root, **given), caplog)


@pytest.mark.parametrize("name", cases.FOLDERS)
def test_folders(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kind, words, options, change = cases.FOLDERS[name]
    root = cases.folder(tmp_path / "data", **options)
    if change is not None:
        change(root)
    told(kind, words, lambda: cases.first_label(root), caplog)


@pytest.mark.parametrize("name", cases.TABLES)
def test_tables(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, words, build = cases.TABLES[name]
    source: Any = build()
    told(
        kind,
        words,
        lambda: cases.first_label(datasets.DatasetDict(source) if isinstance(source, dict) else source),
        caplog,
    )


@pytest.mark.parametrize("name", cases.NAMED)
def test_names_of_data_sets(name: str, caplog: pytest.LogCaptureFixture) -> None:
    kind, words, source, options = cases.NAMED[name]
    told(kind, words, lambda: cases.first_label(source, **options), caplog)
