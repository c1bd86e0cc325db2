"""What every loss of a run must be, in plain NumPy and float64, written from the formulas alone.

Each function takes a mask (B, H, W), logits (B, H, W, C) and the options of the loss, and returns
the loss of the batch. `cases` are the batches they are asked about.
"""

import itertools

import numpy as np

IGNORED = 255


def cases():
    """Return (name, mask, logits): what breaks losses, and what does not."""
    rng = np.random.default_rng(3)

    def logits(*shape, scale=1.5):
        return rng.normal(0, scale, (*shape, 4)).astype("float32")

    def mask(*shape, share=0.15):
        drawn = rng.integers(0, 4, shape)
        return np.where(rng.random(shape) < share, IGNORED, drawn)

    half = mask(2, 5, 7)
    half[0] = IGNORED
    blocks = np.repeat(np.repeat(rng.integers(0, 3, (2, 2, 3)), 4, 1), 3, 2)
    return [
        ("drawn", mask(2, 5, 7), logits(2, 5, 7)),
        ("no pixel ignored", mask(3, 4, 4, share=0), logits(3, 4, 4)),
        ("regions", blocks, logits(2, 8, 9)),
        ("one class", np.full((1, 4, 5), 1), logits(1, 4, 5)),
        ("background alone", np.full((1, 4, 5), 0), logits(1, 4, 5)),
        ("one image ignored", half, logits(2, 5, 7)),
        ("all ignored", np.full((2, 3, 3), IGNORED), logits(2, 3, 3)),
        ("one pixel", np.array([[[2]]]), logits(1, 1, 1)),
        ("one valid pixel", np.array([[[IGNORED, 3], [IGNORED, IGNORED]]]), logits(1, 2, 2)),
        ("ties", mask(2, 4, 6), np.zeros((2, 4, 6, 4), "float32")),
        ("sure", mask(1, 5, 5), logits(1, 5, 5, scale=30)),
    ]


def softmax(logits):
    values = np.exp(logits.astype("float64") - logits.max(-1, keepdims=True))
    return values / values.sum(-1, keepdims=True)


def cross_entropies(mask, logits):
    """Return -ln p[y], (B, H, W), NaN where ignored."""
    logits = logits.astype("float64")
    top = logits.max(-1)
    total = top + np.log(np.exp(logits - top[..., None]).sum(-1))
    label = np.where(mask == IGNORED, 0, mask)
    return np.where(
        mask == IGNORED, np.nan, total - np.take_along_axis(logits, label[..., None], -1)[..., 0]
    )


def weight_of(mask, weights):
    weights = np.ones(4) if weights is None else np.array(weights)
    return np.where(mask == IGNORED, 0, weights[np.where(mask == IGNORED, 0, mask)])


def over_pixels(values, mask):
    return np.nansum(values) / max(1, (mask != IGNORED).sum())


def ce(mask, logits, class_weights=None):
    return over_pixels(weight_of(mask, class_weights) * cross_entropies(mask, logits), mask)


def weighted_ce(mask, logits, class_weights=None):
    weights = weight_of(mask, class_weights)
    if not weights.sum():
        return 0.0
    return np.nansum(weights * cross_entropies(mask, logits)) / weights.sum()


def focal(mask, logits, gamma=2.0, class_weights=None):
    loss = cross_entropies(mask, logits)
    factor = (1 - np.exp(-loss)) ** gamma
    return over_pixels(weight_of(mask, class_weights) * factor * loss, mask)


def label_smoothing(mask, logits, epsilon=0.1, class_weights=None):
    costs = np.stack([cross_entropies(np.full_like(mask, c), logits) for c in range(4)], -1)
    target = (1 - epsilon) * np.eye(5)[np.where(mask == IGNORED, 4, mask)][..., :4] + epsilon / 4
    return over_pixels(weight_of(mask, class_weights) * (target * costs).sum(-1), mask)


def ohem(mask, logits, threshold=0.7, share=0.1, class_weights=None):
    loss = cross_entropies(mask, logits)
    total, kept = 0.0, 0
    for one, weights in zip(loss, weight_of(mask, class_weights), strict=True):
        valid = one[~np.isnan(one)]
        weights = weights[~np.isnan(one)]
        if not valid.size:
            continue
        count = max(1, round(share * valid.size)) if share else 0
        bar = np.sort(valid)[-count] if count else np.inf
        keep = (np.exp(-valid) < threshold) | (valid >= bar)
        total += (weights * valid)[keep].sum()
        kept += keep.sum()
    return total / max(1, kept)


def boundary_ce(mask, logits, weight=10.0, sigma=5.0, class_weights=None):
    factor = np.ones(mask.shape)
    for image, out in zip(mask, factor, strict=True):
        edge = edges(image)
        for place in np.ndindex(image.shape):
            d = min((np.hypot(*np.subtract(place, one)) for one in edge), default=np.inf)
            if d <= np.ceil(3 * sigma):
                out[place] += weight * np.exp(-(d**2) / (2 * sigma**2))
    return over_pixels(
        factor * weight_of(mask, class_weights) * cross_entropies(mask, logits), mask
    )


def edges(image):
    """Return the places beside, above or below which lies a valid pixel of another class."""
    found = []
    for y, x in np.ndindex(image.shape):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < image.shape[0] and 0 <= u < image.shape[1]:
                pair = image[y, x], image[v, u]
                if IGNORED not in pair and pair[0] != pair[1]:
                    found.append((y, x))
    return found


