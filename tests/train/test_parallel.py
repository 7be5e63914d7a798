"""Several processes on the CPU (gloo): the run of one process, in ddp and fsdp mode, and across modes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import weakref
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy_stage import Toy

from data.app import compose_config
from distill.self_forcing import SelfForcing, SelfForcingConfig
from models.assemble import build_dit, build_vae
from models.condition import Condition
from models.diffusion.noise import KeyedNoise
from models.wan.cache import CacheSpec, KVCache
from models.wan.checkpoint import load_dit
from train import accelerator
from train import state as train_state
from train.accelerator import Parallel, entry_points
from train.build import build_trainer, read_settings
from train.monitor import Alarm, AlarmError, LoggerConfig, Monitor
from train.optim import OptimConfig
from train.stage import StepContext
from train.trainer import TrainConfig, Trainer


def train(folder, shards, *overrides):
    """The teacher's run that most of these tests compare, in this process."""
    run(folder, shards, "stage.tracks_min=2", "stage.tracks_max=8", *overrides)


def run(folder, shards, *overrides):
    cfg = compose_config("train", [
        "model=tiny", "precision=fp32", "device=cpu", "optim=scratch", "global_batch=4",
        "optim.warmup_updates=0", "optim.ema_decay=0.9", "optim.decay_updates=4", "micro_batch=1",
        "log_every=1", "logger.progress=false",
        f"shards={shards}", f"output_dir={folder}", *overrides,
    ])  # fmt: skip
    trainer = build_trainer(read_settings(cfg))
    assert trainer.fit() == 0
    trainer.close()


def _one_of_many(rank, environment, function, args):
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # inherited from the tests before
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank))
    function(*args)


def launch(folder, shards, mode, *overrides):
    run_forked(train, mode, (folder, shards, *overrides))


def run_forked(function, mode, args, world=2):
    """A function on `world` processes, with the environment that torchrun or accelerate would give them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "ACCELERATE_USE_FSDP": str(mode == "fsdp").lower(),
    }
    context = multiprocessing.get_context("fork")  # no second import of torch
    processes = [
        context.Process(target=_one_of_many, args=(rank, environment, function, args)) for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        assert process.exitcode == 0, f"{mode}: exit code {process.exitcode}"


def losses(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [(line["teacher/loss"], line["teacher/grad_norm"]) for line in lines if "teacher/loss" in line]


@pytest.fixture(scope="module")
def alone(tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(folder, tiny_shards, "steps=4")
    return folder


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_do_the_run_of_one(alone, tiny_shards, tmp_path, mode):
    launch(
        tmp_path,
        tiny_shards,
        mode,
        "steps=4",
        "checkpoint_every=2",
        "validate_every=2",
        f"validation_shards={tiny_shards}",
    )
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=2e-4)
    first, second = load_dit(alone / "export/teacher"), load_dit(tmp_path / "export/teacher")  # EMA weights
    for (name, a), b in zip(first.named_parameters(), second.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-4, msg=name)


def test_sharded_checkpoint_resumes_on_one_process(alone, tiny_shards, tmp_path):
    """EMA, moments and weights come back whole: nothing of one shard stands for another's."""
    launch(tmp_path, tiny_shards, "fsdp", "steps=2")
    saved = torch.load(tmp_path / "checkpoints/step_00000002/ema.pt", weights_only=True)["teacher"]
    assert {name: value.shape for name, value in saved.items()} == {
        name: value.shape for name, value in load_dit(tmp_path / "export/teacher").named_parameters()
    }
    train(tmp_path, tiny_shards, "steps=4")
    np.testing.assert_allclose(losses(tmp_path), losses(alone), rtol=2e-4)


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_only_the_writing_process_holds_whole_states(tiny_shards, tmp_path, mode):
    run_forked(_train_without_whole_states, mode, (tmp_path, tiny_shards, "steps=1"))
    assert (tmp_path / "checkpoints/step_00000001").is_dir() and (tmp_path / "export/teacher").is_dir()


def _train_without_whole_states(folder, shards, *overrides):
    def refuse(tensor):
        raise AssertionError(f"a process that writes nothing copied {tuple(tensor.shape)} to the CPU")

    if os.environ["RANK"] != "0":
        train_state.full = refuse
    train(folder, shards, *overrides)


def test_every_entry_point_works_on_shards(tiny_model, tmp_path):
    run_forked(_compare_entry_points, "fsdp", (tiny_model,))


def test_no_copies_outlive_the_weights_that_fsdp_gives_back(tiny_model, tmp_path):
    """Autocast would keep each weight's bfloat16 copy until the end of an update."""
    run_forked(_weigh_copies, "fsdp", (tiny_model,))


