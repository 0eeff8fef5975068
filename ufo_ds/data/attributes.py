"""Labels that are sets of attributes: names joined by "+", as in ``female+hat+bag``; of an image without any it is "+".

In arrays such a label is an int64 whose bit i says whether the image has attribute i.
"""

from collections.abc import Iterable, Sequence

import numpy as np

MOST = 63  # attributes that an int64 has room for beside its sign


def names_in(label: str) -> set[str]:
    """The attributes of a label; white space around them and empty parts do not count."""
    return {name.strip() for name in label.split("+")} - {""}


def joined(names: Iterable[str]) -> str:
    """The label of these attributes."""
    return "+".join(names) or "+"


def to_bits(labels: Iterable[str], attributes: Sequence[str]) -> np.ndarray:
    """Labels as int64 [N].

    Args:
        attributes: at most :data:`MOST`; all that the labels name are among them.
    """
    bit = {name: 1 << i for i, name in enumerate(attributes)}
    return np.array([sum(bit[name] for name in names_in(label)) for label in labels], dtype=np.int64)


def from_bits(bits_N: np.ndarray, count: int) -> np.ndarray:
    """Which of ``count`` attributes images have, bool [N, A]."""
    return (bits_N[:, None] >> np.arange(count)) & 1 == 1
