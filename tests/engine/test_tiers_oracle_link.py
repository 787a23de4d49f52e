"""The oracle of version 2 by hand: streams, chunks, rates over time, lost packets (`tiers_by_hand`)."""

import math

import numpy as np
import pytest
from support.by_hand import model_of, one, trace_of
from support.oracle_entries import mix
from support.tiers_by_hand import exactly, moe_ms, rows_of, run, system_with
from support.tiers_oracle.link import resends


@pytest.mark.parametrize(("stream", "ends"), [(1, [5, 9]), (4, [4.25, 8.25]), (0, [4, 8])])
def test_streamed_fetches(stream, ends):
    # Parts of 1 ms and 0.25 ms of work. Two experts: the second arrives from 4 to 8; its work of 1 ms is hidden, too.
    system = system_with(link={"stream": stream})
    assert moe_ms(trace_of(rows_of(1), rows_of(1, 1)), system) == exactly(ends)


def test_streamed_but_bound_by_work():
    # 50 rows are 5 ms of work: it begins with the first part, at 1; without limit at 0.
    trace = trace_of(rows_of(50))
    assert [moe_ms(trace, system_with(link={"stream": C}))[0] for C in (1, 4, 0)] == exactly([9, 6, 5])


def test_a_fetched_expert_starts_itself_in_its_stream():
    # A start of 0.4 ms is work: 1.4, of which the last quarter follows the last part.
    system = system_with(gpu={"launch_us": 400.0, "launch": "layer"}, link={"stream": 4})
    assert moe_ms(trace_of(rows_of(1)), system) == exactly([4.35])


def test_chunks():
    # A row is 250 kB: 1 ms each way; a unit takes 2 ms.
    model = model_of(experts=1, activation_bytes=250)

    def of(chunks, command_us=0.0, latency_us=0.0):
        ndp, link = {"chunks": chunks, "command_us": command_us}, {"latency_us": latency_us}
        return run(trace_of(rows_of(1)), system_with(1, ndp=ndp, link=link), model, dispatch="ndp")

    assert [of(C).steps[0].moe_s[0] * 1e3 for C in (1, 2, 4)] == exactly([4, 3, 2.5])
    assert of("auto").steps[0].chunks == [(64, 1)]
    # Commands of 0.1 ms: 4.1; 2: 0.5 + 1.15 + 0.5 + 1.15; 4: 0.25 + 0.625 + 0.25 + 3*0.625 = 3; 8: 3.15.
    assert [of(C, 100.0).steps[0].moe_s[0] * 1e3 for C in (1, 2, 4, 8)] == exactly([4.1, 3.3, 3.0, 3.15])
    assert of("auto", 100.0).steps[0].chunks == [(4, 1)]
    assert of(4, 100.0).unit["ndp0"]["busy_s"] == exactly(2.1e-3)
    assert of(4, 0.0, 50.0).unit["link_out"]["busy_s"] == exactly(1.2e-3)


def test_rates_are_integrated_from_the_moment_on():
    # The router speaks at 1 ms. 0.5 MB pass until 3 ms, the rest at twice the rate until 4: 3 ms, and 1 ms of work.
    rates = [(0.0, 0.25), (3e-3, 0.5)]
    trace = trace_of(rows_of(1), rows_of(1))
    assert moe_ms(trace, system_with(link={"rates": rates})) == exactly([4, 3])
    # With a latency of 1 ms the bytes begin at 2 ms: 0.25 MB, then 1.5 ms.
    assert moe_ms(trace, system_with(link={"rates": rates, "latency_us": 1e3})) == exactly([4.5, 4])


def test_prefetches_flow_at_the_rates_and_caps_of_the_moment():
    # oracle:1 of layer 1: 0.25 GB/s until 3 ms. Layer 0 is there from step 1 on, layer 1 is fetched (4 ms) or flows.
    model = model_of(layers=2, experts=1, activation_bytes=0)
    step = [[[0], [0]]]
    options = {"slots": 1, "residency": "lru", "prefetch": "oracle:1", "scope": "global"}
    seen = run(trace_of(step), system_with(link={"rates": [(0.0, 0.25), (7e-3, 0.125)]}), model, **options)
    # Router at 1, fetch until 5, work until 6: 0.25 MB flow in that millisecond; dense until 7: 0.25 MB; late.
    assert seen.steps[0].moe_s == [exactly(5e-3), exactly(9e-3)]
    assert seen.prefetch_bytes == exactly(5e5)
    assert seen.late == 1
    assert seen.unit["link_in"]["busy_s"] == exactly(4e-3 + 8e-3 + 2e-3)


