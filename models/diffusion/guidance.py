"""Guidance by several named conditions: MotionStream eq. 2, for any number of terms.

    v = v_base + sum_n w_n (v_full - v_without_n),    v_base = sum_n (w_n / W) v_without_n,    W = sum_n w_n

With text 3.0 and motion 1.5 this is the paper's joint guidance at three evaluations. The combination is
linear and its coefficients sum to 1, so it means the same in velocity, x0 or noise. It equals plain
classifier-free guidance of scale W against the mixed negative v_base; mind that Self-Forcing's ``guidance
3.0`` is written cond + 3 (cond - neg), which is plain scale 4. The all-null branch is never evaluated, so
training needs no joint dropout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor

from models.condition import DROPPABLE, Condition

Given = TypeVar("Given")


class Guidance:
    """Weights of the guidance terms, e.g. ``Guidance({"text": 3.0, "motion": 1.5})``.

    A term of weight 0 costs no evaluation; no terms at all is the plain conditional prediction. Raises
    ValueError for a name that no condition can drop, or a weight that is negative or not finite.
    """

    def __init__(self, weights: Mapping[str, float]):
        for name, weight in weights.items():
            if name not in DROPPABLE:
                raise ValueError(f"guidance '{name}' must be one of {', '.join(DROPPABLE)}")
            if not 0 <= weight < math.inf:
                raise ValueError(f"guidance {name}={weight} must be >= 0 and finite; 0 switches the term off")
        # our own order, not the config's: all ranks must run the same branches in the same order
        self.weights = {name: float(weights[name]) for name in DROPPABLE if weights.get(name, 0.0) > 0}

    @property
    def plain_cfg_scale(self) -> float:
        """Scale s of v_neg + s (v_full - v_neg) that this equals; 1 without terms."""
        return sum(self.weights.values()) if self.weights else 1.0

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficient of each evaluated branch, by what it drops ("" = nothing); they sum to 1."""
        total = self.plain_cfg_scale
        terms = {name: weight / total - weight for name, weight in self.weights.items()}
        return {"": total} | {name: value for name, value in terms.items() if value != 0.0}

    def branches(self, condition: Condition) -> list[tuple[float, Condition]]:
        """(coefficient, condition) of each evaluation, the full one first; coefficients sum to 1."""
        return [(value, condition.drop(name) if name else condition) for name, value in self.coefficients.items()]

    def __call__(self, predict: Callable[[Condition], Tensor], condition: Condition) -> Tensor:
        """Guided prediction, float32."""
        return combine(predict, self.branches(condition))

    def describe(self) -> str:
        """One line for the log: terms, the equivalent plain-CFG scale, evaluations per step."""
        count = len(self.coefficients)
        cost = f"{count} evaluation{'s' if count > 1 else ''} per step"
        if not self.weights:
            return f"no guidance, equal to plain CFG scale 1, {cost}"
        terms = " + ".join(f"{name} {weight:g}" for name, weight in self.weights.items())
        negative = ", ".join(f"{w / self.plain_cfg_scale:.3g} without {name}" for name, w in self.weights.items())
        return f"{terms}, equal to plain CFG scale {self.plain_cfg_scale:g} against ({negative}), {cost}"


def combine(predict: Callable[[Given], Tensor], branches: Sequence[tuple[float, Given]]) -> Tensor:
    """sum of coefficient * predict(branch), in float32; the sum starts with the full branch."""
    total: Tensor | None = None
    for coefficient, given in branches:
        term = predict(given).float() * coefficient
        total = term if total is None else total + term
    if total is None:
        raise ValueError("branches is empty; guidance always has the full condition")
    return total
