"""Rank lists of two models, compared."""

import itertools

import pytest
import torch

from ufo_ds.subnets import agreement


def test_the_largest_inversion_is_that_of_all_pairs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        wanted = torch.randn(3, 9, generator=generator).round(decimals=1)
        found = (wanted + 0.3 * torch.randn(3, 9, generator=generator)).round(decimals=1)
        slow = max(
            max(0.0, float(wanted[i, k] - wanted[i, j]))
            for i in range(3)
            for j, k in itertools.permutations(range(9), 2)
            if found[i, j] >= found[i, k]  # j is listed first, or may be
        )
        assert float(agreement.largest_inversion(found, wanted)) == pytest.approx(slow)
        assert float(agreement.largest_inversion(3 * wanted + 1, wanted)) == 0
