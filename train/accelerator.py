"""Processes, devices and sharding behind one small interface, on top of Hugging Face accelerate.

`accelerate launch --config_file conf/launch/<mode>.yaml -m train …` (or torchrun) decides the mode:

    single      one process
    ddp         whole copies; gradients are averaged once per update, after the last backward pass
    fsdp        FSDP2 (`fully_shard`) per transformer block; fp32 shards, bf16 by autocast
    deepspeed   ZeRO-2 through accelerate, for stages with one trainable module

There is no DistributedDataParallel module: stages call methods other than forward (predict_x0, cache_pass),
make several passes per update and update one of several modules, which its hooks do not allow.

Left out: tensor and sequence parallelism.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.device import DTYPES, fast_dtype, pick_device
from train.state import fill_state, full_state

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
BUCKET_NUMEL = 64 * 2**20  # gradients exchanged per collective call
WAIT = timedelta(hours=1)  # of one process for another: the main one writes, or verifies, a checkpoint of 100 GB alone


class Parallel:
    """This process among the others."""

    def __init__(self, *, device: str = "auto", precision: str = "auto") -> None:
        if precision not in (*PRECISIONS, "auto"):
            raise ValueError(f"precision={precision} must be one of {', '.join(PRECISIONS)}, auto")
        self.mode = _launch_mode()
        self.accelerator = _build_accelerator(device, self.mode)
        self.device: torch.device = self.accelerator.device
        self.dtype = DTYPES[fast_dtype(self.device)] if precision == "auto" else PRECISIONS[precision]
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.is_main: bool = self.accelerator.is_main_process
        if self.mode == "ddp" and self.world == 1:
            self.mode = "single"
        self._shells: dict[str, nn.Module] = {}

    # ------------------------------------------------------------------------------------------ modules
    def prepare(self, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """Move to the device and shard, where the mode shards. DeepSpeed does so in `prepare_optimizer`."""
        if self.mode == "deepspeed" and len(modules) != 1:
            raise ValueError(
                f"launch mode deepspeed trains one module and this stage has {', '.join(modules) or 'none'}; "
                "use conf/launch/fsdp.yaml or conf/launch/ddp.yaml"
            )
        for name, module in modules.items():
            module.to(self.device)
            if self.mode == "fsdp":
                self._shells[name] = _shell_of(module)
                shard(module, self.device)
            elif self.world > 1:
                for tensor in [*module.parameters(), *module.buffers()]:
                    dist.broadcast(tensor.detach(), src=0)
        return dict(modules)

    def prepare_optimizer(self, module: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float) -> Any:
        """The optimizer to step with; under DeepSpeed it also builds the engine around the module, which
        clips.
        """
        if self.mode == "deepspeed":
            settings = self.accelerator.state.deepspeed_plugin.deepspeed_config
            settings["train_micro_batch_size_per_gpu"] = 1  # only DeepSpeed's own loader would read it
            settings["gradient_clipping"] = max_norm
            self._engine, optimizer = self.accelerator.prepare(module, optimizer)
            self._engine.optimizer.check_grad_overflow = True  # off in fp32: its step would take a NaN gradient
        return optimizer

    @contextlib.contextmanager
    def whole_modules(self, modules: Mapping[str, nn.Module]):
        """Unsharded modules of the same values for export, on the main process; {} on the others."""
        if self.mode != "fsdp":
            yield dict(modules) if self.is_main else {}
            return
        whole = {}
        for name, module in modules.items():
            state = full_state(module.state_dict(), keep=self.is_main)
            if self.is_main:
                whole[name] = copy.deepcopy(self._shells[name])
                whole[name].load_state_dict(state, assign=True)
        yield whole

    def load_modules(self, modules: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]]) -> None:
        for name, module in modules.items():
            fill_state(module.state_dict(), states[name], name)

    # ------------------------------------------------------------------------------------------ one update
    def autocast(self) -> AbstractContextManager:
        """bfloat16 products, where the precision is bf16. Autocast's cache would keep a copy of every weight that FSDP
        has given back, until the end of the block.
        """
        enabled, cached = self.dtype == torch.bfloat16, self.mode != "fsdp"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=cached)

    def backward(self, module: nn.Module, loss: Tensor, last: bool) -> None:
        """One backward pass; `last` of the update: gradients are exchanged (under DeepSpeed, the step is
        made).
        """
        if self.mode == "deepspeed":
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=last)
            return
        if self.mode == "fsdp":
            module.set_requires_gradient_sync(last)
        loss.backward()

    def finish_gradients(self, module: nn.Module) -> None:
        """Average the gradients over the processes (ddp; the other modes did it in `backward`)."""
        if self.mode == "ddp":
            average_gradients([p for p in module.parameters() if p.requires_grad], self.world)

    def clip(self, module: nn.Module, max_norm: float) -> float:
        """Clip the gradient norm of the module and return what it was; max_norm 0 only measures.

        inf where DeepSpeed skipped the update for a gradient that is not finite: its norm is the one before.
        """
        if self.mode == "deepspeed":
            if self._engine.optimizer.overflow:
                return float("inf")
            return float(self.accelerator.deepspeed_engine_wrapped.get_global_grad_norm() or 0.0)
        parameters = [p for p in module.parameters() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm or float("inf"), foreach=self.mode != "fsdp")
        return float(norm.full_tensor() if self.mode == "fsdp" else norm)

    # ------------------------------------------------------------------------------------------ agreement
    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any process. A collective."""
        if self.world == 1:
            return flag
        value = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value.item())

    def gather(self, value: Any) -> list[Any]:
        """One plain object per process, in rank order. A collective."""
        if self.world == 1:
            return [value]
        gathered: list[Any] = [None] * self.world
        dist.all_gather_object(gathered, value)
        return gathered

    def from_main(self, value: Any) -> Any:
        """The main process's value, everywhere."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    @contextlib.contextmanager
    def raised_everywhere(self, kind: type[Exception]) -> Iterator[None]:
        """What the main process raises of this kind in the block, all raise at its end: alone it would leave the others
        waiting. A collective.
        """
        own: Exception | None = None
        try:
            yield
        except kind as error:
            own = error
        message = self.from_main(None if own is None else str(own))
        if message is not None:
            raise own or kind(message)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read afterwards is true."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    # ------------------------------------------------------------------------- DeepSpeed's own state
    def save_engine(self, folder: Path) -> None:
        """DeepSpeed's sharded optimizer state, written by all processes. Other modes have none."""
        if self.mode == "deepspeed":
            self._engine.save_checkpoint(str(folder), tag="engine")

    def load_engine(self, folder: Path) -> None:
        if self.mode == "deepspeed":
            path, _ = self._engine.load_checkpoint(str(folder), tag="engine")
            if path is None:
                raise ValueError(f"{folder} holds no DeepSpeed state; resume in the launch mode that wrote it")

    def close(self) -> None:
        """Forget the launch mode. The process group stays, for the next job of --multirun too: processes that met
        again would read the addresses of their first meeting, which torchrun's store keeps.
        """
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has no public way to do so


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


