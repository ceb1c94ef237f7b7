"""Shows what a data set holds: source, terms, splits, and sizes, ids and classes of the first rows of each.

hf-bcd check ade20k --data_dir path/to/ADEChallengeData2016
hf-bcd check user/name --label_column mask --reduce_labels
hf-bcd check path/to/data --every_row
"""

import argparse

from ..data.check import check
from ..data.sources.catalog import CATALOG
from ..utils.messages import UserError


def main(argv: list[str] | None = None) -> None:
    """Prints what the data set holds that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description="Shows what a data set holds, as a run would read it.")
    parser.add_argument("name", nargs="?", help=f"folder, Hub id, or one of {', '.join(CATALOG)}")
    parser.add_argument("--dataset_name", help="the same as name")
    parser.add_argument("--data_dir", help="root of the local copy of a known data set")
    parser.add_argument("--dataset_config", dest="config", help="configuration of a Hub data set")
    parser.add_argument("--dataset_revision", dest="revision", help="branch, tag or commit of a Hub data set")
    parser.add_argument("--image_column")
    parser.add_argument("--label_column")
    parser.add_argument("--id2label", help="JSON file with the class names")
    parser.add_argument("--reduce_labels", action="store_true", help="0 is void and classes start at 1")
    parser.add_argument("--ignore_labels", type=int, nargs="+", default=[], help="further ids that are void")
    parser.add_argument("--every_row", action="store_true", help="read all images and masks, not only the first ones")
    options = vars(parser.parse_args(argv))
    name, alias = options.pop("name"), options.pop("dataset_name")
    source = name or alias or options.pop("data_dir")
    if source is None:
        raise UserError("no data set: name one of the catalog, a Hub id or a folder.")
    print(check(source, **options))
