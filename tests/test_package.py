"""What importing the package does and does not do."""

import subprocess
import sys

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import hf_bcd; from transformers import AutoModelForSemanticSegmentation",
        "from transformers import AutoModelForSemanticSegmentation; import hf_bcd",
        "import hf_bcd; from transformers import pipeline, Trainer, AutoModelForSemanticSegmentation",
        "import hf_bcd.losses; import transformers; from transformers import AutoModelForSemanticSegmentation",
    ],
)
def test_auto_classes_know_our_models_whichever_comes_first(imports: str) -> None:
    code = f"{imports}; print([c.model_type for c in AutoModelForSemanticSegmentation._model_mapping])"
    assert "timm_segmentation" in run(code)


def test_public_names_exist_and_unknown_ones_do_not() -> None:
    import hf_bcd

    assert all(getattr(hf_bcd, name) is not None for name in hf_bcd.__all__)
    with pytest.raises(AttributeError, match="no attribute 'BCDTrianer'"):
        _ = hf_bcd.BCDTrianer
