"""Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers", SC11)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]  # 32-bit words, kept in 64 bits so that products don't overflow

_ROUNDS = 10
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def philox4x32(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, ...]:
    """Ten rounds on arrays of counters and keys, element by element; each word is below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        even, odd = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (odd >> _SHIFT) ^ c1 ^ k0, odd & _LOW, (even >> _SHIFT) ^ c3 ^ k1, even & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each (seed, output index), a pure function of the two.

    Key = the seed's 64 bits, low word first (a negative seed as its two's complement); counter = (index low,
    index high, 0, 0); the number is the first output word followed by the top 20 bits of the second, over
    2^52. 52 bits, not 53, so that u * total < total in floating point for every total > 0.
    """
    seed = np.array([value & 0xFFFFFFFFFFFFFFFF for value in seeds], np.uint64)
    index = np.array(indices, np.uint64)
    zero = np.zeros_like(index)
    high, low, _, _ = philox4x32((index & _LOW, index >> _SHIFT, zero, zero), (seed & _LOW, seed >> _SHIFT))
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return bits.astype(np.float64) / 2.0**52
