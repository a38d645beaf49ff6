"""If this fails, a table or figure of the final chapter says something its records do not."""

import json

import pytest

from tekfac_edu.experiments import reporting
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.records import FORMAT, read_races, write_race


def run(optimizer, seed, losses, scores=None, seconds_per_epoch=2.0, status="finished", **changes):
    """A record as `train` leaves it, with these training losses."""
    scores = scores or [0.5] * len(losses)
    configuration = Configuration(optimizer=optimizer, seed=seed, epochs=len(losses), **changes)
    return {
        "format": FORMAT,
        "configuration": json.loads(json.dumps(configuration.as_dict())),
        "status": status,
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "date": f"2026-11-2{seed}",
        "parameters": 10,
        "train_images": 100,
        "score": "accuracy",
        "epochs": [
            {
                "train_loss": loss,
                "test_loss": loss,
                "test_score": score,
                "lr": 0.1,
                "seconds": (i + 1) * seconds_per_epoch,
                "cpu_seconds": (i + 1) * seconds_per_epoch * 3,
            }
            for i, (loss, score) in enumerate(zip(losses, scores, strict=True))
        ],
    }


RACE = [
    run("tekfac", 1, [1.0, 0.3, 0.1]),
    run("sgd", 0, [2.0, 1.0, 0.5]),
    run("tekfac", 0, [1.0, 0.5, 0.1]),
    run("sgd", 1, [2.0, 1.0, 1.0]),
]


def cells(table):
    """The table's lines below the rule, split where two spaces are."""
    lines = table.splitlines()[2:]
    return {line.split()[0]: [c for c in line.split("  ") if c.strip()][1:] for line in lines}


def stripped(table):
    return {name: [cell.strip() for cell in row] for name, row in cells(table).items()}


def test_epochs_to_a_loss_are_counted_from_one_and_the_first_that_is_at_most_it():
    assert reporting.reached(RACE[0], 1.0) == 1
    assert reporting.reached(RACE[0], 0.3) == 2
    assert reporting.reached(RACE[0], 0.29) == 3
    assert reporting.reached(RACE[0], 0.05) is None


def test_a_loss_that_comes_back_up_counts_from_where_it_was_first_reached():
    assert reporting.reached(run("sgd", 0, [1.0, 0.2, 0.9]), 0.2) == 2


def test_a_loss_that_was_not_finite_reaches_nothing():
    assert reporting.reached(run("sgd", 0, [None, 0.2]), 0.5) == 2


def test_targets_table_by_hand():
    table = stripped(reporting.targets_table(RACE, (1.0, 0.5, 0.01)))
    assert table == {"SGD": ["2.0 ± 0.0", "1 of 2", "–"], "TEKFAC": ["1.0 ± 0.0", "2.0 ± 0.0", "–"]}


@pytest.mark.parametrize(("clock", "text"), [("seconds", "5.0 ± 1.4"), ("cpu_seconds", "15 ± 4")])
def test_seconds_are_those_at_the_end_of_that_epoch(clock, text):
    table = stripped(reporting.targets_table(RACE, (0.3,), clock))
    # epochs 2 and 3: mean 2.5, standard deviation (n - 1) 0.7071; 2 and 6 seconds an epoch
    assert table["TEKFAC"] == [text]


def test_optimizers_come_in_one_order_whatever_that_of_the_records():
    assert list(reporting.by_optimizer(RACE)) == ["sgd", "tekfac"]
    assert [r["configuration"]["seed"] for r in reporting.by_optimizer(RACE)["tekfac"]] == [0, 1]


def test_final_table_by_hand():
    table = reporting.final_table(
        [
            run("sgd", 0, [2.0, 1.25], [0.1, 0.75]),
            run("sgd", 1, [2.0, 1.75], [0.1, 0.25]),
            run("tekfac", 0, [2.0, None], status="diverged"),
            run("tekfac", 1, [2.0, 0.5], [0.1, 0.625]),
        ]
    )
    assert "1.500 ± 0.354" in table and "0.500 ± 0.354" in table
    (diverged,) = [line for line in table.splitlines() if line.startswith("TEKFAC")]
    assert "1 of 2" in diverged and "0.500" in diverged and "±" not in diverged.split("1 of 2")[1]


def test_damping_is_shown_only_where_there_is_one():
    table = reporting.final_table(RACE)
    (sgd,) = [line for line in table.splitlines() if line.startswith("SGD")]
    (tekfac,) = [line for line in table.splitlines() if line.startswith("TEKFAC")]
    assert "0.01" in tekfac and "0.01" not in sgd


