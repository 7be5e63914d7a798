"""The loop: accumulation, schedules, EMA, resume bit for bit, preemption, non-finite gradients."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from toy_stage import Toy

from data.app import EXIT_INTERRUPTED, RunFailedError
from models.diffusion.noise import KeyedNoise
from train import checkpoint, monitor
from train.accelerator import Parallel
from train.monitor import Alarm, AlarmError, LoggerConfig, Monitor
from train.optim import ModuleOptim, OptimConfig, learning_rate
from train.preemption import PreemptionSignal
from train.stage import RunEndedError
from train.trainer import EXIT_REQUEUE, MAX_NONFINITE, TrainConfig, Trainer, accumulation_of


def trainer_of(folder, steps=8, stage=None, optim=None, config=None, **settings):
    cfg = TrainConfig(
        **{
            "output_dir": str(folder),
            "steps": steps,
            "global_batch": 4,
            "micro_batch": 2,
            "precision": "fp32",
            "device": "cpu",
            "log_every": 1,
            "checkpoint_every": 3,
        }
        | settings
    )
    optim = optim or OptimConfig(
        lr=0.05,
        warmup_updates=3,
        ema_decay=0.9,
        schedule="cosine",
        modules={"critic": ModuleOptim(ema_decay=0.0)},
    )
    Path(folder).mkdir(parents=True, exist_ok=True)
    monitor = Monitor(LoggerConfig(progress=False), Path(folder), "toy", {})
    stage = stage or Toy(KeyedNoise(cfg.seed))
    parallel = Parallel(device="cpu", precision="fp32")
    return Trainer(cfg, optim, stage, parallel, None, monitor, {"seed": cfg.seed}, config)


def weights(trainer):
    return {f"{n}.{k}": v.clone() for n, m in trainer.modules.items() for k, v in m.state_dict().items()}


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(("unix", "time/", "seconds", "samples"))} for line in lines
    ]


def test_updates_and_accumulation(tmp_path):
    trainer = trainer_of(tmp_path, steps=4)
    assert trainer.fit() == 0
    once = [
        (s, u, m)
        for s, names in enumerate([["student", "critic"], ["critic"], ["critic"], ["student", "critic"]])
        for u in names
        for m in range(2)
    ]
    assert trainer.stage.trace == once
    assert trainer.counters.updates == {"student": 2, "critic": 4}


def test_the_cosine_of_a_module_ends_with_its_last_update(tmp_path):
    cosine = OptimConfig(lr=0.1, schedule="cosine", min_lr_ratio=0.1)
    trainer_of(tmp_path, steps=10, optim=cosine).fit()
    for name, updates in (("student", 4), ("critic", 10)):
        rates = [line[f"{name}/lr"] for line in losses(tmp_path) if f"{name}/lr" in line]
        assert rates == pytest.approx([learning_rate(update, cosine, updates) for update in range(updates)])


def test_lazy_losses_and_accumulation_give_the_gradient_of_the_sum(tmp_path):
    lazy = trainer_of(tmp_path / "lazy", steps=5)
    whole = trainer_of(tmp_path / "whole", steps=5, stage=Toy(KeyedNoise(0), lazy=False))
    one_pass = trainer_of(tmp_path / "one", steps=5, stage=_Doubled(KeyedNoise(0)), micro_batch=4)
    for trainer in (lazy, whole, one_pass):
        trainer.fit()
    for other in (whole, one_pass):
        for name, value in weights(lazy).items():
            torch.testing.assert_close(weights(other)[name], value, rtol=1e-5, atol=1e-6)


class _Ending(Toy):
    def train_step(self, batch, context):
        if context.step == 5:
            raise RunEndedError("it froze")
        return super().train_step(batch, context)


def test_a_run_that_its_stage_ends_leaves_the_numbers_that_led_to_it(tmp_path):
    trainer = trainer_of(tmp_path, steps=10, stage=_Ending(KeyedNoise(0)), log_every=4)
    with pytest.raises(RunEndedError, match="it froze"):
        trainer.fit()
    assert [line["step"] for line in losses(tmp_path)] == [4, 6] and "critic/loss" in losses(tmp_path)[-1]


class _Doubled(Toy):
    """Both micro-batches of Toy in one pass."""

    def train_step(self, batch, context):
        from dataclasses import replace

        parts = [super(_Doubled, self).train_step(batch, replace(context, micro=m)) for m in range(2)]
        from train.stage import StepOutput

        return StepOutput(sum(sum(part.losses) for part in parts) / 2)


def test_resume_is_bit_for_bit(tmp_path):
    whole = trainer_of(tmp_path / "whole", steps=11)
    whole.fit()
    first = trainer_of(tmp_path / "cut", steps=11)
    _kill_after(first, 8)  # the checkpoint of step 6 is the last; 7 and 8 are lost
    second = trainer_of(tmp_path / "cut", steps=11)
    second.fit()
    assert second.stage.trace[0][0] == 6
    for name, value in weights(whole).items():
        assert torch.equal(weights(second)[name], value), name
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for name, ema in whole.emas.items():
        assert all(torch.equal(ema.values[k], second.emas[name].values[k]) for k in ema.values)
    for a, b in zip(whole.stage.exports[-1].values(), second.stage.exports[-1].values()):
        assert torch.equal(a, b)


def _kill_after(trainer, steps):
    train_one_step = trainer.train_one_step

    def stop_there(batches):
        if trainer.counters.step == steps:
            raise KeyboardInterrupt
        train_one_step(batches)

    trainer.train_one_step = stop_there
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()


def test_resume_in_the_middle_of_a_log_window(tmp_path):
    for folder, stop in (("whole", None), ("cut", 4)):
        trainer = trainer_of(tmp_path / folder, steps=8, log_every=4, checkpoint_every=2)
        if stop:
            _kill_after(trainer, 3)
            trainer = trainer_of(tmp_path / folder, steps=8, log_every=4, checkpoint_every=2)
        trainer.fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_damaged_newest_checkpoint_falls_back(tmp_path, caplog):
    trainer_of(tmp_path / "whole", steps=8).fit()
    _kill_after(trainer_of(tmp_path / "cut", steps=8), 7)
    newest = tmp_path / "cut/checkpoints/step_00000006"
    content = bytearray((newest / "optimizers.pt").read_bytes())
    content[-200] ^= 1
    (newest / "optimizers.pt").write_bytes(content)
    resumed = trainer_of(tmp_path / "cut", steps=8)
    resumed.fit()
    assert resumed.stage.trace[0][0] == 3
    assert "step_00000006 is damaged (optimizers.pt has another checksum" in caplog.text
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("there", "here"), [("adamw", "muon"), ("muon", "adamw")])
def test_moments_of_another_optimizer_are_refused(tmp_path, there, here):
    def run(kind, steps):
        optim = OptimConfig(kind=kind, ema_decay=0.0)
        return trainer_of(tmp_path, steps=steps, optim=optim, config={"optim": {"kind": kind}})

    run(there, 3).fit()
    with pytest.raises(ValueError, match=f"was trained with optim.kind={there}, this is {here}"):
        run(here, 6).fit()


def test_checkpoints_and_validations_are_no_part_of_a_steps_time(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, steps=6, stage=Toy(KeyedNoise(0), validates=True), validate_every=2)
    write, validate = trainer._write_checkpoint, trainer.stage.validate
    monkeypatch.setattr(trainer, "_write_checkpoint", lambda step: (time.sleep(0.5), write(step)))
    monkeypatch.setattr(trainer.stage, "validate", lambda step: (time.sleep(0.5), validate(step))[1])
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(line.get("seconds_per_step", 0) for line in lines) < 0.5


def test_a_start_that_changes_nothing_is_told(tmp_path, caplog):
    trainer_of(tmp_path, steps=3, config={"stage": {"init_from": "a"}}).fit()
    trainer_of(tmp_path, steps=4, config={"stage": {"init_from": "b"}}).fit()
    assert "stage.init_from changes nothing: the weights are those of" in caplog.text


def test_an_encoder_that_was_not_here_when_the_checkpoint_was_written_is_no_difference(tmp_path):
    key = "the content of the latents encoder"
    trainer_of(tmp_path, steps=3).fit()
    here = trainer_of(tmp_path, steps=4)
    here.identity = {**here.identity, key: "abc"}
    here.fit()
    other = trainer_of(tmp_path, steps=5)
    other.identity = {**other.identity, key: "def"}
    with pytest.raises(ValueError, match=f"{key}: abc there, def here"):
        other.fit()


def test_refuses_another_run_and_a_used_folder(tmp_path):
    trainer_of(tmp_path, steps=2).fit()
    with pytest.raises(ValueError, match=r"another run .seed: 0 there, 7 here"):
        trainer_of(tmp_path, steps=4, seed=7).fit()
    with pytest.raises(ValueError, match=r"resume=never, but .*step_00000002 exists"):
        trainer_of(tmp_path, steps=4, resume="never").fit()


def test_a_refused_resume_is_not_told_to_wandb(tmp_path, monkeypatch):
    trainer_of(tmp_path, steps=2).fit()
    begun = []
    monkeypatch.setattr(monitor, "_start_wandb", lambda *args: begun.append(args))
    for seed, refused in ((7, True), (0, False)):
        trainer = trainer_of(tmp_path, steps=4, seed=seed)
        trainer.monitor = Monitor(LoggerConfig(kind="wandb", progress=False), tmp_path, "toy", {})
        with pytest.raises(ValueError, match="another run") if refused else nullcontext():
            trainer.fit()
        trainer.close(refused)
        assert bool(begun) != refused


def test_preemption_saves_at_the_step_boundary(tmp_path):
    trainer_of(tmp_path / "whole", steps=8).fit()
    trainer = trainer_of(tmp_path / "cut", steps=8, checkpoint_every=100)
    train_step, handler = trainer.stage.train_step, signal.getsignal(signal.SIGUSR1)

    def with_signal(batch, context):
        if context.step == 4 and context.update == "critic":
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_step(batch, context)

    trainer.stage.train_step = with_signal
    assert trainer.fit() == EXIT_REQUEUE == 75
    assert (tmp_path / "cut/checkpoints/last_good").read_text() == "step_00000005\n"
    assert signal.getsignal(signal.SIGUSR1) == handler
    assert trainer_of(tmp_path / "cut", steps=8, checkpoint_every=100).fit() == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


def test_the_logs_end_before_other_processes_may_leave(tmp_path):
    """When one has left, the launcher stops the main process, uploading or not."""
    trainer, calls = trainer_of(tmp_path, steps=8), []
    barrier, close = trainer.parallel.barrier, trainer.monitor.close
    trainer.parallel.barrier = lambda: (calls.append("barrier"), barrier())
    trainer.monitor.close = lambda failed=False: (calls.append("logs end"), close(failed))
    press_ctrl_c_in(trainer, (2,))
    assert trainer.fit() == EXIT_INTERRUPTED
    assert calls[-2:] == ["logs end", "barrier"]
    trainer.close()


def press_ctrl_c_in(trainer, steps):
    train_step = trainer.stage.train_step

    def with_signal(batch, context):
        if context.step in steps and context.update == "critic" and context.micro == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(batch, context)

    trainer.stage.train_step = with_signal


def test_ctrl_c_saves_at_the_step_boundary(tmp_path, caplog):
    trainer, handler = trainer_of(tmp_path, checkpoint_every=100), signal.getsignal(signal.SIGINT)
    press_ctrl_c_in(trainer, [4])
    assert trainer.fit() == EXIT_INTERRUPTED == 130
    assert (tmp_path / "checkpoints/last_good").read_text() == "step_00000005\n"
    assert "interrupted: step 5 is saved; the same command continues it" in caplog.text
    assert signal.getsignal(signal.SIGINT) == handler


@pytest.mark.parametrize(("seconds", "raises"), [(0.5, False), (1.5, True)])
def test_a_second_ctrl_c_stops_at_once_unless_a_launcher_repeats_the_first(monkeypatch, seconds, raises):
    now = iter([100.0, 100.0 + seconds])
    monkeypatch.setattr("train.preemption.time.monotonic", lambda: next(now))
    with PreemptionSignal() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received and stop.interrupted == 100.0
        with pytest.raises(KeyboardInterrupt) if raises else nullcontext():
            os.kill(os.getpid(), signal.SIGINT)


def test_a_process_that_ignores_ctrl_c_goes_on_ignoring_it():
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with PreemptionSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.received
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.received and stop.interrupted is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_run_that_is_finished_says_so_and_what_differs(tmp_path, caplog):
    config = {"shards": "a", "optim": {"lr": 0.1, "kind": "adamw"}}
    trainer_of(tmp_path, steps=4, config=config).fit()
    assert "nothing is trained" not in caplog.text
    again = trainer_of(tmp_path, steps=4, config=config)
    assert again.fit() == 0 and again.stage.trace == []
    assert "is finished at step 4: nothing is trained. To train on set steps to more than 4" in caplog.text
    changed = {"shards": "b", "optim": {"lr": 0.2, "kind": "adamw"}}
    trainer_of(tmp_path, steps=4, config=changed).fit()
    differ = "settings differ (shards: a there, b here; optim.lr: 0.1 there, 0.2 here)"
    assert f"nothing is trained or exported, though {differ}" in caplog.text


def test_a_finished_run_is_exported_again_under_its_own_settings_only(tmp_path):
    trainer_of(tmp_path, steps=4, config={"shards": "a"}).fit()
    other = trainer_of(tmp_path, steps=4, config={"shards": "b"}, optim=OptimConfig(ema_decay=0.0))
    assert other.fit() == 0 and other.stage.exports == []
    same = trainer_of(tmp_path, steps=4, config={"shards": "a"})
    assert same.fit() == 0 and len(same.stage.exports) == 1  # a kill may have come before the export
    longer = trainer_of(tmp_path, steps=5, config={"shards": "b"})
    assert longer.fit() == 0 and len(longer.stage.exports) == 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: StorageFull")])
def test_an_export_that_failed_is_made_by_the_next_start_whatever_its_settings(tmp_path, caplog, error):
    validating(tmp_path, keep_every=4, config={"log_every": 1}).fit()
    failing = validating(tmp_path, keep_every=4, steps=12, config={"log_every": 1})
    plain = failing.stage.export

    def full(folder, weights):
        if failing.counters.step == 12:
            raise error
        plain(folder, weights)

    failing.stage.export = full
    with pytest.raises(
        RunFailedError, match=r"step 12 is saved, its export .* GB were free \(.*\); make room, and the"
    ):
        failing.fit()
    again = validating(tmp_path, keep_every=4, steps=12, config={"log_every": 5}, log_every=5)
    assert again.fit() == 0 and again.stage.trace == []
    for exported in again.stage.exports:
        assert torch.equal(exported["student"], again.emas["student"].values["weight"])
    assert len(again.stage.exports) == 2 and (tmp_path / "exports/step_00000012").is_dir()
    assert "what is not exported yet is now, where settings differ (log_every: 1 there, 5 here)" in caplog.text
    once_more = validating(tmp_path, keep_every=4, steps=12, config={"log_every": 6}, log_every=6)
    assert once_more.fit() == 0 and once_more.stage.exports == []


def test_an_export_that_was_deleted_is_made_again(tmp_path):
    trainer_of(tmp_path, steps=4, config={"log_every": 1}).fit()
    (tmp_path / "export").rmdir()
    again = trainer_of(tmp_path, steps=4, config={"log_every": 2})
    assert again.fit() == 0 and len(again.stage.exports) == 1


def test_a_resumed_run_says_what_differs(tmp_path, caplog):
    _kill_after(trainer_of(tmp_path, config={"lr": 0.1}), 4)
    trainer_of(tmp_path, steps=5, config={"lr": 0.1}).fit()
    assert "differ" not in caplog.text
    trainer_of(tmp_path, steps=8, config={"lr": 0.2}).fit()
    assert "step_00000005 and hold from here on: lr: 0.1 there, 0.2 here" in caplog.text


def test_changed_fields():
    there = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {"f": 1}}
    assert checkpoint.changed_fields(there, there) == []
    here = {"a": 1, "b": {"c": [1, 3], "d": None, "g": 2}, "e": None}
    assert checkpoint.changed_fields(there, here) == [
        "b.c: [1, 2] there, [1, 3] here", "b.g: None there, 2 here", "e: {'f': 1} there, None here",
    ]  # fmt: skip


def validating(folder, **settings):
    """A trainer of 8 steps that is to save and validate every fourth."""
    stage = Toy(KeyedNoise(0), validates=True)
    return trainer_of(folder, stage=stage, **{"checkpoint_every": 4, "validate_every": 4} | settings)


def signal_in(stage, method, step):
    """The stage gets USR1 in `method` of this step."""
    plain = getattr(stage, method)

    def with_signal(*args):
        if step == (args[1].step if method == "train_step" else args[0]):
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain(*args)

    setattr(stage, method, with_signal)


def test_a_checkpoint_comes_before_the_validation_of_its_step(tmp_path):
    trainer, found = validating(tmp_path), []
    trainer.stage.validate = lambda step: found.append((step, (tmp_path / "checkpoints/last_good").read_text().strip()))
    trainer.fit()
    assert found == [(4, "step_00000004"), (8, "step_00000008")]


@pytest.mark.parametrize("step", [4, 8])
def test_a_preempted_run_leaves_the_validation_to_the_next(tmp_path, step):
    validating(tmp_path / "whole").fit()
    trainer = validating(tmp_path / "cut")
    signal_in(trainer.stage, "train_step", step - 1)
    assert trainer.fit() == EXIT_REQUEUE
    assert trainer.counters.step == step and step not in trainer.stage.validated
    assert validating(tmp_path / "cut").fit() == 0
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize(("step", "code"), [(4, EXIT_REQUEUE), (8, 0)])
def test_a_signal_lets_the_validation_end_and_then_the_run(tmp_path, step, code):
    validating(tmp_path / "whole", checkpoint_every=3).fit()
    trainer = validating(tmp_path / "cut", checkpoint_every=3)
    signal_in(trainer.stage, "validate", step)
    assert trainer.fit() == code and trainer.stage.validated[-1] == trainer.counters.step == step
    assert (tmp_path / "cut/checkpoints/last_good").read_text() == f"step_{step:08d}\n"
    again = validating(tmp_path / "cut", checkpoint_every=3)
    assert again.fit() == 0 and step not in again.stage.validated
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")


@pytest.mark.parametrize("method", ["validate", "export"])
@pytest.mark.parametrize("step", [4, 8])
def test_what_a_kill_after_the_checkpoint_left_out_is_made_up_for(tmp_path, step, method):
    whole = validating(tmp_path / "whole", keep_every=4)
    whole.fit()
    trainer = validating(tmp_path / "cut", keep_every=4)
    plain = getattr(trainer.stage, method)

    def killed(*args):
        if trainer.counters.step == step:
            raise KeyboardInterrupt
        return plain(*args)

    setattr(trainer.stage, method, killed)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    validating(tmp_path / "cut", keep_every=4).fit()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    for folder in ("export", f"exports/step_{step:08d}"):
        assert (tmp_path / "cut" / folder).is_dir()


def test_a_longer_run_keeps_the_validation_at_the_former_end(tmp_path):
    validating(tmp_path, validate_every=0).fit()
    validating(tmp_path, validate_every=0, steps=12).fit()
    assert [line["step"] for line in losses(tmp_path) if "validation/weight" in line] == [8, 12]


def test_a_run_beyond_its_steps_is_over(tmp_path):
    validating(tmp_path).fit()
    assert validating(tmp_path, steps=6).fit() == 0


def test_nonfinite_gradient_is_skipped_then_given_up(tmp_path, caplog):
    trainer = trainer_of(tmp_path / "a", steps=3, stage=Toy(KeyedNoise(0), explode_at=1))
    trainer.fit()
    assert trainer.counters.updates["critic"] == 2
    assert "gradient norm of critic is nan; update skipped" in caplog.text
    assert all(torch.isfinite(v).all() for v in weights(trainer).values())

    endless = Toy(KeyedNoise(0))
    endless.train_step, step = (lambda batch, context: _nan(step(batch, context))), endless.train_step
    with pytest.raises(RunFailedError, match=f"{MAX_NONFINITE} updates in a row .* lower optim.lr"):
        trainer_of(tmp_path / "b", steps=100, stage=endless).fit()


def test_each_module_counts_its_own_nonfinite_gradients(tmp_path):
    """The critic's finite updates do not hide that the student has none."""
    stage = Toy(KeyedNoise(0))
    train_step = stage.train_step

    def broken_student(batch, context):
        output = train_step(batch, context)
        return _nan(output) if context.update == "student" else output

    stage.train_step = broken_student
    settings = {"steps": 100, "stage": stage, "checkpoint_every": 4}
    with pytest.raises(RuntimeError, match=rf"{MAX_NONFINITE} updates in a row .*\(student, step 27\)"):
        trainer_of(tmp_path, **settings).fit()
    stage.trace.clear()
    with pytest.raises(RuntimeError, match=r"\(student, step 27\)"):
        trainer_of(tmp_path, **settings).fit()  # the count goes on where the checkpoint left it
    assert stage.trace[0][0] == 24


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads which files are mapped from /proc")
def test_a_resumed_run_keeps_no_file_of_the_checkpoint_mapped(tmp_path):
    trainer_of(tmp_path, steps=3).fit()
    resumed = trainer_of(tmp_path, steps=6)
    resumed.resume()
    gc.collect()
    assert str(tmp_path / "checkpoints") not in Path("/proc/self/maps").read_text()
    assert resumed.counters.step == 3


