"""Helpers for every room: standard library and torch only."""
