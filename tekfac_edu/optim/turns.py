"""Who does what when: tasks of unequal cost shared out evenly, over ranks or over time."""


def shared_out(costs, bins):
    """Which of so many bins each task goes to: a list. Greedy, the dearest task first."""
    load = [0.0] * bins
    places = [0] * len(costs)
    for task in sorted(range(len(costs)), key=lambda task: -costs[task]):
        places[task] = load.index(min(load))
        load[places[task]] += costs[task]
    return places


def turns_of(layers, interval):
    """When, within an interval, each layer is refreshed: a dict Layer -> 0 to interval - 1.

    Turns are as far apart as they can be, so that intervals that divide this one spread, too.
    """
    if not layers:
        return {}
    bins = min(interval, len(layers))
    places = shared_out([refresh_cost(layer.d_in, layer.d_out) for layer in layers], bins)
    return {layer: place * interval // bins for layer, place in zip(layers, places, strict=True)}


def refresh_cost(d_in, d_out):
    """Of a layer, in multiplications, but for what depends on examples and positions.

    Bases are some 25 (d_in³ + d_out³) and count once; per-example gradients are projected with
    d_in d_out (d_in + d_out) for each of about a hundred examples.
    """
    return 25 * (d_in**3 + d_out**3) + 100 * d_in * d_out * (d_in + d_out)
