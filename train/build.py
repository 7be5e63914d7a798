"""From a composed configuration to a `Trainer`: every check first, then data, modules, optimizers.

Left out: the loop (`trainer.py`). Stages are named by `stage._target_`, so nothing here imports them.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from data.app import build_config, build_target
from data.batch import Batch, collate
from data.encode import fingerprints
from data.loader import Loader, LoaderConfig, build_loader
from data.shards import INDEX_NAME, ShardDataset, ShardIndex
from models.assemble import ModelConfig, validate
from models.diffusion.noise import KeyedNoise
from models.wan.config import RUNTIME_FIELDS
from train.accelerator import Parallel
from train.memory import GB, require_memory, state_bytes
from train.monitor import LoggerConfig, Monitor
from train.optim import OptimConfig
from train.stage import ChecksConfig, DescribesItself, ReadsFields, SetupContext, Stage
from train.trainer import TrainConfig, Trainer, accumulation_of

log = logging.getLogger(__name__)

OF_THE_RUN = ("steps", "global_batch")  # a stage may read them, but only the run sets them
MADE_BY = {"latents": "vae", "prompt_embeds": "text", "clip_embeds": "clip"}  # field of shards: the encoder


@dataclass
class Settings:
    """The composed configuration as dataclasses, checked."""

    train: TrainConfig
    model: ModelConfig
    loader: LoaderConfig
    optim: OptimConfig
    logger: LoggerConfig
    stage: Stage
    stage_target: str
    plain: dict[str, Any]  # the whole configuration, resolved, for the log
    fingerprints: dict[str, str]  # of the encoders, by shard field

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must share with the run that resumes it."""
        model = {f"model.dit.{key}": value for key, value in self.model.dit.to_dict().items()}
        for runtime in RUNTIME_FIELDS:
            model.pop(f"model.dit.{runtime}")
        model["model.text.kind"] = self.model.text.kind
        encoders = {f"the content of the {name} encoder": value for name, value in self.fingerprints.items()}
        return {"stage": self.stage_target, "seed": self.train.seed, **model, **encoders}


def read_settings(cfg: DictConfig) -> Settings:
    """Dataclasses of a composed conf/train.yaml, checked without building anything. Raises ValueError."""
    train = build_config(cfg, TrainConfig)
    model = build_config(cfg.model)
    stage = build_target(cfg.stage)
    validate(model)
    if isinstance(stage, ChecksConfig):
        stage.check(model)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in OF_THE_RUN:
        if (value := plain["stage"].get(name, plain[name])) != plain[name]:
            raise ValueError(
                f"stage.{name}={value} must be {name}={plain[name]}, the run's; set {name}={value} instead"
            )
    settings = Settings(
        train, model, build_config(cfg.data), build_config(cfg.optim), build_config(cfg.logger), stage,
        cfg.stage["_target_"], plain, {},
    )  # fmt: skip
    if stage.needs_data:
        index = ShardIndex.load(_shards_of(settings))
        fields = check_shards(settings, index)
        settings.fingerprints = fingerprints_of(model, fields)
    return settings


def _shards_of(settings: Settings) -> Path:
    if not settings.loader.path:
        raise ValueError("shards is empty; set it to the folder of shards that `python -m data` wrote")
    return Path(settings.loader.path)


def check_shards(settings: Settings, index: ShardIndex) -> list[str]:
    """The fields that the stage reads. Refuses shards of another clip size, or without one of them."""
    fields = fields_of(settings, index)
    index.require(fields, settings.model.clip, {})
    return fields


def fingerprints_of(model: ModelConfig, fields: Sequence[str]) -> dict[str, str]:
    """Of the encoders whose output is read, as far as their weights are on this machine."""
    wanted = {MADE_BY[field] for field in fields if field in MADE_BY}
    here, absent = present_encoders(model)
    for name in sorted(wanted & absent.keys()):
        log.warning("%s is not here; whether the shards were made with it is not checked", absent[name])
    unknown = absent.keys() | ({"vae"} if model.vae.path is None else set())  # a text code without weights is known
    return {name: value for name, value in fingerprints(here).items() if name in wanted - unknown}


def present_encoders(model: ModelConfig) -> tuple[ModelConfig, dict[str, str]]:
    """The model with no other encoders than those whose weights are on this machine; paths of the absent, by name."""
    paths = {"vae": model.vae.path, "text": model.text.path, "clip": model.clip_encoder}
    absent = {name: path for name, path in paths.items() if path is not None and not Path(path).exists()}
    here = replace(
        model,
        vae=replace(model.vae, path=None if "vae" in absent else model.vae.path),
        text=replace(model.text, path=None if "text" in absent else model.text.path),
        clip_encoder=None if "clip" in absent else model.clip_encoder,
    )
    return here, absent


def fields_of(settings: Settings, index: ShardIndex) -> list[str]:
    """What the stage reads of these shards."""
    stage = settings.stage
    assert isinstance(stage, ReadsFields), f"{settings.stage_target} needs data and has no data_fields"
    return stage.data_fields(settings.model, index.fields)


