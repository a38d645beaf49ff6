"""Experiments with the optimizers: one run, a race of many, tuning, tables, figures.

    tekfac-edu --help                    train, tune, compare, report, bench

One run is a `Configuration` (configuration.py); `train` makes it a record, through checkpoints that
survive being killed (training.py, checkpoints.py, records.py). A preset is a race of all
optimizers (presets.py); tuning.py finds their settings, racing.py runs them, reporting.py draws.
"""
