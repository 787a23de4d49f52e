"""A slow, obvious replay on a cluster of GPUs: what the cluster's kernels are held against.

Plain Python, one row at a time: counts are loops over rows, stages are put on resources by a list scheduler, and
nothing has a closed form. It shares no code with the package; plans come in as data. `parts` has what goes in,
`figures` what comes out, `sharing` sends rows to copies, `stages` prices a step, `schedule` runs it, `moving` changes
plans, `running` adds up, `specs` reads models, systems and policies as their TOML files name the fields.

READINGS, where the text leaves room. Times compare by `less`: `a < b` means `a < b * (1 - 1e-12)`.

Rows and stages

1.  The rows of a micro-batch and of a chunk are all rows of the step, absent from a layer or not. `rows of a chunk`
    in a transfer counts absent ones, too; but a transfer of 0 bytes over the wire takes 0, rows and latency included.
2.  "even" is the rotation of `analyze balance`: row number x of an expert goes to copy `(x - step) mod c`. Steps are
    numbered from 0 at the first step of the trace, of all phases together.
3.  "random" is the draw of `analyze balance`, of (seed; step, layer, row's index in the step, expert), mod c. `layer`
    counts MoE layers from 0.
4.  "nearest", colocated: the first copy (by slot) on GPU `row's index mod M`; without one there, and on a
    disaggregated cluster, as "row".
5.  The width of rows on the wire is that in which experts work (`moe_hidden`, else `hidden`), as in version 1.
    `activation_bytes` plays no part on the wire, only in bulk's locality tax, of the same width.
6.  A(l,i) has the layer's overhead t_o (`gpu.layer_overhead_us`) in it, once for each micro-batch. In it GPUs are
    idle: it counts in no busy seconds, neither of GPUs nor of resources. `overhead_s` is its sum.
7.  C_i/ag is not rounded; ceil(T_i/ag) is.
8.  A model without shared experts (`shared_params_per_layer` 0) has S = 0, without a start. S has the bits of dense
    weights. A and S use the roofline "max" always; "sum" is for E.
9.  "its experts" in E(l,i,j) are the slots that got rows: two copies on one GPU that both got rows pay t_g twice.
10. Two copies on one GPU are one GPU: with dedup such a row travels there once.
11. E2A mirrors A2E: the larger of bytes out of an expert GPU and bytes into an attention GPU; it has `row_ns`, too.
12. Network by phase: a step all of prefill rows takes [network.prefill], all of decode rows [network.decode], any
    other step [network] itself. A phase's table replaces single fields, any of them; the rest is [network]'s.
13. A pause and the bytes of a plan use the bandwidth and the latency of the phase of the step that they are made at.

Schedules

14. `serial` runs everything one after another on one resource. Every other schedule is strictly in order: a resource
    waits for the head of its queue, even where a later task is ready.
15. `pipeline:auto`: for each phase (prefill, decode, mixed) r1, then r2, then the order (asas, aass) ascend, and a
    candidate wins if it is `less` than the best so far. The policy's own `order` is ignored. Steps are timed with
    the whole bandwidth, without pauses, with the plan of step 0 and with their own step numbers. Disaggregated or
    colocated alike.
16. Head: once a step, after the last end of the schedule, on all attention GPUs at once.

Bulk, fused, taxes

17. The `(K-1)*(...)` of bulk is paid in every layer of every step, whether or not a row has a choice there. It is
    busy time of every attention GPU and of the resource that they are.
18. fused, for GPU d: `x = ceil(T/ag)*row_s + max(bytes out of an attention GPU, bytes into d)/B_net`, y likewise,
    both 0 if no bytes cross to or from d; c is d's own work with its starts. A GPU without rows has no part.
    Latencies are added for each direction whose bytes cross to d. An attention GPU's port is a limit there, too.
    With two tiers, x is the larger of that and `max(bytes out of a node, bytes into d's node)/B_node`, and the latency
    is the larger one of those tiers that carry bytes.
19. Busy seconds, bytes and fan-out are the same fused as bulk: fusing overlaps work, it saves none. So resource
    seconds (A2E, EG, E2A) are sums of the stages' own times; only `(K-1)*(...)` is not there with fused.
20. Taxes are computed for every `serial` replay, bulk or fused, step by step with the plan and the bandwidth in force:
    launch = bulk - bulk with K-1 starts taken away; locality = that - bulk with K = 1; barrier = that - fused.
    `step` there is without the pause. They are null with a pipeline.

Rebalance

21. A plan is made just before steps `window`, `window + interval` ... from the choices of the last `window` steps
    of any phase. ep-block has expert e of a layer with E_l experts on GPU `floor(e*N/E_l)`.
22. Moved bytes compare the new plan with the one in force, GPU by GPU over all layers, by expert: a second copy on
    the same GPU moves nothing. They are counted in full in the step before which the plan is made, even if the trace
    ends before an async plan takes effect. They are not network bytes; pauses are not busy seconds of a resource.
23. async: the plan is under way from the start of the step before which it is made; it takes effect at the first step
    whose start is not `less` than that plus `most bytes / (migrate_share*B_net)`, B_net by the phase of the step at
    which it is made and not reduced. All steps that start in between run whole at `(1 - migrate_share)*B_net`. Where
    it moves nothing it takes effect at once. Where it takes effect at a step before which a plan is due, it does so
    first, and the new one is then made. A plan that is due while another is under way is never made.
24. Only B_net is shared with a migration, not B_node; weights move over B_net, also with two tiers.
25. A pause counts in `pauses` if the plan moves bytes; `plans` counts plans made.
26. `redundant` unset is as in `analyze balance`, whose rule is more than "the fewest that make slots divisible": at
    least one redundant slot on each GPU. Plans are data here; only `plans_of` takes part in this.

Figures

27. Busy seconds of an attention GPU: A without t_o, S, the `(K-1)*(...)`, head. Of an expert GPU: its own work.
    Colocated: both. Resource seconds: AG = A - t_o + S + (K-1)*(...) + head, A2E, EG, E2A are sums of stages; colocated
    GPU = AG + EG (the greatest GPU's work), NET = A2E + E2A.
28. Imbalance is of one (step, layer): rows (choices) of each expert GPU over all chunks, and its seconds (starts and
    weights of every chunk). A layer's figure is the mean over its steps, the whole's over all (step, layer).
29. Network bytes: dispatched plus combined, summed over expert GPUs, colocated times (1 - 1/M). With two tiers these
    are what passes inside nodes; `node_bytes` is what crosses between them.
30. Fan-out: over (row, layer) with at least one choice; absent ones do not count.
31. exposed_s compares step times without pauses; free transfers have neither latency nor row time; K stays. It is
    held at 0 step by step, then summed.

Two tiers

32. Nodes hold `gpus_per_node` GPUs in order: attention GPUs first, then expert GPUs (colocated: GPU g is in node
    g // gpus_per_node); the last node may have fewer. B_node is of a node and direction.
33. A row comes from each attention GPU with the same probability. Node v receives `R_v*(1 - p_v)` rows, p_v the
    share of attention GPUs in it, R_v the rows with a copy in it (without dedup: the choices); node u sends
    `p_u * sum of R_v over the other nodes`; the larger, over all nodes, counts. Inside bytes are those of one tier:
    everything that an expert GPU receives comes through its own port. E2A the other way. A tier without bytes takes 0.

Slow GPUs

34. A factor is of F and B of one GPU. t_g, the host's overhead and the network are as before. Every attention GPU does
    the same work; A, S, K and the head end with the slowest of them, each of the stages for itself. Busy seconds of an
    attention GPU are its own. Plans, copies and `pipeline:auto`'s candidates know nothing of factors, but the times do.
"""

from support.cluster_oracle.figures import Figures, Span, StepFigures
from support.cluster_oracle.parts import Machine, Network, Plan, Plans, Policy, Row, Step
from support.cluster_oracle.running import replay
from support.cluster_oracle.specs import from_specs, plans_of, steps_of

__all__ = [
    "Figures",
    "Machine",
    "Network",
    "Plan",
    "Plans",
    "Policy",
    "Row",
    "Span",
    "Step",
    "StepFigures",
    "from_specs",
    "plans_of",
    "replay",
    "steps_of",
]
