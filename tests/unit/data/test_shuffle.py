"""Buckets and order of rows: hashes of their positions."""

import numpy as np
import pytest

from torchdlrm.data import splits as shuffle


def splitmix64(x: int) -> int:
    """The output function of SplitMix64, in plain Python."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1])
def test_hashes_equal_splitmix64_in_plain_python(seed):
    golden = 0x9E3779B97F4A7C15
    positions = np.array([0, 1, 2, 1000, 2**40])

    def keys(stream):
        start = splitmix64((splitmix64(seed * golden % 2**64) + stream) % 2**64)
        return [splitmix64((start + (int(p) + 1) * golden) % 2**64) for p in positions]

    assert shuffle.buckets(positions, seed, 1000).tolist() == [(key >> 32) * 1000 >> 32 for key in keys(1)]
    assert shuffle.order_in_bucket(positions, seed).tolist() == sorted(range(5), key=lambda i: keys(2)[i])


def test_buckets_are_uniform():
    sizes = np.bincount(shuffle.buckets(np.arange(1_000_000), 3, 100), minlength=100)
    chi_square = ((sizes - 10_000) ** 2 / 10_000).sum()
    assert 50 < chi_square < 160  # 99 degrees of freedom: outside with a chance below 1e-4
