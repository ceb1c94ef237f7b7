"""Options of a study that only jobs read: alone they would be ignored, and a dry run would train."""

import pytest

from hf_bcd.commands.study import main
from hf_bcd.utils.messages import UserError


@pytest.mark.parametrize("option", [["--dry_run"], ["--parts", "2"], ["--storage", "me/runs"]])
def test_options_of_jobs_are_refused_without_jobs(option: list[str]) -> None:
    with pytest.raises(UserError, match=f"^{option[0]} would be ignored without --jobs"):
        main(["no_study_is_read.yaml", *option])


def test_jobs_set_the_part_themselves() -> None:
    with pytest.raises(UserError, match="--part is 1/2, which --jobs sets in each job"):
        main(["no_study_is_read.yaml", "--jobs", "l4x1", "--dry_run", "--part", "1/2"])
