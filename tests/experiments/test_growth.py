"""If this fails, a growth that somebody reads off a record was not measured, or not counted."""

import json
import sys

import pytest
import torch

from benchmarks import growth

SIZES = (64, 128, 256, 512, 1024)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Of a tiny run."""
    folder = tmp_path_factory.mktemp("growth")
    threads = torch.get_num_threads()
    path = folder / "growth.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [growth.__file__, "--smoke"])
        growth.main(threads=1, smoke=True, record=path, figures=folder / "figures")
    torch.set_num_threads(threads)
    png = (folder / "figures" / "growth.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000
    return json.loads(path.read_text())


def test_the_record_says_how_it_was_made(record):
    assert record["device"].endswith("1 thread(s)") and record["versions"]["torch"]
    assert record["command"] == "python -m benchmarks.growth --smoke"
    assert record["counts"].keys() == growth.NETWORKS.keys()


def test_growth_is_measured_along_every_axis(record):
    assert set(record["axes"]) == set(growth.AXES)
    for grown in record["axes"].values():
        for kind in ("plain", "refresh", "mean"):
            assert len(grown["seconds"][kind]) == len(grown["sizes"]) == len(grown["sgd_seconds"])
            assert all(t > 0 for t in grown["seconds"][kind])
            assert {"measured", "predicted"} <= grown.keys()


def parts(layers, N=128):
    return growth.multiplications(layers, N, eigh_cost=10)


def test_the_exponents_of_the_counts_are_the_known_ones():
    def exponent(part, layers_and_N):
        counts = [parts(layers, N)[part] for layers, N in layers_and_N]
        return growth.exponent(SIZES, counts)

    batch = [([(64, 100, 20)], N) for N in SIZES]
    assert exponent("factors", batch) == pytest.approx(1)
    assert exponent("network", batch) == pytest.approx(1)
    assert exponent("bases", batch) == pytest.approx(0, abs=1e-9)
    assert exponent("update", batch) == pytest.approx(0, abs=1e-9)
    inputs = [([(1, d, 10)], 128) for d in SIZES]
    assert exponent("bases", inputs) == pytest.approx(3, abs=1e-3)
    assert exponent("factors", inputs) == pytest.approx(2, abs=1e-2)
    refreshes = [growth.predicted([(1, d, 10)], 128, 10)["refresh"] for d in SIZES]
    assert 2 < growth.exponent(SIZES, refreshes) < 3
    deeper = [([(1, 65, 64)] * L, 128) for L in SIZES]
    for part in parts([(1, 2, 2)]):
        assert exponent(part, deeper) == pytest.approx(1)


def test_counts_by_hand():
    assert parts([(1, 3, 2)], N=5) == {
        "network": 3 * 5 * 6,
        "update": 2 * (4 * 3 + 2 * 9),
        "factors": 5 * (9 + 4),
        "bases": 10 * (27 + 8),
        "eigenvalues": 5 * (9 + 4 + 6),
        "moving": 27 + 8 + 12 + 18,
    }
    assert parts([(100, 3, 2)], N=5)["eigenvalues"] == 5 * (100 * (4 + 6) + 2 * 9)  # forms first
    assert parts([(2, 30, 20)], N=5)["eigenvalues"] == 5 * 2 * (900 + 400 + 600)  # projects first


def test_cheaper_statistics_count_less():
    layers, N = [(64, 30, 20)], 5
    cheaper = growth.multiplications(layers, N, 10, rows=2, examples=1)
    # 2 · 30 / 5 = 12 of 8 × 8 positions: a grid of 16
    assert cheaper["factors"] == 5 * 16 * (900 + 400)
    assert cheaper["eigenvalues"] == parts(layers, 1)["eigenvalues"]
    for part in ("network", "update", "bases", "moving"):
        assert cheaper[part] == parts(layers, N)[part]


def test_layers_are_seen_with_positions_and_bias():
    model, shape, _ = growth.AXES["resnet20_width"].build(4, None)
    layers = growth.layer_sizes(model, shape)
    assert len(layers) == 20 and model.training
    assert layers[0] == (32 * 32, 27, 4) and layers[-1] == (1, 17, 10)
    assert layers[-2] == (8 * 8, 16 * 9, 16)


def test_a_power_law_is_found_in_the_upper_half():
    values = [1e6, 1e6, *(3 * size**2.5 for size in SIZES[2:])]
    assert growth.exponent(SIZES, values) == pytest.approx(2.5)