atexit.register(_leave_group)


def shard(module: nn.Module, device: torch.device) -> None:
    """FSDP2 in place: each child of `module.blocks` on its own, then the rest.

    Weights are given back after every forward pass, the root's too: outside of one, `parameters()` are
    shards, which optimizer, EMA and checkpoints rely on.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # FSDP shards no other layout; a VAE's may be channels last
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    blocks = list(dict(module.named_children()).get("blocks", nn.ModuleList()).children())
    for part in [*blocks, module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
        _gather_around_entry_points(part)


@contextlib.contextmanager
def kept_whole(module: nn.Module) -> Iterator[None]:
    """For many passes without gradient: under FSDP the weights are gathered, and cast, once in the block.

    They are whole in its memory until the end of the block (20 GB of a 5B model, 30 with their bfloat16 copies).
    """
    from torch.distributed.fsdp import FSDPModule

    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
    try:
        with _autocast_cache() if parts else contextlib.nullcontext():
            yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


@contextlib.contextmanager
def _autocast_cache() -> Iterator[None]:
    """Casts of weights are kept to the end of the block, also where the autocast around it keeps none."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
        torch.clear_autocast_cache()


def entry_points(module: nn.Module) -> tuple[str, ...]:
    """Methods besides forward that read parameters, as the class lists them: FSDP must gather weights for
    these too.
    """
    return next((vars(cls)["ENTRY_POINTS"] for cls in type(module).__mro__ if "ENTRY_POINTS" in vars(cls)), ())


