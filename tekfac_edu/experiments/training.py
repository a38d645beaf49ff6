"""One run, from its configuration to its record.

    record = train(Configuration(optimizer="tekfac", lr=0.1), "runs/first")

A run continues from the newest checkpoint in its folder, and ends with the numbers of one that
never stopped: everything random about an epoch follows from the seed and the epoch's number, and
the rest is in the checkpoint.
"""

import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tekfac_edu.data.batches import Batches
from tekfac_edu.data.images import DATASETS
from tekfac_edu.experiments.building import (
    build_images,
    build_model,
    build_optimizer,
    build_schedule,
)
from tekfac_edu.experiments.checkpoints import (
    check_room,
    expected_bytes,
    load_checkpoint,
    remove_checkpoints,
    save_checkpoint,
)
from tekfac_edu.experiments.configuration import Configuration
from tekfac_edu.experiments.interruption import Interruption
from tekfac_edu.experiments.networks import NETWORKS
from tekfac_edu.experiments.processes import processes
from tekfac_edu.experiments.records import FORMAT, header, read_record, write_json
from tekfac_edu.experiments.tasks import evaluate

CHECKPOINT_SECONDS = 60  # between checkpoints within an epoch
CHEAP_SECONDS, CHEAP_SHARE = 1.0, 0.05  # one at an epoch's end if it takes so little, or so rarely


class Interrupted(Exception):
    """The run was asked to stop, and has saved itself."""


@dataclass
class Position:
    """How far a run has come; what of it the record will tell.

    Attributes
    ----------
    epoch, batch : the next batch, both from 0.   loss : sum over this epoch's batches so far, of
        the mean over all processes.
    seconds, cpu_seconds : in training steps alone, since the run's beginning.
    epochs : what each finished epoch left.   continued : how often the run was taken up again.
    """

    epoch: int = 0
    batch: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    epochs: list = field(default_factory=list)
    continued: int = 0


def train(configuration, folder, data_folder=None, device=None, tensorboard=False, bar=True):
    """Run to the end, or to the first loss that is not finite, and write `record.json`.

    Parameters
    ----------
    configuration : Configuration.
    folder : of this run alone; made if missing. A finished run there is returned, not run again.
    data_folder : of Parquet files, see `load_images`; None: download.
    device : "cpu", "cuda"; None: a GPU if there is one.
    tensorboard : also write scalars for TensorBoard into the folder.
    bar : show a progress bar.

    Returns
    -------
    dict, the record: header, configuration, and per epoch train_loss (mean over its batches
    as they were trained on), test_loss, test_score (accuracy, or reconstruction error), lr,
    seconds and cpu_seconds since the beginning, in training alone.

    Raises
    ------
    Interrupted
        After Ctrl-C or SIGTERM; the message says how to continue.
    OSError, ValueError
        If the folder cannot be written to or holds another run, before anything is trained.
    """
    folder = Path(folder)
    finished = folder / "record.json"
    if finished.exists():
        record = read_record(finished)
        _refuse_other(configuration, record["configuration"], folder)
        remove_checkpoints(folder)  # if it was killed just before
        return record
    with processes(device) as here:
        run = Run(configuration, folder, data_folder, here, tensorboard)
        try:
            with Interruption() as interruption:
                run.to_the_end(interruption, bar)
            record = run.record()
            if here.first:
                write_json(finished, record)
                remove_checkpoints(folder)
            here.wait()
        finally:
            run.close()
    return record


