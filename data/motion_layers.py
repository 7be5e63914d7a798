"""Rigid motion layers: carry point tracks through occlusion, and out of the frame and back, without drift.

Frame-to-frame tracking loses a point when something passes over it, and slides onto what covers it. Points
of one rigid body share a similarity motion (rotation, scale, shift), so
 1. tracks are grouped: hypotheses from neighbouring tracks, grown by refitting, the best first;
 2. each layer is aligned to every frame by Lucas-Kanade with a similarity warp of the whole layer against
    frame 0 (Baker & Matthews 2004), with robust weights that ignore what covers it, and gain and bias for
    changes of colour;
 3. each point goes to the layer that explains its pixel best over the clip, and is visible where it does.

Positions are complex numbers x + iy, relative to pixel centres; a motion is z -> a z + b. Tracks that no
layer explains stay as they came. Left out: non-rigid motion, perspective.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

REMAP_COLUMNS = 2**14  # OpenCV's remap takes fewer than 2^15 rows and columns
SEARCH_STARTS = 4  # of them refined
EXPLAINED_SCORE = 2.0  # log-likelihood beyond which a point needs no layer of its own
MIN_POINTS = 5  # tracks that make a layer
MIN_PATCH = 8  # untracked neighbours that may make one
PATCH_GAP = 1.6  # spacings between neighbours of a patch
FIT_PX = 0.7  # a track follows a layer's motion if it is this close
SEEDS = 60  # hypotheses per layer
ITERATIONS = 8  # Gauss-Newton steps per frame
EARLY = slice(0, 6)  # frames in which a layer must explain the points it claims, frame 0 included
MAX_PIXELS = 500  # of a layer, used for its alignment
REFINEMENTS = 1  # rounds of assigning points and aligning the layers again
MATCH_COLOR = 0.05  # rms colour difference (of 1) below which a pixel matches frame 0
MAX_TINT_STEP = 0.2  # colour shift that a layer may show within a frame
MIN_SCALE = 0.65  # of a layer since frame 0
STILL_SHARE = 0.6  # of the frames in which a point must look as in frame 0 to count as still
COVERED_SHARE = 0.35  # the same where something may stand before it for a while
STILL_POINTS = 0.15  # share of such points that makes a layer
SLOW_GAIN = 0.7  # a layer moves slowly rather than not at all if that lowers its colour residual to this share
KEEP_SUPPORT = 0.2  # share of a layer's pixels that must match, beyond chance, to follow it on
FIND_SUPPORT = 0.4  # share to believe a motion that is not near the expected one
REAL_SUPPORT = 0.6  # share that a layer must reach in two of the first three frames, or it is none
SAME_MOTION_PX = 1.0  # two layers this close to each other …
SAME_MOTION_SHARE = 0.35  # … in more than this share of the frames are one
MAX_STEP_PX = 3.0  # a layer followed on lies this close to where it was expected
SEARCH_PX = 5.0  # per frame since the layer was seen: how far off the expected place it is looked for
SEARCH_TURN = 0.2  # rad per frame
SEARCH_FRAMES = 4  # the search grows no more after these
NEAR = 2.0  # spacings from a layer's own points within which others join it freely
FAR_COST = 2.0  # score lost per spacing beyond
MAX_FAR_COST = 20.0
SIZE_PRIOR = 2.0  # weight of the log share of the points that a layer has
SAME_COLOR = 0.025  # rms colour difference (of 1) at which a pixel counts as the same
LOOSE_COLOR = 0.1  # the same in a blurred or flickering video, at most
VISIBLE_COLOR = 0.12  # a point shows where its pixel differs by less


def carry_through(
    frames: np.ndarray, points: np.ndarray, alive: np.ndarray, max_layers: int
) -> tuple[np.ndarray, np.ndarray]:
    """frames uint8 [T, H, W, 3], tracks [T, N, 2] px, alive [T, N] -> tracks and visibility, completed by
    layers.
    """
    z = (points[..., 0] + 1j * points[..., 1]) - (0.5 + 0.5j)
    colors = frames.astype(np.float32) / 255
    images = np.stack([_gray(frame) for frame in frames])
    layers = find_layers(colors, images, z, alive, max_layers)
    for _ in range(REFINEMENTS if layers else 0):
        owner, _, _ = assign(colors, z[0], layers)
        owned = [replace(layer, members=np.flatnonzero(owner == k)) for k, layer in enumerate(layers)]
        aligned = [
            layer if _is_still(layer) else align_layer(colors, images, z[0], layer)
            for layer in owned
            if len(layer.members) >= MIN_POINTS
        ]
        layers = _distinct(aligned, z[0])
    if not layers:
        return points, alive
    return compose(colors, points, alive, z[0], layers)


@dataclass
class Layer:
    members: np.ndarray  # [M] indices of tracks
    a: np.ndarray  # [T] complex, rotation and scale since frame 0
    b: np.ndarray  # [T] complex, shift
    support: np.ndarray  # [T] share of pixels that match, beyond chance; 1 where tracks carried the fit


def _gray(frame: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


# ------------------------------------------------------------------------------------------ grouping
def fit_motion(
    start: np.ndarray, now: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Least-squares z' = a z + b per frame: start [N], now [T, N], weight [T, N] -> a, b [T], enough
    points [T].
    """
    total = np.maximum(weight.sum(1), 1e-9)
    mean, mean_now = (weight * start).sum(1) / total, (weight * now).sum(1) / total
    offset, offset_now = start - mean[:, None], now - mean_now[:, None]
    spread = (weight * np.abs(offset) ** 2).sum(1)
    a = np.where(spread > 1e-6, (weight * offset.conj() * offset_now).sum(1) / np.maximum(spread, 1e-9), 1.0)
    return a, mean_now - a * mean, (weight > 0).sum(1) >= MIN_POINTS


