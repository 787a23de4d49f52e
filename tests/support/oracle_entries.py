"""What the oracle's memory is made of: copies on the GPU, entries of the queue, and a draw."""

from dataclasses import dataclass

DONE_BYTES = 1e-3  # a transfer is complete when at most this is left; "some bytes moved" means more than this

Expert = tuple[int, int]  # (layer, expert id)


def given(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(eq=False)
class Entry:
    """A transfer in the prefetch queue."""

    key: Expert
    left: float
    moved: float = 0.0
    was_late: bool = False
    target: tuple[int, int] = (0, 0)  # (step, layer) that `oracle` wants it for

    @property
    def complete(self) -> bool:
        return self.left <= DONE_BYTES

    @property
    def started(self) -> bool:
        return self.moved > DONE_BYTES


@dataclass
class Copy:
    """A GPU copy of an expert."""

    prefetched: bool
    used: bool = False  # run on the GPU while resident
    number: int = 0  # of its admission
    demands: int = 0  # since it was admitted, that demand included
    visited: bool = False  # demanded since it was admitted, or since Sieve's hand passed it


def mix(z: int) -> int:
    """The finalizer of splitmix64."""
    mask = 2**64 - 1
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
    return z ^ z >> 31


def splitmix64(seed: int, step: int, layer: int, expert: int) -> int:
    x = seed
    for v in (step, layer, expert):
        x = mix((x + 0x9E3779B97F4A7C15 + v) % 2**64)
    return x
