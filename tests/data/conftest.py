import pytest


@pytest.fixture(autouse=True)
def table_cache(tmp_path, monkeypatch):
    """Tables of a test lie in its own folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