class _Copies(TorchDispatchMode):
    """The bfloat16 copies of matrices of these shapes that are alive."""

    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.made, self.alive = shapes, 0, weakref.WeakValueDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if "_to_copy" in str(function) and out.dtype == torch.bfloat16 and tuple(out.shape) in self.shapes:
            self.made += 1
            self.alive[id(out)] = out
        return out


def _weigh_copies(model_cfg):
    model_cfg = replace(model_cfg, dit=replace(model_cfg.dit, activation_checkpointing=True))
    parallel = Parallel(device="cpu", precision="bf16")
    sharded = _perturbed(model_cfg)
    shapes = {tuple(parameter.shape) for parameter in sharded.parameters() if parameter.ndim == 2}
    of_a_block = sum(parameter.ndim == 2 for parameter in sharded.blocks[0].parameters())
    parallel.prepare({"student": sharded})
    latents, _, condition = _inputs(model_cfg)

    def loss_of(dit):
        return dit(latents, torch.tensor([700.0]), condition).square().mean()

    with _Copies(shapes) as copies, parallel.autocast():
        with torch.no_grad(), accelerator.kept_whole(sharded):
            loss_of(sharded)
            held, made = len(copies.alive), copies.made
            loss_of(sharded)
            assert len(copies.alive) == held > 0 and copies.made - made < held, "cast once for all passes"
        assert not copies.alive
        loss = loss_of(sharded)
        assert len(copies.alive) <= of_a_block < held
        parallel.backward(sharded, loss, last=True)
    found = [parameter.grad.to_local().clone() for parameter in sharded.parameters()]
    sharded.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # with its cache
        parallel.backward(sharded, loss_of(sharded), last=True)
    for (name, parameter), ours in zip(sharded.named_parameters(), found, strict=True):
        assert torch.equal(parameter.grad.to_local(), ours), name


