"""Pictures with corners, blobs and regions, and how places move when a picture is turned."""

import cv2
import numpy as np

from cbir.types import Floats, Pixels


def scene(height: int = 240, width: int = 320, seed: int = 1) -> Pixels:
    """Coloured boxes and discs on smooth texture, a little blurred; values 20 to 220."""
    rng = np.random.default_rng(seed)
    texture = cv2.GaussianBlur(rng.standard_normal((height, width, 3)), (0, 0), 6)
    image = (110 + 25 * texture / texture.std()).astype(np.float32)
    for _ in range(60):
        centre = (float(rng.uniform(0, width)), float(rng.uniform(0, height)))
        sides = (float(rng.uniform(8, 50)), float(rng.uniform(8, 50)))
        corners = cv2.boxPoints((centre, sides, float(rng.uniform(0, 90)))).astype(np.int32)
        colour = rng.uniform(20, 220, 3).tolist()
        cv2.fillPoly(image, [corners], colour)
        cv2.circle(
            image, [int(value) for value in rng.uniform(0, (width, height))], int(rng.uniform(3, 14)), colour, -1
        )
    return np.clip(cv2.GaussianBlur(image, (0, 0), 0.8), 20, 220).astype(np.uint8)


def blob(std: float, side: int = 160) -> Pixels:
    """A bright Gaussian in the middle."""
    rows, columns = np.mgrid[:side, :side] - side / 2
    grey = 40 + 180 * np.exp(-(rows**2 + columns**2) / (2 * std**2))
    return np.repeat(grey.round().astype(np.uint8)[..., None], 3, axis=2)


def turned(table: Floats, height: int) -> Floats:
    """Keypoints (K, 5 or 7) of a picture of this height, as they lie after a quarter turn clockwise."""
    moved = table.copy()
    moved[:, 0], moved[:, 1] = height - 1 - table[:, 1], table[:, 0]
    moved[:, 3] = (table[:, 3] + 90) % 360
    if table.shape[1] == 7:
        moved[:, 6] = (table[:, 6] + 90) % 180
    return moved


def quarter_turn(image: Pixels) -> Pixels:
    """The picture turned clockwise by 90 degrees."""
    return np.ascontiguousarray(np.rot90(image, k=-1))


def circles(count: int = 60, height: int = 240, width: int = 320, seed: int = 0) -> Floats:
    """Keypoints (K, 5) of sizes 3 to 12 away from the border, by chance."""
    rng = np.random.default_rng(seed)
    places = rng.uniform((60, 60), (width - 60, height - 60), (count, 2))
    columns = rng.uniform(3, 12, count), rng.uniform(0, 360, count), rng.uniform(0, 1, count)
    return np.column_stack([places, *columns]).astype(np.float32)
