"""Repeats every table and figure of Li & Liang 2021: python -m benchmarks.paper table1.

Read in this order: `experiments.py` (the runs, in the paper's order), `presets.py` (their
settings), `run.py` (one run), `pool.py` (many runs on processes and GPUs), `results.py` (CSVs),
`claims.py` (the paper's claims, and whether they hold here), `figures.py`, `report.py` (RESULTS.md)
and `command.py` (the command line).
"""
