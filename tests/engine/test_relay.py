import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moetrace.engine.relay import UNDER_WAY, Relay, Walker
from moetrace.jit.apart import Hands
from moetrace.spec.errors import MoetraceError


def block(number: int) -> Any:
    return SimpleNamespace(number=number)


def walker(group: Any, advance: Any) -> Walker:
    return Walker(group, advance)


BLOCKS = 6


@given(
    waits=st.lists(st.lists(st.integers(0, 2), min_size=BLOCKS, max_size=BLOCKS), min_size=1, max_size=5),
    jobs=st.integers(1, 3),
)
def test_each_walker_takes_all_blocks_in_order_and_one_at_a_time(waits, jobs):
    seen: list[list[int]] = [[] for _ in waits]
    busy = [threading.Lock() for _ in waits]

    def advance(i: int, batch: Any) -> None:
        assert busy[i].acquire(blocking=False)
        time.sleep(waits[i][batch.number] / 2000)
        seen[i].append(batch.number)
        busy[i].release()

    with Hands(jobs) as pool:
        relay = Relay([walker(i, lambda batch, i=i: advance(i, batch)) for i in range(len(waits))], pool)
        for number in range(BLOCKS):
            relay.give(block(number))
            assert min(map(len, seen)) > number - UNDER_WAY + 1
        relay.finish()
    assert seen == [list(range(BLOCKS))] * len(waits)
    assert not relay.errors


def test_a_walker_goes_on_while_another_is_in_the_block_before():
    first, second = threading.Event(), threading.Event()

    def slow(batch: Any) -> None:
        assert batch.number == 1 or second.wait(20)

    def quick(batch: Any) -> None:
        if batch.number == 1:
            second.set()
        first.set()

    with Hands(2) as pool:
        relay = Relay([walker(0, slow), walker(1, quick)], pool)
        relay.give(block(0))
        assert first.wait(20) and not second.is_set()
        relay.give(block(1))
        relay.finish()
    assert second.is_set() and not relay.errors


@given(
    failures=st.lists(st.sets(st.integers(0, 4)), min_size=1, max_size=5),
    groups=st.lists(st.integers(0, 1), min_size=5, max_size=5),
    jobs=st.integers(0, 3),
)
def test_the_error_is_that_of_the_first_block_and_there_of_the_first_walker(failures, groups, jobs):
    def advance(i: int, batch: Any) -> None:
        if batch.number in failures[i]:
            raise MoetraceError(f"block {batch.number}, walker {i}")

    def errors(pool: Hands | None) -> dict:
        relay = Relay([walker(groups[i], lambda batch, i=i: advance(i, batch)) for i in range(len(failures))], pool)
        for number in range(5):
            relay.give(block(number))
        relay.finish()
        return {group: str(error) for group, error in relay.errors.items()}

    expected = {}
    for group in groups[: len(failures)]:
        found = [(min(failures[i]), i) for i in range(len(failures)) if groups[i] == group and failures[i]]
        if found:
            expected[group] = "block {}, walker {}".format(*min(found))
    if jobs == 0:
        assert errors(None) == expected
        return
    with Hands(jobs) as pool:
        assert errors(pool) == expected


@pytest.mark.parametrize("jobs", [0, 2])
def test_any_other_exception_ends_the_pass(jobs):
    def advance(batch: Any) -> None:
        raise ZeroDivisionError

    def give(pool: Hands | None) -> None:
        relay = Relay([walker(0, lambda batch: None), walker(1, advance)], pool)
        relay.give(block(0))
        relay.finish()

    if jobs == 0:
        with pytest.raises(ZeroDivisionError):
            give(None)
        return
    with pytest.raises(ZeroDivisionError), Hands(jobs) as pool:
        give(pool)


def test_nobody_waits_where_nobody_walks():
    relay = Relay([], None)
    for number in range(3):
        relay.give(block(number))
    relay.finish()
    assert not relay.errors


def test_the_error_is_that_of_the_first_walker_even_if_it_comes_last():
    failed = threading.Event()

    def late(batch: Any) -> None:
        assert failed.wait(20)
        while not relay.errors:  # the other one's error has been noted
            time.sleep(0.001)
        raise MoetraceError("first")

    def early(batch: Any) -> None:
        failed.set()
        raise MoetraceError("second")

    with Hands(2) as pool:
        relay = Relay([walker(0, late), walker(0, early)], pool)
        relay.give(block(0))
        relay.finish()
    assert str(relay.errors[0]) == "first"


@pytest.mark.parametrize("number", range(3))
def test_any_other_exception_of_any_block_ends_the_pass(number):
    def advance(batch: Any) -> None:
        if batch.number == number:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Hands(2) as pool:
        relay = Relay([walker(0, advance), walker(1, advance)], pool)
        for each in range(3):
            relay.give(block(each))
        relay.finish()


def test_of_a_group_that_failed_nobody_takes_a_later_block():
    taken = []

    def fails(batch: Any) -> None:
        raise MoetraceError("no")

    relay = Relay([walker(0, fails), walker(0, lambda batch: taken.append(batch.number))], None)
    for each in range(3):
        relay.give(block(each))
    relay.finish()
    assert taken == [0]
