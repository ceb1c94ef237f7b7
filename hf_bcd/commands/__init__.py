"""The commands behind `hf-bcd` and `scripts/`: each parses its arguments, builds and runs."""
