"""One layer of a clip aligned to every frame: Lucas-Kanade with a similarity warp of the layer as a whole.

Gauss-Newton against frame 0 (Baker & Matthews 2004), with robust weights that ignore what covers the layer, and gain
and bias for changes of colour; where a layer is lost it is searched for around where it should be, at last by its
blurred colours alone. Positions are complex numbers x + iy, relative to pixel centres; a motion is z -> a z + b.
Left out: which tracks make a layer, and which layer explains a pixel (motion_layers.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

REMAP_COLUMNS = 2**14  # OpenCV's remap takes fewer than 2^15 rows and columns
SEARCH_STARTS = 4  # of them refined
ITERATIONS = 8  # Gauss-Newton steps per frame
MAX_PIXELS = 500  # of a layer, used for its alignment
MATCH_COLOR = 0.08  # rms colour difference (of 1) below which a pixel matches frame 0; a smeared one still does
MAX_TINT_STEP = 0.2  # colour shift that a layer may show within a frame
MIN_SCALE = 0.65  # of a layer since frame 0
KEEP_SUPPORT = 0.2  # share of a layer's pixels that must match, beyond chance, to follow it on
FIND_SUPPORT = 0.4  # share to believe a motion that is not near the expected one
MAX_STEP_PX = 3.0  # a layer followed on lies this close to where it was expected
SEARCH_PX = 5.0  # per frame since the layer was seen: how far off the expected place it is looked for
SEARCH_TURN = 0.2  # rad per frame
SEARCH_FRAMES = 4  # the search grows no more after these
SOFT_PX = 2.0  # deviation of the blur under which a smeared body still has its colours
SOFT_COLOR = 0.1  # rms colour difference (of 1) below which a blurred pixel matches
SOFT_SUPPORT = 0.5  # share, beyond chance, to believe a place found by blurred colours
SOFT_PIXELS = 120  # of a layer, used for that


@dataclass
class Layer:
    members: np.ndarray  # [M] indices of tracks
    a: np.ndarray  # [T] complex, rotation and scale since frame 0
    b: np.ndarray  # [T] complex, shift
    support: np.ndarray  # [T] share of pixels that match, beyond chance; 1 where tracks carried the fit

    def at(self, frames: np.ndarray) -> Layer:
        """The same in some of the frames."""
        return replace(self, a=self.a[frames], b=self.b[frames], support=self.support[frames])


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
    soft: np.ndarray  # [S, 3] colours of the blurred frame
    contrast: float
    chance: float  # share of pixels that match when the layer is out of place
    tint: np.ndarray  # [3] colour shift in the last frame that showed the layer

    @classmethod
    def of(cls, color: np.ndarray, image: np.ndarray, pixels: np.ndarray) -> Target:
        gray, color, soft = (sample(values, pixels) for values in (image, color, _softened(color)))
        moved = np.roll(color, len(color) // 2, axis=0)
        chance = float((np.sqrt(((color - moved) ** 2).mean(1)) < MATCH_COLOR).mean())
        return cls(pixels, gray, color, soft, max(float(gray.std()), 0.02), chance, np.zeros(3))


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
    reach = half_spacing(start)
    steps = np.arange(-reach, reach)
    pixels = (np.round(start)[:, None] + (steps[:, None] + 1j * steps[None]).reshape(-1)).reshape(-1)
    inside = (pixels.real >= 0) & (pixels.imag >= 0) & (pixels.real < size[1]) & (pixels.imag < size[0])
    pixels = np.unique(pixels[inside])
    return pixels[:: 1 + len(pixels) // MAX_PIXELS]


def sample(image: np.ndarray, z: np.ndarray) -> np.ndarray:
    """Bicubic reads at z (any shape); NaN outside the frame."""
    import cv2

    rows = -(-z.size // REMAP_COLUMNS)
    flat = z.reshape(1, -1) if rows == 1 else np.pad(z.reshape(-1), (0, -z.size % REMAP_COLUMNS)).reshape(rows, -1)
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
    return best if best.support > 0 else _by_soft_colors(color, target, expected[0], gap) or hidden


def _softened(color: np.ndarray) -> np.ndarray:
    import cv2

    return cv2.GaussianBlur(color, (0, 0), SOFT_PX)


def _by_soft_colors(color: np.ndarray, target: Target, guess: tuple[complex, complex], gap: int) -> Alignment | None:
    """The shift of an expected motion at which blurred colours match best: a body whose pattern is smeared is still
    of its colours. None where there is no such place, or where most places are.
    """
    a, b = guess
    reach = np.arange(-SEARCH_PX * gap, SEARCH_PX * gap + 1)
    shifts = (reach[:, None] + 1j * reach[None]).reshape(-1)
    few = slice(None, None, 1 + len(target.pixels) // SOFT_PIXELS)
    values = sample(_softened(color), shifts[:, None] + (a * target.pixels[few] + b))
    near = np.sqrt(((values - target.soft[few] - target.tint) ** 2).mean(-1)) < SOFT_COLOR  # nan is not
    share = near.mean(1)
    chance = share.min()
    support = float((share.max() - chance) / (1 - chance + 1e-6))
    if support < SOFT_SUPPORT:
        return None
    weight = np.maximum(share - 0.9 * share.max(), 0)
    return Alignment(a, b + (weight * shifts).sum() / weight.sum(), support, target.tint)


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
    values = sample(image, turned[:, None] * target.pixels[few] + shifted[:, None])
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
        values = sample(stacked, a * target.pixels + b)  # [G, P, 3]
        seen = ~np.isnan(values[..., 0])
        values[~seen] = 0
        now, gx, gy = np.moveaxis(values, -1, 0)
        if bias is None:
            bias = _seen_median(target.gray - now, seen)
        width = target.contrast * (1.2 if iteration < 3 else 0.6)
        weight = tukey(gain * now + bias - target.gray, width) * seen
        gain, bias = gain_and_bias(now, target.gray, weight)
        residual = gain * now + bias - target.gray
        weight = tukey(residual, width) * seen
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
    if seen.all():
        return np.median(values, axis=1, keepdims=True)
    return np.array([[np.median(row[shown]) if shown.any() else 0.0] for row, shown in zip(values, seen)])


def _judged(color: np.ndarray, target: Target, a: complex, b: complex) -> Alignment:
    """How many of the layer's pixels have its colour, allowing a shift that changes slowly over time."""
    values = sample(color, a * target.pixels + b)
    seen = ~np.isnan(values[:, 0])
    if seen.sum() < 12 or not MIN_SCALE < abs(a) < 1 / MIN_SCALE:
        return Alignment(a, b, -1.0, target.tint)
    change = values[seen] - target.color[seen]
    near = np.abs(change - target.tint).max(1) < MAX_TINT_STEP
    tint = np.median(change[near], axis=0) if near.sum() >= 8 else target.tint
    matching = (np.sqrt(((change - tint) ** 2).mean(1)) < MATCH_COLOR).sum()
    share = matching / max(seen.sum(), 0.25 * len(target.pixels))
    return Alignment(a, b, float((share - target.chance) / (1 - target.chance + 1e-6)), tint)


