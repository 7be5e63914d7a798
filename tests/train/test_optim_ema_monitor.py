"""Learning rates, module settings, EMA, metrics.jsonl, W&B."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from data.app import build_config, compose_config
from train.ema import Ema
from train.monitor import Alarm, AlarmError, LoggerConfig, MetricWindow, Monitor
from train.optim import ModuleOptim, OptimConfig, build_optimizer, learning_rate


def test_learning_rate():
    cfg = OptimConfig(lr=1.0, warmup_updates=4, schedule="cosine", min_lr_ratio=0.1)
    rates = [learning_rate(n, cfg, 24) for n in range(30)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[14] == pytest.approx(0.55) and rates[24] == pytest.approx(0.1) and rates[29] == pytest.approx(0.1)
    assert learning_rate(1000, OptimConfig(lr=0.3), 10) == 0.3


def test_dmd_settings_of_the_yaml():
    cfg = build_config(compose_config("train", ["optim=dmd", "optim.modules.critic.lr=1e-6"]).optim)
    student, critic = cfg.of("student"), cfg.of("critic")
    assert (student.lr, student.ema_decay, student.betas) == (2e-6, 0.99, [0.0, 0.999])
    assert (critic.lr, critic.ema_decay, critic.grad_clip) == (1e-6, 0.0, 10.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "optim.schedule=linear must be constant or cosine"),
        ({"kind": "sgd"}, "optim.kind=sgd must be adamw or muon"),
        ({"ema_decay": 1.0}, "optim.ema_decay=1.0 must be in"),
        ({"ema_start": -1}, "optim.ema_start=-1 must be >= 0"),
        ({"decay_updates": 0}, "optim.decay_updates=0 must be at least 1, or null"),
        ({"min_lr_ratio": 2.0}, r"optim.min_lr_ratio=2.0 must be in \[0, 1\]"),
        ({"weight_decay": -0.1}, "optim.weight_decay=-0.1 must be >= 0"),
        ({"betas": []}, r"optim.betas=\[\] must be two numbers"),
        ({"modules": {"critic": ModuleOptim(lr=-1.0)}}, "optim.modules.critic.lr=-1.0 must be >= 0"),
        ({"modules": {"critic": ModuleOptim(weight_decay=-1.0)}}, "optim.modules.critic.weight_decay=-1.0 must be >="),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**settings)


def test_an_exception_and_an_alarm_can_be_added_on_the_command_line():
    cfg = compose_config("train", ["+optim.modules.critic.lr=1e-6", "+logger.alarms.seconds_per_step.max=9"])
    assert build_config(cfg.optim).of("critic").lr == 1e-6
    assert build_config(cfg.logger).alarms == {"seconds_per_step": Alarm(max=9.0)}
    for override, message in (
        ("+optim.modules.critic.lrr=1", "no field 'optim.modules.critic.lrr'"),
        ("+optim.modules.critic.lr=low", "optim.modules.critic.lr='low': "),
    ):
        with pytest.raises(ValueError, match=message):
            build_config(compose_config("train", [override]).optim)


def test_exceptions_and_alarms_are_for_what_the_stage_trains():
    OptimConfig(modules={"critic": ModuleOptim()}).require_trained(["student", "critic"])
    with pytest.raises(ValueError, match=r"optim.modules.kritic: .* no module 'kritic'; it trains: student, critic"):
        OptimConfig(modules={"kritic": ModuleOptim()}).require_trained(["student", "critic"])
    for name in ("student/loss", "validation/psnr_db", "seconds_per_step", "time/data_seconds"):
        LoggerConfig(alarms={name: Alarm()}).require_measured(["student"])
    for name in ("loss", "teacher/loss"):
        with pytest.raises(ValueError, match=f"logger.alarms.{name}: .* begin with student/, validation/"):
            LoggerConfig(alarms={name: Alarm()}).require_measured(["student"])
    with pytest.raises(ValueError, match="begin with vae/, validation/"):
        LoggerConfig(alarms={"loss": Alarm()}).require_measured(["vae", "vae"])


def test_muon_keeps_its_ratio():
    optimizer = build_optimizer(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), OptimConfig(kind="muon", lr=0.1), True)
    assert [group["lr_ratio"] for group in optimizer.param_groups] == [pytest.approx(10.0), 1.0]


def test_ema_counts_updates_starts_and_swaps():
    module = nn.Linear(1, 1, bias=False)
    ema, values = Ema(decay=0.5, start=2), [1.0, 2.0, 4.0]
    for value in values:
        nn.init.constant_(module.weight, value)
        ema.update(module)
        assert ema.active == (ema.updates >= 2)
    decay = min(0.5, 2 / 11)  # one update after the copy of 2.0
    expected = decay * 2.0 + (1 - decay) * 4.0
    assert float(ema.values["weight"]) == pytest.approx(expected)
    with ema.swapped(module) as averaged:
        assert float(averaged.weight.detach()) == pytest.approx(expected)
    assert float(module.weight.detach()) == 4.0

    restored = Ema(decay=0.5, start=2)
    restored.load(module, ema.values, ema.updates)
    for average in (ema, restored):
        average.update(module)
    assert torch.equal(ema.values["weight"], restored.values["weight"])


def test_a_start_that_is_put_off_sets_a_running_average_aside():
    """Else it would stand still at what it was, and be exported."""
    module, ema = nn.Linear(1, 1, bias=False), Ema(0.5)
    for _ in range(5):
        ema.update(module)
    later = Ema(0.5, start=8)
    later.load(module, ema.values, ema.updates)
    assert not later.active
    for _ in range(3):
        later.update(module)
    assert later.active


def test_ema_settles_at_its_decay():
    module, ema = nn.Linear(1, 1, bias=False), Ema(decay=0.9)
    nn.init.constant_(module.weight, 0.0)
    for _ in range(200):
        ema.update(module)
    nn.init.constant_(module.weight, 1.0)
    ema.update(module)
    assert float(ema.values["weight"]) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("start", "num_updates", "said"),
    [
        (40, 80, "EMA 0.99 from update 40, risen to 0.82 at the last of 80"),  # Self-Forcing, as the recipes have it
        (0, 1000, "EMA 0.99 from update 0"),
        (40, 40, "EMA of no effect: it starts at update 40 of 40"),
    ],
)
def test_ema_says_what_it_comes_to(start, num_updates, said):
    assert Ema(0.99, start).describe(num_updates) == said


def test_an_average_follows_what_is_trained():
    """Another part may be frozen at a resume."""
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module[0].weight.requires_grad_(False)
    first, second = Ema(0.5), Ema(0.5)
    first.update(module)
    module[0].weight.requires_grad_(True)
    module[1].bias.requires_grad_(False)
    second.load(module, first.values, first.updates)
    assert set(second.values) == {"0.weight", "0.bias", "1.weight"}
    assert torch.equal(second.values["0.weight"], module[0].weight) and second.values["0.bias"] is not None
    with pytest.raises(ValueError, match="belongs to another model"):
        second.load(module, first.values | {"2.weight": torch.zeros(1)}, 1)


def test_frozen_parameters_have_no_average():
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).requires_grad_(False))
    ema = Ema(0.9)
    ema.update(module)
    assert set(ema.values) == {"0.weight", "0.bias"}


def test_records_behind_the_resumed_step_are_cut(tmp_path):
    monitor = Monitor(LoggerConfig(), tmp_path, "run", {})
    monitor.start(0)
    for step in (1, 2, 3):
        monitor.log(step, {"loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    again = Monitor(LoggerConfig(), tmp_path, "run", {})
    again.start(2)
    again.log(3, {"loss": 30.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_alarm_needs_patience(tmp_path, caplog):
    monitor = Monitor(LoggerConfig(alarms={"psnr": Alarm(min=20.0, patience=2)}), tmp_path, "run", {})
    for step, value in enumerate([30.0, 10.0, 30.0, 10.0, float("nan")]):
        monitor.log(step, {"psnr": value})
    assert caplog.text.count("alarm: psnr") == 1


def test_a_resumed_run_goes_on_counting_the_records_beyond_a_limit(tmp_path):
    cfg = LoggerConfig(alarms={"student/loss": Alarm(max=1.0, patience=3, stop=True)})
    first, resumed = (Monitor(cfg, tmp_path, "run", {}) for _ in range(2))
    for step in (1, 2):
        first.log(step, {"student/loss": 2.0})
    resumed.start(2)
    with pytest.raises(AlarmError, match="3 records"):
        resumed.log(3, {"student/loss": 2.0})


def test_window_means_over_processes():
    first, second = MetricWindow(), MetricWindow()
    first.add({"loss": torch.tensor(1.0)})
    first.add({"loss": 3.0, "only_here": 5.0})
    second.add({"loss": 8.0})
    assert MetricWindow.merge([first.state_dict(), second.state_dict()]) == {"loss": 4.0, "only_here": 5.0}


def test_a_value_that_is_not_finite_does_not_spoil_the_mean(tmp_path):
    window = MetricWindow()
    for value in (1.0, float("nan"), torch.tensor(3.0), torch.tensor(float("inf"))):
        window.add({"loss": value})
    window.add({"norm": float("inf")})
    found = MetricWindow.merge([window.state_dict()])
    assert found["loss"] == 2.0 and math.isnan(found["norm"])
    monitor = Monitor(LoggerConfig(alarms={"norm": Alarm(patience=2, stop=True)}), tmp_path, "run", {})
    monitor.log(1, found)
    assert json.loads(monitor.path.read_text())["norm"] is None, "JSON has no nan"
    monitor.start(1)
    with pytest.raises(AlarmError, match="norm=nan"):
        monitor.log(2, found)


def test_an_alarm_of_no_record_is_refused():
    with pytest.raises(ValueError, match="patience=0 of an alarm must be at least 1"):
        Alarm(patience=0)


def started(folder, config=None):
    """A monitor that sends to W&B."""
    monitor = Monitor(LoggerConfig(kind="wandb"), folder, "run", config or {})
    monitor.start(0)
    return monitor


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what it is told, and cannot reach its server unless it is made to."""
    said = SimpleNamespace(modes=[], rows=[], axes={}, ids=[], ended=[], reachable=False)

    class Unreachable(Exception): ...

    def init(mode, **settings):
        said.modes.append(mode)
        said.ids.append(settings["id"])
        if mode != "offline" and not said.reachable:
            raise Unreachable("timed out")
        return SimpleNamespace(log=said.rows.append, define_metric=define_metric, finish=finish)

    def finish(exit_code):
        said.ended.append(exit_code)

    def define_metric(name, step_metric=None):
        said.axes[name] = step_metric

    module = SimpleNamespace(
        init=init, teardown=lambda: None, Error=Unreachable, Video=lambda path, format: Path(path).name
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    return said


def test_wandb_draws_over_the_step_so_that_a_run_may_go_back(wandb, tmp_path):
    monitor = started(tmp_path)
    for step in (7, 3):
        monitor.log(step, {"loss": 2.0})
    monitor.log_videos(3, {"clip": np.zeros((3, 32, 32, 3), np.uint8)}, fps=8)
    assert wandb.axes["*"] == "step"
    assert wandb.rows == [
        {"step": 7, "loss": 2.0}, {"step": 3, "loss": 2.0}, {"step": 3, "validation/clip": "clip.mp4"},
    ]  # fmt: skip


def test_a_stopped_helper_of_wandb_does_not_end_the_run(wandb, tmp_path, caplog):
    """A preemption may signal every process of a job."""
    monitor = started(tmp_path)
    wandb.rows = None  # appending to it fails
    monitor._wandb.log = lambda row: wandb.rows.append(row)
    for step in (1, 2):
        monitor.log(step, {"loss": 2.0})
    monitor.close()
    assert len(monitor.path.read_text().splitlines()) == 2 and wandb.ended == []
    assert caplog.text.count("W&B gets no more records (AttributeError") == 1


@pytest.mark.parametrize("failed", [False, True])
def test_wandb_is_told_how_the_run_ended(wandb, tmp_path, failed):
    monitor = started(tmp_path)
    for _ in range(2):
        monitor.close(failed)
    assert wandb.ended == [int(failed)]


def test_a_run_that_does_not_start_is_not_told_to_wandb(wandb, tmp_path):
    """A resume that is refused would else mark the run of the folder as failed, with another configuration."""
    monitor = Monitor(LoggerConfig(kind="wandb"), tmp_path, "run", {})
    monitor.close(failed=True)
    assert wandb.modes == wandb.ended == [] and not (tmp_path / "wandb_id").exists()


def test_a_copied_run_has_a_wandb_run_of_its_own(wandb, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    for _ in range(2):
        started(first)
    shutil.copytree(first, second)
    started(second)
    own, again, copied = wandb.ids
    assert own == again != copied
    assert f"second was copied from {first}" in caplog.text


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, None),  # wandb reads it
    ],
)
def test_wandb_mode_is_that_of_the_environment(wandb, tmp_path, monkeypatch, environment, mode):
    wandb.reachable = True
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started(tmp_path)
    assert wandb.modes == [mode]


def test_wandb_out_of_reach_does_not_end_the_run(wandb, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("WANDB_API_KEY", "k")
    started(tmp_path).log(1, {"loss": 2.0})
    assert wandb.modes == ["online", "offline"] and len(wandb.rows) == 1
    assert "W&B refused to start (timed out); it runs offline" in caplog.text


@pytest.fixture
def real_wandb(monkeypatch):
    """The package, without a key; it reads the environment anew."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


def test_the_real_wandb_goes_on_offline_where_its_server_refuses(real_wandb, tmp_path, monkeypatch, caplog):
    settings = {"API_KEY": "a" * 40, "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monitor = started(tmp_path)
    monitor.log(1, {"loss": 2.0})
    monitor.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert run.name.endswith((tmp_path / "wandb_id").read_text().split()[0]) and "it runs offline" in caplog.text


def test_wandb_runs_offline_inside_the_output_folder(real_wandb, tmp_path):
    monitor = started(tmp_path, {"a": 1})
    monitor.log(1, {"loss": 2.0})
    monitor.close()
    assert list((tmp_path / "wandb").glob("offline-run-*")) and (tmp_path / "wandb_id").read_text()
