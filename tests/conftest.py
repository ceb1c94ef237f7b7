"""Settings and fixtures shared by all tests."""

import gc
import os


# before torch is imported: two processes that each use every core slow each other down a hundredfold
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

from collections import Counter
from pathlib import Path

import pytest
import quick  # noqa: F401
import torch


torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images and weights beside the checkout, named by HF_BCD_TEST_DATA or found there."""
    folder = Path(os.environ.get("HF_BCD_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "camvid").is_dir():
        pytest.skip(f"no real test data in {folder}; set HF_BCD_TEST_DATA to its folder")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips GPU tests where there is no GPU, and brings the slowest modules forward: no core waits for the last one."""
    tests, slow = Counter(item.path for item in items), Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path] / tests[item.path])
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Spares every training its walk over all modules: it collects garbage first, which took half of a short run."""
    gc.freeze()