def _count_gathered_weights():
    """A list that grows by one with each group of weights that FSDP gathers."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    gathered, gather = [], _fsdp_param_group.foreach_all_gather
    _fsdp_param_group.foreach_all_gather = lambda *args, **kwargs: (gathered.append(1), gather(*args, **kwargs))[1]
    return gathered


def _compare_entry_points(model_cfg):
    parallel = Parallel(device="cpu", precision="fp32")
    plain, sharded = (_perturbed(model_cfg) for _ in range(2))
    parallel.prepare({"student": sharded})
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    for first, second in zip(_outputs(plain, model_cfg), _outputs(sharded, model_cfg), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    gathered = _count_gathered_weights()
    with torch.no_grad():
        for _ in range(2):
            _outputs(sharded, model_cfg)
        each_pass = len(gathered)
        with accelerator.kept_whole(sharded):
            twice = [_outputs(sharded, model_cfg) for _ in range(2)]
    assert 0 < len(gathered) - each_pass < each_pass / 4, "once, not in each pass"
    for first, *others in zip(_outputs(plain, model_cfg), *twice, strict=True):
        for second in others:
            torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())
    parallel.backward(sharded, sharded.predict_x0(*_inputs(model_cfg)).square().mean(), last=True)
    plain.predict_x0(*_inputs(model_cfg)).square().mean().backward()
    for (name, first), second in zip(plain.named_parameters(), sharded.parameters()):
        torch.testing.assert_close(first.grad, second.grad.full_tensor(), rtol=1e-3, atol=1e-6, msg=name)
    with parallel.whole_modules({"student": sharded}) as whole:
        for first, second in zip(plain.parameters(), whole["student"].parameters() if parallel.is_main else []):
            assert torch.equal(first, second)
    parallel.close()


def _inputs(model_cfg):
    dit, (channels, _, height, width) = model_cfg.dit, model_cfg.latent_shape
    rng = torch.Generator().manual_seed(5)
    condition = Condition(
        torch.randn(1, dit.text_len, dit.text_dim, generator=rng), torch.zeros(1, dit.text_len, dit.text_dim),
        torch.randn(1, dit.track_id_dim, 9, height, width, generator=rng),
        torch.randn(1, channels, 1, height, width, generator=rng),
    )  # fmt: skip
    return torch.randn(1, channels, 3, height, width, generator=rng), 0.7, condition


def _perturbed(model_cfg):
    """A DiT whose every weight matters."""
    dit, rng = build_dit(model_cfg, seed=3), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dit.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return dit


def _outputs(dit, model_cfg):
    latents, sigma, condition = _inputs(model_cfg)
    with_graph = [dit(latents, torch.tensor([700.0]), condition), dit.predict_x0(latents, sigma, condition)]
    with torch.no_grad():
        prepared = dit.prepare(condition, dit.prepare_text(condition.prompt_embeds))
        cache = KVCache.empty(CacheSpec(3, 1, 1, "slot"), len(dit.blocks))
        layers = dit.cache_pass(latents, prepared, cache.context(dit.token_grid(*latents.shape[-2:])))
        return [
            *with_graph,
            dit(latents, dit.modulation(700.0), prepared),
            dit.predict_x0(latents, sigma, prepared),
            torch.stack([layer.key for layer in layers]),
        ]


@pytest.mark.parametrize("stage", ["vae", "tiny_vae"])
def test_a_vae_is_trained_on_shards_as_whole(pixel_shards, tiny_model, tmp_path, stage):
    """Losses and gradient norms of three steps, and what was exported."""
    build_vae(tiny_model, seed=0).save(tmp_path / "full")
    overrides = ["model.clip.height=32", "model.clip.width=32", f"stage={stage}", "stage.num_frames=9"]
    if stage == "vae":
        overrides += ["stage.normalisation_clips=2"]
    else:
        overrides += [
            f"model.vae.path={tmp_path / 'full'}", "stage.preset=sprites", "stage.crop_px=16", "stage.gan_start=2",
            "stage.discriminator_widths=[8,16]",
        ]  # fmt: skip
    overrides += [f"validation_shards={pixel_shards}", "validation_clips=1", "steps=3"]
    # a process replays what it has itself decoded: nothing in its first pass of the discriminator
    micro = {"vae": (1, 1), "tiny_vae": (4, 2)}[stage]
    run_forked(run, "single", (tmp_path / "one", pixel_shards, *overrides, f"micro_batch={micro[0]}"), world=1)
    run_forked(run, "fsdp", (tmp_path / "two", pixel_shards, *overrides, f"micro_batch={micro[1]}"))
    one, two = (_records(tmp_path / folder, stage) for folder in ("one", "two"))
    assert len(one) == 3 and one[-1].keys() == two[-1].keys()
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(list(second.values()), list(first.values()), rtol=1e-3, err_msg=str(list(first)))
    first, second = (load_file(next((tmp_path / f / "export" / stage).glob("*.safetensors"))) for f in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-2, atol=1e-3, msg=name)


def _records(folder, stage):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    wanted = ("/loss", "/grad_norm", "/l1")
    return [{k: line[k] for k in line if k.endswith(wanted)} for line in lines if f"{stage}/loss" in line]


def test_a_weight_without_gradient_anywhere_keeps_none(monkeypatch):
    """A gradient of zero would let weight decay shrink what one process leaves alone."""
    used, elsewhere, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    used.grad = torch.full((2,), 4.0)

    def sum_of_two(tensor):  # the other process has a gradient of 2 for the first two
        if tensor.dtype == torch.int32:
            tensor += torch.tensor([1, 1, 0], dtype=torch.int32)
        else:
            tensor += 2.0

    monkeypatch.setattr(accelerator.dist, "all_reduce", sum_of_two)
    accelerator.average_gradients([used, elsewhere, unused], 2)
    assert used.grad.tolist() == [3.0, 3.0] and elsewhere.grad.tolist() == [1.0, 1.0] and unused.grad is None


def test_deepspeed_takes_one_module(monkeypatch):
    parallel = Parallel(device="cpu", precision="fp32")
    parallel.mode = "deepspeed"
    with pytest.raises(ValueError, match=r"deepspeed trains one module and this stage has student, critic; use conf"):
        parallel.prepare({"student": nn.Linear(1, 1), "critic": nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="this stage has none; use conf"):  # stage=ode_pairs
        parallel.prepare({})


def test_deepspeed_skips_a_gradient_that_is_not_finite():
    zero = SimpleNamespace(check_grad_overflow=False, overflow=False)
    engine, plugin = SimpleNamespace(optimizer=zero), SimpleNamespace(deepspeed_config={})
    parallel = Parallel(device="cpu", precision="fp32")
    parallel.mode = "deepspeed"
    parallel.accelerator = SimpleNamespace(
        state=SimpleNamespace(deepspeed_plugin=plugin),
        prepare=lambda module, optimizer: (engine, optimizer),
        deepspeed_engine_wrapped=SimpleNamespace(get_global_grad_norm=lambda: 0.5),
    )
    module = nn.Linear(1, 1)
    parallel.prepare_optimizer(module, torch.optim.SGD(module.parameters(), 0.1), 1.0)
    assert zero.check_grad_overflow
    assert parallel.clip(module, 1.0) == 0.5
    zero.overflow = True
    assert parallel.clip(module, 1.0) == float("inf")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_processes_wait_while_the_main_one_writes_a_large_checkpoint(mode):
    run_forked(_check_patience, mode, ())


def _check_patience():
    parallel = Parallel(device="cpu", precision="fp32")
    group = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    assert group.options._timeout >= timedelta(hours=1)
    parallel.gather(None)  # a main process that leaves takes along the store that the other still connects through
    parallel.close()


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_the_jobs_of_a_multirun_follow_each_other_in_the_same_processes(mode):
    run_forked(_agree_again, mode, (mode,))


def _agree_again(mode):
    for _ in range(4):
        parallel = Parallel(device="cpu", precision="fp32")
        assert parallel.mode == mode and parallel.gather(parallel.rank) == [0, 1]
        parallel.close()


@pytest.mark.parametrize("metric", ["critic/loss", "validation/weight"])
def test_an_alarm_that_stops_the_run_is_raised_on_all_processes(tmp_path, metric):
    """The others would wait for the main one until they time out."""
    run_forked(_run_into_alarm, "ddp", (tmp_path, metric))


def _run_into_alarm(folder, metric):
    parallel = Parallel(device="cpu", precision="fp32")
    limits = {metric: Alarm(max=-100.0, stop=True)}
    monitor = Monitor(LoggerConfig(progress=False, alarms=limits), folder, "toy", {}) if parallel.is_main else None
    cfg = TrainConfig(output_dir=str(folder), steps=4, global_batch=2, micro_batch=1, log_every=2, validate_every=2)
    stage = Toy(KeyedNoise(0), validates=True)
    with pytest.raises(AlarmError, match=rf"alarm: {metric}=\S+ is beyond min=None, max=-100.0"):
        Trainer(cfg, OptimConfig(), stage, parallel, None, monitor).fit()
    parallel.close()


def test_health_is_that_of_all_processes():
    run_forked(_measure_health, "ddp", ())


def _measure_health():
    parallel = Parallel(device="cpu", precision="fp32")
    stage = SelfForcing(SelfForcingConfig())
    stage.device = parallel.device
    measures = {"score_gap": 0.5 + parallel.rank, "latent_std_ratio": 1.0}
    told = stage._health(measures, StepContext(0, "student", 0, parallel.rank, parallel.world, 0))
    assert told == stage.smoothed == {"score_gap": 1.0, "latent_std_ratio": 1.0}
    parallel.close()


def test_entry_points_are_read_from_the_class():
    from models.wan.dit import WanDiT

    class Finer(WanDiT):
        pass

    assert "predict_x0" in entry_points(Finer.__new__(Finer)) and entry_points(nn.Linear(1, 1)) == ()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp16"}, "precision=fp16 must be one of bf16, fp32, auto"),
        ({"device": "tpu"}, "device=tpu must be auto, cpu or cuda"),
    ],
)
def test_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Parallel(**settings)


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_auto_is_the_faster_precision_of_the_device(monkeypatch, faster):
    monkeypatch.setattr(accelerator, "fast_dtype", lambda device: faster)
    product = torch.ones(1, 1)
    with Parallel(device="cpu").autocast():
        product = product @ product
    assert product.dtype == getattr(torch, faster)


def test_the_launcher_not_the_device_says_which_gpu_a_process_gets(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="device=cuda:1 must be auto, cpu or cuda; CUDA_VISIBLE_DEVICES"):
        Parallel(device="cuda:1")


def _muon_steps(folder: Path) -> None:
    """Three Muon steps with the same gradients everywhere; the first process writes what came out."""
    from train.muon import Muon

    parallel = Parallel(device="cpu", precision="fp32")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(5, 7))
    optimizer = Muon(module.named_parameters(), 0.01, weight_decay=0.1)
    for _ in range(3):
        for parameter in module.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    if parallel.is_main:
        torch.save({**module.state_dict(), "state": optimizer.state_dict()["state"]}, folder / "muon.pt")
    parallel.close()


def test_processes_share_muons_work_and_get_its_result(tmp_path):
    for name, world in (("one", 1), ("three", 3)):
        (tmp_path / name).mkdir()
        run_forked(_muon_steps, "ddp", (tmp_path / name,), world=world)
    one, three = (torch.load(tmp_path / name / "muon.pt", weights_only=True) for name in ("one", "three"))
    states = [found.pop("state").values() for found in (one, three)]
    assert all(torch.equal(one[name], three[name]) for name in one)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*states) for key in a)
