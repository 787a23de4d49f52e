"""Links that lose packets, and links whose rate changes: sums done by hand, and what must hold of any."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from support.drawn_runs import replay as replay_case
from support.in_ms import model, moe_ms, policy, replay, rows, steps, system
from support.one_run import run
from support.strategies import Case, cases, policies

from moetrace.engine.decoded import Needs, decoded_bytes
from moetrace.engine.lane import Lane
from moetrace.engine.state import LINK_IN, LINK_OUT, records
from moetrace.engine.tiers.tier_link import IN, LINK_STATE, LINK_TERM, OUT, TO_HOME, Transfers, draw, flow_of, rounds_of
from moetrace.jit.random import GOLDEN, mix_64
from moetrace.trace import Trace
from moetrace.trace import format as trace_format

RANDOM = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
SEED = 2**40 + 3


def drawn(seed: int, *fields: int) -> float:
    """Return a draw in plain Python: version 1's chain, which begins with the mixed seed."""
    x = int(mix_64(np.array([seed], np.uint64) + GOLDEN)[0])
    for field in fields:
        x = int(mix_64(np.array([(x + int(GOLDEN) + field) % 2**64], np.uint64))[0])
    return x / 2**64


def sent(loss: float, packets: int, u: float) -> tuple[int, float]:
    """Return how often something is sent again, and the bytes that pass for each one of payload: by the definition."""
    rounds = 0
    while u > (1 - loss ** (rounds + 1)) ** packets:
        rounds += 1
    return rounds, sum(loss**i for i in range(rounds + 1))


def transfers(loss: float, seed: int = 0) -> Transfers:
    term = records(1, LINK_TERM)
    term["loss"], term["key"] = loss, mix_64(np.array([seed], np.uint64) + GOLDEN)
    none = np.zeros(1, np.int64)
    return Transfers(term, records(1, LINK_STATE), np.zeros(1), np.ones(1), none, none, none, np.zeros(1, np.uint8))


def written(path: Path, *lines: tuple[float, float]) -> str:
    path.write_text("seconds,gb_s\n" + "".join(f"{at!r},{rate!r}\n" for at, rate in lines))
    return str(path)


def with_link(case: Case, **changed: Any) -> Case:
    system = replace(case.system, link=replace(case.system.link, **changed))
    return dataclasses.replace(case, system=system)


def same(one: Lane, other: Lane) -> None:
    """Check that two lanes are the same to the last bit."""
    for name in ("step", "layer", "unit", "tally"):
        assert getattr(one.log, name).tobytes() == getattr(other.log, name).tobytes(), name
    assert one.losses == other.losses


@pytest.mark.parametrize(("loss", "packets"), [(0.01, 1), (0.02, 40), (0.3, 7), (0.9, 500)])
def test_rounds_have_the_mean_of_their_distribution(loss, packets):
    """The kernel's own draws and rounds; sum over k >= 1 of 1 - (1 - loss^k)^p, within 3 standard errors."""
    link, count = transfers(loss, seed=11), 100_000
    found = [rounds_of(loss, float(packets), draw(link, TO_HOME, IN, i)) for i in range(count)]
    beyond = [1 - (1 - loss**k) ** packets for k in range(1, 2000)]  # probability of R >= k
    mean = math.fsum(beyond)
    variance = math.fsum((2 * k + 1) * p for k, p in enumerate(beyond)) - mean**2
    assert abs(np.mean(found) - mean) <= 3 * math.sqrt(variance / count)


def test_a_draw_is_the_chain_of_its_fields():
    link = transfers(0.1, SEED)
    link.state["step"], link.state["layer"] = 7, 3
    assert draw(link, TO_HOME, IN, 12) == drawn(SEED, 7, 3, 1, 1, 12)
    assert draw(link, TO_HOME, OUT, 12) == drawn(SEED, 7, 3, 1, 0, 12)


@settings(max_examples=300, deadline=None)
@given(st.floats(1e-6, 0.999), st.integers(1, 10**6), st.floats(0, 1), st.floats(0, 1))
def test_rounds_are_the_least_that_suffice_and_grow_with_the_draw_and_the_loss(loss, packets, u, other):
    least, most = sorted((u, other))
    found = rounds_of(loss, float(packets), most)
    assert most <= (1 - loss ** (found + 1)) ** packets
    assert found == 0 or most > (1 - loss**found) ** packets
    assert rounds_of(loss, float(packets), least) <= found <= rounds_of(min(1.1 * loss, 0.9999), float(packets), most)