def _nan(output):
    output.losses = sum(output.losses) * float("nan")
    return output


def test_announced_number_of_losses_is_checked(tmp_path):
    class Wrong(Toy):
        def train_step(self, batch, context):
            output = super().train_step(batch, context)
            output.num_losses = 3
            return output

    with pytest.raises(RuntimeError, match=r"num_losses=3 and gave 2"):
        trainer_of(tmp_path, stage=Wrong(KeyedNoise(0))).fit()


@pytest.mark.parametrize(
    ("batch", "micro", "world", "message"),
    [
        (
            48,
            5,
            1,
            "micro_batch=5 must divide global_batch=48 / 1 processes = 48; valid: 1, 2, 3, 4, 6, 8, 12, 16,",
        ),
        (
            64,
            8,
            6,
            "must be a multiple of micro_batch=8 x 6 processes = 48; valid: global_batch=48 or 96, or",
        ),
        (2, 4, 1, "micro_batch=4 must divide global_batch=2 / 1 processes = 2; valid: 1, 2"),
    ],
)
def test_impossible_batches_name_what_works(batch, micro, world, message):
    with pytest.raises(ValueError) as info:
        accumulation_of(batch, micro, world)
    assert message in str(info.value)


def test_validation_needs_a_clip():
    with pytest.raises(ValueError, match="validation_clips=0 must be at least 1"):
        TrainConfig(validation_clips=0)


