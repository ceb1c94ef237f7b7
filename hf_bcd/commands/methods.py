"""Lists the distillation methods, or prints one in full: equation, options, weights, citation.

hf-bcd methods
hf-bcd methods cwd
hf-bcd methods --markdown > docs/methods.md
"""

import argparse


def main(argv: list[str] | None = None) -> None:
    """Prints what the arguments ask for; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", nargs="?", help="print this one in full")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    args = parser.parse_args(argv)

    from ..runs.methods import measured_costs, overview, page, table  # imports torch

    costs = measured_costs()
    if args.method is not None:
        print(page(args.method, costs))
    else:
        print(table(costs) if args.markdown else overview(costs))