def find_layers(
    colors: np.ndarray, images: np.ndarray, z: np.ndarray, alive: np.ndarray, max_layers: int
) -> list[Layer]:
    """Greedy: take the motion that most track-frames follow, align it, give it all points it explains,
    repeat.
    """
    still = _still_layer(colors, images, z[0])
    layers = [] if still is None else [still]
    free = np.ones(z.shape[1], bool)
    if still is not None:
        free[still.members] = False
    grouped, patched = free.copy(), free.copy()  # not yet tried
    for _ in range(3 * max_layers):
        if len(layers) == max_layers:
            break
        layer = _largest_group(z, alive, free & grouped)
        if layer is not None:
            grouped[layer.members] = False
        else:
            if layers:
                free &= assign(colors, z[0], layers)[1] < EXPLAINED_SCORE
            layer = _unexplained_patch(z, free & patched)
            if layer is None:
                break
            patched[layer.members] = False
        early = align_layer(colors[EARLY], images[EARLY], z[0], layer)
        claimed = np.flatnonzero(free & _explained_early(residuals(colors[EARLY], z[0], early)))
        if len(claimed) < MIN_POINTS:
            continue
        if not _seen_well(align_layer(colors[EARLY], images[EARLY], z[0], replace(early, members=claimed))):
            continue
        layer = align_layer(colors, images, z[0], layer)
        layer = align_layer(colors, images, z[0], replace(layer, members=claimed))
        if not any(_same_motion(layer, other, z[0]) for other in layers):
            layers.append(layer)
            free[claimed] = False
    return layers


def _still_layer(colors: np.ndarray, images: np.ndarray, start: np.ndarray) -> Layer | None:
    """What does not move, as under a camera at rest: no alignment shall drag it along with a slow body beside it.

    Where an alignment explains the colours clearly better, the motion is slow rather than none.
    """
    count = len(colors)
    if count == 1:
        return None
    layer = Layer(np.arange(len(start)), np.ones(count, complex), np.zeros(count, complex), np.ones(count))
    matching = residuals(colors, start, layer)[1:] < 2 * SAME_COLOR
    share = matching.mean(0)
    if (share > STILL_SHARE).sum() < max(STILL_POINTS * len(start), MIN_POINTS):
        return None
    layer = replace(layer, members=np.flatnonzero(share > COVERED_SHARE))
    slow = align_layer(colors, images, start, layer)
    found, rest = (np.median(residuals(colors, start, each)[1:, layer.members]) for each in (slow, layer))
    return slow if found < SLOW_GAIN * rest else layer


