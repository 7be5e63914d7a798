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

from dataclasses import replace

import numpy as np

from data.layer_alignment import Layer, align_layer, gain_and_bias, half_spacing, sample, spacing, tukey

EXPLAINED_SCORE = 2.0  # log-likelihood beyond which a point needs no layer of its own
MIN_POINTS = 5  # tracks that make a layer
MIN_PATCH = 8  # untracked neighbours that may make one
PATCH_GAP = 1.6  # spacings between neighbours of a patch
MIN_CANDIDATES = 5  # layers looked for, of which the largest stay where fewer are asked for
FIT_PX = 0.7  # a track follows a layer's motion if it is this close
SEEDS = 60  # hypotheses per layer
EARLY_FRAMES = 6  # in which a layer must explain the points it claims, frame 0 included
AWAY_PX = 2.0  # a track of the still layer that is further from its start …
MIN_LEFT_FRAMES = 3  # … in so many frames is of a body that rested
REFINEMENTS = 1  # rounds of assigning points and aligning the layers again
STILL_SHARE = 0.6  # of the frames in which a point must look as in frame 0 to count as still
COVERED_SHARE = 0.35  # the same where something may stand before it for a while
STILL_POINTS = 0.15  # share of such points that makes a layer
SLOW_GAIN = 0.7  # a layer moves slowly rather than not at all if that lowers its colour residual to this share
REAL_SUPPORT = 0.6  # share that a layer must reach in two of the first three frames, or it is none
SAME_MOTION_PX = 1.0  # two layers this close to each other …
SAME_MOTION_SHARE = 0.35  # … in more than this share of the frames are one
NEAR = 2.0  # spacings from a layer's own points within which others join it freely
FAR_COST = 2.0  # score lost per spacing beyond
MAX_FAR_COST = 20.0
NEIGHBOURS_SAY = 60.0  # score gained where all neighbours are of the same layer
SMOOTHINGS = 3  # rounds
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


