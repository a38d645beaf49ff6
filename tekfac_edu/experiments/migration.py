"""What older versions wrote: the settings of their runs in today's words.

Format 1 had the settings of a Kronecker optimizer one by one, and the date of a run as "finished".
"""

COSTS = {
    "eigenbasis": "eigenbasis",
    "input_rank": "input_rank",
    "factor_rows": "factor_rows",
    "scale_examples": "eigenvalue_examples",
    "stagger": "stagger",
    "precision": "precision",
}
DECAYS = ("factor_decay", "scale_decay")
DECAY = 0.95  # of either, where it was not written down
OLD = {"warmup_steps", "damping_policy", *COSTS, *DECAYS}
PHASES = {  # of a step's profile
    "factors": ("patches", "factors"),
    "eigenbases": ("eigh", "move"),
    "eigenvalues": ("measure",),
}


def migrated_settings(settings):
    """The settings of a run, of any format, as `Configuration` has them now; all or a few.

    Raises
    ------
    ValueError
        If there is no way to say them: two decays that differ, or two rules of damping at once.
    """
    old = OLD & settings.keys()
    if not old or "cost" in settings:
        return dict(settings)
    new = {name: value for name, value in settings.items() if name not in old}
    if "warmup_steps" in old:
        new["warmup"] = settings["warmup_steps"]
    if old.intersection(DECAYS):
        factors, eigenvalues = (settings.get(name, DECAY) for name in DECAYS)
        if factors != eigenvalues:
            raise ValueError(
                f"factor_decay {factors} and scale_decay {eigenvalues}: there is one decay for "
                "both now, and no run with two can be read"
            )
        new["decay"] = factors
    if settings.get("damping_policy") == "trace":
        if settings.get("damping_rule") == "added":
            raise ValueError(
                'damping_policy "trace" and damping_rule "added": there is one damping_rule now, '
                "and no run with two can be read"
            )
        new["damping_rule"] = "by-trace"
    new["cost"] = {COSTS[name]: settings[name] for name in COSTS if name in old}
    return new


def migrated_record(record):
    """The record of a run, of any format, with settings and date as they are written now."""
    new = record | {"configuration": migrated_settings(record["configuration"])}
    if "finished" in new:
        new["date"] = new.pop("finished")
    return new


def migrated_profile(seconds):
    """{phase of a step: seconds}, of any format, with the phases that are told apart now."""
    if "eigh" not in seconds:
        return dict(seconds)
    parts = {part for merged in PHASES.values() for part in merged}
    new = {name: value for name, value in seconds.items() if name not in parts}
    return new | {name: sum(seconds[part] for part in merged) for name, merged in PHASES.items()}
