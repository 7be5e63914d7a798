"""The sample order: every epoch a permutation, the same at any world size, resumed exactly."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset

from data.batch import Sample
from data.loader import STOP_SIGNALS, Loader, LoaderConfig, ResumableSampler


def take(sampler: ResumableSampler, batches: int) -> list[list[int]]:
    return list(itertools.islice(iter(sampler), batches))


def global_order(num_samples, per_rank, seed, world, batches, state=None) -> list[int]:
    """Interleave what all ranks see."""
    ranks = [ResumableSampler(num_samples, per_rank * world, seed, rank, world) for rank in range(world)]
    for sampler in ranks:
        if state is not None:
            sampler.load_state_dict(state)
    seen = [take(sampler, batches) for sampler in ranks]
    return [index for n in range(batches) for group in zip(*(batch[n] for batch in seen)) for index in group]


@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 100))
def test_every_epoch_is_a_permutation(num_samples, per_rank, world, seed):
    batches = -(-3 * num_samples // (per_rank * world))
    order = global_order(num_samples, per_rank, seed, world, batches)
    for epoch in range(3):
        assert sorted(order[epoch * num_samples : (epoch + 1) * num_samples]) == list(range(num_samples))


@given(st.integers(1, 40), st.integers(0, 100), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(1, 8))
def test_order_is_the_same_at_any_world_size(num_samples, seed, world, batches):
    alone = global_order(num_samples, 12, seed, 1, batches)
    assert global_order(num_samples, 12 // world, seed, world, batches) == alone


@given(
    st.integers(1, 40),
    st.integers(0, 100),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 12),
    st.integers(1, 6),
)
def test_resuming_continues_the_order(num_samples, seed, world, world_after, done, batches):
    whole = global_order(num_samples, 4, seed, 1, done + batches)
    sampler = ResumableSampler(num_samples, 4, seed, 0, world)
    for _ in range(done):
        sampler.advance()
    state = sampler.state_dict()
    assert 0 <= state["samples_seen"] < num_samples
    rest = global_order(num_samples, 4 // world_after, seed, world_after, batches, state)
    assert rest == whole[4 * done :]


def test_epochs_and_seeds_differ():
    sampler = ResumableSampler(50, 10, seed=0)
    assert not (sampler.permutation(0) == sampler.permutation(1)).all()
    assert not (sampler.permutation(0) == ResumableSampler(50, 10, seed=1).permutation(0)).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((0, 4, 0, 0, 1), "num_samples=0"),
        ((8, 5, 0, 0, 2), "global_batch=5 must be a positive multiple of world=2"),
        ((8, 4, 0, 2, 2), "rank=2"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResumableSampler(*arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_workers": -1}, "data.num_workers=-1 must be at least 0; 0 loads in the training process"),
        ({"seed": -1}, "data.seed=-1 must be >= 0"),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        LoaderConfig(**settings)


def test_state_of_another_data_set_is_refused():
    with pytest.raises(ValueError, match="samples_seen=9 must lie in 0..7"):
        ResumableSampler(8, 4, 0).load_state_dict({"epoch": 0, "samples_seen": 9})


class Numbers(Dataset):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, f"clip-{index}", f"caption {index}", latents=torch.full((1, 1, 2, 2), float(index)))


def test_loader_state_counts_what_was_handed_out():
    loader = Loader(Numbers(), ResumableSampler(10, 4, seed=3))
    ids = []
    for batch in itertools.islice(loader, 4):
        ids += batch.sample_ids
    assert loader.state_dict() == {"epoch": 1, "samples_seen": 6, "identity": None}
    again = Loader(Numbers(), ResumableSampler(10, 4, seed=3))
    again.load_state_dict({"epoch": 0, "samples_seen": 8, "identity": None})
    resumed = [i for batch in itertools.islice(again, 2) for i in batch.sample_ids]
    assert resumed == ids[8:]


def test_a_data_set_packed_anew_begins_its_next_epoch(caplog):
    def loader(identity: str | None) -> Loader:
        return Loader(Numbers(), ResumableSampler(10, 4, seed=3), identity=identity)

    begun = loader("a")
    next(iter(begun))
    state = begun.state_dict()
    for identity, position in (("a", (0, 4)), ("b", (1, 0)), (None, (0, 4))):
        resumed = loader(identity)
        resumed.load_state_dict(state)
        assert (resumed.sampler.epoch, resumed.sampler.samples_seen) == position
    assert caplog.text.count("packed anew since epoch 0 began; going on with the next epoch") == 1


def test_resuming_with_workers_continues_the_order():
    whole = [batch.sample_ids for batch in itertools.islice(Loader(Numbers(), ResumableSampler(10, 4, seed=3)), 6)]
    begun, resumed = (Loader(Numbers(), ResumableSampler(10, 4, seed=3), num_workers=1) for _ in range(2))
    for _ in itertools.islice(begun, 2):
        pass
    resumed.load_state_dict(begun.state_dict())
    assert [batch.sample_ids for batch in itertools.islice(resumed, 4)] == whole[2:]


def test_worker_processes_change_neither_order_nor_state():
    here, there = (Loader(Numbers(), ResumableSampler(10, 4, seed=3), workers) for workers in (0, 2))
    expected = [batch.sample_ids for batch in itertools.islice(here, 3)]
    assert [batch.sample_ids for batch in itertools.islice(there, 3)] == expected
    assert here.state_dict() == there.state_dict(), "batches read ahead by workers do not count"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_loading_processes_outlive_the_signals_that_stop_a_job(number):
    batches = iter(Loader(Numbers(), ResumableSampler(10, 4, seed=3), num_workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, number)
    for _ in range(4):  # more than are read ahead
        next(batches)
    assert worker.is_alive()
    batches.close()
    assert not worker.is_alive()


class Signalled(Numbers):
    """A loading process gets the stop signals as it reads the data set from its parent: before it can ignore them."""

    def __reduce__(self):
        return numbers_after_signals, ()


def numbers_after_signals() -> Numbers:
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    return Numbers()


LOAD_SIGNALLED = """
import signal

from data.loader import STOP_SIGNALS, Loader, ResumableSampler
from tests.data.test_loader import Signalled

if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    batches = iter(Loader(Signalled(), ResumableSampler(10, 4, seed=3), num_workers=1))
    for _ in range(4):
        next(batches)
    batches.close()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGUSR2}
"""


def run_script(folder: Path, script: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, in which nothing of multiprocessing has begun."""
    (folder / "script.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, folder / "script.py"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_loading_processes_outlive_those_signals_while_they_start(tmp_path):
    ended = run_script(tmp_path, LOAD_SIGNALLED)
    assert ended.returncode == 0, ended.stderr


FAIL_WHILE_LOADING = """
from data.loader import Loader, ResumableSampler
from tests.data.test_loader import Numbers

if __name__ == "__main__":
    batches = iter(Loader(Numbers(), ResumableSampler(10, 4, seed=3), num_workers=1))
    next(batches)
    raise SystemExit("stopped")  # with the loader open
"""


def test_the_training_process_does_not_wait_for_them_at_its_exit(tmp_path):
    ended = run_script(tmp_path, FAIL_WHILE_LOADING)
    assert ended.returncode == 1 and ended.stderr.strip() == "stopped"
