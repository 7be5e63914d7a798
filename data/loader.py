"""The data loader: an endless, exactly resumable stream of batches.

Epoch e visits the samples in a permutation drawn from (seed, e); batches run on across the end of an epoch,
so nothing is dropped. The global order is the same for any world size and any number of workers, and the
state is two numbers, {"epoch", "samples_seen"}, and the identity of the data set. Nothing is fast-forwarded on resume.

Loading processes outlive the signals by which a scheduler asks a job to stop: the training process, which handles them,
needs batches up to its last step.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler

from data.batch import Batch, collate
from data.shards import ShardDataset, ShardError
from models.condition import ClipGeometry

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # Slurm, and Ctrl-C, send them to every process of a job


class ResumableSampler(Sampler[list[int]]):
    """Yields, without end, the sample indices of this rank's share of each global batch.

    Rank r of w takes elements r, r + w, r + 2w … of the global batch. Iterating does not change the state
    (workers read ahead of training); `advance` does, once a batch has been handed out.
    """

    def __init__(self, num_samples: int, global_batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples={num_samples} must be >= 1: the data set is empty")
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"rank={rank} must lie in 0..world-1 with world={world} >= 1")
        if global_batch < 1 or global_batch % world:
            raise ValueError(
                f"global_batch={global_batch} must be a positive multiple of world={world}; "
                f"nearest: {max(1, round(global_batch / world)) * world}"
            )
        self.num_samples, self.global_batch, self.seed = num_samples, global_batch, seed
        self.rank, self.world = rank, world
        self.epoch, self.samples_seen = 0, 0

    def permutation(self, epoch: int) -> np.ndarray:
        """Sample order of an epoch: [num_samples]."""
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, position = self.epoch, self.samples_seen
        order = self.permutation(epoch)
        while True:
            taken: list[int] = []
            while len(taken) < self.global_batch:
                if position == self.num_samples:
                    epoch, position = epoch + 1, 0
                    order = self.permutation(epoch)
                part = order[position : position + self.global_batch - len(taken)]
                taken.extend(part.tolist())
                position += len(part)
            yield taken[self.rank :: self.world]

    def advance(self) -> None:
        """Count one global batch as consumed."""
        consumed = self.samples_seen + self.global_batch
        self.epoch, self.samples_seen = self.epoch + consumed // self.num_samples, consumed % self.num_samples

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "samples_seen": self.samples_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if not 0 <= state["samples_seen"] < self.num_samples:
            raise ValueError(
                f"samples_seen={state['samples_seen']} must lie in 0..{self.num_samples - 1}, the size of "
                "this data set; the state belongs to another one"
            )
        self.epoch, self.samples_seen = int(state["epoch"]), int(state["samples_seen"])


@dataclass
class LoaderConfig:
    path: str = ""  # folder of shards with index.json
    num_workers: int = 0  # loading processes; 0 loads in the training process
    cache: bool = False  # keep loaded samples in memory (each worker its own)
    seed: int = 0  # order of the samples

    def __post_init__(self) -> None:
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers} must be at least 0; 0 loads in the training process")
        if self.seed < 0:
            raise ValueError(f"data.seed={self.seed} must be >= 0")


class Loader:
    """Iterates batches for ever; `state_dict` counts the batches handed out, not those read ahead."""

    def __init__(
        self, dataset: Dataset, sampler: ResumableSampler, num_workers: int = 0, identity: str | None = None
    ) -> None:
        """identity: another one where the same numbers are other samples; None if that is not known."""
        self.dataset, self.sampler, self.num_workers, self.identity = dataset, sampler, num_workers, identity

    def __iter__(self) -> Iterator[Batch]:
        if self.num_workers:
            atexit.unregister(_kill_workers)  # once is enough
            atexit.register(_kill_workers)
        loader = DataLoader(
            self.dataset,
            batch_sampler=self.sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            # a forked process inherits decoder and OpenMP threads in an unknown state
            multiprocessing_context="spawn" if self.num_workers else None,
            worker_init_fn=_ignore_stop_signals,
            persistent_workers=False,
        )
        with _stop_signals_held() if self.num_workers else nullcontext():
            batches = iter(loader)  # starts the processes
        for batch in _plainly_refused(batches):
            self.sampler.advance()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {**self.sampler.state_dict(), "identity": self.identity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the state was taken. If that was in another data set, with the next epoch: which samples of this
        one were seen in the old one is not known.
        """
        then = state["identity"]
        if None not in (then, self.identity) and then != self.identity:
            log.warning(
                "the data set was packed anew since epoch %d began; going on with the next epoch", state["epoch"]
            )
            state = {"epoch": state["epoch"] + 1, "samples_seen": 0}
        self.sampler.load_state_dict(state)


def _plainly_refused(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches; a ShardError says the same, and no more, where a loading process raised it: PyTorch puts that
    process's traceback into the message.
    """
    try:
        yield from batches
    except ShardError as error:
        raise ShardError(str(error).rpartition(f"{ShardError.__name__}: ")[2].strip()) from error


@contextmanager
def _stop_signals_held() -> Iterator[None]:
    """Stop signals wait until the end of the block; for processes started in it, until they ignore them."""
    resource_tracker.ensure_running()  # its start, which the first process needs, lets SIGTERM through again
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _ignore_stop_signals(worker: int) -> None:
    """Those that came while the process started are dropped too."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _kill_workers() -> None:
    """At its exit Python sends daemons SIGTERM, which loading processes ignore, and waits until they end."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler takes a killed worker for an error
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def build_loader(
    cfg: LoaderConfig,
    fields: Sequence[str],
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    geometry: ClipGeometry | None = None,
    fingerprints: dict[str, str] | None = None,
) -> Loader:
    """Open the shards at cfg.path for `fields`, in batches of `batch_size` clips per process, and check them against
    the model.

    Raises FileNotFoundError or ShardError before anything is loaded.
    """
    if not cfg.path:
        raise ValueError("loader path is empty; set it to a folder made by `python -m data step=all … out=…`")
    dataset = ShardDataset(cfg.path, fields, geometry=geometry, fingerprints=fingerprints, cache=cfg.cache)
    sampler = ResumableSampler(len(dataset), batch_size * world, cfg.seed, rank, world)
    return Loader(dataset, sampler, cfg.num_workers, dataset.index.identity)