def _is_still(layer: Layer) -> bool:
    return bool((layer.a == 1).all() and (layer.b == 0).all())


def _seen_well(layer: Layer) -> bool:
    """In the first frames; the motion of another layer with a few accidents is not."""
    return bool((layer.support[1:4] > REAL_SUPPORT).sum() >= min(2, len(layer.support) - 1))


def _same_motion(layer: Layer, other: Layer, start: np.ndarray) -> bool:
    own = start[layer.members]
    gap = np.abs((layer.a - other.a)[1:, None] * own + (layer.b - other.b)[1:, None]).mean(1)
    return bool((gap < SAME_MOTION_PX).mean() > SAME_MOTION_SHARE)


def _distinct(layers: list[Layer], start: np.ndarray) -> list[Layer]:
    """Without those that turned out to move like a larger one."""
    kept: list[Layer] = []
    for layer in sorted(layers, key=lambda item: -len(item.members)):
        if not any(_same_motion(layer, other, start) for other in kept):
            kept.append(layer)
    return kept


def _explained_early(residual: np.ndarray) -> np.ndarray:
    """Points whose pixel the layer predicts in most of the first frames: residual [T, N] -> [N]."""
    first = residual[EARLY][1:]
    seen = np.isfinite(first)
    return (first < 2 * SAME_COLOR).sum(0) >= np.maximum(0.6 * seen.sum(0), 2)


def _largest_group(z: np.ndarray, alive: np.ndarray, free: np.ndarray) -> Layer | None:
    candidates = np.flatnonzero(free & alive[: min(4, len(z))].all(0))
    if len(candidates) < MIN_POINTS:
        return None
    seeds = candidates[np.linspace(0, len(candidates) - 1, min(SEEDS, len(candidates))).astype(int)]
    usable = np.zeros_like(free)
    usable[candidates] = True
    grown = [_grow(z, alive, usable, seed) for seed in seeds]
    return max(grown, key=lambda item: item[1])[0]


def _unexplained_patch(z: np.ndarray, free: np.ndarray) -> Layer | None:
    """The largest patch of neighbouring points without a layer, of unknown motion."""
    left = np.flatnonzero(free)
    if len(left) < MIN_PATCH:
        return None
    near = np.abs(z[0, left, None] - z[0, left]) < PATCH_GAP * _spacing(z[0])
    label = np.arange(len(left))
    for _ in range(len(left)):
        spread = np.where(near, label, len(left)).min(1)
        if (spread == label).all():
            break
        label = spread
    members = left[label == np.bincount(label).argmax()]
    if len(members) < MIN_PATCH:
        return None
    unknown = np.zeros(len(z))
    return Layer(members, np.ones(len(z), complex), np.zeros(len(z), complex), unknown)


