"""The sprites world: a procedural video generator with exact tracks, masks, poses and captions.

One to three textured sprites move over a textured background: spline paths, rotation, scale change,
occlusion by z-order, leaving and re-entering, a panning background. Texture is a closed-form function of
sprite-local coordinates (a few plane waves through a tanh), so a frame is rendered by mapping each pixel
back into the sprite, without interpolation, and the motion of every point is known exactly.

Captions name what is on screen and what tracks cannot show ("then the disc turns yellow").
Leaves out: lighting, perspective, deformation. Coordinates are those of `models.motion.tracks`: pixel column
i covers x in [i, i + 1), so the centre of the top-left pixel is (0.5, 0.5).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

SHAPES = ("disc", "square", "triangle", "ring", "cross")
TEXTURES = ("striped", "two-tone", "spotted")
COLORS = {
    "red": (0.90, 0.16, 0.14),
    "orange": (0.96, 0.52, 0.08),
    "yellow": (0.94, 0.86, 0.14),
    "green": (0.16, 0.70, 0.22),
    "cyan": (0.14, 0.78, 0.82),
    "blue": (0.16, 0.30, 0.92),
    "purple": (0.54, 0.18, 0.80),
    "pink": (0.96, 0.50, 0.76),
}
SPLITS = ("train", "val", "test")
BACKGROUNDS = ("static", "panning", "mixed")

SHAPE_EXTENT = 1.3  # no shape reaches further from its centre, in radii
RIM_PX = 0.5  # anti-aliasing: closer to an outline a pixel is a mixture of two surfaces
EVENT_FRAMES = 4  # a colour change is blended over so many frames
KNOT_SECONDS = 0.6  # time between two knots of a path
REST_SECONDS = 2.0  # a sprite may rest anew in each stretch of this length


def split_seed(split: str, index: int) -> int:
    """Seed of clip `index` of a split. Splits take different residues modulo 3, so they never share one."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {SPLITS}")
    if index < 0:
        raise ValueError(f"index={index} must be >= 0")
    return index * len(SPLITS) + SPLITS.index(split)


@dataclass
class SpritesConfig:
    height: int = 64  # px
    width: int = 64  # px
    num_frames: int = 33  # any length; 1 + 4k where a video VAE reads it
    fps: int = 16  # frames per second
    min_sprites: int = 1
    max_sprites: int = 3  # at most as many as shapes: none repeats, so that a caption is unambiguous
    shapes: list[str] = field(default_factory=lambda: list(SHAPES))
    min_size: float = 0.30  # sprite diameter, fraction of height
    max_size: float = 0.48
    min_speed: float = 0.25  # heights per second
    max_speed: float = 0.85
    max_rotation: float = 90.0  # degrees per second, either way
    scale_change: float = 0.15  # scale stays in 1 +- this
    rest_ratio: float = 0.0  # share of the sprites that rest: throughout a stretch of 2 s, at its start or at its end
    leave_margin: float = 0.15  # how far outside the frame a path may lead, fraction of its size; < 0: it stays inside
    occlusion: bool = True  # False: paths are drawn again until sprites keep apart
    background: str = "mixed"  # static | panning | mixed (half of the clips pan)
    max_pan_speed: float = 0.25  # heights per second
    camera_pan_speed: float = 0.0  # heights per second; moves sprites and background together
    events: bool = True  # colour changes that the caption tells
    event_ratio: float = 0.35  # share of the clips with an event
    same_look: bool = False  # True: sprites of one shape and texture look alike and stand upright in frame 0
    wavelength_px: float = 6.0  # texture on sprites: waves of 0.9 to 1.7 times this, 7.8 px on average
    background_wavelength_px: float = 9.0  # the same rule: 11.7 px on average

    def __post_init__(self) -> None:
        if min(self.height, self.width) < 16:
            raise ValueError(f"height={self.height}, width={self.width} must be at least 16 px")
        if self.num_frames < 1 or self.fps < 1:
            raise ValueError(f"num_frames={self.num_frames} and fps={self.fps} must be >= 1")
        if unknown := [shape for shape in self.shapes if shape not in SHAPES]:
            raise ValueError(f"shapes={list(self.shapes)} has {unknown[0]!r}; shapes are {', '.join(SHAPES)}")
        if not 1 <= self.min_sprites <= self.max_sprites <= len(self.shapes):
            raise ValueError(
                f"min_sprites={self.min_sprites}, max_sprites={self.max_sprites} must satisfy "
                f"1 <= min_sprites <= max_sprites <= {len(self.shapes)}, the number of shapes"
            )
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background={self.background!r} must be one of {BACKGROUNDS}")
        for low, high in (("min_size", "max_size"), ("min_speed", "max_speed")):
            if not 0 < getattr(self, low) <= getattr(self, high):
                raise ValueError(f"{low}={getattr(self, low)} must be > 0 and <= {high}={getattr(self, high)}")
        if self.leave_margin < -0.45:
            raise ValueError(f"leave_margin={self.leave_margin} must be >= -0.45, to leave a path some room")
        if not 0 <= self.rest_ratio <= 1:
            raise ValueError(f"rest_ratio={self.rest_ratio} must be in [0, 1]")
        if not 0 <= self.scale_change < 0.9:
            raise ValueError(f"scale_change={self.scale_change} must be in [0, 0.9)")