def _gray(frame: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255


# ------------------------------------------------------------------------------------------ grouping
def fit_motion(start: np.ndarray, now: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
    """Greedy: take the motion that most track-frames follow, align it, give it all points it explains, repeat. Bodies
    that rest at first come after those that move, and patches that nothing explains last.
    """
    still = _still_layer(colors, images, z[0])
    layers = [] if still is None else [still]
    free = np.ones(z.shape[1], bool)
    rested, telling = np.zeros_like(free), np.ones_like(alive)
    if still is not None:
        free[still.members] = False
        rested[still.members] = _leaves(z[:, still.members], alive[:, still.members])
    grouped, patched = free.copy(), free.copy()  # not yet tried
    for _ in range(3 * max(max_layers, MIN_CANDIDATES)):
        if len(layers) == max(max_layers, MIN_CANDIDATES):
            break
        layer = _largest_group(z, alive, free & grouped, telling)
        if layer is None and rested.any():
            free, grouped, telling = free | rested, grouped | rested, _away(z)
            rested = np.zeros_like(free)
            layer = _largest_group(z, alive, free & grouped, telling)
        if layer is not None:
            grouped[layer.members] = False
        else:
            if layers:
                free &= assign(colors, z[0], layers)[1] < EXPLAINED_SCORE
            layer = _unexplained_patch(z, free & patched)
            if layer is None:
                break
            patched[layer.members] = False
        found = _with_its_points(colors, images, z[0], free, layer)
        if found is not None and not any(_same_motion(found, other, z[0]) for other in layers):
            layers.append(found)
            free[found.members] = False
    return _largest(layers, colors, z[0], max_layers)


def _with_its_points(
    colors: np.ndarray, images: np.ndarray, start: np.ndarray, free: np.ndarray, layer: Layer
) -> Layer | None:
    """The layer with all free points that it explains where it first moves, aligned to every frame; None where they are
    few or not well seen.
    """
    shown = _first_moving_frames(layer, start)
    early = align_layer(colors[shown], images[shown], start, layer.at(shown))
    claimed = np.flatnonzero(free & _explained(residuals(colors[shown], start, early)))
    if len(claimed) < MIN_POINTS:
        return None
    if not _seen_well(align_layer(colors[shown], images[shown], start, replace(early, members=claimed))):
        return None
    layer = align_layer(colors, images, start, layer)
    return align_layer(colors, images, start, replace(layer, members=claimed))


def _largest(layers: list[Layer], colors: np.ndarray, start: np.ndarray, count: int) -> list[Layer]:
    """The layers that explain most points: a few tracks that slid the same way are no body."""
    if len(layers) <= count:
        return layers
    points = np.bincount(assign(colors, start, layers)[0], minlength=len(layers))
    return [layers[k] for k in sorted(np.argsort(-points)[:count])]


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


def _leaves(z: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Tracks of the still layer that leave their place while they are followed: bodies at rest that move later on."""
    return (_leading(alive) & _away(z)).sum(0) >= MIN_LEFT_FRAMES


def _away(z: np.ndarray) -> np.ndarray:
    """Where a track is not at its start: [T, N]."""
    return np.abs(z - z[0]) > AWAY_PX


def _first_moving_frames(layer: Layer, start: np.ndarray) -> np.ndarray:
    """Frame 0 and the first ones in which the layer has moved, by which its points are told from others."""
    own = start[layer.members]
    away = np.abs((layer.a - 1)[:, None] * own + layer.b[:, None]).mean(1) > SAME_MOTION_PX
    moved = np.flatnonzero(away & (layer.support > 0))
    first = moved[0] if len(moved) else 1
    return np.array([0, *range(first, min(first + EARLY_FRAMES - 1, len(layer.a)))])


def _is_still(layer: Layer) -> bool:
    return bool((layer.a == 1).all() and (layer.b == 0).all())


def _seen_well(layer: Layer) -> bool:
    """In the first frames; the motion of another layer with a few accidents is not."""
    return bool((layer.support[1:4] > REAL_SUPPORT).sum() >= min(2, len(layer.support) - 1))


def _same_motion(layer: Layer, other: Layer, start: np.ndarray) -> bool:
    """In the frames that tell: those in which one of them is away from where it started."""
    own = start[layer.members]
    place, other_place = (each.a[1:, None] * own + each.b[1:, None] for each in (layer, other))
    away = np.maximum(*(np.abs(each - own).mean(1) for each in (place, other_place))) > SAME_MOTION_PX
    near = np.abs(place - other_place).mean(1) < SAME_MOTION_PX
    return bool((near[away] if away.any() else near).mean() > SAME_MOTION_SHARE)


def _distinct(layers: list[Layer], start: np.ndarray) -> list[Layer]:
    """Without those that turned out to move like a larger one."""
    kept: list[Layer] = []
    for layer in sorted(layers, key=lambda item: -len(item.members)):
        if not any(_same_motion(layer, other, start) for other in kept):
            kept.append(layer)
    return kept


def _explained(residual: np.ndarray) -> np.ndarray:
    """Points whose pixel the layer predicts in most frames: residual [T, N] -> [N]."""
    first = residual[1:]
    seen = np.isfinite(first)
    return (first < 2 * SAME_COLOR).sum(0) >= np.maximum(0.6 * seen.sum(0), 2)


def _largest_group(z: np.ndarray, alive: np.ndarray, free: np.ndarray, telling: np.ndarray) -> Layer | None:
    candidates = np.flatnonzero(free & alive[: min(4, len(z))].all(0))
    if len(candidates) < MIN_POINTS:
        return None
    seeds = candidates[np.linspace(0, len(candidates) - 1, min(SEEDS, len(candidates))).astype(int)]
    usable = np.zeros_like(free)
    usable[candidates] = True
    grown = [_grow(z, alive, usable, telling, seed) for seed in seeds]
    return max(grown, key=lambda item: item[1])[0]


def _unexplained_patch(z: np.ndarray, free: np.ndarray) -> Layer | None:
    """The largest patch of neighbouring points without a layer, of unknown motion."""
    left = np.flatnonzero(free)
    if len(left) < MIN_PATCH:
        return None
    near = np.abs(z[0, left, None] - z[0, left]) < PATCH_GAP * spacing(z[0])
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


def _grow(
    z: np.ndarray, alive: np.ndarray, free: np.ndarray, telling: np.ndarray, seed: int
) -> tuple[Layer | None, float]:
    """Fit the tracks around a seed, then again all free tracks that follow the fit."""
    distance = np.where(free, np.abs(z[0] - z[0, seed]), np.inf)
    members = np.argsort(distance)[:5]
    run = _leading(alive)
    for _ in range(4):
        weight = (run[:, members]).astype(float)
        a, b, held = fit_motion(z[0, members], z[:, members], weight)
        close = np.abs(a[:, None] * z[0] + b[:, None] - z) < FIT_PX
        run = _leading(alive & (close | ~held[:, None]))
        enough = np.minimum((_leading(alive) & telling).sum(0), max(6, len(z) // 4))
        follows = free & ((run & telling).sum(0) >= enough)
        members = np.flatnonzero(follows)
        if len(members) < MIN_POINTS:
            return None, 0.0
    return Layer(members, a, b, held.astype(float)), float((run & telling)[:, members].sum())


def _leading(flags: np.ndarray) -> np.ndarray:
    """True until the first False along time."""
    return np.logical_and.accumulate(flags, axis=0)


# ------------------------------------------------------------------------------------------ assignment
def assign(colors: np.ndarray, start: np.ndarray, layers: list[Layer]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        distance = np.abs(start[:, None] - start[layer.members]).min(1) / spacing(start)
        score[k] -= np.clip(FAR_COST * (distance - NEAR), 0, MAX_FAR_COST)
        score[k] += SIZE_PRIOR * np.log(len(layer.members) / len(start))
    return _smoothed(score, start), score.max(0), residual


def _smoothed(score: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The best layer of each point, where neighbours speak for theirs: score [K, N] -> [N]. A Potts prior, by iterated
    conditional modes (Besag 1986).
    """
    near = np.abs(start[:, None] - start) < PATCH_GAP * spacing(start)
    np.fill_diagonal(near, False)
    weight = NEIGHBOURS_SAY * near / np.maximum(near.sum(1, keepdims=True), 1)
    owner = score.argmax(0)
    for _ in range(SMOOTHINGS):
        owner = (score + np.stack([weight @ (owner == k) for k in range(len(score))])).argmax(0)
    return owner


def _color_spread(residual: np.ndarray, layers: list[Layer]) -> np.ndarray:
    """How far colours of one surface differ from frame 0 in this video: [T, 1], from SAME_COLOR in a clean one to
    LOOSE_COLOR in a blurred or flickering one. The layer that fits best in a frame tells.
    """
    typical = np.stack([np.median(residual[k][:, layer.members], axis=1) for k, layer in enumerate(layers)])
    return np.clip(typical.min(0), SAME_COLOR, LOOSE_COLOR)[:, None]


def _covered_by_others(size: tuple[int, int], start: np.ndarray, layers: list[Layer], match: np.ndarray) -> np.ndarray:
    """Whether layer k's place for point n at t lies among matching points of other layers: [K, T, N]."""
    import cv2

    place = np.stack([layer.a[:, None] * start + layer.b[:, None] for layer in layers])
    x = np.clip(np.round(place.real), -1, size[1]).astype(int) + 1
    y = np.clip(np.round(place.imag), -1, size[0]).astype(int) + 1
    covered = np.zeros(match.shape, bool)
    reach = 2 * half_spacing(start) + 1
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
    template = sample(colors[0], start)
    contrast = np.maximum(template[layer.members].std(0), 0.03)
    found = np.full((len(colors), len(start)), np.inf)
    for t, image in enumerate(colors):
        values = sample(image, layer.a[t] * start + layer.b[t])
        seen = ~np.isnan(values[:, 0])
        trusted = layer.members[seen[layer.members]]
        if len(trusted) >= 4:
            now, wanted = values[trusted].T, template[trusted].T  # [3, M]
            gain, bias = np.ones((3, 1)), np.median(wanted - now, axis=1, keepdims=True)
            for _ in range(3):
                weight = tukey(gain * now + bias - wanted, 1.5 * contrast[:, None])
                gain, bias = gain_and_bias(now, wanted, weight)
            values = values * gain.T + bias.T
        found[t, seen] = np.sqrt(((values - template)[seen] ** 2).mean(1))
    return found