def build_trainer(settings: Settings) -> Trainer:
    """Data, modules, optimizers, as the launch says. The plan is told in the log before the first step."""
    cfg = settings.train
    parallel = Parallel(device=cfg.device, precision=cfg.precision)
    settings.model = settings.model.on(parallel.device)
    accumulation = accumulation_of(cfg.global_batch, cfg.micro_batch, parallel.world)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    loader, sample_clips, held_out = _build_data(settings, parallel)
    settings.stage.setup(SetupContext(
        settings.model, parallel.device, parallel.dtype, output_dir, KeyedNoise(cfg.seed), held_out,
        sample_clips, _data_id(settings),
    ))  # fmt: skip
    modules = settings.stage.modules()
    settings.optim.require_trained(modules)
    settings.logger.require_measured([*modules, *settings.stage.updates(0)])
    if parallel.device.type == "cuda":
        memory = torch.cuda.get_device_properties(parallel.device).total_memory
        require_memory(
            modules, settings.optim, parallel.mode, parallel.world, memory, _accumulates(accumulation, modules)
        )
    monitor = None
    if parallel.is_main:
        monitor = Monitor(settings.logger, output_dir, f"{settings.model.name}/{cfg.name}", settings.plain)
    trainer = Trainer(cfg, settings.optim, settings.stage, parallel, loader, monitor, settings.identity, settings.plain)
    if parallel.is_main:
        for line in plan(settings, trainer):
            log.info(line)
    return trainer


def _build_data(
    settings: Settings, parallel: Parallel
) -> tuple[Loader | None, Callable[[int], Iterator[Batch]] | None, Batch | None]:
    if not settings.stage.needs_data:
        return None, None, None
    cfg, clip = settings.train, settings.model.clip
    fields = fields_of(settings, ShardIndex.load(settings.loader.path))
    loader = build_loader(
        settings.loader, fields, cfg.micro_batch, rank=parallel.rank, world=parallel.world, geometry=clip,
        fingerprints=settings.fingerprints,
    )  # fmt: skip

    def sample_clips(count: int) -> Iterator[Batch]:
        numbers = spread(len(loader.dataset), count)
        for start in range(0, len(numbers), cfg.micro_batch):
            yield collate([loader.dataset[n] for n in numbers[start : start + cfg.micro_batch]])

    held_out = None
    if cfg.validation_shards is not None:
        held_out_fields = fields_of(settings, ShardIndex.load(cfg.validation_shards))
        dataset = ShardDataset(
            cfg.validation_shards, held_out_fields, geometry=clip, fingerprints=settings.fingerprints
        )
        held_out = collate([dataset[n] for n in spread(len(dataset), cfg.validation_clips)])
    return loader, sample_clips, held_out


def _accumulates(accumulation: int, modules: Collection[str]) -> bool:
    """Whether an update adds up several gradients; those of Self-Forcing, which trains two modules, come by chunks."""
    return accumulation > 1 or len(modules) > 1


def _data_id(settings: Settings) -> str | None:
    if not settings.stage.needs_data:
        return None
    index = (_shards_of(settings) / INDEX_NAME).read_bytes()
    return f"{hashlib.sha256(index).hexdigest()[:16]}, order {settings.loader.seed}"


def spread(total: int, count: int) -> list[int]:
    """At most `count` numbers of 0..total-1, evenly spaced."""
    count = min(count, total)
    return [number * total // count for number in range(count)]


def plan(settings: Settings, trainer: Trainer) -> list[str]:
    """What is about to happen, one line each: the effective recipe, so that no default is silent."""
    cfg, parallel = settings.train, trainer.parallel
    dtype = str(parallel.dtype).removeprefix("torch.")
    lines = [
        f"{settings.stage_target} on {settings.model.name}, seed {cfg.seed}, output {cfg.output_dir}",
        f"launch: {parallel.mode}, {parallel.world} process(es), {parallel.device}, autocast {dtype}",
        f"batch: {cfg.global_batch} clips per update = {parallel.world} process(es) x {cfg.micro_batch} x "
        f"{trainer.accumulation} accumulated",
        f"steps: {cfg.steps}; checkpoint every {cfg.checkpoint_every}; validation {_validation(settings)}",
    ]
    if trainer.loader is not None:
        clips = len(trainer.loader.dataset)
        lines.append(
            f"data: {clips} clips in {settings.loader.path}; "
            f"{cfg.steps * cfg.global_batch / clips:.1f} epochs "
            "for each module updated in every step"
        )
        if clips < cfg.global_batch:
            lines.append(
                f"an update takes its {cfg.global_batch} clips from {clips}, each again with the same noise and "
                f"tracks: global_batch={clips} or less learns the same at less cost"
            )
    for name, module in trainer.modules.items():
        optim = trainer.settings[name]
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in module.parameters())
        ema = trainer.emas[name].describe(trainer.num_updates[name]) if name in trainer.emas else "no EMA"
        lines.append(
            f"{name}: {_count(trained)} of {_count(total)} parameters train; {optim.kind} lr {optim.lr:g} "
            f"{optim.schedule}, {optim.warmup_updates} warm-up, betas {list(optim.betas)}, weight decay "
            f"{optim.weight_decay:g}, clip {optim.grad_clip:g}, {ema}"
        )
    if "critic" in trainer.modules and not settings.optim.modules:
        lines.append(f"{' and '.join(trainer.modules)} learn by the same settings; optim=dmd has the paper's for each")
    accumulates = _accumulates(trainer.accumulation, trainer.modules)
    each = state_bytes(trainer.modules, settings.optim, parallel.mode, parallel.world, accumulates)
    lines.append(f"memory: {each / GB:.3g} GB of weights, gradients, moments and EMA per process; activations on top")
    if isinstance(settings.stage, DescribesItself):
        lines += settings.stage.describe()
    return lines


def _validation(settings: Settings) -> str:
    """When there is one."""
    cfg = settings.train
    if cfg.validate_every < 0:
        return f"off (validate_every={cfg.validate_every})"
    if settings.stage.needs_data and not cfg.validation_shards:
        return "off (validation_shards=null)"
    return f"every {cfg.validate_every}" if cfg.validate_every else "at the end"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
