"""The trade-off of a verification threshold: the true accept rate (TAR) against the false accept rate (FAR).

A pair is accepted when its similarity is the threshold or more; a genuine pair shows the same twice, an impostor pair
does not. TAR at a FAR is pessimistic with ties: the threshold is one that exists, and the impostor pairs that score as
high or higher are at most that share. The area under the curve counts a tie as half and the equal error rate
interpolates between thresholds, as is usual (Fawcett, 2006, "An introduction to ROC analysis"; scikit-learn's
``roc_auc_score``). A NaN speaks against the model: genuine it scores lowest, of impostors highest.
"""

import numpy as np

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RESOLVED = 10  # false accepts from which a FAR is measured: one more or less then changes it by a tenth


def impostors_above(similarity: np.ndarray, same: np.ndarray) -> np.ndarray:
    """Of each genuine pair, in their order, how many impostor pairs score as high or higher.

    Args:
        similarity: float [M].
        same: bool [M].

    Returns:
        int64 [G].
    """
    genuine, impostor = _split(similarity, same)
    impostor.sort()
    return len(impostor) - np.searchsorted(impostor, genuine, side="left")


def tar_at(above: np.ndarray, impostors: int, far: float) -> float:
    """The largest TAR of a threshold whose FAR is ``far`` or less.

    Args:
        above: int [G], of :func:`impostors_above`.
        impostors: number of impostor pairs.
    """
    return float(np.mean(accepted_at(above, impostors, far)))


def accepted_at(above: np.ndarray, impostors: int, far: float) -> np.ndarray:
    """Which genuine pairs that threshold accepts, bool [G]."""
    return above <= false_accepts(impostors, far)


def false_accepts(impostors: int, far: float) -> int:
    """The most false accepts that are a share of ``far`` or less."""
    return int(far * impostors * (1 + 1e-12))  # 1e-6 * 15e6 is less than 15 in floating point


def resolved(impostors: int, fars: tuple[float, ...] = FARS) -> list[float]:
    """Those FARs that so many impostor pairs can measure: at which :data:`RESOLVED` or more are accepted."""
    return [far for far in fars if false_accepts(impostors, far) >= RESOLVED]


def name_of(far: float) -> str:
    """The metric's name: ``tar@far=1e-4``."""
    return f"tar@far=1e{round(np.log10(far))}"


def points(above: np.ndarray, impostors: int, count: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """The pessimistic curve, thinned for a plot with a logarithmic axis.

    Returns:
        far, tar: float64 [P], P at most ``count``, both ascending: the TAR at no false accept and at numbers of them
        that grow by a constant factor up to all.
    """
    accepts = np.unique(np.geomspace(1, max(1, impostors), count - 1).round().astype(np.int64))
    accepts = np.concatenate([[0], accepts])
    tar = np.searchsorted(np.sort(above), accepts, side="right") / len(above)
    return accepts / max(1, impostors), tar


def curve(similarity: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FAR and TAR at every threshold that makes a difference, float64 [T] each, ascending from (0, 0) to (1, 1)."""
    genuine, impostor = _split(similarity, same)
    thresholds = np.unique(np.concatenate([genuine, impostor]))[::-1]
    rates = [
        1 - np.searchsorted(np.sort(scores), thresholds, side="left") / len(scores) for scores in (impostor, genuine)
    ]
    far, tar = (np.concatenate([[0.0], rate]) for rate in rates)
    return far, tar


def auc(similarity: np.ndarray, same: np.ndarray) -> float:
    """The probability that a genuine pair scores higher than an impostor pair, ties counted as half.

    Both kinds of pairs must be there.
    """
    far, tar = curve(similarity, same)
    return float(np.trapezoid(tar, far))


def eer(similarity: np.ndarray, same: np.ndarray) -> float:
    """The error rate where as large a share of impostor pairs is accepted as of genuine pairs is rejected.

    Both kinds of pairs must be there.
    """
    far, tar = curve(similarity, same)
    excess = far + tar - 1  # from -1 to 1, never falling
    last = int(np.argmax(excess >= 0))
    share = excess[last - 1] / (excess[last - 1] - excess[last])
    return float(far[last - 1] + share * (far[last] - far[last - 1]))


def _split(similarity: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Genuine and impostor scores, copies without NaN."""
    nan = np.isnan(similarity)
    filled = np.where(nan, np.where(same, -np.inf, np.inf), similarity).astype(similarity.dtype)
    return filled[same], filled[~same]