def _gather_around_entry_points(module: nn.Module) -> None:
    """Gather weights around the outermost call only: an inner one would give them back too early."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    depth = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1

        return call

    def outermost(plain: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (plain if depth[0] else counted(gathering))(*args, **kwargs)

    methods = {name: getattr(module, name) for name in entry_points(module)}
    for name, plain in methods.items():
        register_fsdp_forward_method(module, name)
        setattr(module, name, outermost(plain, getattr(module, name)))
    module.forward = counted(module.forward)  # type: ignore[method-assign]


def average_measures(measures: Mapping[str, float], world: int, device: torch.device) -> dict[str, float]:
    """Means over the processes, which all give the same names in the same order. A collective."""
    if world == 1 or not measures:
        return dict(measures)
    values = torch.tensor(list(measures.values()), device=device)
    dist.all_reduce(values)
    return dict(zip(measures, (values / world).tolist(), strict=True))


def average_gradients(parameters: Iterable[nn.Parameter], world: int) -> None:
    """All-reduce in buckets. A parameter without a gradient on this process counts as zero; one that has none on any
    keeps none, so that weight decay does not reach it.
    """
    parameters, bucket = list(parameters), []
    if not parameters:
        return
    has_gradient = torch.tensor([parameter.grad is not None for parameter in parameters]).to(parameters[0].device)
    counts = has_gradient.int()
    dist.all_reduce(counts)
    for parameter, count in zip(parameters, counts.tolist(), strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(grad.numel() for grad in bucket) >= BUCKET_NUMEL:
            _reduce(bucket, world)
            bucket = []
    _reduce(bucket, world)


def _reduce(bucket: list[Tensor], world: int) -> None:
    if not bucket:
        return
    flat = torch.cat([grad.flatten() for grad in bucket])
    dist.all_reduce(flat)
    flat /= world
    for grad, part in zip(bucket, flat.split([grad.numel() for grad in bucket]), strict=True):
        grad.copy_(part.view_as(grad))


def _shell_of(module: nn.Module) -> nn.Module:
    """A copy without storage, to be filled for export; buffers that no state dict holds keep their values."""
    held = set(module.state_dict())
    named = [*module.named_parameters(), *module.named_buffers()]
    memo: dict[int, Any] = {}
    for name, tensor in named:
        if name in held:
            empty = torch.empty_like(tensor, device="meta")
            memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo)


def _launch_mode() -> str:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        return "deepspeed"
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return "fsdp"
    return "ddp"


def _build_accelerator(device: str, mode: str) -> Accelerator:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    picked = pick_device(device)
    if picked.index is not None:
        raise ValueError(f"device={device} must be auto, cpu or cuda; CUDA_VISIBLE_DEVICES says which GPUs there are")
    if mode == "fsdp":
        # accelerate only launches here: `shard` shards, several modules with one optimizer each
        os.environ["ACCELERATE_USE_FSDP"] = "false"
    # accelerate sets DeepSpeed aside where it is told to use the CPU
    cpu = mode != "deepspeed" and picked.type == "cpu"
    group = InitProcessGroupKwargs(timeout=WAIT)
    try:
        return Accelerator(cpu=cpu, mixed_precision="no", step_scheduler_with_optimizer=False, kwargs_handlers=[group])
    finally:
        if mode == "fsdp":
            os.environ["ACCELERATE_USE_FSDP"] = "true"  # the launch of the next job in this process
