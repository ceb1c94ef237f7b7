"""What object detection makes of training arguments."""

from typing import Any

import pytest
import tiny

from hf_bcd.tasks import TASKS
from hf_bcd.utils.messages import UserError


TASK = TASKS["object-detection"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 96, "image_longest": 64}, "image_longest is 64, less than image_size, which is 96"),
        ({"image_longest": 640}, "image_longest is 640, less than image_size, which is 800, as usual"),
        ({"train_shortest": [64, 200], "image_longest": 160}, "less than train_shortest, which is 200"),
        ({"image_size": 96, "square_size": 96}, "in two ways; give one"),
        ({"crop_size": 256, "image_size": 96}, "crop_size is for label maps"),
    ],
)
def test_sizes_that_contradict_each_other_are_named_as_the_user_gave_them(
    options: dict[str, Any], message: str, tmp_path: Any
) -> None:
    args = tiny.config(tmp_path, **{"crop_size": 512} | options)
    with pytest.raises(UserError, match=message):
        TASK.check_args(args)


def test_a_square_wins_over_the_longest_side(tmp_path: Any) -> None:
    args = tiny.config(tmp_path, crop_size=512, square_size=640, image_longest=64)
    TASK.check_args(args)
    assert TASK.train_sizes(args) == [(640, 640)]
