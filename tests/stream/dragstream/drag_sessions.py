"""Sessions of a tiny student, and drags for them."""

from __future__ import annotations

import numpy as np
import pytest

from models.motion.tracks import Tracks
from stream.dragstream.config import DragConfig
from stream.dragstream.drag import Drag, Handle, Pose
from stream.session import StreamSession

PROMPT = "a red striped disc on a blue background"
LEFT = Pose(dx=-4.0)


def first_frame() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def open_session(parts, **options) -> StreamSession:
    student, codecs = parts
    return StreamSession(student, codecs, **({"first_frame": first_frame(), "prompt": PROMPT} | options))


def mask(x0: int = 4, x1: int = 10, y0: int = 4, y1: int = 10) -> np.ndarray:
    inside = np.zeros((16, 16), bool)
    inside[y0:y1, x0:x1] = True
    return inside


def drag(mode: str, *targets: Pose, **options) -> Drag:
    frames = 1 if mode == "edit" else 3
    poses = [tuple(Pose().toward(target, (n + 1) / frames) for n in range(frames)) for target in targets]
    return Drag(mode, tuple(Handle(mask(), (7.0, 7.0), each, (7.0, 7.0)) for each in poses), **options)


def advance(session: StreamSession, chunks: int) -> list[np.ndarray]:
    return [session.next_chunk() for _ in range(chunks)]


def tracked_session(parts, **options) -> StreamSession:
    """One track on the handle, at (7, 7), and one off its way."""
    points = np.broadcast_to(np.array([[7.0, 7.0], [13.0, 13.0]], np.float32), (9, 2, 2)).copy()
    tracks = Tracks.from_arrays(points, np.ones((9, 2), bool), 16, 16)
    return open_session(parts, tracks=tracks, drag=DragConfig(iterations=1, **options))


def ways(session: StreamSession, frames: int = 12) -> dict[int, list[float]]:
    """x of each track that is seen in the frames to come, by identity."""
    session._receive()
    taken = session._buffer.peek(frames)
    shown = taken.visibility[0].all(0).tolist()
    return {identity: taken.points[0, :, n, 0].tolist()
            for n, identity in enumerate(taken.ids[0].tolist()) if shown[n]}  # fmt: skip


def refused(session: StreamSession, bad: Drag, message: str) -> None:
    before = (session.chunk_index, session.num_frames, session._memory)
    hook = session.student.patch_embedding.register_forward_pre_hook(lambda *_: pytest.fail("the student ran"))
    with pytest.raises(ValueError, match=message):
        session.drag(bad)
    hook.remove()
    assert before == (session.chunk_index, session.num_frames, session._memory)
