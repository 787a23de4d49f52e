"""The oracle over several steps: what is kept and what moves early, worked out by hand."""

import numpy as np
import pytest
from support.by_hand import MB, hits_of, model_of, ms, one, policy_of, replay, system_of, trace_of, unit
from support.oracle import simulate
from support.oracle_entries import mix, splitmix64

PROMPT = [one(0)] * 3 + [one(1)] * 2 + [one(2)]


def test_lru_demands_all_of_a_layer_at_once():
    # slots 2. {0 1}: both come. {1 2}: 2 cannot evict 1, so 0 goes. {0 3}: 1 was touched before 2, so 0 evicts 1; 3 may
    # not evict 0, so 2 goes. {0 3}: both there.
    assert hits_of(trace_of([one(0, 1)], [one(1, 2)], [one(0, 3)], [one(0, 3)]), "lru", 2) == [0, 1, 0, 2]
    # Three at once into two slots: 0 and 1 stay and 2 is used from a buffer.
    assert hits_of(trace_of([one(0, 1, 2)], [one(2)], [one(0, 1)]), "lru", 2) == [0, 0, 1]


def test_a_demand_on_the_units_touches_too():
    # A demand on a unit touches resident experts: at step 3, 0 has been touched after 1, so 2 evicts 1.
    def hits_on_unit(layer, active, n, resident):
        return set() if active == [0] and resident else set(active)

    trace = trace_of([one(0)], [one(1)], [one(0)], [one(2)], [one(0)], [one(1)])
    policy = policy_of(residency="lru")
    outcome = simulate(trace, model_of(experts=3), system_of(), policy, slots=2, dispatch=hits_on_unit)
    assert outcome.steps["hits"].tolist() == [0, 0, 1, 0, 1, 0]
    assert outcome.layers["ndp_experts"] == 2


def test_scope():
    # Two layers, two slots: with scope layer each layer has one, with scope global layer 0 takes both in step 1.
    trace = trace_of([[[0, 1], []]], [[[1], [0]]], [[[1], [0]]])
    model = model_of(layers=2, experts=3)
    assert hits_of(trace, "lru", 2, model) == [0, 0, 2]  # step 1 keeps 0, step 2 evicts it for 1
    assert hits_of(trace, "lru", 2, model, scope="global") == [0, 1, 2]  # step 2: layer 1's 0 evicts layer 0's 0
    assert hits_of(trace, "lru", 3, model) == [0, 0, 2]  # the third slot is unused
    assert hits_of(trace, "lru", 0, model) == [0, 0, 0]


def test_lfu_keeps_the_most_demanded():
    # 0 twice, 1 once: 2 evicts 1, though 0 was touched longer ago.
    assert hits_of(trace_of([one(0)], [one(0)], [one(1)], [one(2)], [one(0)]), "lfu", 2) == [0, 1, 0, 0, 1]
    # 0 four times, 1 three times: 2 evicts 1, unless the 4 were halved after step 4.
    trace = trace_of(*[[one(e)] for e in (0, 0, 0, 0, 1, 1, 1, 2, 1)])
    assert hits_of(trace, "lfu", 2)[-1] == 0
    assert hits_of(trace, "lfu", 2, half_life=4)[-1] == 1
    # Halved after step 3, 1 has 0.5 and 0 has 1; step 4 makes it 1.5, so 2 evicts 0.
    assert hits_of(trace_of(*[[one(e)] for e in (1, 0, 0, 1, 2, 1)]), "lfu", 2, half_life=3)[-1] == 1


def test_lfuda_forgets_experts_that_were_hot_long_ago():
    # At most 2 a count: 0 scores 2, 1 scores 1 and goes for 2, so that the age is 1. 3 scores 1 + 1, and 2 goes for it.
    # 1, whose count was halved, scores 1 + 1.5: of 0 and 3, which score 2, 0 was touched longer ago.
    trace = trace_of(*[[one(e)] for e in (0, 0, 0, 1, 2, 3, 1, 3, 0)])
    assert hits_of(trace, "lfuda", 2, most_count=2, evicted_share=0.5) == [0, 1, 1, 0, 0, 0, 0, 1, 0]
    assert hits_of(trace, "lfu", 2) == [0, 1, 1, 0, 0, 0, 0, 0, 1]
    # With 3 a count 0 scores 3, and 3 goes for 1.
    assert hits_of(trace, "lfuda", 2, most_count=3, evicted_share=0.5) == [0, 1, 1, 0, 0, 0, 0, 0, 1]


