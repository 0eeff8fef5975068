"""What computes here."""

import torch

from ufo_ds.errors import UserError


def check_device(device: str | int | torch.device, where: str = "--device") -> None:
    """
    Args:
        where: it was named.

    Raises:
        UserError: torch has no such device here.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise UserError(f"{where} {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from None