@pytest.mark.parametrize("packets", [1, 685, 10**9, 10**18])
@pytest.mark.parametrize("u", [2.0**-64, 0.5, 1 - 2.0**-53, 1.0])
def test_rounds_at_the_bound_of_the_loss_are_those_of_the_definition(packets, u):
    assert rounds_of(0.99, float(packets), u) == sent(0.99, packets, u)[0]


@pytest.mark.parametrize("loss", [1 - 1e-9, 1 - 2.0**-53])
def test_rounds_end_however_much_is_lost(loss):
    """Above 2^53 no step of 1 is a step: the search ends nonetheless."""
    assert rounds_of(loss, 1e6, 1.0) > 1e10


def test_a_reliable_transfer_waits_for_lost_packets():
    """A fetch of 1 MB in 4 ms, 685 packets; one row out and back of 5 packets, 7.3 kB and 29.2 us each way."""
    link = {"loss": 0.02, "rto_ms": 7.0, "seed": SEED}
    fetched = replay(steps(rows(2), rows(1)), system(link=link), policy("gpu"))
    at_home = replay(steps(rows(2), rows(1)), system(ndp={}, link=link), policy("ndp"), activation_bytes=7.3)
    again = 0.0
    for step, expert in ((0, 2), (1, 1)):
        rounds, volume = sent(0.02, 685, drawn(SEED, step, 0, 0, 1, expert))
        assert moe_ms(fetched)[step] == pytest.approx(4 * volume + 7 * rounds + 1, rel=1e-12)
        again += 1e6 * (volume - 1)
        both_ms = 0.0
        for direction in (0, 1):
            rounds, volume = sent(0.02, 5, drawn(SEED, step, 0, 1, direction, 0))
            both_ms += 0.0292 * volume + 7 * rounds
        assert moe_ms(at_home)[step] == pytest.approx(both_ms + 2, rel=1e-12)
    assert fetched.losses.resent_in_bytes == pytest.approx(again, rel=1e-12)
    assert fetched.losses.resent_out_bytes == fetched.losses.gate_mass_dropped == 0
    assert fetched.log.unit["bytes"][LINK_IN] == 2e6  # payload
    assert fetched.log.unit["busy_s"][LINK_IN] * 1e3 == pytest.approx(sum(moe_ms(fetched)) - 2)


def test_chunks_share_resent_bytes():
    link = {"loss": 0.4, "rto_ms": 7.0, "seed": SEED, "latency_us": 100.0}
    lane = replay(steps(rows(0)), system(ndp={"chunks": 4}, link=link), policy("ndp"), activation_bytes=7.3)
    x, y = (
        0.0292 * volume + 7 * rounds
        for rounds, volume in (sent(0.4, 5, drawn(SEED, 0, 0, 1, direction, 0)) for direction in (0, 1))
    )
    x, c, y = x / 4 + 0.1, 2 / 4, y / 4 + 0.1
    assert moe_ms(lane)[0] == pytest.approx(x + c + y + 3 * max(x, c, y), rel=1e-12)
    assert lane.log.unit["busy_s"][LINK_OUT] * 1e3 == pytest.approx(4 * x)
    assert lane.log.unit["busy_s"][LINK_IN] * 1e3 == pytest.approx(4 * y)


def test_rates_hold_from_their_second_on(tmp_path):
    """The router speaks at 1 ms; the rate doubles at 3 ms: half of the first fetch takes 2 ms, the other half 1."""
    link = {"rates": written(tmp_path / "r.csv", (0.0, 0.25), (0.003, 0.5))}
    assert moe_ms(replay(steps(rows(0), rows(1)), system(link=link), policy("gpu"))) == pytest.approx([4, 3])
    # the latency comes first: 1.5 ms at the first rate, and the rest in 1.25
    late = link | {"latency_us": 500.0}
    assert moe_ms(replay(steps(rows(0)), system(link=late), policy("gpu"))) == pytest.approx([0.5 + 1.5 + 1.25 + 1])
    # rates have the link's efficiency
    half = link | {"efficiency": 0.5}
    assert moe_ms(replay(steps(rows(0)), system(link=half), policy("gpu"))) == pytest.approx([2 + 3 + 1])
    # and are no faster than the host's memory, where that is read
    cpu = {"bandwidth_gb_s": 0.25}
    read = system(cpu=cpu, link=link | {"host_read": True})
    assert moe_ms(replay(steps(rows(0)), read, policy("gpu"))) == pytest.approx([5])
    assert moe_ms(replay(steps(rows(0)), system(cpu=cpu, link=link), policy("gpu"))) == pytest.approx([4])


