"""Images that cannot be read: others take their places, up to a share of them."""

import sys
from collections.abc import Iterable

from ufo_ds.errors import UserError


class Corrupt:
    """
    Args:
        images: how many there are.
        most: share that may be unreadable, ``data.max_corrupt``; one image always may.
    """

    def __init__(self, images: int, most: float):
        self.images, self.most = images, most
        self.found: set[int] = set()

    def add(self, positions: Iterable[int]) -> None:
        """
        Raises:
            UserError: too many by now.
        """
        new = set(positions) - self.found
        if not new:
            return
        if not self.found:
            print("an image cannot be read: others take the places of such", file=sys.stderr)
        self.found |= new
        if len(self.found) > max(1, self.most * self.images):
            raise UserError(
                f"{len(self.found)} of {self.images} images cannot be read, more than data.max_corrupt {self.most:g}: "
                "remove them, or give other images with --data"
            )
