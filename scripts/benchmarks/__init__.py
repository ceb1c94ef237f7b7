"""Speed and memory, always as ratios within one run: `scripts/benchmark.py` runs these."""