def test_a_decision_holds_the_rate_at_which_the_router_speaks(tmp_path):
    """3 rows take 3 ms at home; at 1 GB/s a fetch and the work take 2. The rate falls when half of it has arrived."""
    link = {"rates": written(tmp_path / "r.csv", (-1.0, 1.0), (0.0015, 0.01))}
    lane = replay(steps(rows(0, 0, 0), rows(0, 0, 0)), system(ndp={}, link=link), policy("balance"))
    assert moe_ms(lane) == pytest.approx([0.5 + 50 + 1, 3])
    assert lane.clairvoyant_s * 1e3 == pytest.approx(2 * (1 + 1))  # resident; its link is link.bandwidth_gb_s


def test_prefetches_flow_at_the_rate_of_the_moment_less_losses(tmp_path):
    """From 5 ms, when the fetch has ended, to 7, when the next router speaks; the rate doubles at 5.5 ms."""
    trace, ahead = steps(rows(0), rows(1)), policy("gpu", "lru", prefetch="oracle:1")
    link = {"rates": written(tmp_path / "r.csv", (0.0, 0.25), (0.0055, 0.5))}
    lane = replay(trace, system(link=link), ahead)
    assert lane.log.step["prefetch_bytes"] == pytest.approx([125_000 + 250_000, 500_000])
    assert lane.log.step["late"].tolist() == [0, 1] and moe_ms(lane)[1] == pytest.approx(3)
    lost = replay(trace, system(link={"loss": 0.2}), ahead)
    assert lost.log.step["prefetch_bytes"] == pytest.approx([200_000, 200_000])


def test_the_clock_runs_through_waits_and_evictions(tmp_path):
    """One slot: the second fetch evicts, and the third step begins 10 ms later; then the rate has changed."""
    link = {"rates": written(tmp_path / "r.csv", (0.0, 0.25), (0.0215, 0.5))}
    trace = steps(rows(0), rows(1), rows(2))
    plain, evicting = (
        replay(trace, system({"evict_us": us}, link=link), policy("gpu", "lru"), slots=1) for us in (0.0, 10_000.0)
    )
    assert moe_ms(plain) == pytest.approx([5, 5, 5])
    assert evicting.log.step["dense_s"] * 1e3 == pytest.approx([1, 1, 11])
    assert moe_ms(evicting) == pytest.approx([5, 5, 3])