@pytest.mark.parametrize(
    ("values", "digits", "text"),
    [
        ([1.0], 1, "1.0"),
        ([1.0, 2.0], 1, "1.5 ± 0.7"),
        ([0.001, 0.002], 3, "0.00150 ± 0.00071"),
        ([100.0, 120.0], 0, "110 ± 14"),
        ([0.5, 0.7], 0, "0.6 ± 0.1"),
        ([5.0, 7.0], 0, "6.0 ± 1.4"),
    ],
)
def test_mean_and_spread_keep_two_digits(values, digits, text):
    assert reporting.spread(values, digits) == text


def test_runs_of_two_races_are_refused_and_the_difference_is_named():
    other = run("sgd", 2, [1.0, 0.5, 0.2], width=8)
    with pytest.raises(ValueError, match="width: None and 8"):
        reporting.by_optimizer([*RACE, other])


def test_two_settings_of_one_optimizer_are_refused():
    with pytest.raises(ValueError, match="tekfac has several runs with the same seed"):
        reporting.by_optimizer([*RACE, run("tekfac", 0, [1.0, 1.0, 1.0], lr=0.3)])


def test_no_runs_are_refused():
    with pytest.raises(ValueError, match="no finished runs"):
        reporting.final_table([])


def test_stamp_names_device_versions_dates_and_seeds():
    assert (
        reporting.stamp(RACE) == "a processor; torch 2.13.0; 2026-11-20 to 2026-11-21; seeds 0, 1"
    )


def test_targets_are_round_and_reached_by_someone():
    targets = reporting.targets_of(RACE)
    assert targets == tuple(sorted(targets, reverse=True))
    assert all(any(reporting.reached(r, target) for r in RACE) for target in targets)


def test_targets_of_runs_that_all_diverged_is_an_error():
    with pytest.raises(ValueError, match="every run diverged"):
        reporting.targets_of([run("sgd", 0, [None], status="diverged")])


def drawn(ax):
    return {line.get_label(): line.get_xydata() for line in ax.get_lines()}


def test_loss_figure_shows_medians_against_epochs_and_mean_seconds():
    left, right = reporting.loss_figure(RACE).axes
    assert drawn(left)["TEKFAC"].tolist() == [[1, 1.0], [2, 0.4], [3, 0.1]]
    assert drawn(right)["TEKFAC"][:, 0].tolist() == [2.0, 4.0, 6.0]
    assert set(drawn(left)) == {"SGD", "TEKFAC"}


def test_figures_end_where_a_diverged_run_does():
    runs = [run("sgd", 0, [2.0, 1.0]), run("sgd", 1, [2.0, None], status="diverged")]
    left, _ = reporting.loss_figure(runs).axes
    assert len(drawn(left)["SGD"]) == 1


def test_report_writes_tables_and_figures(tmp_path):
    text = reporting.write_report(RACE, [], (0.5,), tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "tables.txt").read_text(encoding="utf-8") == text
    for name in ("loss.png", "score.png"):
        assert (tmp_path / "new" / "folder" / name).read_bytes().startswith(b"\x89PNG")
    assert "seeds 0, 1" in text


def test_a_race_in_one_file_is_what_its_folder_was(tmp_path):
    trial = run("sgd", 7, [1.0], held_out=True)
    for i, record in enumerate([*RACE, trial]):
        folder = tmp_path / "race" / str(i)
        folder.mkdir(parents=True)
        (folder / "record.json").write_text(json.dumps(record))
    runs, trials = read_races([tmp_path / "race"])
    assert trials == [trial] and len(runs) == 4
    write_race(tmp_path / "saved.json", runs, trials)
    assert read_races([tmp_path / "saved.json"]) == (runs, trials)


def test_trials_table_counts_and_names_the_best():
    trials = [
        run("tekfac", 9, [1.0, 0.5], held_out=True, lr=0.1),
        run("tekfac", 9, [1.0, 0.4], held_out=True, lr=0.3, damping=0.1),
        run("tekfac", 9, [1.0, None], held_out=True, lr=3.0, status="diverged"),
    ]
    row = stripped(reporting.trials_table(trials))["TEKFAC"]
    assert row == ["3", "1", "0.1 … 3", "0.01 … 0.1", "0.3", "0.1", "0.4"]
