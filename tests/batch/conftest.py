"""What tests of sweeps share."""

import pytest

import moetrace as mt


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> str:
    """A trace that takes no time."""
    path = tmp_path_factory.mktemp("t") / "small.h5"
    mt.generate(path, "tiny-olmoe", requests=2, prompt=4, output=6)
    return str(path)
