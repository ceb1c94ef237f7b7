"""One row per task."""
