"""Experiments with the optimizers: one run, a race of many, tuning, tables, figures.

    tekfac-edu --help                    train, tune, compare, report, bench

One run is a `Configuration` (configuration.py), of a network (networks.py), a data set (in
`tekfac_edu.data`) and an optimizer (methods.py), each a row of its table. `train` makes it a record
through checkpoints that survive being killed (training.py, checkpoints.py, records.py). A preset is
a race of all optimizers (presets.py); tuning.py finds their settings, racing.py runs them, one or
many at a time (at_once.py), reporting.py draws. Older records are read through migration.py.
"""