def test_ewma_follows_the_shares():
    # alpha 0.5. Step 1, 4 rows: 0 has 3/8, 1 has 1/8. Step 2: 3/16 and 1/16, and 2 comes with 1/2: 1 goes, though it
    # was touched last. Step 3: 1 comes; 0 has 3/32, 2 has 1/4: 0 goes. Step 4: 2 is there.
    trace = trace_of([one(1), one(0), one(0), one(0)], [one(2)], [one(1)], [one(2)])
    assert hits_of(trace, "ewma", 2, alpha=0.5) == [0, 0, 0, 1]
    # A row counts by its share of all rows of the step, absent ones too. As the only row, 0 has 0.3 * 0.7 * 0.7 at step
    # 3 and 1 has 0.3 * 0.7. In a crowd of nine, 1 has a ninth of that, so 2 evicts 1.
    crowd = [one(1)] + [one()] * 8
    assert hits_of(trace_of([one(0)], [one(1)], [one(2)], [one(0)]), "ewma", 2) == [0, 0, 0, 0]
    assert hits_of(trace_of([one(0)], crowd, [one(2)], [one(0)]), "ewma", 2) == [0, 0, 0, 1]


def test_belady_looks_ahead():
    # At the demand of 2, 0 comes back before 1.
    assert hits_of(trace_of(*[[one(e)] for e in (0, 1, 2, 0, 1)]), "belady", 2) == [0, 0, 0, 1, 0]
    # If several never come back, the one touched longest ago goes. A demanded expert is admitted even if it never comes
    # back.
    assert hits_of(trace_of(*[[one(e)] for e in (0, 1, 2, 3, 2)]), "belady", 2) == [0, 0, 0, 0, 1]
    # Global: in step 2, expert 1 of layer 0 evicts layer 0's 0 (step 3), not layer 1's 0 (still in step 2).
    trace = trace_of([[[0], [0]]], [[[1], [0]]], [[[0], []]])
    assert hits_of(trace, "belady", 2, model_of(layers=2), scope="global") == [0, 1, 0]


def test_a_residency_of_the_users_own():
    def keep_low_ids(layer, n, T, scores):
        return [-e for e in range(len(n))]

    trace = trace_of(*[[one(e)] for e in (0, 1, 2, 0)])
    outcome = simulate(trace, model_of(experts=3), system_of(), policy_of(), slots=2, residency=keep_low_ids)
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 1]


def test_prefill_keeps_what_the_prompt_wanted():
    # wanted = {0, 1}. Nothing is kept of the prompt itself. 0 is fetched and kept, 2 is fetched and not kept.
    trace = trace_of(PROMPT, [one(0)], [one(2)], [one(0, 2)], phases=[0, 1, 1, 1])
    assert hits_of(trace, "prefill", 2) == [0, 0, 0, 1]
    assert hits_of(trace, "prefill", 2, scope="global") == [0, 0, 0, 1]


def test_prefill_evicts_the_unwanted_only():
    # Two slots. Request 0 wants 0 and 3, and gets them. Request 1 makes it 1 (3 times) and 0 (twice): 1 evicts 3,
    # though 0 was touched longer ago.
    steps = [one(0), one(0), one(3)], [one(0)], [one(3)], [one(1)] * 3, [one(1)], [one(0)]
    trace = trace_of(*steps, phases=[0, 1, 1, 0, 1, 1], requests=[0] * 5 + [1] * 4 + [0])
    assert hits_of(trace, "prefill", 2) == [0, 0, 0, 0, 0, 1]


