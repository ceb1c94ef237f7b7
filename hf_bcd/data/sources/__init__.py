"""Raw rows of every kind of source."""
