"""Limits of figures, as a user writes them."""

import math

import pytest

from moetrace.batch.slo import parse_slos, worst_miss
from moetrace.results.record import METRICS
from moetrace.spec.errors import UsageError


@pytest.mark.parametrize(
    ("text", "metric", "limit"),
    [
        ("tpot_s.p99<=50ms", "tpot_s.p99", 0.05),
        (" ttft_s.p50 <= 1.5 s ", "ttft_s.p50", 1.5),
        ("itl_s.max<=200us", "itl_s.max", 2e-4),
        ("total_s<=1e2", "total_s", 100.0),
        ("tokens_per_s>=20", "tokens_per_s", 20.0),
        ("tokens_per_s>=20/s", "tokens_per_s", 20.0),
        ("hit_rate>=80%", "hit_rate", 0.8),
        ("demand_bytes<=2.5GB", "demand_bytes", 2.5e9),
        ("late<=10", "late", 10.0),
    ],
)
def test_units_are_read(text, metric, limit):
    (slo,) = parse_slos(text)
    assert slo.metric == metric and slo.limit == pytest.approx(limit) and slo.text == text.strip()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tpot_s.p99", "METRIC<=LIMIT"),
        ("tpot_s.p99<50ms", "METRIC<=LIMIT"),
        ("", "METRIC<=LIMIT"),
        ("tpot_s.p98<=50ms", "the nearest is"),
        ("tpot_s.p99>=50ms", "less is better, so write <="),
        ("tokens_per_s<=5", "more is better, so write >="),
        ("prefetch_bytes<=5GB", "neither less nor more is better"),
        ("tpot_s.p99<=50GB", "given in s, ms, us, got 'GB'"),
        ("hit_rate>=150%", "hit_rate is a share, and never more than 100 %"),
        ("late<=5ms", "given in no unit, got 'ms'"),
        ("total_s<=1.2.3", "is not a number"),
        ("total_s<=1e999", "finite"),
        ("\x1b[2Jtotal_s<=1", "METRIC<=LIMIT"),
    ],
)
def test_a_malformed_limit_is_refused_in_one_sentence(text, words):
    with pytest.raises(UsageError, match="SLO") as error:
        parse_slos([text])
    assert words in str(error.value) and "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_a_miss_is_a_share_of_the_limit():
    less, more = parse_slos(["total_s<=2s", "tokens_per_s>=10"])
    assert [less.miss(value) for value in (1.0, 2.0, 3.0, None)] == [0.0, 0.0, 0.5, math.inf]
    assert [more.miss(value) for value in (11.0, 10.0, 5.0)] == [0.0, 0.0, 0.5]
    assert worst_miss([less, more], {"total_s": 2.2, "tokens_per_s": 5.0}) == 0.5
    assert worst_miss([], {}) == 0.0
    assert parse_slos("late<=0")[0].miss(1) == math.inf


def test_every_figure_with_a_direction_takes_a_limit():
    signs = {"lower": "<=", "higher": ">="}
    directed = [name for name, figure in METRICS.items() if figure.better]
    assert len(parse_slos([f"{name}{signs[METRICS[name].better]}1" for name in directed])) == len(directed)