def test_wanted_is_what_the_living_requests_wanted():
    # One slot. Request 0 wants 0 (twice), request 1 wants 1 (once); decode of request 1 demands 1, 1, then 0, 0.
    prompts = [one(0), one(0)], [one(1)]
    decode = [[one(e)] for e in (1, 1, 0, 0)]
    phases = [0, 0, 1, 1, 1, 1]
    # request 0 is over after its prompt: wanted = {1}
    trace = trace_of(*prompts, *decode, phases=phases, requests=[0, 0, 1, 1, 1, 1, 1])
    assert hits_of(trace, "prefill", 1) == [0, 0, 0, 1, 0, 0]
    # request 0 decodes last: wanted = {0}
    trace = trace_of(*prompts, *decode, phases=phases, requests=[0, 0, 1, 1, 1, 1, 0])
    assert hits_of(trace, "prefill", 1) == [0, 0, 0, 0, 0, 1]
    # A prompt that has just ended counts although nothing follows it: 0 and 1 once each, so wanted = {0}, the lower id.
    # 0 evicts the unwanted 1 and is there the next time.
    trace = trace_of(*[[one(e)] for e in (1, 1, 0, 0, 0, 1)], phases=[0, 1, 0, 1, 1, 1], requests=[0, 0, 1, 0, 0, 0])
    assert hits_of(trace, "prefill", 1) == [0, 0, 0, 0, 1, 0]


def test_prefetch_flows_and_is_admitted_before_the_next_dense():
    # wanted = {0, 1}; 0.25 MB/ms. Step 2: 1 ms of dense and 2 of the unit move 0.75 MB of 0. Step 3: 0 is complete in
    # the middle of the dense, yet the router finds it missing, late; 0.5 MB of 1 follow. Step 4: 0 is there. 1 gets
    # its last 0.25 MB at the end of this dense: 1 is late once, though it is demanded again; it is there in step 5.
    trace = trace_of(PROMPT, [one(2)], [one(0)], [one(0, 1)], [one(1)], phases=[0, 1, 1, 1, 1])
    outcome = replay(trace, 2, "ndp", "prefill", "prefill")
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 1, 1]
    assert outcome.steps["late"].tolist() == [0, 0, 1, 1, 0]
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.75, 0.5, 0]) * MB)
    assert (outcome.prefetch_bytes, outcome.demand_bytes) == (2 * MB, 0)
    assert unit(outcome, "link_in")["busy_s"] == ms(8)
    assert unit(outcome, "link_in")["experts"] == 2
    # neither was run on the GPU
    assert (outcome.used, outcome.wasted) == (0, 2)


def test_prefetch_waits_for_demand():
    # As above, on the GPU: 2 is fetched in 4 of its 5 ms, so 0 gets 1 + 1 ms: 0.5 MB. In step 3 it gets 0.25 more, is
    # late, and is overtaken: wasted, and what it moved stays counted; 1 gets 1 ms. Step 4: 0 was wanted, so it was
    # kept; 1 gets 1 ms more, is late, overtaken and wasted; nothing is left in the queue.
    trace = trace_of(PROMPT, [one(2)], [one(0)], [one(0, 1)], phases=[0, 1, 1, 1])
    outcome = replay(trace, 2, "gpu", "prefill", "prefill")
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 1]
    assert outcome.steps["late"].tolist() == [0, 0, 1, 1]
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.5, 0.5, 0.25]) * MB)
    assert (outcome.used, outcome.wasted) == (0, 2)


