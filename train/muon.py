"""Muon: momentum whose update is orthogonalised, for the weight matrices; AdamW for everything else.

Jordan et al. 2024 (Newton-Schulz quintic); the factor max(1, rows / columns)^0.5 is theirs too. A convolution is
the matrix [out, in * kernel]. On the small sprites VAE it reached AdamW's loss in half the steps.
``torch.optim.Muon`` takes 2-D parameters only and would need a second optimizer beside it; this one holds both
groups, so a stage has one optimizer and one schedule. Processes of one run share the orthogonalising, which costs
as much as a backward pass of a small model; the result does not depend on how many they are. Left out: sharded
parameters (FSDP, DeepSpeed), whose matrices no rank sees whole; use AdamW there.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.device import DTYPES, fast_dtype

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic that drives singular values into about [0.7, 1.2]
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrix: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix, roughly: singular values of ``matrix`` [rows, columns] are driven towards 1.

    Each step applies the odd polynomial p(s) = c1 s + c3 s^3 + c5 s^5 to the singular values.
    """
    first, third, fifth = NEWTON_SCHULZ
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.T if is_tall else matrix).to(DTYPES[fast_dtype(matrix.device)])  # the smaller Gram matrix
    wide = wide / wide.norm().clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = wide @ wide.T
        even_part = torch.addmm(gram, gram, gram, beta=third, alpha=fifth)
        wide = torch.addmm(wide, even_part, wide, beta=first)
    return (wide.T if is_tall else wide).to(matrix.dtype)


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates it; gains, biases, embeddings, input and output layers are AdamW's.

    Layers are known by their names in `WanDiT`, `AutoencoderKLWan` and `SpritesNetwork`. Those of `TinyVae` have
    numbers, so that its first and last convolutions count as hidden too; so does the first one of
    `PatchDiscriminator`. The shipped tiny VAE was trained like this.
    """
    outer = ("patch_embedding", "conv_in", "conv_out", "head", "embed")
    return (
        parameter.ndim >= 2
        and min(parameter.shape[0], parameter[0].numel()) > 1
        and not any(part.startswith(outer) for part in name.split("."))
        and "modulation" not in name
    )


class Muon(torch.optim.Optimizer):
    """Muon on hidden matrices and AdamW on the rest of ``module``.

    learning_rate is AdamW's; matrices use learning_rate * matrix_lr_ratio (an orthogonal update has spectral norm 1, so
    its natural scale, about 0.02, does not depend on the gradient's).
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        learning_rate: float,
        *,
        matrix_lr_ratio: float = 10.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        eps: float = 1e-8,
    ):
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in named_parameters:
            if parameter.requires_grad:
                (matrices if is_hidden_matrix(name, parameter) else others).append(parameter)
        shared = {"weight_decay": weight_decay}
        groups = [
            {"params": matrices, "lr": learning_rate * matrix_lr_ratio, "momentum": momentum, "is_matrix": True},
            {"params": others, "lr": learning_rate, "betas": betas, "eps": eps, "is_matrix": False},
        ]
        super().__init__([group for group in groups if group["params"]], shared)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
            if group["is_matrix"]:
                self._muon_update(parameters, group)
            else:
                for parameter in parameters:
                    _adamw_update(parameter, parameter.grad, self.state[parameter], group)

    def _muon_update(self, parameters: list[nn.Parameter], group: dict) -> None:
        for parameter, direction in zip(parameters, self._directions(parameters, group["momentum"])):
            rows, columns = parameter.shape[0], parameter[0].numel()
            parameter.add_(direction, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """Orthogonalised momentum of each matrix; each process makes its share, and adds up the others'."""
        shared = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        rank, world = (dist.get_rank(), dist.get_world_size()) if shared else (0, 1)
        directions = []
        for number, parameter in enumerate(parameters):
            mean = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
            mean.lerp_(parameter.grad, 1 - momentum)
            if number % world == rank:
                nesterov = parameter.grad.lerp(mean, momentum).flatten(1)
                directions.append(orthogonalise(nesterov).view_as(parameter))
            else:
                directions.append(torch.zeros_like(parameter))
        if shared and directions:
            everyone = torch.cat([direction.flatten() for direction in directions])
            dist.all_reduce(everyone)  # every entry has one summand that is not zero: exact
            parts = everyone.split([direction.numel() for direction in directions])
            directions = [part.view_as(direction) for part, direction in zip(parts, directions)]
        return directions


def _adamw_update(parameter: Tensor, grad: Tensor, state: dict, group: dict) -> None:
    beta1, beta2 = group["betas"]
    if not state:
        state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
    state["step"] += 1
    state["mean"].lerp_(grad, 1 - beta1)
    state["square"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step = state["step"].item()
    scale = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
    parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - beta1**step))