def _grow(z: np.ndarray, alive: np.ndarray, free: np.ndarray, seed: int) -> tuple[Layer | None, float]:
    """Fit the tracks around a seed, then again all free tracks that follow the fit."""
    distance = np.where(free, np.abs(z[0] - z[0, seed]), np.inf)
    members = np.argsort(distance)[:5]
    run = _leading(alive)
    for _ in range(4):
        weight = (run[:, members]).astype(float)
        a, b, held = fit_motion(z[0, members], z[:, members], weight)
        close = np.abs(a[:, None] * z[0] + b[:, None] - z) < FIT_PX
        run = _leading(alive & (close | ~held[:, None]))
        follows = free & (run.sum(0) >= np.minimum(_leading(alive).sum(0), max(6, len(z) // 4)))
        members = np.flatnonzero(follows)
        if len(members) < MIN_POINTS:
            return None, 0.0
    return Layer(members, a, b, held.astype(float)), float(run[:, members].sum())


def _leading(flags: np.ndarray) -> np.ndarray:
    """True until the first False along time."""
    return np.logical_and.accumulate(flags, axis=0)


# ------------------------------------------------------------------------------------------ alignment
def align_layer(colors: np.ndarray, images: np.ndarray, all_starts: np.ndarray, layer: Layer) -> Layer:
    """Refine the layer's motion in every frame against its pixels in frame 0."""
    target = Target.of(colors[0], images[0], _cover(all_starts[layer.members], images.shape[1:]))
    a, b, support = layer.a.copy(), layer.b.copy(), np.ones(len(images))
    a[0], b[0] = 1.0, 0.0
    last, before = 0, 0
    for t in range(1, len(images)):
        expected = [(layer.a[t], layer.b[t])] if layer.support[t] > KEEP_SUPPORT else []
        expected += [_predicted(a, b, target.pixels.mean(), before, last, t), (a[last], b[last])]
        found = _best_alignment(colors[t], images[t], target, expected, min(t - last, SEARCH_FRAMES))
        a[t], b[t], support[t] = found.a, found.b, found.support
        if support[t] > KEEP_SUPPORT:
            target = replace(target, tint=found.tint)
            before, last = last, t
    return Layer(layer.members, a, b, support)


@dataclass(frozen=True)
class Target:
    """A layer's pixels in frame 0, and how its colours have changed since."""

    pixels: np.ndarray  # [S] complex
    gray: np.ndarray  # [S]
    color: np.ndarray  # [S, 3]
    contrast: float
    chance: float  # share of pixels that match when the layer is out of place
    tint: np.ndarray  # [3] colour shift in the last frame that showed the layer

    @classmethod
    def of(cls, color: np.ndarray, image: np.ndarray, pixels: np.ndarray) -> Target:
        gray, color = _sample(image, pixels), _sample(color, pixels)
        moved = np.roll(color, len(color) // 2, axis=0)
        chance = float((np.sqrt(((color - moved) ** 2).mean(1)) < MATCH_COLOR).mean())
        return cls(pixels, gray, color, max(float(gray.std()), 0.02), chance, np.zeros(3))


@dataclass(frozen=True)
class Alignment:
    a: complex
    b: complex
    support: float  # share of the layer's pixels that match, beyond chance; 1 = all
    tint: np.ndarray  # [3]


def _predicted(
    a: np.ndarray, b: np.ndarray, center: complex, before: int, last: int, t: int
) -> tuple[complex, complex]:
    """The layer's center in frame 0 moves on, and the layer turns on, at the speed between the last two frames
    in which it was seen, for at most 6 frames; its scale stays, since an error in it would grow without bound.
    """
    if last == before:
        return a[last], b[last]
    steps = min(t - last, 6) / (last - before)
    turn = a[last] / a[before]
    turned = a[last] * (turn / abs(turn)) ** steps
    place, place_before = (a[k] * center + b[k] for k in (last, before))
    return turned, place + (place - place_before) * steps - turned * center


def _cover(start: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixel positions [S] of the cells around the layer's points in frame 0."""
    reach = _half_spacing(start)
    steps = np.arange(-reach, reach)
    pixels = (np.round(start)[:, None] + (steps[:, None] + 1j * steps[None]).reshape(-1)).reshape(-1)
    inside = (pixels.real >= 0) & (pixels.imag >= 0) & (pixels.real < size[1]) & (pixels.imag < size[0])
    pixels = np.unique(pixels[inside])
    return pixels[:: 1 + len(pixels) // MAX_PIXELS]


def _sample(image: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Bicubic reads at z (any shape); NaN outside the frame."""
    import cv2

    rows = -(-z.size // REMAP_COLUMNS)
    flat = np.pad(z.reshape(-1), (0, -z.size % REMAP_COLUMNS if rows > 1 else 0)).reshape(rows, -1)
    x, y = flat.real.astype(np.float32), flat.imag.astype(np.float32)
    values = cv2.remap(image, x, y, cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    values = values.reshape(-1, *image.shape[2:])[: z.size].reshape(*z.shape, *image.shape[2:])
    height, width = image.shape[:2]
    outside = (np.abs(z.real - (width - 1) / 2) > width / 2) | (np.abs(z.imag - (height - 1) / 2) > height / 2)
    values[outside] = np.nan
    return values


def _best_alignment(
    color: np.ndarray, image: np.ndarray, target: Target, expected: list[tuple[complex, complex]], gap: int
) -> Alignment:
    """The motion near an expected one that matches most pixels, or else one found around it.

    Support -1 and the first expected motion if neither matches enough: the layer is hidden.
    """
    stacked = np.stack([image, np.gradient(image, axis=1), np.gradient(image, axis=0)], axis=-1)
    best = hidden = Alignment(*expected[0], -1.0, target.tint)
    center = target.pixels.mean()
    for guesses in (expected[:1], expected[1:]):
        for guess, found in zip(guesses, _aligned(color, stacked, target, guesses), strict=True):
            near = abs((found.a - guess[0]) * center + found.b - guess[1]) < MAX_STEP_PX
            if found.support > (KEEP_SUPPORT if near else FIND_SUPPORT) and found.support > best.support:
                best = found
        if best.support > FIND_SUPPORT:
            return best
    for found in _aligned(color, stacked, target, _search_around(image, target, expected[0], gap)):
        if found.support > max(FIND_SUPPORT, best.support):
            best = found
    return best if best.support > 0 else hidden


def _search_around(
    image: np.ndarray, target: Target, guess: tuple[complex, complex], gap: int
) -> list[tuple[complex, complex]]:
    """The turned and shifted variants of a motion that correlate best with frame 0."""
    center, (a, b) = target.pixels.mean(), guess
    shifts = np.linspace(-SEARCH_PX * gap, SEARCH_PX * gap, 5 + 2 * gap)
    turns = np.linspace(-SEARCH_TURN * gap, SEARCH_TURN * gap, 3 + gap)
    turn, dx, dy = (v.reshape(-1) for v in np.meshgrid(turns, shifts, shifts, indexing="ij"))
    turned = a * np.exp(1j * turn)
    shifted = b + (a - turned) * center + dx + 1j * dy
    few = slice(None, None, 1 + len(target.pixels) // 60)
    values = _sample(image, turned[:, None] * target.pixels[few] + shifted[:, None])
    wanted = np.broadcast_to(target.gray[few], values.shape)
    seen = ~np.isnan(values)
    count = np.maximum(seen.sum(1, keepdims=True), 1)
    now = np.where(seen, values - np.where(seen, values, 0).sum(1, keepdims=True) / count, 0)
    then = np.where(seen, wanted - np.where(seen, wanted, 0).sum(1, keepdims=True) / count, 0)
    correlation = (now * then).sum(1) / np.sqrt((now**2).sum(1) * (then**2).sum(1) + 1e-9)
    correlation[count[:, 0] < 0.3 * values.shape[1]] = -1
    return [(turned[n], shifted[n]) for n in np.argsort(-correlation)[:SEARCH_STARTS]]


def _aligned(
    color: np.ndarray, stacked: np.ndarray, target: Target, guesses: list[tuple[complex, complex]]
) -> list[Alignment]:
    """Gauss-Newton from each of G guesses on gray values, judged by colour.

    stacked [H, W, 3] = gray image and its derivatives.
    """
    a, b = (np.array(values, complex)[:, None] for values in zip(*guesses, strict=True))  # [G, 1]
    center = target.pixels.mean()
    local = target.pixels - center
    reach = max(float(np.abs(local).mean()), 1.0)
    gain, bias = np.ones((len(guesses), 1)), None
    for iteration in range(ITERATIONS):
        values = _sample(stacked, a * target.pixels + b)  # [G, P, 3]
        seen = ~np.isnan(values[..., 0])
        values[~seen] = 0
        now, gx, gy = np.moveaxis(values, -1, 0)
        if bias is None:
            bias = _seen_median(target.gray - now, seen)
        width = target.contrast * (1.2 if iteration < 3 else 0.6)
        weight = _tukey(gain * now + bias - target.gray, width) * seen
        gain, bias = _gain_and_bias(now, target.gray, weight)
        residual = gain * now + bias - target.gray
        weight = _tukey(residual, width) * seen
        turned = a * local / reach
        # by p, q, shift x, shift y, where a -> a + a (p + iq) / reach about the layer's centre
        moves = [gx * turned.real + gy * turned.imag, -gx * turned.imag + gy * turned.real, gx, gy]
        jacobian = gain[:, None] * np.stack(moves, axis=1)  # [G, 4, P]
        weighted = weight[:, None] * jacobian
        normal = weighted @ jacobian.transpose(0, 2, 1) + 1e-4 * np.eye(4)
        change = -np.linalg.solve(normal, weighted @ residual[..., None])
        p, q, dx, dy = np.moveaxis(change, 1, 0)
        turn = a * (p + 1j * q) / reach
        a, b = a + turn, b + dx + 1j * dy - turn * center
        if np.abs(change).sum(1).max() < 0.02:
            break
    return [_judged(color, target, *found) for found in zip(a[:, 0], b[:, 0], strict=True)]


def _seen_median(values: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Median over the seen pixels: [G, P] -> [G, 1]; 0 where none is seen."""
    return np.array([[np.median(row[shown]) if shown.any() else 0.0] for row, shown in zip(values, seen)])


def _judged(color: np.ndarray, target: Target, a: complex, b: complex) -> Alignment:
    """How many of the layer's pixels have its colour, allowing a shift that changes slowly over time."""
    values = _sample(color, a * target.pixels + b)
    seen = ~np.isnan(values[:, 0])
    if seen.sum() < 12 or not MIN_SCALE < abs(a) < 1 / MIN_SCALE:
        return Alignment(a, b, -1.0, target.tint)
    change = values[seen] - target.color[seen]
    near = np.abs(change - target.tint).max(1) < MAX_TINT_STEP
    tint = np.median(change[near], axis=0) if near.sum() >= 8 else target.tint
    matching = (np.sqrt(((change - tint) ** 2).mean(1)) < MATCH_COLOR).sum()
    share = matching / max(seen.sum(), 0.25 * len(target.pixels))
    return Alignment(a, b, float((share - target.chance) / (1 - target.chance + 1e-6)), tint)


def _tukey(residual: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Weights that give no say to what covers the layer."""
    return np.maximum(1 - (residual / width) ** 2, 0) ** 2 + 1e-6


def _gain_and_bias(
    now: np.ndarray, wanted: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted lines wanted = gain * now + bias over the last axis, gain in 0.7 .. 1.4: [..., P] -> [..., 1]."""
    share = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-9)
    mean_now, mean_wanted = ((share * v).sum(-1, keepdims=True) for v in (now, wanted))
    offset = share * (now - mean_now)
    spread, slope = ((offset * v).sum(-1, keepdims=True) for v in (now - mean_now, wanted - mean_wanted))
    gain = np.clip(slope / np.maximum(spread, 1e-6), 0.7, 1.4)
    return gain, mean_wanted - gain * mean_now


# ------------------------------------------------------------------------------------------ assignment
def assign(
    colors: np.ndarray, start: np.ndarray, layers: list[Layer]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The layer that explains each point's pixel best over the clip [N], its score [N], the residuals [K, T,
    N].

    The score is a log-likelihood of "this layer" against "anything else". A mismatch where another layer's
    points are seen may be occlusion, and weighs little; out of the frame nothing is known.
    """
    residual = np.stack([residuals(colors, start, layer) for layer in layers])
    known = np.isfinite(residual)
    spread = _color_spread(residual, layers)
    match = np.where(known, np.exp(-0.5 * (residual / spread) ** 2), 0)
    covered = _covered_by_others(colors.shape[1:3], start, layers, match > 0.5)
    density = 30 * match * SAME_COLOR / spread
    score = np.where(known, np.log(np.where(covered, 0.8, 0.25) + density), 0)[:, 1:].sum(1)
    for k, layer in enumerate(layers):
        distance = np.abs(start[:, None] - start[layer.members]).min(1) / _spacing(start)
        score[k] -= np.clip(FAR_COST * (distance - NEAR), 0, MAX_FAR_COST)
        score[k] += SIZE_PRIOR * np.log(len(layer.members) / len(start))
    return score.argmax(0), score.max(0), residual


def _color_spread(residual: np.ndarray, layers: list[Layer]) -> np.ndarray:
    """How far colours of one surface differ from frame 0 in this video: [T, 1], from SAME_COLOR in a clean one to
    LOOSE_COLOR in a blurred or flickering one. The layer that fits best in a frame tells.
    """
    typical = np.stack([np.median(residual[k][:, layer.members], axis=1) for k, layer in enumerate(layers)])
    return np.clip(typical.min(0), SAME_COLOR, LOOSE_COLOR)[:, None]


def _covered_by_others(
    size: tuple[int, int], start: np.ndarray, layers: list[Layer], match: np.ndarray
) -> np.ndarray:
    """Whether layer k's place for point n at t lies among matching points of other layers: [K, T, N]."""
    import cv2

    place = np.stack([layer.a[:, None] * start + layer.b[:, None] for layer in layers])
    x = np.clip(np.round(place.real), -1, size[1]).astype(int) + 1
    y = np.clip(np.round(place.imag), -1, size[0]).astype(int) + 1
    covered = np.zeros(match.shape, bool)
    reach = 2 * _half_spacing(start) + 1
    for t in range(1, match.shape[1]):
        maps = np.zeros((len(layers), size[0] + 2, size[1] + 2), np.uint8)
        for k, layer in enumerate(layers):
            seen = layer.members[match[k, t, layer.members]]
            maps[k, y[k, t, seen], x[k, t, seen]] = 1
            maps[k] = cv2.dilate(maps[k], np.ones((reach, reach), np.uint8))
        total = maps.sum(0)
        for k in range(len(layers)):
            covered[k, t] = (total - maps[k])[y[k, t], x[k, t]] > 0
    return covered


def _spacing(start: np.ndarray) -> float:
    """Side of a square that holds one point on average, px."""
    area = (np.ptp(start.real) + 1) * (np.ptp(start.imag) + 1)
    return max(float(np.sqrt(area / len(start))), 1.0)


def _half_spacing(start: np.ndarray) -> int:
    """Half the spacing, 1 .. 4 px."""
    return int(np.clip(_spacing(start) / 2, 1, 4))


def compose(
    colors: np.ndarray, points: np.ndarray, alive: np.ndarray, start: np.ndarray, layers: list[Layer]
) -> tuple[np.ndarray, np.ndarray]:
    """Tracks [T, N, 2] and visibility [T, N] from the layers, or as they came where no layer explains a
    point.
    """
    owner, _, residual = assign(colors, start, layers)
    z = np.stack([layer.a[:, None] * start + layer.b[:, None] for layer in layers])  # [K, T, N]
    chosen = np.take_along_axis(z, owner[None, None], axis=0)[0]
    shown = np.take_along_axis(residual, owner[None, None], axis=0)[0] < VISIBLE_COLOR
    explained = shown[1:].sum(0) >= min(2, len(points) - 1)
    tracks = np.stack([chosen.real + 0.5, chosen.imag + 0.5], axis=-1).astype(np.float32)
    tracks = np.where(explained[:, None], tracks, points)
    visibility = np.where(explained, shown, alive)
    tracks[0], visibility[0] = points[0], True
    return tracks, visibility


def residuals(colors: np.ndarray, start: np.ndarray, layer: Layer) -> np.ndarray:
    """Colour difference to frame 0 under the layer's motion, 0..1, after gain and bias; inf outside: [T,
    N].
    """
    template = _sample(colors[0], start)
    contrast = np.maximum(template[layer.members].std(0), 0.03)
    found = np.full((len(colors), len(start)), np.inf)
    for t, image in enumerate(colors):
        values = _sample(image, layer.a[t] * start + layer.b[t])
        seen = ~np.isnan(values[:, 0])
        trusted = layer.members[seen[layer.members]]
        if len(trusted) >= 4:
            now, wanted = values[trusted].T, template[trusted].T  # [3, M]
            gain, bias = np.ones((3, 1)), np.median(wanted - now, axis=1, keepdims=True)
            for _ in range(3):
                weight = _tukey(gain * now + bias - wanted, 1.5 * contrast[:, None])
                gain, bias = _gain_and_bias(now, wanted, weight)
            values = values * gain.T + bias.T
        found[t, seen] = np.sqrt(((values - template)[seen] ** 2).mean(1))
    return found
