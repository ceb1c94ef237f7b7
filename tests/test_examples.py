"""Every file under examples is usable as it stands."""

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file


CONFIGS = Path(__file__).parent.parent / "examples" / "accelerate_configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    expected = {"cpu_x2": 2, "gpu_x1": 1, "gpu_x8": 8, "multi_node": 16}
    assert config.num_processes == expected[path.stem]
