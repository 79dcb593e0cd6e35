"""Shared by the tests: paths, tiny models and data, runs on them, and a judge's server."""
