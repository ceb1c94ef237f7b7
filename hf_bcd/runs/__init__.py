"""Runs: arguments, recipes, experiments, studies and their reports."""
