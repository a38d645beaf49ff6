"""The same search for every optimizer: a compass search on the logarithms of its settings.

From the start, try both neighbours of the best point in every coordinate, half a decade away for
the learning rate, a decade for damping and weight decay, and move to whatever is better. When all
neighbours are worse, look at half that distance, a quarter, an eighth; then farther away, at twice
the first distance, three times, and so on, from wherever the best point is. It ends after a number
of trials that is the same for all, and knows no edge of a grid (Kolda, Lewis, Torczon, SIAM Review
45 (2003), section 1.2, has the search for the minimum; to look farther with what is left is ours).

A trial is a run, shorter than those of the race, that trains with nine tenths of the training
images and is judged by the loss on the others. Ties go to the earlier trial. Trials have one seed,
that of no run in the race.
"""

import math
from pathlib import Path

from tekfac_edu.arguments import whole_number
from tekfac_edu.experiments.at_once import AtOnce
from tekfac_edu.experiments.methods import KRONECKER, OPTIMIZERS
from tekfac_edu.experiments.processes import is_first
from tekfac_edu.experiments.racing import tuned_in
from tekfac_edu.experiments.records import write_json

TRIALS = 12
TUNING_SEED = 1000
STEPS = {"lr": 0.5, "damping": 1.0, "weight_decay": 1.0}  # decades
NEARER = (1.0, 0.5, 0.25, 0.125)  # distances in these steps; then 2, 3, ...


def tune(
    preset, folder, optimizers=OPTIMIZERS, trials=TRIALS, progress=print, at_once=1, **options
):
    """Search the settings of each optimizer; writes `tuned.json`, {optimizer: settings}.

    Settings of other optimizers, tuned there before, stay in it.

    Parameters
    ----------
    preset : Preset.   folder : of the race; trials go into its folder `trials`.
    optimizers : which of the six.   trials : runs for each.
    progress : called with a line per optimizer.
    at_once : searches at a time; several have a process each. A search itself has one trial after
        the other.
    options : passed on to `train` (data_folder, device, bar).

    Returns
    -------
    dict, {optimizer: {"lr", "damping" where there is one, "weight_decay"}}

    Raises
    ------
    ValueError
        If every trial of an optimizer diverged.
    """
    whole_number("trials", trials, 1)

    def search(optimizer):
        def judged(settings):
            configuration = preset.base.replace(
                **settings,
                optimizer=optimizer,
                epochs=preset.tuning_epochs,
                held_out=True,
                seed=TUNING_SEED,
            )
            place = Path(folder) / "trials" / configuration.name
            return _held_out_loss(runs.train(configuration, place))

        coordinates = ["lr"] + ["damping"] * (optimizer in KRONECKER)
        coordinates += ["weight_decay"] * preset.weight_decay
        best, loss, closed = compass_search(judged, preset.starts[optimizer], coordinates, trials)
        if math.isinf(loss):
            raise ValueError(f"all {trials} trials of {optimizer} diverged; start elsewhere")
        settings = ", ".join(f"{name} {value:g}" for name, value in best.items())
        tried = "all its neighbours are worse" if closed else "not all its neighbours were tried"
        progress(f"{optimizer}: {settings}; held-out loss {loss:.4g}; {tried}")
        return best

    with AtOnce(at_once, **options) as runs:
        tuned = dict(zip(optimizers, runs.map(search, optimizers), strict=True))
    if is_first():
        write_json(Path(folder) / "tuned.json", tuned_in(folder) | tuned)
    return tuned


def _held_out_loss(record):
    """inf where it diverged."""
    loss = record["epochs"][-1]["test_loss"] if record["status"] == "finished" else None
    return math.inf if loss is None else loss


def compass_search(judged, start, coordinates, trials):
    """Minimize over the logarithms of some coordinates of a point.

    Parameters
    ----------
    judged : point -> loss, inf where it diverged.
    start : {name: value}, the first point.   coordinates : names of those that move; > 0.
    trials : how often `judged` may be called.

    Returns
    -------
    (point, loss, closed) : the best point, and whether all its neighbours at the first distance
        have been tried, too.
    """
    seen = {}

    def try_once(point):
        key = tuple(point.items())
        if key not in seen and len(seen) < trials:
            seen[key] = judged(dict(point))
        return seen.get(key, math.inf)

    def better_neighbour(distance):
        for neighbour in _neighbours(best, coordinates, distance):
            if (found := try_once(neighbour)) < loss:
                return neighbour, found
        return None

    best, loss = dict(start), try_once(start)
    turn = 0
    while len(seen) < trials:
        distance = NEARER[turn] if turn < len(NEARER) else 2.0 + turn - len(NEARER)
        if (moved := better_neighbour(distance)) is None:
            turn += 1
        else:
            best, loss = moved
            turn = turn if turn < len(NEARER) else 0
    closed = all(tuple(point.items()) in seen for point in _neighbours(best, coordinates, 1.0))
    return best, loss, closed


def _neighbours(point, coordinates, distance):
    for name in coordinates:
        for direction in (1, -1):
            decades = direction * distance * STEPS[name]
            yield point | {name: _rounded(point[name] * 10**decades)}


def _rounded(value):
    """Two digits: 0.1, 0.32, 1, so that half decades there and back meet the same point."""
    return float(f"{value:.2g}")
