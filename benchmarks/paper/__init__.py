"""Every table and figure of Li & Liang 2021, run here: python -m benchmarks.paper table1.

Read in this order: `experiments.py` (what is run, in the paper's order), `presets.py` (with which
settings), `run.py` (one run), `pool.py` (many of them, on processes and GPUs), `results.py` (CSV),
`claims.py` (what the paper says and whether it holds), `figures.py`, `report.py` (RESULTS.md) and
`command.py` (the command line).
"""
