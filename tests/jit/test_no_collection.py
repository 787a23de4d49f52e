"""The search for cycles, which the whole process shares, is held for blocks of several threads."""

import gc

import pytest

from moetrace.jit.no_collection import no_collection


@pytest.mark.parametrize("was_enabled", [True, False])
def test_the_search_for_cycles_goes_on_when_the_last_block_ends(was_enabled):
    """Blocks of two threads overlap: the one that began first ends first."""
    before, first, second = gc.isenabled(), no_collection(), no_collection()
    (gc.enable if was_enabled else gc.disable)()
    try:
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        between = gc.isenabled()
        second.__exit__(None, None, None)
        after = gc.isenabled()
    finally:
        (gc.enable if before else gc.disable)()
    assert not between and after is was_enabled
