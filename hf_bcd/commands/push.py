"""Pushes, or pushes again, the finished student of a run's output folder to the Hub.

    hf-bcd push runs/x me/x --dry_run          # lists the files and shows the card; sends nothing
    hf-bcd push runs/x me/x --private
    hf-bcd push runs/x me/x --revision v2

Checkpoints, optimizer states and logs stay here. Log in first with `hf auth login`, or set HF_TOKEN.
"""

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> None:
    """Pushes the folder that the arguments name; `argv` is the process's own command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of a finished run")
    parser.add_argument("repo_id", help="user/name; a bare name belongs to the token's user")
    parser.add_argument("--private", action="store_true", help="create a private repository")
    parser.add_argument("--revision", help="branch to push to; created if missing")
    parser.add_argument("--commit_message", default="Upload student", help="first line of the commit")
    parser.add_argument("--dry_run", action="store_true", help="list the files and show the card; send nothing")
    args = parser.parse_args(argv)
    if args.dry_run:
        show(args.folder, args.repo_id, args.revision)
        return

    from ..hub.pushing import push_folder  # imports torch

    commit = push_folder(
        args.folder,
        args.repo_id,
        private=args.private or None,
        revision=args.revision,
        commit_message=args.commit_message,
    )
    print(f"pushed: {commit.commit_url}")


def show(folder: Path, repo_id: str, revision: str | None) -> None:
    """Prints every file that a push would send with its size now, and the card as it would be sent."""
    from huggingface_hub.utils import validate_repo_id

    from ..hub.errors import explained
    from ..hub.pushing import name_in_examples, student_files

    with explained("model", repo_id):
        validate_repo_id(repo_id)
    files = student_files(folder)
    for path, file in files.items():
        print(f"{file.stat().st_size:>12,}  {path}")
    print(f"{sum(file.stat().st_size for file in files.values()):>12,}  bytes in {len(files)} files\n")
    print(name_in_examples(files["README.md"].read_text(encoding="utf-8"), repo_id, revision))
