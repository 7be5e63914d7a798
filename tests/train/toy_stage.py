"""A stage that alternates two linear modules, without data: for tests of the loop itself."""

from __future__ import annotations

import torch
from torch import nn

from train.stage import StepOutput, ValidationOutput


class Toy:
    """Every third step updates "student" and "critic", the others only the critic; the loss comes in two
    parts.
    """

    needs_data = False

    def __init__(self, noise, lazy=True, explode_at=None, validates=False):
        self.noise, self.lazy, self.explode_at, self.validates = noise, lazy, explode_at, validates
        torch.manual_seed(noise.seed)
        self.nets = {"student": nn.Linear(3, 2), "critic": nn.Linear(3, 2)}
        self.trace, self.exports, self.validated, self.memory = [], [], [], 0.0

    def setup(self, context): ...

    def modules(self):
        return self.nets

    def use(self, modules):
        self.nets = dict(modules)

    def updates(self, step):
        return ["student", "critic"] if step % 3 == 0 else ["critic"]

    def train_step(self, batch, context):
        samples = range(
            context.rank * 2 + context.micro * 2 * context.world,
            context.rank * 2 + context.micro * 2 * context.world + 2,
        )
        x = self.noise.normal((3,), list(samples), context.update, context.step)
        net = self.nets[context.update]
        self.trace.append((context.step, context.update, context.micro))

        def parts():
            self.memory = 0.5 * self.memory + 1
            yield net(x)[:, 0].square().mean()
            factor = float("nan") if context.step == self.explode_at else 1.0
            yield (net(x)[:, 1] - 1).abs().mean() * factor

        if self.lazy:
            return StepOutput(parts(), {"lazy": 1.0}, num_losses=2)
        return StepOutput(sum(parts()))

    def validate(self, step):
        if not self.validates:
            return None
        self.validated.append(step)
        return ValidationOutput({"weight": float(self.nets["student"].weight.sum())})

    def state_dict(self):
        return {"memory": self.memory, "tensor": torch.tensor([self.memory])}

    def load_state_dict(self, state):
        self.memory = float(state["memory"])

    def export(self, folder, weights):
        folder.mkdir(parents=True, exist_ok=True)
        self.exports.append({name: net.weight.detach().clone() for name, net in weights.items()})