def test_a_remade_queue():
    # Slots 2, wanted = {0, 1}. The prompt of request 1, over after it, moves 0.75 MB of 0 and makes it 1 with 4, 0 with
    # 3: the queue is 1, 0. Step 3 moves 0.75 MB of 1. Step 4 ends 1, then 0, which is late: 0.5 MB. Step 5 has both.
    prompts = PROMPT, [one(1)] * 2
    requests = [0] * 6 + [1] * 2 + [0] * 3
    trace = trace_of(*prompts, [one(2)], [one(0)], [one(0, 1)], phases=[0, 0, 1, 1, 1], requests=requests)
    outcome = replay(trace, 2, "ndp", "prefill", "prefill")
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 0, 2]
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.75, 0.5, 0]) * MB)
    assert outcome.late == 1  # only 0: of 1 nothing had moved when step 2 demanded it
    # Slots 1: wanted = {0}, then {1}: 0 leaves with its 0.75 MB, wasted. 1 gets 0.75 MB, 0.25 MB, and is not used.
    outcome = replay(trace, 1, "ndp", "prefill", "prefill")
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 0, 1]
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.75, 0.25, 0]) * MB)
    assert outcome.wasted == 2


def test_prefetch_blocks_the_first_decode_step():
    # 2 MB at 0.25 MB/ms: 8 ms; 0 and 1 are there for the dense of that step. Request 1 wants 3, and its decode does not
    # wait: 0.25 MB came in time, late, overtaken; it evicts 1, which was never touched.
    steps = PROMPT, [one(0)], [one(3)] * 4, [one(3)]
    trace = trace_of(*steps, phases=[0, 1, 0, 1], requests=[0] * 7 + [1] * 5)
    outcome = replay(trace, 2, "gpu", "prefill", "prefill", prefetch_blocks=True)
    np.testing.assert_allclose(outcome.steps["wait_s"], [0, 8e-3, 0, 0])
    assert outcome.steps["hits"].tolist() == [0, 1, 0, 0]
    assert outcome.steps["duration_s"][1] == ms(8 + 1 + 1)
    assert (outcome.used, outcome.wasted, outcome.late) == (1, 2, 1)
    # the clairvoyant does not wait; of the prompt's three experts two can be resident and the third is there at 4
    assert outcome.clairvoyant_s == ms(4 + 5 + 1 + 1 + 1)


def test_oracle_prefetch_comes_in_time_or_is_late():
    # Three layers, dense 8 ms, depth 2. Router of layer 0: 1's and 2's experts join. 1 ms of moe (5 - 4) and the dense
    # of layer 1 move both: 2 MB of 2.25. Layer 1's is complete but late: fetched, overtaken, wasted. Layer 2's is used.
    model = model_of(layers=3, experts=3, activation_bytes=0, dense_params_per_layer=8 * MB)
    trace = trace_of([[[0], [1], [2]]])
    outcome = replay(trace, 6, "gpu", "lru", "oracle:2", model)
    assert outcome.layers["hits"].tolist() == [0, 0, 1]
    assert (outcome.late, outcome.wasted, outcome.used) == (1, 1, 1)
    assert (outcome.prefetch_bytes, outcome.demand_bytes) == (2 * MB, 2 * MB)
    assert outcome.steps["moe_s"] == ms(5 + 5 + 1)
    assert unit(outcome, "link_in")["experts"] == 4
    # depth 1: layer 1's gets 1 + 8 ms and is late; layer 2's joins in layer 1, gets 1 + 8 ms and is late too
    outcome = replay(trace, 6, "gpu", "lru", "oracle:1", model)
    assert (outcome.hits, outcome.late, outcome.wasted, outcome.used) == (0, 2, 2, 0)
    # with p = 0 nothing joins
    assert replay(trace, 6, "gpu", "lru", "oracle:2", model, p=0.0).prefetch_bytes == 0


def test_oracle_prefetch_wraps_and_forgets():
    # One layer, depth 1, two units: 1 ms of dense and 1 of moe, 0.25 MB each. Step 1: 1 joins, 0.25. Step 2: 0.25,
    # late, 2 joins, 0.25. Step 3: 0.25, all of 1; but it was for step 2: it leaves, wasted, and joins again for step 4,
    # behind 2, which gets 0.25. Step 4: 0.25 more for 2, which leaves, wasted; 0.25 for 1.
    trace = trace_of([one(0)], [one(1)], [one(2)], [one(1)])
    outcome = replay(trace, 4, "ndp", "lru", "oracle:1", units=2)
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0.25, 0.5, 0.5, 0.5]) * MB)
    assert (outcome.hits, outcome.late, outcome.wasted, outcome.used) == (0, 1, 2, 0)


