"""N-term guidance against its definition and against plain classifier-free guidance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.condition import Condition
from models.diffusion.guidance import Guidance


def condition() -> Condition:
    rng = torch.Generator().manual_seed(0)
    return Condition(
        prompt_embeds=torch.randn(2, 4, 3, generator=rng),
        null_prompt_embeds=torch.randn(1, 4, 3, generator=rng),
        track_map=torch.randn(2, 5, 9, 2, 3, generator=rng),
    )


class Model:
    """A non-linear function of text and motion that records what it is asked."""

    def __init__(self):
        self.calls: list[str] = []

    def __call__(self, given: Condition) -> torch.Tensor:
        has_text = not torch.equal(given.prompt_embeds[:1], given.null_prompt_embeds)
        self.calls.append("text" * has_text + "motion" * bool(given.track_map.any()))
        text = given.prompt_embeds.sum((1, 2)).view(-1, 1, 1, 1, 1)
        return torch.sin(text) + given.track_map[:, :3, :3] * (1 + text)


def velocities(model: Model) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    full = condition()
    return model(full), model(full.drop("text")), model(full.drop("motion"))


def test_joint_guidance_equals_the_papers_equation():
    full, no_text, no_motion = velocities(Model())
    a = 3.0 / 4.5
    base = a * no_text + (1 - a) * no_motion
    expected = base + 3.0 * (full - no_text) + 1.5 * (full - no_motion)
    actual = Guidance({"text": 3.0, "motion": 1.5})(Model(), condition())
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def test_joint_guidance_is_plain_cfg_of_the_total_scale():
    guidance = Guidance({"text": 3.0, "motion": 1.5})
    full, no_text, no_motion = (v / 10 for v in velocities(Model()))
    negative = 2 / 3 * no_text + 1 / 3 * no_motion
    plain = negative + guidance.plain_cfg_scale * (full - negative)
    actual = guidance(lambda given: Model()(given) / 10, condition())
    assert guidance.plain_cfg_scale == 4.5
    torch.testing.assert_close(actual, plain, atol=2e-6, rtol=0)


def test_coefficients_of_the_paper():
    coefficients = [c for c, _ in Guidance({"text": 3.0, "motion": 1.5}).branches(condition())]
    assert coefficients == pytest.approx([4.5, -7 / 3, -7 / 6])


@settings(max_examples=60)
@given(st.floats(0, 10), st.floats(0, 10))
def test_coefficients_sum_to_one(text, motion):
    guidance = Guidance({"text": text, "motion": motion})
    assert sum(guidance.coefficients.values()) == pytest.approx(1.0, abs=1e-9)


def test_order_of_branches_is_not_the_configs():
    forward, backward = Model(), Model()
    first = Guidance({"text": 3.0, "motion": 1.5})(forward, condition())
    second = Guidance({"motion": 1.5, "text": 3.0})(backward, condition())
    assert forward.calls == backward.calls == ["textmotion", "motion", "text"]
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("weights", "calls"),
    [
        ({}, ["textmotion"]),
        ({"text": 0.0, "motion": 0.0}, ["textmotion"]),
        ({"text": 0.0, "motion": 3.0}, ["textmotion", "text"]),
        ({"text": 1.0}, ["textmotion"]),  # scale 1 is the conditional prediction: the dropped branch cancels
    ],
)
def test_terms_that_cancel_cost_no_evaluation(weights, calls):
    model = Model()
    guided = Guidance(weights)(model, condition())
    assert model.calls == calls
    if len(calls) == 1:
        assert torch.equal(guided, Model()(condition()))


def test_zero_motion_weight_needs_no_track_map():
    tracks_less = Condition(prompt_embeds=torch.ones(1, 4, 3), null_prompt_embeds=torch.zeros(1, 4, 3))
    branches = Guidance({"text": 4.0, "motion": 0.0}).branches(tracks_less)
    assert [coefficient for coefficient, _ in branches] == [4.0, -3.0]
    with pytest.raises(ValueError, match="motion guidance weight"):
        Guidance({"motion": 1.0, "text": 1.0}).branches(tracks_less)


def test_result_is_float32():
    guided = Guidance({"text": 2.0})(lambda given: Model()(given).bfloat16(), condition())
    assert guided.dtype == torch.float32


def test_description_states_the_plain_scale_and_the_cost():
    text = Guidance({"text": 3.0, "motion": 1.5}).describe()
    assert "plain CFG scale 4.5" in text and "3 evaluations" in text and "0.667 without text" in text
    assert "plain CFG scale 1," in Guidance({}).describe()


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"txt": 1.0}, "guidance 'txt' must be one of text, motion"),
        ({"text": -1.0}, "text=-1.0"),
        ({"text": float("nan")}, "text=nan"),
        ({"text": float("inf")}, "text=inf must be >= 0 and finite"),
    ],
)
def test_bad_weights_are_named(weights, match):
    with pytest.raises(ValueError, match=match):
        Guidance(weights)
