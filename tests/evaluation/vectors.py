"""Features whose order is known."""

import numpy as np


def on_circle(*degrees: float) -> np.ndarray:
    """Unit vectors whose cosine with that at 0 falls with the angle."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def signs(generator: np.random.Generator, number: int) -> np.ndarray:
    """Signs in 4 dimensions: cosines are exact multiples of 1/2, so there are many ties and no rounding."""
    return generator.choice([-1.0, 1.0], (number, 4)).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))
