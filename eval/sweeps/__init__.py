"""Sweeps: a TOML of models, datasets and evals read as jobs; what the jobs left, in one table."""