def test_one_packet_a_row_drops_the_expected_share_of_gates():
    """One unit, 1,460 bytes a row: out and back, so 1 - (1 - loss)^2 of 40,000 rows, within 3 standard errors."""
    loss, count = 0.03, 40_000
    experts = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1) % 4
    trace = Trace.from_arrays(experts, num_experts=4, steps=np.full(20, count // 20))
    on = system(ndp={}, link={"loss": loss, "loss_mode": "relaxed"})
    lane = replay(trace, on, policy("ndp"), activation_bytes=1.46)
    expected = 1 - (1 - loss) ** 2
    error = math.sqrt(expected * (1 - expected) / count)
    assert abs(lane.losses.gate_mass_dropped - expected) <= 3 * error
    assert lane.losses.resent_in_bytes == lane.losses.resent_out_bytes == 0


@pytest.mark.parametrize("activations", [None, "host"])
@pytest.mark.parametrize("placement", ["ep", "tp"])
def test_relaxed_rows_lie_unit_by_unit(activations, placement):
    """Two units, 1,000 bytes a row, packets of 700: which packets a row touches is counted here, row by row."""
    ids = [[0, 1], [2, 3], [1, 3], [0, 2], [3, 0]]
    gates = np.random.default_rng(1).random((5, 1, 2)).astype(np.float16)
    trace = Trace.from_arrays(np.array(ids, np.uint8)[:, None], num_experts=4, steps=np.array([2, 3]), gates=gates)
    link = {"loss": 0.06, "loss_mode": "relaxed", "mtu_bytes": 700, "seed": SEED}
    on = system(ndp={"units": 2, "activations": activations}, link=link)
    lane = replay(trace, on, policy("ndp", placement=placement), activation_bytes=1.0)
    units = [[0, 1, 2, 3]] if activations else [[0, 2], [1, 3]] if placement == "ep" else [[0, 1, 2, 3]] * 2
    lost = set()
    for step, of_step in ((0, range(2)), (1, range(2, 5))):
        place = 0
        for held in units:
            for row in of_step:
                if not set(ids[row]) & set(held):
                    continue
                packets = range(place * 1000 // 700, -(-(place + 1) * 1000 // 700))
                fields = [(step, 0, 1, direction, packet) for direction in (0, 1) for packet in packets]
                if any(drawn(SEED, *each) < 0.06 for each in fields):
                    lost |= {(row, slot) for slot, expert in enumerate(ids[row]) if expert in held}
                place += 1
    dropped = sum(float(gates[row, 0, slot]) for row, slot in lost)
    assert 0 < len(lost) < 10
    assert lane.losses.gate_mass_dropped == pytest.approx(dropped / float(gates.astype(float).sum()), rel=1e-12)
    # Experts on the GPU lose nothing, and a link that loses no activations takes as long as one without loss.
    assert replay(trace, on, policy("gpu"), activation_bytes=1.0).losses.gate_mass_dropped == 0
    plain = replay(trace, system(ndp={"units": 2, "activations": activations}), policy("ndp", placement=placement))
    assert moe_ms(replay(trace, on, policy("ndp", placement=placement))) == pytest.approx(moe_ms(plain))


def test_no_loss_is_no_loss_to_the_bit():
    trace = steps(rows(0, 1, 1), rows(2, 3), rows(0, 3, 3))
    for link in ({"loss": 0.0}, {"loss": 0, "rto_ms": 9.0, "mtu_bytes": 90, "seed": 5, "loss_mode": "relaxed"}):
        for choice in (policy("balance", "lru"), policy("gpu", "lru", prefetch="oracle:1")):
            plain, other = (replay(trace, system(ndp={}, link=each), choice, slots=2) for each in ({}, link))
            same(plain, other)
            assert other.tiers is None and other.losses is None


@RANDOM
@given(cases(), st.data())
def test_a_constant_rate_is_no_rate(tmp_path_factory, case, data):
    choice = data.draw(policies(case.system.units).filter(lambda one: one.dispatch not in ("split", "optimal")))
    rate = case.system.link.bandwidth_gb_s
    path = written(tmp_path_factory.mktemp("r") / "r.csv", (0.0, rate), (2e-3, rate), (2.5e-3, rate), (0.1, rate))
    plain = replay_case(case, [choice]).lanes[0]
    lane = replay_case(with_link(case, rates=path), [choice]).lanes[0]
    for name in ("duration_s", "moe_s", "prefetch_bytes", "demand_bytes", "wait_s"):
        np.testing.assert_allclose(lane.log.step[name], plain.log.step[name], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(lane.clairvoyant_s, plain.clairvoyant_s, rtol=1e-12)
    np.testing.assert_allclose(lane.work_bound_s, plain.work_bound_s, rtol=1e-12)


@RANDOM
@given(cases(), st.data())
def test_more_loss_never_makes_a_reliable_replay_faster(case, data):
    """With the same draws, and so in expectation; without prefetches, whose misses are others at other rates."""
    plain = policies(case.system.units).filter(
        lambda one: one.dispatch not in ("split", "optimal") and one.prefetch == "none"
    )
    choice, seed = data.draw(plain), data.draw(st.integers(0, 2**63 - 1))
    less, more = sorted((data.draw(st.floats(1e-4, 0.9)), data.draw(st.floats(1e-4, 0.9))))
    found = [replay_case(with_link(case, loss=loss, rto_ms=0.3, seed=seed), [choice]).lanes[0] for loss in (less, more)]
    assert (found[1].log.step["moe_s"] >= found[0].log.step["moe_s"] * (1 - 1e-12)).all()
    assert found[1].losses.resent_in_bytes >= found[0].losses.resent_in_bytes * (1 - 1e-12)
    assert found[1].clairvoyant_s == found[0].clairvoyant_s


def test_neither_jobs_nor_cuts_change_losses(tmp_path, monkeypatch):
    rng = np.random.default_rng(4)
    experts = np.argsort(rng.random((60, 3, 6)), axis=-1)[..., :2].astype(np.uint8)
    gates = rng.random(experts.shape).astype(np.float16)
    link = {"loss": 0.1, "loss_mode": "relaxed", "rto_ms": 1.0, "mtu_bytes": 300, "seed": 8}
    link["rates"] = written(tmp_path / "r.csv", (0.0, 0.2), (0.05, 1.0), (0.1, 0.1))
    on = system({"evict_us": 50.0}, link, ndp={"units": 3, "chunks": "auto"})
    choices = [policy(dispatch, "lru", prefetch="oracle:2") for dispatch in ("balance", "halo", "gpu", "ndp")]
    choices = [replace(one, name=str(i)) for i, one in enumerate(choices)]
    of = model(moe_layers=3, experts=6, top_k=2, activation_bytes=0.5)

    def lanes(jobs: int) -> list[Lane]:
        trace = Trace.from_arrays(experts, num_experts=6, steps=np.full(20, 3), gates=gates)
        return run(trace, of, on, choices, slots=5, jobs=jobs).lanes

    first = lanes(1)
    assert 0 < first[0].losses.gate_mass_dropped < 1 and first[0].losses.resent_in_bytes > 0
    for jobs, block_bytes in ((2, 1 << 20), (1, 1), (2, 40)):
        with monkeypatch.context() as patch:
            patch.setattr(trace_format, "BLOCK_BYTES", block_bytes)
            patch.setattr("moetrace.engine.decoded.BLOCK_BYTES", block_bytes)
            for one, other in zip(first, lanes(jobs), strict=True):
                same(one, other)
                assert one.clairvoyant_s == other.clairvoyant_s


def test_halo_keeps_what_weighs_most_on_the_gpu():
    """Four experts of a row each take 8 ms at home. With one on the GPU it is 6, with two 9: the heaviest goes."""
    gates = np.array([0.1, 0.2, 0.9, 0.3], np.float16).reshape(4, 1, 1)
    trace = Trace.from_arrays(np.arange(4, dtype=np.uint8).reshape(4, 1, 1), num_experts=4, steps=[4], gates=gates)
    link = {"loss": 0.99, "loss_mode": "relaxed"}
    on = system(ndp={}, link=link | {"loss": 0.0})
    assert moe_ms(replay(trace, on, policy("halo"))) == pytest.approx([6])
    dropped = [
        replay(trace, system(ndp={}, link=link), policy(dispatch), activation_bytes=1.0).losses.gate_mass_dropped
        for dispatch in ("halo", "balance")
    ]
    total = float(gates.astype(float).sum())
    kept = float(gates[2, 0, 0]), float(gates[0, 0, 0])
    assert dropped == pytest.approx([1 - kept[0] / total, 1 - kept[1] / total])
    # without gates each choice weighs the same, and the order is that of demand
    plain = Trace.from_arrays(np.array([0, 1, 1, 2], np.uint8).reshape(4, 1, 1), num_experts=4, steps=[4])
    lane = replay(plain, on, policy("halo"))
    assert lane.log.layer["gpu_experts"].tolist() == [1] and moe_ms(lane) == pytest.approx([5])


def test_each_gate_is_kept_only_for_who_loses_rows():
    trace = steps(rows(0, 1), rows(2))
    needs = Needs(0, False, False)
    assert decoded_bytes(trace, needs._replace(each_gate=True)) > decoded_bytes(trace, needs)


@settings(max_examples=200, deadline=None)
@given(st.floats(1.0, 1e9), st.floats(1e-12, 1e3), st.floats(1e-13, 1e-6))
def test_an_incomplete_transfer_takes_all_of_the_time(byte_count, most_s, each_s):
    """Else a rest of rounding is left, in which the next expert moves."""
    moved_bytes, seconds = flow_of(None, byte_count, 0.0, most_s, each_s, 0.0)
    assert 0.0 < moved_bytes <= byte_count
    assert seconds == (byte_count * each_s if byte_count * each_s <= most_s else most_s)
    assert moved_bytes * each_s == pytest.approx(seconds)