def test_a_fetch_begins_where_the_one_before_ends():
    # Expert 0 from 1 to 5 ms, expert 1 from 5 to 7 at twice the rate; so few packets get lost that R is 0.
    link = {"rates": [(0.0, 0.25), (5e-3, 0.5)], "loss": 1e-12}
    assert moe_ms(trace_of(rows_of(2, 1)), system_with(link=link)) == pytest.approx([7])
    link = {"rates": [(0.0, 0.25), (5e-3, 0.5)]}
    assert moe_ms(trace_of(rows_of(2, 1)), system_with(link=link)) == exactly([7])


ONLINE = {"dispatch": "ndp", "residency": "lfu", "scope": "global"}


@pytest.mark.parametrize(
    ("link", "ndp", "moved"),
    [({}, {}, 0.75e6), ({"loss": 0.5}, {}, 0.375e6), ({}, {"outside_gb_s": 0.1}, 0.3e6)],
)
def test_prefetches_flow_slower_on_a_lossy_link_and_out_of_one_unit(link, ndp, moved):
    # Queued after step 1; 1 ms of dense and 2 ms of moe in step 2. No activations, so nothing else is lost.
    system = system_with(2, link=link, ndp=ndp)
    seen = run(trace_of(rows_of(1), rows_of(1)), system, slots=1, prefetch="online:1", **ONLINE)
    assert seen.prefetch_bytes == exactly(moved)
    assert seen.unit["link_in"]["busy_s"] == exactly(3e-3)
    assert seen.resent_in_bytes == 0


def test_a_second_prefetch_has_the_rate_of_its_moments():
    # Both are queued at 5 ms. Expert 0 flows until 7, expert 1 from 7 to 10 at half the rate.
    system = system_with(1, link={"rates": [(0.0, 0.5), (7e-3, 0.25)]})
    seen = run(trace_of(rows_of(2, 1), rows_of(2, 1)), system, slots=2, prefetch="online:2", **ONLINE)
    assert seen.prefetch_bytes == exactly(1.75e6)


def test_prefetches_beside_moe_flow_after_the_fetches():
    # Layer 0: router at 1, fetch until 5, work until 6; from 5 on 0.125 GB/s: 0.125 MB, and 0.125 MB in the next dense.
    model = model_of(layers=2, experts=1, activation_bytes=0)
    system = system_with(link={"rates": [(0.0, 0.25), (5e-3, 0.125)]})
    chosen = {"slots": 1, "residency": "lru", "prefetch": "oracle:1", "scope": "global"}
    assert run(trace_of([[[0], [0]]]), system, model, **chosen).prefetch_bytes == exactly(0.25e6)


def test_the_clock_of_rates_counts_overheads():
    system = system_with(gpu={"layer_overhead_us": 500.0}, link={"rates": [(0.0, 0.25), (1.25e-3, 0.5)]})
    assert moe_ms(trace_of(rows_of(1)), system) == exactly([3])


def test_the_clock_of_rates_counts_waits():
    # Step 1 ends at 3 ms; expert 0 is queued, and step 2 waits: 0.5 MB until 5, the rest until 6. Router at 7: expert 1
    # is fetched, 0.25 MB until 7.5 and the rest in 3 ms.
    system = system_with(1, link={"rates": [(0.0, 0.25), (5e-3, 0.5), (7.5e-3, 0.25)]})
    chosen = {"slots": 1, "residency": "lfu", "scope": "global", "prefetch": "online:1", "prefetch_blocks": True}
    trace = trace_of(rows_of(1), [one(1)], phases=[0, 1])
    seen = run(trace, system, user=lambda layer, order, n, resident: {1} & set(n), **chosen)
    assert seen.per_step("wait_s") * 1e3 == exactly([0, 3])
    assert seen.per_step("moe_s") * 1e3 == exactly([2, 4.5])


def drawn(*fields, seed=0):
    """Section M's draw, written out once more."""
    x = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
    for v in fields:
        x = mix((x + 0x9E3779B97F4A7C15 + v) % 2**64)
    return x / 2**64


def test_the_mean_of_resends():
    for eps, packets in ((0.1, 20), (0.4, 3)):
        R = np.array([resends(eps, packets, drawn(0, 0, 0, 1, item)) for item in range(100_000)])
        mean = sum(1 - (1 - eps**k) ** packets for k in range(1, 200))
        assert abs(R.mean() - mean) < 3 * R.std() / math.sqrt(R.size)


