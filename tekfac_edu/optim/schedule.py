"""What is refreshed when: three intervals, a warm-up, and layers that may take turns."""

STAGES = ("factors", "bases", "eigenvalues")  # in the order in which a step refreshes them


class Schedule:
    """Which layers a step refreshes.

    Parameters
    ----------
    layers : list of Layer.   settings : Settings.
    stages : those of `STAGES` that the method has.
    """

    def __init__(self, layers, settings, stages):
        self.layers, self.warmup = layers, settings.warmup
        intervals = dict(zip(STAGES, settings.interval, strict=True))
        self.intervals = {stage: intervals[stage] for stage in stages}
        longest = max(self.intervals.values())
        self.turns = turns_of(layers, longest if settings.cost.stagger else 1)

    def due(self, stage, step, curvatures):
        """The layers whose `stage` this step refreshes; those without curvature always are."""
        if stage not in self.intervals:
            return []
        interval = self.intervals[stage]
        if step < self.warmup or interval == 1:
            return self.layers
        return [
            layer
            for layer in self.layers
            if (step - self.turns[layer]) % interval == 0 or not curvatures[layer].ready
        ]

    def sampled(self, step, curvatures):
        """The layers from which this step takes statistics of its batch."""
        stages = ("factors", "eigenvalues")
        return {layer for stage in stages for layer in self.due(stage, step, curvatures)}


def turns_of(layers, interval):
    """When, within an interval, each layer is refreshed: a dict Layer -> 0 to interval - 1.

    Turns are as far apart as they can be, so that intervals that divide this one spread, too.
    """
    if not layers:
        return {}
    bins = min(interval, len(layers))
    costs = [(layer.blocks or 1) * refresh_cost(layer.d_in, layer.d_out) for layer in layers]
    places = shared_out(costs, bins)
    return {layer: place * interval // bins for layer, place in zip(layers, places, strict=True)}


def shared_out(costs, bins):
    """Which of so many bins each task goes to: a list. Greedy, the dearest task first."""
    load = [0.0] * bins
    places = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        places[task] = load.index(min(load))
        load[places[task]] += costs[task]
    return places


def refresh_cost(d_in, d_out):
    """Of a layer's block, in multiplications, but for what depends on examples and positions.

    Bases are some 25 (d_in³ + d_out³) and count once; per-example gradients are projected with
    d_in d_out (d_in + d_out) for each of about a hundred examples.
    """
    return 25 * (d_in**3 + d_out**3) + 100 * d_in * d_out * (d_in + d_out)
