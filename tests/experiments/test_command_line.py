"""If this fails, a command does something else than it says, or bad input ends in a traceback."""

import dataclasses
import os
import subprocess
import sys

import pytest

from tekfac_edu.experiments import command_line, racing, training, tuning
from tekfac_edu.experiments.configuration import Configuration, Cost
from tekfac_edu.experiments.methods import OPTIMIZERS
from tekfac_edu.experiments.presets import PRESETS
from tekfac_edu.experiments.records import read_record

from . import numbers, run, tiny

TINY = """
--model mlp --dataset digits --widths 8 --epochs 2 --batch-size 256 --interval 2 --warmup 3
--optimizer sgd --lr 0.3 --device cpu
""".split()


@pytest.fixture
def command(monkeypatch):
    """Run the command in this process."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["tekfac-edu", *map(str, arguments)])
        command_line.main()

    return call


@pytest.fixture
def asked(monkeypatch):
    """What the command asks of train, tune and race, in place of doing it."""
    calls = []

    def record(*arguments, **named):
        calls.append((arguments, named))
        return {"epochs": []}

    for module, name in ((training, "train"), (tuning, "tune"), (racing, "race")):
        monkeypatch.setattr(module, name, record)
    return calls


EVERYTHING = Configuration(
    model="mlp",
    dataset="mnist",
    optimizer="ekfac",
    lr=0.7,
    damping=0.5,
    weight_decay=0.25,
    momentum=0.5,
    epochs=3,
    batch_size=17,
    schedule="step",
    augment=True,
    width=None,
    widths=(9, 4),
    interval=5,
    warmup=6,
    trust=0.02,
    positions="summed",
    decay=0.5,
    damping_rule="by-trace",
    fisher="exact",
    cost=Cost(2.5, 7, 5, "qr", True, "bfloat16"),
    held_out=True,
    train_images=100,
    test_images=50,
    bf16=True,
    seed=8,
)


def options(settings, prefix="--"):
    words = []
    for name, value in settings.items():
        option = prefix + name.replace("_", "-")
        if isinstance(value, dict):
            words += options(value, f"{option}.")
        elif value is True:
            words.append(option)
        elif isinstance(value, tuple):
            words += [option, *map(str, value)]
        elif value is not None:
            words += [option, str(value)]
    return words


def test_every_setting_is_an_option(command, asked):
    default = Configuration()
    same = [
        field.name
        for field in dataclasses.fields(Configuration)
        if getattr(EVERYTHING, field.name) == getattr(default, field.name)
    ]
    assert same == ["width"]
    cost = zip(vars(EVERYTHING.cost).items(), vars(default.cost).items(), strict=True)
    assert all(given != normal for given, normal in cost)
    command("train", *options(EVERYTHING.as_dict()))
    command("train", "--width", 8)
    command("train")
    configurations = [arguments[0] for arguments, _ in asked]
    assert configurations == [EVERYTHING, Configuration(width=8), default]


def test_help_tells_every_option_and_its_default(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command("train", "--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    words = said.replace("│", " ").replace(",", " ").split()
    for field in dataclasses.fields(Configuration):
        if field.name != "cost":
            assert f"--{field.name.replace('_', '-')}" in said
    for field in dataclasses.fields(Cost):
        assert f"--cost.{field.name.replace('_', '-')}" in words
    for old in ("warmup-steps", "factor-decay", "scale-decay", "damping-policy", "eigenbasis"):
        assert f"--{old}" not in words
    assert "default: 0.1" in said and "Only the" not in said
    for option in ("--folder", "--data-folder", "--device", "--no-tensorboard"):
        assert option in said


def test_train_writes_the_record_of_its_configuration(command, tmp_path, capsys):
    command("train", *TINY, "--folder", tmp_path / "run")
    said = capsys.readouterr().out
    assert said.startswith("finished: training loss ") and str(tmp_path / "run") in said
    record = read_record(tmp_path / "run" / "record.json")
    assert record["command"] == f"tekfac-edu train {' '.join(TINY)} --folder {tmp_path / 'run'}"
    assert numbers(record) == numbers(run(tiny("sgd"), tmp_path / "other"))
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))
    command("train", *TINY, "--folder", tmp_path / "bare", "--no-tensorboard")
    assert [path.name for path in (tmp_path / "bare").iterdir()] == ["record.json"]


def test_a_folder_is_named_after_the_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command("train", *TINY, "--no-tensorboard")
    assert (tmp_path / "runs/mlp-digits/sgd-lr0.3-seed0/record.json").exists()


def test_races_get_what_was_asked(command, asked, capsys):
    command("tune", "digits-mlp", "--trials", 3, "--optimizers", "sgd", "kfac", "--device", "cpu")
    command("compare", "svhn-vgg16", "--seeds", 4, 5, "--data-folder", "there", "--folder", "here")
    command("compare", "svhn-vgg16")
    command("compare", "svhn-vgg16", "--at-once", 3)
    command("tune", "digits-mlp", "--at-once", 2)
    (tune, tune_options), (compare, compare_options), (default, _), (third, _), (second, _) = asked
    assert (tune[5], compare[4], default[4], third[4], second[5]) == (1, 1, 1, 3, 2)
    assert tune[0] is PRESETS["digits-mlp"]
    assert (str(tune[1]), tune[2], tune[3]) == ("runs/digits-mlp", ("sgd", "kfac"), 3)
    assert tune_options == {"data_folder": None, "device": "cpu"}
    assert compare[0] is PRESETS["svhn-vgg16"]
    assert (str(compare[1]), compare[2], compare[3]) == ("here", OPTIMIZERS, (4, 5))
    assert compare_options == {"data_folder": "there", "device": None}
    assert (str(default[1]), default[3]) == ("runs/svhn-vgg16", (0, 1, 2))
    assert "tekfac-edu report here" in capsys.readouterr().out


def test_only_the_first_process_talks(command, asked, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    command("compare", "digits-mlp")
    assert capsys.readouterr().out == ""


# bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model vgg16 --dataset digits", "vgg16 needs images of 32×32 pixels"),
        ("train --model mlp --dataset digits --lr -1", "lr must be a finite number and > 0"),
        ("train --model mlp --dataset digits --batch-size 5000", "a batch of 5000 is more than"),
        ("train --model mlp --dataset digits --data-folder x", "digits is embedded"),
        ("train --dataset cifar10 --data-folder /no/where", "there is no folder /no/where"),
        (
            "train --model mlp --dataset digits --optimizer kfac --cost.eigenbasis qr",
            '="qr") is for',
        ),
        ("tune digits-mlp --trials 0", "trials must be a whole number >= 1; got 0"),
        ("report /no/where", "there is no /no/where"),
    ],
)
def test_what_cannot_be_is_one_line(arguments, message, command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        command(*arguments.split())
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert stopped.value.code not in (0, None)
    assert message in " ".join(said.replace("│", " ").split())
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        ("train --dataset imagenet", "imagenet"),
        ("train --optimizer lbfgs", "lbfgs"),
        ("train --epochs ten", "ten"),
        ("train --leraning-rate 1", "--leraning-rate"),
        ("compare nothing", "nothing"),
        ("fly", "fly"),
    ],
)
def test_what_is_not_known_is_named(arguments, wrong, command, capsys):
    with pytest.raises(SystemExit) as stopped:
        command(*arguments.split())
    assert stopped.value.code == 2
    assert wrong in capsys.readouterr().err


def test_a_command_that_fails_shows_no_traceback(tmp_path):
    """In a process of its own, as users see it."""
    arguments = [*TINY, "--folder", tmp_path / "file" / "run"]
    (tmp_path / "file").write_text("not a folder")
    said = subprocess.run(
        [sys.executable, "-m", "tekfac_edu.experiments.command_line", "train", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert said.returncode == 1 and said.stdout == ""
    (line,) = said.stderr.splitlines()
    assert line.startswith(f"tekfac-edu: cannot write to {tmp_path / 'file' / 'run'}")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """tekfac-edu train --help | head -1"""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "tekfac_edu.experiments.command_line", "train", "--help"]
    said = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert said.stderr == ""
