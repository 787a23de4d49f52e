"""`[energy]` and `[price]` of a system: every key is used or refused, in one sentence."""

import pytest
from support.system_file import SYSTEM, write

from moetrace.batch.identity import identity
from moetrace.spec import UsageError, canonical, load_system


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[energy]\ngpu = {idle_w = 3}", "energy.gpu.active_w is missing, and wants a number."),
        (
            "[energy.gpu]\nidle = 3\nactive_w = 5",
            "energy.gpu.idle is unknown (the nearest is 'idle_w'); known are idle_w, active_w.",
        ),
        ("[energy.gpu]\nidle_w = 30\nactive_w = 5", "energy.gpu.active_w wants at least idle_w = 30, got 5."),
        ("[energy]", "[energy] is empty: set [energy.gpu] or [energy.link], or remove it."),
        ("[price]", "[price] is empty: set price.usd_hour or [price.gpu], or remove it."),
        ("[price.gpu]", "[price.gpu] is empty: set usd_hour or usd_gb_hour, or remove it."),
        (
            "[price]\nusd_per_hour = 3",
            "price.usd_per_hour is unknown (the nearest is 'usd_hour'); known are usd_hour, gpu",
        ),
        (
            "[energy.disk]\nidle_w = 3\nactive_w = 5",
            "[energy.disk] is set, but the system has no [disk]: add [disk] or remove [energy.disk].",
        ),
        (
            "[energy.cpu]\nidle_w = 3\nactive_w = 5",
            "[energy.cpu] is set, but the system has no [cpu]: add [cpu] or remove [energy.cpu].",
        ),
        (
            "[price.host]\nusd_gb_hour = 3",
            "[price.host] is set, but the system has no host.memory_gb: add host.memory_gb or remove [price.host].",
        ),
        (
            "[price.cpu]\nusd_gb_hour = 3",
            "price.cpu.usd_gb_hour is unknown (the nearest is 'usd_hour'); known are usd_hour.",
        ),
        ("[price]\nusd_hour = -1", "price.usd_hour wants a number from 0 to 1e+09, got -1."),
    ],
)
def test_rates_are_used_or_refused(tmp_path, text, sentence):
    with pytest.raises(UsageError) as caught:
        load_system(write(tmp_path / "bad.toml", SYSTEM + text))
    assert f"bad.toml: {sentence}" in str(caught.value)


def test_a_link_or_units_that_a_system_lacks_draw_nothing(tmp_path):
    gpu = SYSTEM.split("[ndp]")[0]
    for table, rate in (("energy.ndp", "idle_w = 1\nactive_w = 1"), ("energy.link", "joule_per_gb = 1")):
        with pytest.raises(UsageError, match=rf"\[{table}\] is set, but the system has no \[{table[7:]}\]"):
            load_system(write(tmp_path / "bad.toml", f"{gpu}\n[{table}]\n{rate}"))
    with pytest.raises(UsageError, match=r"\[price.ndp\] is set, but the system has no \[ndp\]"):
        load_system(write(tmp_path / "bad.toml", f"{gpu}\n[price.ndp]\nusd_hour = 1"))


def test_a_system_without_rates_says_nothing_of_them():
    """A baseline from before compares as the same."""
    system = load_system("edge-ndp")
    assert (canonical(system)["energy"], canonical(system)["price"], system.usd_hour) == (None, None, None)
    assert system.usd_hour_by_part == {}


def test_the_old_price_of_a_machine_is_the_same_input():
    assert identity(canonical(load_system("edge-ndp", {"price.usd_hour": 3}))) == identity(
        canonical(load_system("edge-ndp")) | {"price": {"usd_hour": 3.0}}
    )


def test_prices_of_parts_add_up():
    rates = {
        "price.usd_hour": 0.5,
        "price.gpu.usd_hour": 1.0,
        "price.ndp.usd_hour": 0.25,
        "price.ndp.usd_gb_hour": 0.125,
    }
    system = load_system("edge-ndp", rates)
    assert system.usd_hour_by_part == {"gpu": 1.0, "ndp": 6 * (0.25 + 0.125 * 32), "machine": 0.5}
    assert system.usd_hour == 27.0
