"""A slow, obvious oracle of version 2 of the timing model: a whole replay with any mix of its mechanisms.

    machine, policy = from_specs(trace, model, system, spec, slots=7)      or the dataclasses, filled by hand
    figures = replay(trace, machine, policy)

With all mechanisms off it is the oracle of version 1 (`support.oracle`), whose cache, placements and devices it uses.
`machine.py` has the plain numbers and `adapter.py` reads them from the specs; `link.py` is one transfer (rates, loss,
draws), `line.py` one layer's time line, `choose.py` the dispatches, `domains.py` memory domains and relayout,
`store.py` the GPU's cache with evictions and the host's with a disk, `functions.py` remote functions, `run.py` the
steps.

READINGS: what the text of the design leaves open, and how it is read here
==========================================================================

Who takes part
 1. A CPU beside NDP units takes part with dispatch `home`, `cheapest`, `bottleneck` only. `optimal` beside units is
    that of version 1 (home and GPU): else version 1's figures would change. Three devices come up in `optimal` only
    where the caller says so (`from_specs(..., cpu_takes_part=True)`), and in the regret of a dispatch that has a
    CPU.
 2. `optimal` ties: fewest experts not at home; then the list of those, as places in demand order, lexicographically
    least; then the list of their devices, GPU before CPU. So of {first} and {second} it is {first}, as in version 1:
    a vector of devices with home < GPU < CPU would say {second}. Limit: devices^|A| <= 2^20, so 20 active experts
    with two devices, 12 with three; above it `balance`, counted.
 3. `split` is version 1's, and refused if any mechanism of version 2 is on.

Evictions (`gpu.evict_us`; our definition)
 4. Each admission to the GPU, on demand or of a prefetch, that evicts a resident adds evict_s. The seconds of those
    made since the router of the layer before spoke (after that layer, and of prefetches right before this one's
    dense) come before the router of the next layer that runs, also of the next step, after dense and overhead. The
    GPU is idle in them (not busy), prefetches and moves flow, `dense_s` contains them; `evict_s` is their sum.
    Those after the last layer of the trace cost nothing. A cold start (scope request) evicts nobody, and what is
    due stays due. Decisions don't see them. Host memory's evictions are free.

Transfers
 5. A transfer that starts at t lasts: latency, then its bytes (times 1 + eps + ... + eps^R) integrated over
    min(rate(t), cap) from t + latency on, then R*rto. Busy is all of that. `rates` stand for `bandwidth_gb_s`:
    `efficiency` applies to them, and the host read's limit. A line holds from its very second on. The clock runs
    through waits, cold start, overheads, evictions and heads.
 6. Activations back start at act + the busiest of the device's seconds, whatever the chunks; so with `rates` and
    loss they last otherwise than those out.
 7. With chunks, x and y are the transfers' seconds without t_l: resends and timeouts are divided among chunks. C
    `auto` is a decision: it is chosen without draws and at the held rate, then timed with them. T is x' + c' + y' +
    (C-1)*max(...), for a single unit (bottleneck) with its own busy time for c and the layer's C. On the link both
    directions count x + C*t_l and y + C*t_l seconds. For the utilization of link in, they return in the last y +
    C*t_l seconds before T.
 8. The CPU's and home's activations have the link to themselves each, as in version 1.
 9. Prefetches: in dense (with overhead and evictions) and in [router + sum of fetches, router + moe]; at
    min(rate(t), cap)*(1 - eps), entry by entry. Their busy seconds are those in which they flow, and they resend
    nothing. `wait_s` is the time that the whole queue takes likewise.
10. Prefetched and queued experts know no R and no latency; a demand fetch has both.
11. Draws: weights are (step, layer, 0, 1, expert), activations to home (step, layer, 1, 0, 0), back (.., 1, 1, 0),
    to the CPU beside units (.., 2, 0, 0), back (.., 2, 1, 0); relaxed packets have their index as item. A CPU that
    is home is device 1. u = x/2^64 as one division in float64; (1 - eps^(k+1))^p by powers in float64.
12. Relaxed: the pairs (unit, row), unit by unit, rows in trace order, each *distinct* row of a unit once, lie one
    behind another from byte 0 on, h*a bytes each; packet i holds the bytes from i*mtu on. (The bytes of the
    transfer are version 1's count, which may be more: packets that no row touches don't matter.) Activations "host"
    and a CPU: as one unit that has all the experts. A choice is lost once, whatever the number of shards that lost
    it. `gate_mass_total` is over all cells of the trace that are not absent; 1/k is of the trace's k, the width of
    a row. A transfer that is relaxed takes t_l + b/B and resends nothing. The experts' own work is not less for
    lost rows.
13. `resent_bytes`: b*(eps + ... + eps^R), of each direction of the link.
14. `fiddler` compares the *own cost of a miss* (section M: by stream, with caps and the held rate) with that of
    home.
15. `hot:ratio` takes B_l as a decision does: the rate held when the router speaks, without caps.
16. Own costs know no disk, no contention, no activations. In `bottleneck` "own cost" of what a unit runs is its
    shard's seconds, of what the GPU runs `gpu(e)` for a resident, else that of a miss.

Memory domains
17. They need `[ndp]`; without it `host.channels_gb_s` says nothing (refuse it). An expert that stands on one unit
    is localized (cap B_x), on more it is striped or sharded (cap B_h), whatever the placement is called.
18. Contention: each demand fetch and each expert that the CPU (beside units) runs adds W/B_x to its unit, or W/B_h
    to each unit that has a part of it, if that unit runs an expert in this layer. It is in c of the chunks.
19. `relayout` goes with placement `mixed` and residency `ewma`, and needs `ndp.move_gb_s`. n^ starts at 0 and is in
    rows: alpha*n + (1-alpha)*n^, of all experts of the layer, after evictions, where `online` queues. Looked at are
    those with n^ > 0, by n^ descending, then id. Own costs for n^ rows: GPU as a resident if it is one, else as a
    miss under the present layout; CPU, if it takes part, as if striped; unit as if localized. Ties GPU, CPU, unit.
    - GPU: it joins the prefetch queue as by `online` without a limit: neither resident nor queued, its score of
      `ewma` above the bar of `online`; by score descending, then id. Its layout, and a move under way, stay.
    - They join the queue of moves in the order in which they are looked at.
    - CPU: striped. Unit: localized; if it is localized already, or on its way there, it stays on that unit. Others
      go, in the order above, to the unit of least predicted seconds: the sum of `ndp(e)` for n^ rows over the
      layer's experts that units get by this decision and that stand or go there; ties the lowest unit.
    - If that is the layout it has, a pending move is dropped (bytes that flowed stay counted); if it is the one it
      is on the way to, the move goes on; else a move joins the end of one queue for all layers.
    Moves flow like prefetches do before the router speaks (dense, overhead, evictions), not beside moe, from the
    next layer on, at min(move, cap of the present layout), each until 1e-3 bytes are left; then the layout changes,
    also for the very layer whose dense it was, but not for prefetches beside that dense. A cold start (scope
    request) forgets n^ and the queue, and the layout is the first one. With N = 1 both layouts are the same and nothing
    moves.

Disk
20. Only without `[ndp]` and with `[link]`. Host memory begins empty, has `host_slots`, else floor(memory / max W),
    else all experts; at most all.
21. Who reads: every active expert that is neither GPU-resident nor in host memory when the router speaks, wherever
    it runs. After the layer, in demand order, each active one that was not GPU-resident when the router spoke is
    touched, if it is in host memory, else offered: admitted if there is room or a victim that is not active in this
    layer (GPU-resident ones count as active, too). Victims are those of version 1's residencies with scope global,
    which count the demands of experts that were not GPU-resident. Scope request does not empty it.
22. A fetch waits for its read; link and `sum of fetches` count no gaps. The CPU runs in demand order, its first
    start at act (+ t_c with launch "layer"), each expert from max(CPU free, read) on. With chunks c is the time
    from act to its last end, waits included; busy is without.
28. A prefetch that host memory lacks is read at B_d, each byte once, whatever the link sends again. Beside moe the
    disk has moe - sum of reads for it; when that is over the entry waits, and those behind it flow on the link.

Remote functions
23. The remote set: floor(b*E_l) experts of each layer, fewest rows in the first `plan_steps` (32) steps, or of
    `loads`; ties higher id first. They run remotely always; residency, prefetch, hits, misses, host memory and plan
    don't know them. `moe` = max(..., T_remote), in decisions too.
24. LPT runs for each step and layer, on the rows at hand (a replica is a copy of the layer's function): longest
    first, ties lower id; to the least loaded replica, ties lowest. A replica's time is its sum of tau +
    2*n*h*a/B_r, plus calls * t_call; calls = max(1, ceil(sum of n*h*a / payload)) of one direction. A replica
    without rows calls nobody. T_remote is the longest, remote_s their sum, calls theirs. tau = max(Q/(v*F),
    W/(v*B)), without a start.
25. Cold start, once `remote` is set (0 too): start + max(main, largest function)/load; main: L*dense + head + all
    local experts; a layer's function: the remote experts of that layer. `cold_s` comes first in the first step.

Yardsticks
26. Work bound and clairvoyant time: no evictions, waits, cold start, disk or rates; remote experts are not in the work
    bound, T_remote is in the clairvoyant time. The clairvoyant time has the layout in force.
27. Regret: both times as decisions see them, from the same state; `optimal` there has the devices that take part with
    the dispatch. `equal_decisions` counts active experts.
"""

from support.oracle_layer import OracleTrace
from support.tiers_oracle.adapter import from_specs
from support.tiers_oracle.figures import Figures
from support.tiers_oracle.machine import Device, Disk, Plain, Remote, Tiers
from support.tiers_oracle.run import replay

__all__ = ["Device", "Disk", "Figures", "OracleTrace", "Plain", "Remote", "Tiers", "from_specs", "replay"]
