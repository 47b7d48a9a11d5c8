"""Maps names to numbers by their digests, in 24 bytes per name."""

from __future__ import annotations

import hashlib

import numpy as np


class DigestMap:
    """Maps 16-byte digests to numbers, in a few sorted arrays that are merged as they grow: 24 bytes per entry."""

    def __init__(self) -> None:
        self.runs: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, digests: np.ndarray, numbers: np.ndarray) -> None:
        """Adds digests, uint64 [N,2], with their numbers, int64 [N]."""
        run = (digests[:, 0], digests[:, 1], numbers)
        while self.runs and len(self.runs[-1][0]) <= 2 * len(run[0]):
            run = tuple(np.concatenate(pair) for pair in zip(self.runs.pop(), run, strict=True))  # type: ignore[assignment]
        order = np.argsort(run[0])
        self.runs.append((run[0][order], run[1][order], run[2][order]))

    def find(self, digests: np.ndarray) -> np.ndarray:
        """Returns the number of each digest, int64 [N]; -1 for unknown digests."""
        found = np.full(len(digests), -1, np.int64)
        for keys, checks, numbers in self.runs:
            place = np.searchsorted(keys, digests[:, 0])
            # Two digests may share their first half, so the one after the place found is compared, too.
            for step in (0, 1):
                at = np.minimum(place + step, len(keys) - 1)
                hit = (keys[at] == digests[:, 0]) & (checks[at] == digests[:, 1])
                found[hit] = numbers[at[hit]]
        return found


def digests_of(names: list[bytes]) -> np.ndarray:
    """Returns the digests of names, uint64 [N,2]."""
    data = b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in names)
    return np.frombuffer(data, np.uint64).reshape(-1, 2)
