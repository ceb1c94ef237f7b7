"""`python -m hf_bcd` is `hf-bcd`; `accelerate launch -m hf_bcd distill ...` runs it in several processes."""

from .commands import main


if __name__ == "__main__":
    main()
