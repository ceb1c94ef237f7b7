"""Modules that several methods use."""