def of_images(mask, logits, cost, present_only=True, background=True):
    """Return the mean over images of the mean over classes of cost(p, y), vectors of pixels."""
    values = []
    for labels, one in zip(mask, softmax(logits), strict=True):
        p, labels = one[labels != IGNORED], labels[labels != IGNORED]
        counted = [
            c
            for c in range(0 if background else 1, 4)
            if labels.size and (not present_only or (labels == c).any())
        ]
        costs = [cost(p[:, c], (labels == c).astype("float64")) for c in counted]
        values.append(np.mean(costs) if costs else 0.0)
    return np.mean(values)


def dice(mask, logits, squared=True, smoothing=0.0, **which):
    def cost(p, y):
        sizes = (y**2).sum() + (p**2).sum() if squared else y.sum() + p.sum()
        return 1 - (2 * (p * y).sum() + smoothing) / (sizes + smoothing)

    return of_images(mask, logits, cost, **which)


def generalised_dice(mask, logits, background=True):
    values = []
    for labels, one in zip(mask, softmax(logits), strict=True):
        above = below = 0.0
        for c in range(0 if background else 1, 4):
            y = labels[labels != IGNORED] == c
            p = one[labels != IGNORED][:, c]
            if y.any():
                above += (p * y).sum() / y.sum() ** 2
                below += (p.sum() + y.sum()) / y.sum() ** 2
        values.append(1 - 2 * above / below if below else 0.0)
    return np.mean(values)


def jaccard(mask, logits, smoothing=0.0, **which):
    def cost(p, y):
        both = (p * y).sum()
        return 1 - (both + smoothing) / (p.sum() + y.sum() - both + smoothing)

    return of_images(mask, logits, cost, **which)


def tversky_cost(alpha, beta, smoothing, power=1.0):
    def cost(p, y):
        right, false, missed = (p * y).sum(), (p * (1 - y)).sum(), ((1 - p) * y).sum()
        index = (right + smoothing) / (right + alpha * false + beta * missed + smoothing)
        return max(0.0, 1 - index) ** power

    return cost


def tversky(mask, logits, alpha=0.3, beta=0.7, smoothing=0.0, **which):
    return of_images(mask, logits, tversky_cost(alpha, beta, smoothing), **which)


def focal_tversky(mask, logits, gamma=4 / 3, alpha=0.3, beta=0.7, smoothing=0.0, **which):
    return of_images(mask, logits, tversky_cost(alpha, beta, smoothing, 1 / gamma), **which)


def lovasz(mask, logits, **which):
    """Return the extension from its definition: sets of wrong pixels, and the IoU each leaves."""

    def one_less_iou(y, wrong):
        predicted = np.where(wrong, 1 - y, y)
        union = np.maximum(predicted, y).sum()
        return 1 - (predicted * y).sum() / union if union else 0.0

    def cost(p, y):
        errors, wrong, total, before = np.abs(y - p), np.zeros(len(y), bool), 0.0, 0.0
        for pixel in np.argsort(-errors, kind="stable"):
            wrong[pixel] = True
            now = one_less_iou(y, wrong)
            total, before = total + errors[pixel] * (now - before), now
        return total

    return of_images(mask, logits, cost, **which)


def boundary_distance(mask, logits, radius=16):
    values = []
    for labels, p in zip(mask, softmax(logits), strict=True):
        total = 0.0
        for c in range(4):
            total += (p[..., c] * signed_distances(labels, c, radius) * (labels != IGNORED)).sum()
        values.append(total / 4 / max(1, (labels != IGNORED).sum()))
    return np.mean(values)


def signed_distances(labels, class_id, radius):
    inside = labels == class_id
    outside = ~inside & (labels != IGNORED)
    if not inside.any() or not outside.any():
        return np.zeros(labels.shape)
    result = np.zeros(labels.shape)
    for place in np.ndindex(labels.shape):
        other = outside if inside[place] else inside
        near = min(np.hypot(*np.subtract(place, one)) for one in np.argwhere(other))
        result[place] = 1 - min(near, radius) if inside[place] else min(near, radius)
    return result


LOSSES = {
    function.__name__: function
    for function in (
        *(ce, weighted_ce, focal, label_smoothing, ohem, boundary_ce, dice, generalised_dice),
        *(jaccard, tversky, focal_tversky, lovasz, boundary_distance),
    )
}
WEIGHTS = (0.5, 2.0, 1.0, 4.0)
# Options to try beside the defaults.
OPTIONS = {
    "ce": [{"class_weights": WEIGHTS}],
    "weighted_ce": [{"class_weights": WEIGHTS}],
    "focal": [{"gamma": 0.0}, {"gamma": 0.5}, {"gamma": 3.0, "class_weights": WEIGHTS}],
    "label_smoothing": [{"epsilon": 0.0}, {"epsilon": 0.4, "class_weights": WEIGHTS}],
    "ohem": [
        {"threshold": 0.0, "share": 0.3},
        {"threshold": 0.3, "share": 0.0},
        {"threshold": 0.0, "share": 1.0},
        {"class_weights": WEIGHTS},
    ],
    "boundary_ce": [{"weight": 3.0, "sigma": 0.7, "class_weights": WEIGHTS}],
    "dice": [
        {"squared": squared, "smoothing": smoothing, "present_only": present, "background": back}
        for squared, smoothing, (present, back) in itertools.product(
            (True, False), (0.0, 1.0), ((True, False), (False, True))
        )
    ],
    "generalised_dice": [{"background": False}],
    "jaccard": [{"smoothing": 1.0, "present_only": False}, {"background": False}],
    "tversky": [{"alpha": 0.9, "beta": 0.2, "smoothing": 1.0, "present_only": False}],
    "focal_tversky": [{"gamma": 2.0, "background": False}, {"gamma": 1.0}],
    "lovasz": [{"present_only": False}, {"background": False}],
    "boundary_distance": [{"radius": 1}, {"radius": 3}],
}