def test_a_reliable_fetch_sends_again():
    for seed in range(8):
        system = system_with(link={"loss": 0.5, "mtu_bytes": 500_000, "rto_ms": 0.25, "seed": seed})
        u, R = drawn(0, 0, 0, 1, 0, seed=seed), 0
        while u > (1 - 0.5 ** (R + 1)) ** 2:
            R += 1
        volume = sum(0.5**k for k in range(R + 1))
        seen = run(trace_of(rows_of(1)), system)
        assert seen.steps[0].moe_s == [exactly((4 * volume + 0.25 * R + 1) * 1e-3)]
        assert (seen.resent_in_bytes, seen.resent_out_bytes) == (pytest.approx(1e6 * (volume - 1)), 0)
        assert (seen.demand_bytes, seen.gate_mass_dropped) == (1e6, 0)


def test_activations_have_a_draw_for_each_direction():
    model = model_of(experts=1, activation_bytes=250)  # 250 kB a row: 1 ms
    link = {"loss": 0.5, "mtu_bytes": 1000, "rto_ms": 0.25, "seed": 3}
    seen = run(trace_of(rows_of(1)), system_with(1, link=link), model, dispatch="ndp")
    rounds = [resends(0.5, 250, drawn(0, 0, 1, direction, 0, seed=3)) for direction in (0, 1)]
    ways = [sum(0.5**k for k in range(R + 1)) + 0.25 * R for R in rounds]
    assert seen.unit["link_out"]["busy_s"] == exactly(ways[0] * 1e-3)
    assert seen.steps[0].moe_s == [exactly((sum(ways) + 2) * 1e-3)]
    assert seen.resent_out_bytes == pytest.approx(250e3 * sum(0.5**k for k in range(1, rounds[0] + 1)))


def test_the_number_of_chunks_is_decided_without_draws():
    # With commands of 0.1 ms the number is 4, as in `test_chunks`. The time counts resent bytes, with which 16 is less.
    ndp, link = {"chunks": "auto", "command_us": 100.0}, {"loss": 0.5, "mtu_bytes": 1000, "rto_ms": 1.0, "seed": 3}
    model = model_of(experts=1, activation_bytes=250)
    seen = run(trace_of(rows_of(1)), system_with(1, link=link, ndp=ndp), model, dispatch="ndp")
    rounds = [resends(0.5, 250, drawn(0, 0, 1, direction, 0, seed=3)) for direction in (0, 1)]
    x, y = (sum(0.5**k for k in range(R + 1)) + R for R in rounds)

    def of(C):
        return (x + 2.1 + y) / C + 0.1 + (C - 1) * max(x / C, 2.1 / C + 0.1, y / C)

    assert seen.steps[0].chunks == [(4, 1)]
    assert seen.steps[0].moe_s == [exactly(of(4) * 1e-3)]
    assert of(16) < of(4)


@pytest.mark.parametrize(("mtu", "packets"), [(2000, 1), (1000, 2), (4000, 1)])
def test_relaxed_activations_drop_gates(mtu, packets):
    # Rows of 2 kB, in one packet each, in two, or two in one: a packet is lost out or back.
    eps, rows = 0.2, 4000
    link = {"loss": eps, "mtu_bytes": mtu, "loss_mode": "relaxed", "rto_ms": 1.0}
    seen = run(trace_of(rows_of(rows)), system_with(1, link=link), model_of(experts=1), dispatch="ndp")
    p = 1 - (1 - eps) ** (2 * packets)
    sharing = max(1, mtu // 2000)
    assert abs(seen.gate_mass_dropped - p) < 3 * math.sqrt(p * (1 - p) * sharing / rows)
    assert seen.steps[0].moe_s == [exactly((rows + 2 * rows * 8e-3) * 1e-3)]
    assert seen.resent_out_bytes == seen.resent_in_bytes == 0


def test_a_lost_row_loses_its_choices_on_that_unit():
    # Two units; each row chooses 0, 2 (unit 0) and 1 (unit 1). Gates 0.5, 0.2 and 0.3.
    trace = trace_of([one(0, 2, 1)] * 3)
    trace.gates = np.tile([0.5, 0.2, 0.3], (3, 1, 1))
    link = {"loss": 0.3, "mtu_bytes": 2000, "loss_mode": "relaxed", "seed": 11}
    seen = run(trace, system_with(2, link=link), model_of(experts=3, top_k=3), dispatch="ndp")
    lost = [any(drawn(0, 0, 1, way, i, seed=11) < 0.3 for way in (0, 1)) for i in range(6)]
    assert 0 < sum(lost) < 6
    assert seen.gate_mass_lost == pytest.approx(sum(lost[:3]) * 0.7 + sum(lost[3:]) * 0.3)
    assert seen.gate_mass_total == pytest.approx(3)
    # As shards of both units: a row that is lost on either loses all.
    seen = run(trace, system_with(2, link=link), model_of(experts=3, top_k=3), placement="tp", dispatch="ndp")
    assert seen.gate_mass_lost == pytest.approx(sum(lost[row] or lost[3 + row] for row in range(3)))