class Run:
    """The objects of one run, built from the configuration or taken up from a checkpoint."""

    def __init__(self, configuration, folder, data_folder, here, tensorboard=False):
        self.configuration, self.folder, self.here = configuration, folder, here
        if here.ranks > 1 and configuration.fisher == "mc":
            raise ValueError(
                'fisher "mc" on several processes cannot be continued exactly: use one'
            )
        self.task = NETWORKS[configuration.model].task
        self.images = build_images(configuration, data_folder, str(here.device))
        self.batches = Batches(
            self.images,
            configuration.batch_size,
            configuration.augment,
            configuration.seed,
            here.rank,
            here.ranks,
            self.task.unit,
            mirror=DATASETS[configuration.dataset].mirror,
        )
        self.model = build_model(configuration, self.images).to(here.device)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        self.trained = self.model if here.ranks == 1 else DistributedDataParallel(self.model)
        self.optimizer = build_optimizer(configuration, self.trained)
        self.schedule = build_schedule(configuration, self.optimizer, len(self.batches))
        self.position = Position()
        self.saved_at, self.saving_seconds = time.perf_counter(), 0.0
        if here.first:
            check_room(folder, 3 * expected_bytes(self.model, self.optimizer))
        here.wait()
        self._take_up(load_checkpoint(folder, here.device))
        here.wait()  # a run that only lacks its record removes the checkpoints next
        self.scalars = None
        if tensorboard and here.first:
            from torch.utils.tensorboard import SummaryWriter

            self.scalars = SummaryWriter(folder, purge_step=self.position.epoch + 1)

    def to_the_end(self, interruption, bar=True):
        """Train, evaluate and save, epoch by epoch."""
        epochs, position = self.configuration.epochs, self.position
        with tqdm(
            total=epochs * len(self.batches),
            initial=position.epoch * len(self.batches) + position.batch,
            desc=self.configuration.name,
            unit="step",
            dynamic_ncols=True,
            disable=None if bar and self.here.first else True,
        ) as shown:
            while position.epoch < epochs and not self.diverged:
                self._epoch(interruption, shown)
                if position.batch == 0:
                    self._tell(shown)
                asked = self.here.agree(interruption.asked)
                if asked or position.batch > 0 or self._cheap_to_save():
                    self.save()
                if asked and position.epoch < epochs:
                    raise Interrupted(
                        f"stopped after step {self.step} and saved in {self.folder}; "
                        "the same command continues"
                    )

    def _epoch(self, interruption, shown):
        """Until the epoch's end, an interruption, or time for a checkpoint within it."""
        position, here = self.position, self.here
        loss = torch.full((), position.loss, dtype=torch.float64, device=here.device)
        self.model.train()
        here.wait()
        start, cpu = time.perf_counter(), time.process_time()
        saved = start
        for x, y in self.batches.epoch(position.epoch, position.batch):
            loss += self._step(x, y)
            position.batch += 1
            shown.update()
            late = time.perf_counter() - saved > CHECKPOINT_SECONDS
            if here.agree(interruption.asked or late):
                break
        position.loss = here.mean(loss.item())
        here.wait()
        position.seconds += time.perf_counter() - start
        position.cpu_seconds += time.process_time() - cpu
        if position.batch == len(self.batches):
            self._close_epoch()

    def _step(self, x, y):
        """One training step; its loss."""
        c = self.configuration
        self.optimizer.zero_grad()
        with torch.autocast(self.here.device.type, torch.bfloat16) if c.bf16 else nullcontext():
            outputs = self.trained(x)
        outputs = outputs.float()
        if c.fisher != "empirical" and hasattr(self.optimizer, "accumulate_fisher"):
            self.optimizer.accumulate_fisher(outputs, self.task.likelihood)
        loss = self.task.loss(outputs, x, y)
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()

    def _close_epoch(self):
        position = self.position
        test_loss, test_score = evaluate(self.task, self.model, self.images)
        position.epochs.append(
            {
                "train_loss": position.loss / len(self.batches),
                "test_loss": test_loss,
                "test_score": test_score,
                "lr": self.schedule.get_last_lr()[0],
                "seconds": position.seconds,
                "cpu_seconds": position.cpu_seconds,
            }
        )
        position.epoch, position.batch, position.loss = position.epoch + 1, 0, 0.0

    def _tell(self, shown):
        last = self.position.epochs[-1]
        shown.set_postfix(
            epoch=self.position.epoch,
            loss=f"{last['train_loss']:.3g}",
            **{f"test_{self.task.score}": f"{last['test_score']:.3g}"},
        )
        if self.scalars is not None:
            for name in ("train_loss", "test_loss", "test_score", "lr", "seconds"):
                self.scalars.add_scalar(name, last[name], self.position.epoch)
            self.scalars.flush()

    @property
    def step(self):
        """Steps taken since the beginning."""
        return self.position.epoch * len(self.batches) + self.position.batch

    @property
    def diverged(self):
        """Whether the last epoch's losses were not finite."""
        return bool(self.position.epochs) and not all(
            math.isfinite(self.position.epochs[-1][name]) for name in ("train_loss", "test_loss")
        )

    def _cheap_to_save(self):
        """The checkpoint of a wide network can take as long as an epoch on a fast GPU."""
        passed = time.perf_counter() - self.saved_at
        cheap = self.saving_seconds < max(CHEAP_SECONDS, CHEAP_SHARE * passed)
        return self.here.agree(cheap)

    def save(self):
        """A checkpoint of everything that a continuation needs."""
        start = time.perf_counter()
        if self.here.first:
            state = {
                "format": FORMAT,
                "configuration": self.configuration.as_dict(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "position": asdict(self.position),
            }
            save_checkpoint(self.folder, self.step, state)
        self.saved_at = time.perf_counter()
        self.saving_seconds = self.saved_at - start

    def _take_up(self, state):
        if state is None:
            return
        _refuse_other(self.configuration, state["configuration"], self.folder)
        if state.get("format") != FORMAT:
            raise ValueError(
                f"the checkpoints in {self.folder} are of an older version, which can continue "
                "them; this one cannot: delete them to start again, or give another folder"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.position = Position(**state["position"])
        self.position.continued += 1

    def record(self):
        """What the run leaves behind."""
        return {
            **header(self.here.device),
            "configuration": self.configuration.as_dict(),
            "status": "diverged" if self.diverged else "finished",
            "processes": self.here.ranks,
            "parameters": self.parameters,
            "train_images": len(self.images.x_train),
            "test_images": len(self.images.x_test),
            "score": self.task.score,
            "continued": self.position.continued,
            "epochs": [
                {name: _rounded(value) for name, value in epoch.items()}
                for epoch in self.position.epochs
            ],
        }

    def close(self):
        """Close TensorBoard's file."""
        if self.scalars is not None:
            self.scalars.close()


def _rounded(value):
    """Six digits; None for what is not finite, which JSON cannot hold."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _refuse_other(configuration, settings, folder):
    there = Configuration.from_dict(settings)
    if there != configuration:
        listed = ", ".join(
            f"{name}: {getattr(there, name)!r} there, {value!r} here"
            for name, value in vars(configuration).items()
            if getattr(there, name) != value
        )
        raise ValueError(f"{folder} holds another run ({listed}); give another folder")