def test_oracle_forgets_within_a_step():
    # Two layers, depth 1, two units, 0.25 MB in each dense and moe. Each entry gets 0.5 MB while its layer is ahead or
    # 0.25 once it is there, and leaves, wasted, when the next router speaks: of five four with some bytes moved.
    model = model_of(layers=2, experts=3, activation_bytes=0)
    trace = trace_of([[[0], [0]]], [[[1], [0]]], [[[2], [0]]])
    outcome = replay(trace, 6, "ndp", "lru", "oracle:1", model, units=2)
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0.75, 1, 1]) * MB)
    assert (outcome.hits, outcome.late, outcome.wasted) == (0, 1, 4)


def test_overtaken_before_it_moved_is_not_wasted():
    # 1 and 2 join, 1 gets 0.5 MB, 2 nothing; both are fetched.
    outcome = replay(trace_of([one(0)], [one(1), one(2)]), 4, "gpu", "lru", "oracle:1")
    assert (outcome.prefetch_bytes, outcome.late, outcome.wasted) == (MB / 2, 1, 1)


def test_an_oracle_prefetch_stays_queued_for_a_later_step():
    # The same with 1 in steps 2, 3 and 4: the entry is now for step 3, then 4, stays, is late once, and arrives.
    trace = trace_of([one(0)], [one(1)], [one(1)], [one(1)])
    outcome = replay(trace, 4, "ndp", "lru", "oracle:1", units=2)
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0.25, 0.5, 0.25, 0]) * MB)
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 1]
    assert (outcome.late, outcome.wasted) == (1, 1)  # never run on the GPU


def test_online_queues_what_scores_above_the_lowest_resident():
    # One slot, lfu, m = 1, on the unit; 1 ms of dense, 2 of moe. Step 1: 0 and 1 score 1, the free slot 0: 0 joins.
    # Step 2: 0 is late, gets 0.75 MB; 1 joins behind it. Step 3: 0.25 and 0.5. Step 4: 0 is there; 1 gets 0.5.
    # Step 5: 1 takes the only slot, wasting 0, which was never run on the GPU; 0 scores 5 > 1: it joins. Step 6: late.
    trace = trace_of([one(0, 1)], *[[one(0)]] * 5)
    outcome = replay(trace, 1, "ndp", "lfu", "online:1")
    assert outcome.steps["hits"].tolist() == [0, 0, 0, 1, 0, 0]
    assert outcome.steps["late"].tolist() == [0, 1, 0, 0, 0, 1]
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.75, 0.5, 0, 0.75]) * MB)
    assert outcome.wasted == 2  # 0, and 1 at the end


def test_online_fills_free_slots():
    # Two slots. 0 joins after step 1, is complete in step 3 and there in step 4 with 3 demands. 1 has one, less than
    # the lowest resident, but a slot is free, which counts 0: it joins.
    trace = trace_of(*[[one(e)] for e in (0, 0, 0, 1, 2)])
    outcome = replay(trace, 2, "ndp", "lfu", "online:1")
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.25, 0, 0.75]) * MB)


def test_a_prefetch_without_room_is_dropped():
    # No slots at all: 0 arrives in the dense of step 3, is dropped before the next, joins again after it.
    trace = trace_of(*[[one(0)]] * 4)
    outcome = replay(trace, 0, "ndp", "lfu", "online:1")
    assert (outcome.hits, outcome.wasted) == (0, 1)
    np.testing.assert_allclose(outcome.steps["prefetch_bytes"], np.array([0, 0.75, 0.25, 0]) * MB)


def test_splitmix64_is_the_published_generator():
    # its first output for seed 0 is that of the reference implementation
    assert mix(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    drawn = [splitmix64(7, step, layer, e) / 2**64 for step in range(10) for layer in range(10) for e in range(10)]
    assert len(set(drawn)) == 1000
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
