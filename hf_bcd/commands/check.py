"""Shows what a data set holds: source, terms, splits, and sizes, ids and classes of the first rows of each.

hf-bcd check ade20k --data_dir path/to/ADEChallengeData2016
hf-bcd check user/name --label_column mask --reduce_labels
hf-bcd check path/to/data --every_row
"""

from ..data.check import report


def main(argv: list[str] | None = None) -> None:
    """Prints the report on the data set that the arguments name; `argv` is the process's own command line by default."""
    print(report(argv))
