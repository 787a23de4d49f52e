"""The oracle of version 2 by hand: evictions, memory domains, a disk, remote functions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.by_hand import model_of, one, trace_of
from support.tiers_by_hand import exactly, moe_ms, rows_of, run, system_with
from support.tiers_oracle.functions import longest_first


def test_evictions_delay_the_next_layer():
    # One slot. Step 1 fills it, step 2 evicts: 0.5 ms before the router of step 3, which evicts for nobody.
    trace = trace_of(rows_of(1), [one(1)], rows_of(1))
    seen = run(trace, system_with(gpu={"evict_us": 500.0}), slots=1, residency="lru")
    assert seen.per_step("dense_s") * 1e3 == exactly([1, 1, 1.5])
    assert seen.per_step("evict_s") * 1e3 == exactly([0, 0, 0.5])
    assert seen.unit["gpu"]["busy_s"] == exactly(6e-3)


def test_a_prefetch_that_evicts_delays_the_layer_that_it_comes_before():
    # One unit, 2 ms an expert; a transfer takes 4 ms, a step 3. Expert 0 is queued after step 1, resident from step 4
    # on. Expert 1 has more demands after step 7, arrives in step 9's dense and evicts right before that of step 10.
    steps = [one(0)] * 3 + [one(1)] * 8
    options = {"slots": 1, "residency": "lfu", "prefetch": "online:1", "dispatch": "ndp"}
    seen = run(trace_of(*[[row] for row in steps]), system_with(1, gpu={"evict_us": 500.0}), **options)
    assert seen.per_step("dense_s") * 1e3 == exactly([1] * 9 + [1.5, 1])
    assert seen.per_step("hits").tolist() == [0] * 9 + [1, 1]
    assert seen.prefetch_bytes == exactly(2e6)


# --- Memory domains --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("placement", "fetched_ms"), [("ep", 10), ("tp", 5), ("striped", 5), ("mixed", 10)])
def test_outside_reads_are_capped(placement, fetched_ms):
    system = system_with(2, ndp={"outside_gb_s": 0.1}, host={"channels_gb_s": 0.2})
    assert moe_ms(trace_of(rows_of(1)), system, placement=placement) == exactly([fetched_ms + 1])
    # a resident costs no outside read
    seen = moe_ms(trace_of(rows_of(1), rows_of(1)), system, placement=placement, residency="lru", slots=1)
    assert seen == exactly([fetched_ms + 1, 1])


def test_striped_runs_as_tp():
    trace = trace_of(rows_of(3, 1, 2), rows_of(1, 1, 1))
    seen = [run(trace, system_with(2), placement=placement, dispatch="ndp") for placement in ("striped", "tp")]
    assert seen[0].unit == seen[1].unit
    assert moe_ms(trace_of(rows_of(1)), system_with(2), placement="striped", dispatch="ndp") == exactly([1])


RELAYOUT = {"placement": "mixed", "residency": "ewma", "prefetch": "relayout"}


@pytest.mark.parametrize(("outside_gb_s", "move_gb_s"), [(0.4, 0.1), (0.1, 1.0)])
def test_relayout_moves_warm_experts_to_all_units(outside_gb_s, move_gb_s):
    # Hot 0, warm 1, cold 2, all localized. n^ = 10, 3, 0.5 and more. The CPU, as if striped: 2.5 ms, of 20 rows 4;
    # units, as if localized, 10, 3, 2 and more; the GPU 4. So 0 and 1 go to all units, in this order, and 2 stays.
    # A dense of 2.7 ms moves 0.27 MB: expert 0 has arrived in the 4th one after step 1, expert 1 in the 8th.
    cpu = {"tflops": 0.01, "bandwidth_gb_s": 1.0}
    ndp = {"outside_gb_s": outside_gb_s, "move_gb_s": move_gb_s}
    system = system_with(2, cpu, link={"stream": 0}, host={"channels_gb_s": 0.4}, ndp=ndp)
    seen = run(trace_of(*[rows_of(20, 6, 1)] * 10), system, dispatch="home", alpha=0.5, **RELAYOUT)
    assert seen.moved_bytes == exactly(2e6)
    assert seen.moved_s == exactly(20e-3)
    # Unit 0 has 20 + 2 ms, unit 1 6; then 10 + 2 and 10 + 6; then 10 + 3 + 2 and 10 + 3.
    assert seen.per_step("moe_s") * 1e3 == exactly([22] * 4 + [16] * 4 + [15] * 2)


def test_relayout_stays_where_it_is_good():
    # Without a CPU, and with a link of 20 ms, all stay at home and localized: nothing moves.
    system = system_with(2, ndp={"move_gb_s": 1.0}, link={"bandwidth_gb_s": 0.05})
    seen = run(trace_of(*[rows_of(2, 1, 1)] * 3), system, layout={(0, 1): 0}, dispatch="ndp", **RELAYOUT)
    assert seen.moved_bytes == seen.prefetch_bytes == 0
    # Striped experts go, most rows first, to the unit of least predicted seconds: 0 to unit 0, 1 and 2 to unit 1.
    layout = {(0, e): "striped" for e in range(3)}
    chosen = RELAYOUT | {"layout": layout, "alpha": 1.0, "dispatch": "ndp"}
    seen = run(trace_of(*[rows_of(9, 2, 2)] * 6), system, **chosen)
    assert seen.moved_bytes == exactly(3e6)
    assert seen.steps[0].moe_s == [exactly(6.5e-3)]
    assert seen.steps[5].moe_s == [exactly(9e-3)]


def test_relayout_queues_hot_experts():
    # Units take 2 ms a row: expert 0 stays. Expert 1 has n^ = 1.8, 3.6 ms, then 3.06, 6.12 ms: the GPU's 4 are less.
    # It flows beside step 3 and is resident from step 4 on.
    system = system_with(2, ndp={"move_gb_s": 1.0, "gmac_s": 0.5}, link={"stream": 0})
    chosen = RELAYOUT | {"dispatch": "ndp", "scope": "global", "slots": 1}
    seen = run(trace_of(*[rows_of(1, 6)] * 6), system, **chosen)
    assert seen.prefetch_bytes == exactly(1e6)
    assert seen.per_step("hits").tolist() == [0, 0, 0, 1, 1, 1]


def test_relayout_drops_a_move_that_it_no_longer_wants():
    # 15 rows are 3 ms on the CPU: all units. 0.1 MB have moved when one row makes it 2 ms on its unit: it stays there.
    ndp = {"outside_gb_s": 0.4, "move_gb_s": 0.1}
    cpu = {"tflops": 0.01, "bandwidth_gb_s": 1.0}
    system = system_with(2, cpu, link={"stream": 0}, host={"channels_gb_s": 0.4}, ndp=ndp)
    seen = run(trace_of(rows_of(15), *[rows_of(1)] * 15), system, dispatch="home", alpha=1.0, **RELAYOUT)
    assert seen.moved_bytes == exactly(1e5)
    assert seen.per_step("moe_s") * 1e3 == exactly([15] + [2] * 15)


def test_relayout_queues_nothing_below_the_bar():
    # Units take 10 ms a row. Expert 1 is queued after step 2 (n^ = 0.51, 5.1 ms) and resident from step 4 on. Expert 0
    # is as hot from step 5 on, but its score is below that of expert 1.
    system = system_with(2, ndp={"move_gb_s": 1.0, "gmac_s": 0.1}, link={"stream": 0})
    chosen = RELAYOUT | {"dispatch": "ndp", "scope": "global", "slots": 1}
    seen = run(trace_of(*[[one(1)]] * 3, *[rows_of(1, 1)] * 5), system, **chosen)
    assert seen.prefetch_bytes == exactly(1e6)
    assert seen.per_step("hits").tolist() == [0] * 3 + [1] * 5


# --- A disk ----------------------------------------------------------------------------------------------------------


def disk_ms(steps, dispatch, host=None, **options):
    """A disk of 10 ms an expert, a CPU of 2 ms."""
    system = system_with(0, cpu={}, disk={"bandwidth_gb_s": 0.1, "latency_us": 0.0}, host=host or {})
    seen = run(trace_of(*steps), system, dispatch=dispatch, **options)
    return seen, (seen.per_step("moe_s") * 1e3).tolist()


def test_a_disk_is_read_in_demand_order():
    # Reads end at 10 and 20. CPU: 12, 22. GPU: fetched from 10 to 14 and 20 to 24, run until 25; 8 on the link.
    steps = [rows_of(2, 1)] * 2
    seen, moe = disk_ms(steps, "home")
    assert moe == exactly([22, 4])
    assert (seen.host_hits, seen.host_misses, seen.disk_bytes) == (2, 2, 2e6)
    assert seen.disk_busy_s == exactly(20e-3)
    seen, moe = disk_ms(steps, "gpu")
    assert moe == exactly([25, 9])
    assert seen.unit["link_in"]["busy_s"] == exactly(16e-3)


def test_host_memory_keeps_by_the_rules_of_slots():
    # One slot: the first takes it, the second finds no victim that is not active. Then 1 of its own takes it.
    steps = [rows_of(2, 1), rows_of(2, 1), [one(1)], rows_of(2, 1)]
    seen, moe = disk_ms(steps, "home", {"slots": 1})
    assert moe == exactly([22, 12, 12, 14])
    assert (seen.host_hits, seen.host_misses) == (2, 5)
    # GPU residents do not ask host memory.
    seen, moe = disk_ms(steps[:2], "gpu", {"slots": 1}, residency="lru", slots=2)
    assert moe == exactly([25, 2])
    assert (seen.host_hits, seen.host_misses) == (0, 2)


@pytest.mark.parametrize(
    ("residency", "first", "second"),
    [("lru", 3, 4), ("fifo", 4, 4), ("lfu", 3, 3)],
)
def test_residencies_of_host_memory(residency, first, second):
    # Two slots. 0 1 0 2 0: fifo drops 0 for 2. 0 0 1 2 0: lru does, too; lfu drops 1.
    for ids, misses in (((0, 1, 0, 2, 0), first), ((0, 0, 1, 2, 0), second)):
        seen, _ = disk_ms([[one(e)] for e in ids], "home", {"slots": 2, "residency": residency})
        assert (seen.host_misses, seen.disk_bytes) == (misses, misses * 1e6)


def test_a_prefetch_has_what_reads_leave_of_the_disk():
    # Read until 10, fetched until 14, run until 15: 11 ms of the link are left, but 5 of the disk, which then has all
    # of a dense. That is 0.6 of the second expert, which is late, and is read as a whole.
    steps = [[one(0)], [one(1)]]
    seen, moe = disk_ms(steps, "gpu", residency="lru", prefetch="oracle:1", slots=2)
    assert moe == exactly([15, 15])
    assert seen.per_step("prefetch_bytes").tolist() == exactly([5e5, 1e5])
    assert (seen.late, seen.wasted, seen.host_misses) == (1, 1, 2)
    assert (seen.disk_bytes, seen.disk_busy_s) == exactly((2.6e6, 26e-3))
    assert seen.unit["link_in"]["busy_s"] == exactly(14e-3)


def test_decisions_see_the_disk():
    # Read at 10: CPU 12, GPU 15. Both read at 10 and 20: 22 and 24 on the CPU.
    for dispatch in ("balance", "bottleneck", "optimal"):
        assert disk_ms([rows_of(1)], dispatch)[1] == exactly([12])


# --- Remote functions ------------------------------------------------------------------------------------------------

REMOTE = {"tflops_per_vcpu": 0.001, "bandwidth_gb_s_per_vcpu": 0.25, "vcpus": 2, "network_gb_s": 0.001}


def test_remote_functions():
    # Two vCPUs: 1 ms a row, 2 ms for the weights. A row of 2 kB: 2 ms each way, so 4. Calls of 5 ms.
    # 4 experts, rows 4, 3, 2, 1: half are remote, 2 and 3: 2 rows max(2, 2) + 8 = 10, 1 row max(1, 2) + 4 = 6.
    trace = trace_of(rows_of(4, 3, 2, 1))
    system = system_with(remote=REMOTE | {"call_ms": 5.0})
    seen = run(trace, system, model_of(experts=4), remote=0.5)
    assert seen.steps[0].moe_s == [exactly(21e-3)]
    assert (seen.remote_s, seen.remote_calls) == (exactly(21e-3), 1)
    assert (seen.hits, seen.misses, seen.demand_bytes) == (0, 2, 2e6)
    assert seen.steps[0].plan == [{0: 1, 1: 1, 2: 3, 3: 3}]
    two = run(trace, system, model_of(experts=4), remote=0.5, replicas=2)
    assert two.steps[0].moe_s == [exactly(15e-3)]
    assert (two.remote_s, two.remote_calls) == (exactly(26e-3), 2)
    # 6 kB in calls of 4 kB: two calls.
    system.remote.payload_mb = 4e-3
    assert run(trace, system, model_of(experts=4), remote=0.5).steps[0].moe_s == [exactly(26e-3)]


def test_ties_go_to_functions_by_the_higher_id():
    seen = run(trace_of(rows_of(1, 1, 1, 1)), system_with(remote=REMOTE), model_of(experts=4), remote=0.3)
    assert seen.steps[0].plan == [{0: 1, 1: 1, 2: 1, 3: 3}]


def test_a_cold_start_comes_first():
    # Loads of 0.1 GB/s: main has 1 MB dense and 3 experts: 40 ms; a function of one expert 10 ms.
    system = system_with(remote=REMOTE | {"start_ms": 7.0, "load_gb_s": 0.1})
    seen = run(trace_of(rows_of(1, 1, 1, 1), rows_of(1)), system, model_of(experts=4), remote=0.25)
    assert [step.cold_s for step in seen.steps] == [exactly(47e-3), 0]
    assert seen.steps[0].duration_s == exactly(47e-3 + 1e-3 + seen.steps[0].moe_s[0])
    # Three of four experts in the layer's function are more than main's dense and one.
    larger = run(trace_of(rows_of(1)), system, model_of(experts=4), remote=0.75)
    assert larger.steps[0].cold_s == exactly(37e-3)
    assert run(trace_of(rows_of(1)), system_with(remote=REMOTE), model_of(experts=4)).steps[0].cold_s == 0


def test_the_clock_of_rates_counts_the_cold_start():
    # Router at 7 + 1 ms: twice the rate.
    system = system_with(remote=REMOTE | {"start_ms": 7.0}, link={"rates": [(0.0, 0.25), (7.5e-3, 0.5)]})
    assert moe_ms(trace_of(rows_of(1)), system, remote=0.0) == exactly([3])
    assert moe_ms(trace_of(rows_of(1)), system) == exactly([5])


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7), st.integers(1, 3))
def test_longest_first_is_near_the_optimum(seconds, replicas):
    given_to = longest_first(dict(enumerate(seconds)), replicas)
    assert sorted(e for experts in given_to for e in experts) == list(range(len(seconds)))
    longest = max(sum(seconds[e] for e in experts) for experts in given_to)
    best = min(
        max(sum(s for s, z in zip(seconds, chosen, strict=True) if z == replica) for replica in range(replicas))
        for chosen in itertools.product(range(replicas), repeat=len(seconds))
    )
    assert best <= longest * (1 + 1e-9)
    assert longest <= (4 / 3 - 1 / (3 * replicas)) * best * (1 + 1e-9)
