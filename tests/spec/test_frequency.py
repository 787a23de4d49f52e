"""`[[gpu.levels]]` of a system and `deadline_ms` of a policy: sorted, checked, used or refused in one sentence."""

import pytest

from moetrace.batch.identity import identity
from moetrace.spec import UsageError, canonical, load_policy, load_system
from moetrace.spec.toml_text import toml

SYSTEM = """\
name = "mine"
[gpu]
name = "some GPU"
tflops = 100
bandwidth_gb_s = 1000
memory_gb = 16
reserve_gb = 2
launch_us = 5
"""
TOP = "[[gpu.levels]]\nfrequency = 1\nvoltage = 1\n"


def level(frequency, voltage):
    return f"[[gpu.levels]]\nfrequency = {frequency}\nvoltage = {voltage}\n"


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            level(0.9, 1),
            "gpu.levels has no top level: the highest must have frequency = 1 and voltage = 1, got frequency = 0.9 and "
            "voltage = 1.",
        ),
        (
            level(1, 0.9) + level(0.5, 0.9),
            "gpu.levels has no top level: the highest must have frequency = 1 and voltage = 1, got frequency = 1 and "
            "voltage = 0.9.",
        ),
        ("levels = []", "gpu.levels is empty: list levels, the top with frequency = 1 and voltage = 1, or remove it."),
        (TOP + TOP, "gpu.levels has frequency = 1 twice: keep one of them."),
        (
            TOP + level(0.4, 0.9) + level(0.7, 0.8),
            "gpu.levels has voltage = 0.9 at frequency = 0.4, above 0.8 at 0.7: a lower frequency must not have a "
            "higher voltage.",
        ),
        (TOP + level(0.5, 1.2), "gpu.levels[1].voltage wants a number from 1e-06 to 1, got"),
        (TOP + level(0.5, 0), "gpu.levels[1].voltage wants a number from 1e-06 to 1, got"),
        (TOP + level(2, 0.9), "gpu.levels[1].frequency wants a number from 1e-06 to 1, got 2."),
        (TOP + "volts = 3", "gpu.levels[0].volts is unknown (the nearest is 'voltage'); known are frequency, voltage."),
        (
            "memory_scales = true",
            "gpu.memory_scales is set, but the GPU has no levels: add [[gpu.levels]] or remove it.",
        ),
    ],
)
def test_bad_levels_are_one_sentence(tmp_path, text, sentence):
    with pytest.raises(UsageError) as refused:
        load_system(write(tmp_path / "mine.toml", SYSTEM + text))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_levels_are_sorted_and_do_not_count_in_another_order(tmp_path):
    one = load_system(write(tmp_path / "a.toml", SYSTEM + level(0.25, 0.5) + TOP + level(0.5, 0.7)))
    other = load_system(write(tmp_path / "b.toml", SYSTEM + TOP + level(0.5, 0.7) + level(0.25, 0.5)))
    assert one == other
    assert [each.frequency for each in one.gpu.levels] == [1, 0.5, 0.25]
    assert [each.power for each in one.gpu.levels] == pytest.approx([1, 0.5 * 0.49, 0.25 * 0.25])
    assert load_system(write(tmp_path / "c.toml", toml(canonical(one)))) == one
    assert load_system("edge-ndp", {"gpu.levels": "[{frequency = 1, voltage = 1}]"}).gpu.levels == one.gpu.levels[:1]


def test_a_system_without_levels_and_a_policy_without_a_deadline_are_what_they_were(tmp_path):
    plain = canonical(load_system(write(tmp_path / "a.toml", SYSTEM)))
    before = plain | {"gpu": {name: value for name, value in plain["gpu"].items() if value is not None}}
    assert not {"levels", "memory_scales"} & {*before["gpu"]}
    assert identity(plain) == identity(before)
    assert "deadline_ms" in load_policy("monde").unread
    assert "deadline_ms" not in load_policy("monde", {"deadline_ms": 3}).unread


@pytest.mark.parametrize("deadline_ms", [0, -1, "soon"])
def test_a_deadline_is_a_time(deadline_ms):
    with pytest.raises(UsageError, match="deadline_ms wants a number"):
        load_policy("monde", {"deadline_ms": deadline_ms})