@dataclass(frozen=True)
class Waves:
    """A band-limited random field: sqrt(2/M) * sum_m cos(vectors_m . p + phases_m), unit variance."""

    vectors: np.ndarray  # [M, 2] rad per px of the sprite at scale 1
    phases: np.ndarray  # [M] rad

    @classmethod
    def draw(cls, wavelength_px: float, count: int, rng: np.random.Generator) -> Waves:
        angle = np.pi * (np.arange(count) + rng.uniform(0, 1, count)) / count  # stratified: no aperture problem
        length = 2 * np.pi / (wavelength_px * rng.uniform(0.9, 1.7, count))
        vectors = np.stack([length * np.cos(angle), length * np.sin(angle)], axis=1)
        return cls(vectors, rng.uniform(0, 2 * np.pi, count))

    def on_grid(self, corner: np.ndarray, size: tuple[int, int], pose: Pose) -> np.ndarray:
        """Field on a pixel window that follows a pose: corner [T, 2] (x, y), size (h, w) -> [T, h, w]."""
        cos, sin = np.cos(pose.angle), np.sin(pose.angle)
        rotation = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # [T, 2, 2]
        vectors = np.einsum("tij,mj->tmi", rotation, self.vectors) / pose.scale[:, None, None]
        offset = corner + 0.5 - pose.center
        phase = self.phases + vectors[..., 0] * offset[:, None, 0] + vectors[..., 1] * offset[:, None, 1]
        along_x = vectors[..., 0, None] * np.arange(size[1]) + phase[..., None]  # [T, M, w]
        along_y = vectors[..., 1, None] * np.arange(size[0])  # [T, M, h]
        # cos(a + b) = cos a cos b - sin a sin b turns the sum of waves into one small matrix product
        left = np.concatenate([np.cos(along_y), -np.sin(along_y)], axis=1).astype(np.float32)
        right = np.concatenate([np.cos(along_x), np.sin(along_x)], axis=1).astype(np.float32)
        return np.float32(np.sqrt(2 / len(self.phases))) * (left.transpose(0, 2, 1) @ right)


