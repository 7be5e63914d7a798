from __future__ import annotations

import numpy as np
import pytest
import torch
from test_editor import CELLS, SIZE, make_student, mask

from models.condition import Condition
from models.diffusion.guidance import Guidance
from models.diffusion.noise import KeyedNoise
from models.wan.config import WanConfig
from stream.dragstream import bidirectional
from stream.dragstream.bidirectional import ClipDragEditor, drag_clip
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.dragstream.features import Reference

CONFIG = WanConfig.tiny()
FRAMES = 5


def run(
    poses: tuple[Pose, ...], frame: int = 1, mode: str = "animate", seed: int = 0, reference: Reference | None = None,
    **settings: object,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    prompt = torch.randn(1, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(1))
    handle = Handle(np.flip(mask()[::-1], 0), (32.0, 28.0), poses, (32.0, 28.0), reference)  # a view, as tools give
    drag = Drag(mode, (handle,), editable=np.ones(SIZE, bool))
    return drag_clip(
        make_student(CONFIG), Condition(prompt, torch.zeros_like(prompt)), Guidance({"text": 2.0}), drag, frame,
        DragConfig(**{"iterations": 2} | settings), size=SIZE, num_inference_steps=6, shift=6.0,
        noise=KeyedNoise(seed), sample_ids=[0], latent_shape=(CONFIG.latent_channels, FRAMES, *CELLS),
    )  # fmt: skip


def test_a_bidirectional_clip_can_be_dragged() -> None:
    poses = (Pose(dx=8.0), Pose(dx=16.0))
    dragged, plain = run(poses)
    again, _ = run(poses)
    assert torch.equal(dragged, again) and torch.isfinite(dragged).all()
    assert (dragged - plain).abs().max() > 1e-3


def test_no_movement_is_the_clip_itself() -> None:
    dragged, plain = run((Pose(), Pose()))
    torch.testing.assert_close(dragged, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frame": -1}, f"frame=-1 must be in 0..{FRAMES - 1}"),
        ({"layers": [99]}, r"drag.layers=\[99\] must be blocks of the model"),
        ({"reference": Reference(torch.zeros(4, *CELLS))}, "handle 0 brings a reference that was read with"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_clip_is_sampled(monkeypatch, changes: dict, message: str) -> None:
    monkeypatch.setattr("stream.dragstream.bidirectional.sample_teacher", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        run((Pose(dx=4.0),), **changes)


@pytest.mark.parametrize(("frame", "mode", "count"), [(3, "animate", 2), (1, "edit", 1)])
def test_a_drag_beyond_the_clip_is_refused(frame: int, mode: str, count: int) -> None:
    with pytest.raises(ValueError, match=f"animates 1 to {FRAMES - frame - 1} latent frames after frame {frame}"):
        run((Pose(dx=4.0),) * count, frame, mode)


def test_features_are_of_the_frame_dragged_in_and_the_last_pose_is_held_to_the_end(monkeypatch) -> None:
    read, editors = [], []
    original = bidirectional.read_references

    def reading(*args: object) -> tuple[Reference, ...]:
        read.append((args[-1], original(*args)[0].clean, original(*args[:-1], -1)[0].clean))
        return original(*args)

    class Seen(ClipDragEditor):
        def __init__(self, *args: object, **settings: object) -> None:
            super().__init__(*args, **settings)
            editors.append(self)

    monkeypatch.setattr(bidirectional, "read_references", reading)
    monkeypatch.setattr(bidirectional, "ClipDragEditor", Seen)
    run((Pose(dx=8.0), Pose(dx=16.0)), frame=1, iterations=1)
    ((frame, clean, last),) = read
    assert frame == 1 and not torch.equal(clean, last)
    held = [Pose(dx=16.0)]
    assert editors[0]._poses(0, FRAMES) == ([Pose()], [None, None, [Pose(dx=8.0)], held, held])