def test_only_a_checkpoint_that_is_written_can_be_kept():
    with pytest.raises(ValueError, match="keep_every=1200 must be a multiple of checkpoint_every=500, or 0"):
        TrainConfig(checkpoint_every=500, keep_every=1200)


def test_accumulation():
    assert accumulation_of(128, 4, 8) == 4
    assert accumulation_of(8, 8, 1) == 1


def test_keeps_the_last_and_the_milestones(tmp_path):
    trainer_of(tmp_path, steps=10, checkpoint_every=2, keep_last=2, keep_every=4).fit()
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == ["exported", "last_good", "step_00000004", "step_00000008", "step_00000010"]
    assert sorted(p.name for p in (tmp_path / "exports").iterdir()) == ["step_00000004", "step_00000008"]


@pytest.mark.parametrize("patience", [1, 2])
@pytest.mark.parametrize("steps", [8, 20])
def test_an_alarm_of_a_validation_stops_the_same_command_again(tmp_path, patience, steps):
    every, limit = 4 if patience == 2 else 8, Alarm(max=-100.0, patience=patience, stop=True)
    for starts in range(2):
        trainer = validating(tmp_path, validate_every=every, steps=steps)
        trainer.monitor.cfg.alarms["validation/weight"] = limit
        with pytest.raises(AlarmError, match="alarm: validation/weight="):
            trainer.fit()
        assert trainer.counters.step == 8 and bool(trainer.stage.trace) == (starts == 0)
    assert [line["step"] for line in losses(tmp_path) if "validation/weight" in line] == list(range(every, 9, every))
    limit.max = 100.0  # the user thinks better of it
    trainer = validating(tmp_path, validate_every=every, steps=steps)
    trainer.monitor.cfg.alarms["validation/weight"] = limit
    assert trainer.fit() == 0 and trainer.stage.validated[0] == 8


def test_alarm_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.monitor.cfg.alarms["critic/loss"] = Alarm(max=1e-9, patience=2, stop=True)
    with pytest.raises(AlarmError, match=r"critic/loss=.* is beyond min=None, max=1e-09 .2 records"):
        trainer.fit()
    assert losses(tmp_path)[-1]["alarm/critic/loss"] == 1.0 and len(losses(tmp_path)) == 2