@dataclass(frozen=True)
class Pose:
    """Similarity motion of one layer over the clip: p(t) = center + scale * R(angle) * p_local."""

    center: np.ndarray  # [T, 2] px (x, y)
    angle: np.ndarray  # [T] rad
    scale: np.ndarray  # [T]

    def to_local(self, points: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Screen points [..., 2] at frames [...] -> layer-local px."""
        offset = (points - self.center[frames]) / self.scale[frames][..., None]
        cos, sin = np.cos(self.angle[frames]), np.sin(self.angle[frames])
        x, y = offset[..., 0], offset[..., 1]
        return np.stack([cos * x + sin * y, cos * y - sin * x], axis=-1)

    def to_screen(self, local: np.ndarray) -> np.ndarray:
        """Layer-local points [N, 2] -> screen points at every frame [T, N, 2]."""
        cos, sin = np.cos(self.angle)[:, None], np.sin(self.angle)[:, None]
        x, y = local[:, 0], local[:, 1]
        rotated = np.stack([cos * x - sin * y, sin * x + cos * y], axis=-1)
        return self.center[:, None] + self.scale[:, None, None] * rotated


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to a unit shape (radius 1), negative inside; a lower bound near outer corners."""
    if shape == "disc":
        return np.hypot(x, y) - 1.0
    if shape == "ring":
        return np.abs(np.hypot(x, y) - 0.70) - 0.32
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - 0.88
    if shape == "triangle":
        return np.maximum(np.float32(np.sqrt(0.75)) * ax - 0.5 * y, y) - 0.64
    if shape == "cross":
        return np.minimum(np.maximum(ax - 0.40, ay - 1.0), np.maximum(ax - 1.0, ay - 0.40))
    raise ValueError(f"shape={shape!r} must be one of {SHAPES}")


@dataclass(frozen=True)
class Sprite:
    shape: str
    texture: str
    color: str
    radius_px: float  # at scale 1
    pose: Pose
    waves: Waves
    stripe_px: float  # stripe wavelength
    base_rgb: np.ndarray  # [T, 3] in 0..1, changes where an event says so

    def distance(self, points: np.ndarray, frames: np.ndarray) -> np.ndarray:
        """Signed distance in px of screen points [..., 2] at frames [...] to the outline, negative inside."""
        local = self.pose.to_local(points, frames) / self.radius_px
        unit = shape_distance(self.shape, local[..., 0], local[..., 1])
        return unit * self.radius_px * self.pose.scale[frames]

    def render(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """-> corner [T, 2] int px of a window that follows the sprite, alpha [T, P, P], rgb [T, P, P, 3]."""
        half = SHAPE_EXTENT * self.radius_px * self.pose.scale.max() + 1
        side = int(np.ceil(2 * half)) + 1
        corner = np.floor(self.pose.center - half).astype(np.int64)
        offset = ((corner + 0.5 - self.pose.center) / self.pose.scale[:, None]).astype(np.float32)
        steps = np.arange(side, dtype=np.float32) / self.pose.scale[:, None].astype(np.float32)
        dx, dy = (offset[:, :1] + steps)[:, None, :], (offset[:, 1:] + steps)[:, :, None]
        cos = np.cos(self.pose.angle).astype(np.float32)[:, None, None]
        sin = np.sin(self.pose.angle).astype(np.float32)[:, None, None]
        x, y = cos * dx + sin * dy, cos * dy - sin * dx
        radius = np.float32(self.radius_px)
        distance = shape_distance(self.shape, x / radius, y / radius) * radius
        # coverage of a pixel crossed by a straight edge at this distance: analytic anti-aliasing
        alpha = np.clip(0.5 - distance * self.pose.scale[:, None, None].astype(np.float32), 0, 1)
        field_value = 1.2 * self.waves.on_grid(corner, (side, side), self.pose)
        if self.texture == "striped":
            field_value = 0.8 * field_value + 1.2 * np.sin(x * np.float32(2 * np.pi / self.stripe_px))
        elif self.texture == "two-tone":
            field_value = field_value + 0.9 * np.tanh(x / np.float32(2.0))
        return corner, alpha, two_tones(field_value, self.base_rgb, dark=0.32, light=0.40)


@dataclass(frozen=True)
class Background:
    color: str
    pose: Pose
    waves: Waves
    base_rgb: np.ndarray  # [T, 3]

    def render(self, height: int, width: int) -> np.ndarray:
        """-> [T, height, width, 3] in 0..1."""
        corner = np.zeros_like(self.pose.center)
        noise = 0.8 * self.waves.on_grid(corner, (height, width), self.pose)
        return two_tones(noise, 0.45 * self.base_rgb + 0.22, dark=0.55, light=0.30)


def two_tones(value: np.ndarray, base_rgb: np.ndarray, dark: float, light: float) -> np.ndarray:
    """Field [T, h, w] -> rgb [T, h, w, 3] between base * dark and base mixed with `light` of white."""
    low = (base_rgb * dark).astype(np.float32)[:, None, None]
    high = (base_rgb * (1 - light) + light).astype(np.float32)[:, None, None]
    mix = 0.5 + 0.5 * np.tanh(value, dtype=np.float32)
    return low + (high - low) * mix[..., None]


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip, before any pixel is drawn. Sprites are ordered back to front."""

    cfg: SpritesConfig
    seed: int
    background: Background
    sprites: list[Sprite]
    caption: str

    def track(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Follow the topmost surface under each query.

        queries [N, 3] = (frame, x, y) -> points [T, N, 2] float32 px, visibility [T, N] bool: inside the
        frame (0 <= x < W, 0 <= y < H) and not covered by a sprite further in front. A query within RIM_PX of
        the outline at its frame sits on a blended pixel, of no one surface, and is never visible.
        """
        queries = np.asarray(queries, dtype=np.float64).reshape(-1, 3)
        frames, start = queries[:, 0].astype(np.int64), queries[:, 1:]
        if len(frames) and not (frames.min() >= 0 and frames.max() < self.cfg.num_frames):
            raise ValueError(f"queries frames {frames.min()}..{frames.max()} must lie in 0..{self.cfg.num_frames - 1}")
        owner, on_rim = self._owners(start, frames)
        points = np.empty((self.cfg.num_frames, len(queries), 2))
        for k, pose in enumerate([self.background.pose, *(s.pose for s in self.sprites)], start=-1):
            held = owner == k
            points[:, held] = pose.to_screen(pose.to_local(start[held], frames[held]))
        return points.astype(np.float32), self._visible(points, owner) & ~on_rim

    def _owners(self, start: np.ndarray, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Topmost sprite at each query (-1: background) [N], and whether the query is on that outline [N]."""
        owner, on_rim = np.full(len(start), -1), np.zeros(len(start), bool)
        for k, sprite in enumerate(self.sprites):
            distance = sprite.distance(start, frames)
            owner[distance < 0] = k
            on_rim = np.where(distance < -RIM_PX, False, on_rim | (np.abs(distance) <= RIM_PX))
        return owner, on_rim

    def _visible(self, points: np.ndarray, owner: np.ndarray) -> np.ndarray:
        x, y = points[..., 0], points[..., 1]
        visible = (x >= 0) & (x < self.cfg.width) & (y >= 0) & (y < self.cfg.height)
        times = np.broadcast_to(np.arange(len(points))[:, None], x.shape)
        for k, sprite in enumerate(self.sprites):
            visible &= ~((sprite.distance(points, times) < 0) & (owner < k))
        return visible


@dataclass(frozen=True)
class SpritesClip:
    frames: np.ndarray  # uint8 [T, H, W, 3]
    caption: str
    masks: np.ndarray  # bool [K, T, H, W], visible part of each sprite
    poses: np.ndarray  # float32 [K, T, 5] = x px, y px, angle rad, scale, visible (1 if any pixel shows)
    scene: Scene = field(repr=False)

    def track(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Scene.track`."""
        return self.scene.track(queries)


def render_clip(cfg: SpritesConfig, seed: int) -> SpritesClip:
    """Draw the clip of a seed; the same (cfg, seed) gives the same bytes."""
    return render_scene(simulate(cfg, seed))


def render_scene(scene: Scene) -> SpritesClip:
    cfg = scene.cfg
    canvas = scene.background.render(cfg.height, cfg.width).reshape(-1, 3)
    top = np.full(cfg.num_frames * cfg.height * cfg.width, -1, dtype=np.int8)
    for k, sprite in enumerate(scene.sprites):
        corner, alpha, rgb = sprite.render()
        x = corner[:, 0, None, None] + np.arange(alpha.shape[2])
        y = corner[:, 1, None, None] + np.arange(alpha.shape[1])[:, None]
        shown = (alpha > 0) & (x >= 0) & (x < cfg.width) & (y >= 0) & (y < cfg.height)
        flat = ((np.arange(cfg.num_frames)[:, None, None] * cfg.height + y) * cfg.width + x)[shown]
        cover = alpha[shown]
        canvas[flat] += (rgb[shown] - canvas[flat]) * cover[:, None]
        top[flat[cover >= 0.5]] = k
    frames = (canvas * 255 + 0.5).clip(0, 255).astype(np.uint8)
    size = (cfg.num_frames, cfg.height, cfg.width)
    masks = top.reshape(1, *size) == np.arange(len(scene.sprites), dtype=np.int8).reshape(-1, 1, 1, 1)
    poses = np.stack(
        [
            np.concatenate([s.pose.center, s.pose.angle[:, None], s.pose.scale[:, None], seen[:, None]], axis=1)
            for s, seen in zip(scene.sprites, masks.any(axis=(2, 3)))
        ]
    ).astype(np.float32)
    return SpritesClip(frames.reshape(*size, 3), scene.caption, masks, poses, scene)


def simulate(cfg: SpritesConfig, seed: int) -> Scene:
    """Draw shapes, colours, paths and events from the seed, without rendering."""
    rng = np.random.default_rng([seed, 0])
    count = int(rng.integers(cfg.min_sprites, cfg.max_sprites + 1))
    shapes = rng.choice(len(cfg.shapes), count, replace=False)
    colors = rng.choice(len(COLORS), count + 1, replace=False)
    camera = _drift(cfg, cfg.camera_pan_speed, np.random.default_rng([seed, 1]))
    background = _draw_background(cfg, list(COLORS)[colors[-1]], camera, rng)
    sprites: list[Sprite] = []
    starts = _spread_starts(cfg, count, rng)
    for k in range(count):
        identity = cfg.shapes[shapes[k]], list(COLORS)[colors[k]]
        clock = _clock(cfg, np.random.default_rng([seed, 3, k]))
        sprite = _draw_sprite(cfg, identity, starts[k], clock, camera, sprites, np.random.default_rng([seed, 2, k]))
        if sprite is not None:
            sprites.append(sprite)
    scene = Scene(cfg, seed, background, sprites, _caption(sprites, background))
    has_event = cfg.events and rng.uniform() < cfg.event_ratio and cfg.num_frames > 2 * EVENT_FRAMES
    return _add_event(scene, rng) if has_event else scene


def _draw_background(cfg: SpritesConfig, color: str, camera: np.ndarray, rng: np.random.Generator) -> Background:
    pans = cfg.background == "panning" or (cfg.background == "mixed" and rng.uniform() < 0.5)
    drift = camera + _drift(cfg, cfg.max_pan_speed if pans else 0.0, rng)
    pose = Pose(drift, np.zeros(cfg.num_frames), np.ones(cfg.num_frames))
    rgb = np.tile(np.array(COLORS[color]), (cfg.num_frames, 1))
    return Background(color, pose, Waves.draw(cfg.background_wavelength_px, 10, rng), rgb)


def _draw_sprite(
    cfg: SpritesConfig,
    identity: tuple[str, str],
    start: np.ndarray,
    clock: np.ndarray,
    camera: np.ndarray,
    others: list[Sprite],
    rng: np.random.Generator,
) -> Sprite | None:
    shape, color = identity
    radius = 0.5 * cfg.height * rng.uniform(cfg.min_size, cfg.max_size)
    texture = TEXTURES[rng.integers(len(TEXTURES))]
    look = [SHAPES.index(shape), TEXTURES.index(texture)]
    waves = Waves.draw(cfg.wavelength_px, 8, np.random.default_rng(look) if cfg.same_look else rng)
    rgb = np.tile(np.array(COLORS[color]), (cfg.num_frames, 1))
    for _ in range(1 if cfg.occlusion else 60):
        pose = _draw_pose(cfg, start, clock, camera, rng)
        sprite = Sprite(shape, texture, color, radius, pose, waves, 1.2 * cfg.wavelength_px, rgb)
        if cfg.occlusion or all(_apart(sprite, other) for other in others):
            return sprite
    return None  # no free path: the clip has one sprite fewer


def _apart(first: Sprite, second: Sprite) -> bool:
    distance = np.linalg.norm(first.pose.center - second.pose.center, axis=1)
    reach = first.radius_px * first.pose.scale + second.radius_px * second.pose.scale
    return bool((distance > SHAPE_EXTENT * reach).all())


def _spread_starts(cfg: SpritesConfig, count: int, rng: np.random.Generator) -> np.ndarray:
    """Start points inside the frame, kept apart so that the first frame shows every sprite."""
    size = np.array([cfg.width, cfg.height])
    inset = max(0.18, -cfg.leave_margin)
    layouts = size * rng.uniform(inset, 1 - inset, (64, count, 2))
    gaps = np.linalg.norm(layouts[:, :, None] - layouts[:, None], axis=-1) + 1e9 * np.eye(count)
    return layouts[gaps.min(axis=(1, 2)).argmax()]


def _num_knots(cfg: SpritesConfig) -> int:
    return int(np.ceil((cfg.num_frames - 1) / cfg.fps / KNOT_SECONDS)) + 3


def _spline(knots: np.ndarray, cfg: SpritesConfig) -> np.ndarray:
    """Uniform Catmull-Rom through knots[1:-1], one knot each KNOT_SECONDS: [K, D] -> [T, D]."""
    times = np.arange(cfg.num_frames) / cfg.fps / KNOT_SECONDS
    index = np.minimum(times.astype(np.int64), len(knots) - 4) if len(knots) > 3 else times.astype(np.int64) * 0
    u = (times - index)[:, None]
    p0, p1, p2, p3 = (knots[np.minimum(index + i, len(knots) - 1)] for i in range(4))
    return p1 + 0.5 * u * (p2 - p0 + u * (2 * p0 - 5 * p1 + 4 * p2 - p3 + u * (3 * (p1 - p2) + p3 - p0)))


def _drift(cfg: SpritesConfig, max_speed: float, rng: np.random.Generator) -> np.ndarray:
    """A slow unbounded path from the origin: [T, 2] px."""
    if max_speed == 0:
        return np.zeros((cfg.num_frames, 2))
    count = _num_knots(cfg)
    heading = rng.uniform(0, 2 * np.pi) + np.concatenate([[0], np.cumsum(rng.uniform(-0.6, 0.6, count - 1))])
    step = cfg.height * KNOT_SECONDS * max_speed * rng.uniform(0.4, 1.0)
    knots = np.cumsum(step * np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0)
    return _spline(knots - knots[1], cfg)


def _clock(cfg: SpritesConfig, rng: np.random.Generator) -> np.ndarray:
    """Which frame of its path a sprite shows in each frame: [T]. It stands still where that does not advance."""
    stretch = round(REST_SECONDS * cfg.fps)
    steps = np.arange(1, stretch + 1)
    advances = [np.zeros(1, int)]
    for _ in range(0, cfg.num_frames - 1, stretch):
        if rng.uniform() >= cfg.rest_ratio:
            advances.append(np.ones(stretch, int))
            continue
        turn = rng.integers(stretch // 4, 3 * stretch // 4 + 1)
        advances.append((0 * steps, steps > turn, steps <= turn)[rng.integers(3)])
    return np.cumsum(np.concatenate(advances))[: cfg.num_frames]


def _draw_pose(
    cfg: SpritesConfig, start: np.ndarray, clock: np.ndarray, camera: np.ndarray, rng: np.random.Generator
) -> Pose:
    count = _num_knots(cfg)
    step = cfg.height * KNOT_SECONDS * rng.uniform(cfg.min_speed, cfg.max_speed)
    turn = np.deg2rad(cfg.max_rotation) * KNOT_SECONDS
    angles = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.uniform(-turn, turn, (count, 1)), axis=0)
    if cfg.same_look:
        angles -= angles[1]  # the knot of frame 0
    scales = 1 + rng.uniform(-cfg.scale_change, cfg.scale_change, (count, 1))
    center = _spline(_wander(cfg, start, step, count, rng), cfg)[clock] + camera
    scale = np.clip(_spline(scales, cfg)[:, 0], 1 - cfg.scale_change, 1 + cfg.scale_change)
    return Pose(center, _spline(angles, cfg)[clock, 0], scale[clock])


def _wander(cfg: SpritesConfig, start: np.ndarray, step: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Knots [count, 2] of a random walk with constant step that turns back at `leave_margin` outside."""
    size = np.array([cfg.width, cfg.height])
    heading = rng.uniform(0, 2 * np.pi)
    knots = [start - step * np.array([np.cos(heading), np.sin(heading)]), start]
    for _ in range(count - 2):
        heading += rng.uniform(-1.2, 1.2)
        target = knots[-1] + step * np.array([np.cos(heading), np.sin(heading)])
        if np.any(target < -cfg.leave_margin * size) or np.any(target > (1 + cfg.leave_margin) * size):
            home = size * rng.uniform(0.3, 0.7, 2) - knots[-1]
            heading = np.arctan2(home[1], home[0])
            target = knots[-1] + step * np.array([np.cos(heading), np.sin(heading)])
        knots.append(target)
    return np.stack(knots)


def _caption(sprites: list[Sprite], background: Background) -> str:
    things = " and ".join(f"{_with_article(s.color)} {s.texture} {s.shape}" for s in sprites)
    return f"{things} on {_with_article(background.color)} background"


def _with_article(color: str) -> str:
    return f"an {color}" if color[0] in "aeiou" else f"a {color}"


def _add_event(scene: Scene, rng: np.random.Generator) -> Scene:
    """Change the hue of one sprite or, in one of five cases, of the background, in the middle of the clip."""
    used = {scene.background.color, *(s.color for s in scene.sprites)}
    free = [name for name in COLORS if name not in used]
    color = free[rng.integers(len(free))]
    begin = int(rng.integers(scene.cfg.num_frames // 4, 3 * scene.cfg.num_frames // 4 - EVENT_FRAMES + 1))
    blend = np.clip((np.arange(scene.cfg.num_frames) - begin) / EVENT_FRAMES, 0, 1)[:, None]
    if rng.uniform() < 0.2:
        rgb = scene.background.base_rgb * (1 - blend) + np.array(COLORS[color]) * blend
        background, sprites, name = replace(scene.background, base_rgb=rgb), scene.sprites, "background"
    else:
        k = int(rng.integers(len(scene.sprites)))
        rgb = scene.sprites[k].base_rgb * (1 - blend) + np.array(COLORS[color]) * blend
        changed = replace(scene.sprites[k], base_rgb=rgb)
        background, sprites, name = scene.background, [*scene.sprites], scene.sprites[k].shape
        sprites[k] = changed
    caption = f"{scene.caption} then the {name} turns {color}"
    return replace(scene, background=background, sprites=sprites, caption=caption)