def tukey(residual: np.ndarray, width: float | np.ndarray) -> np.ndarray:
    """Weights that give no say to what covers the layer."""
    return np.maximum(1 - (residual / width) ** 2, 0) ** 2 + 1e-6


def gain_and_bias(now: np.ndarray, wanted: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted lines wanted = gain * now + bias over the last axis, gain in 0.7 .. 1.4: [..., P] -> [..., 1]."""
    share = weight / np.maximum(weight.sum(-1, keepdims=True), 1e-9)
    mean_now, mean_wanted = ((share * v).sum(-1, keepdims=True) for v in (now, wanted))
    offset = share * (now - mean_now)
    spread, slope = ((offset * v).sum(-1, keepdims=True) for v in (now - mean_now, wanted - mean_wanted))
    gain = np.clip(slope / np.maximum(spread, 1e-6), 0.7, 1.4)
    return gain, mean_wanted - gain * mean_now


def spacing(start: np.ndarray) -> float:
    """Side of a square that holds one point on average, px."""
    area = (np.ptp(start.real) + 1) * (np.ptp(start.imag) + 1)
    return max(float(np.sqrt(area / len(start))), 1.0)


def half_spacing(start: np.ndarray) -> int:
    """Half the spacing, 1 .. 4 px."""
    return int(np.clip(spacing(start) / 2, 1, 4))
