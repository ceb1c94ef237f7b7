"""What every room uses: standard library and torch only."""
