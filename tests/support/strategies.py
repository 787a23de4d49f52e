"""Random small traces, machines and policies: what drives the kernels against the oracle.

Costs of fetch, GPU and NDP are drawn close to each other, so that decisions go both ways, either as arbitrary numbers
(no ties) or as powers of two (many ties).
"""

from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from msgspec import UNSET

from moetrace.spec import Gpu, Link, Model, Ndp, PolicySpec, System
from moetrace.spec.weights import WeightBits
from support.oracle import DECODE, PREFILL, OracleTrace

DISPATCHES = ("ndp", "gpu", "balance", "optimal", "split")

# (residency, prefetch) -> the parameters to try with them
RESIDENCIES: dict[tuple[str, str], list[dict]] = {
    ("none", "none"): [{}],
    ("static", "none"): [{}],
    ("lru", "none"): [{}],
    ("lru", "oracle"): [
        {"prefetch": "oracle:1"},
        {"prefetch": "oracle:6", "p": 0.5, "seed": 7, "prefetch_blocks": True},
    ],
    ("lfu", "none"): [{}, {"half_life": 3}],
    ("lfu", "online"): [{"prefetch": "online:1"}, {"prefetch": "online:3", "half_life": 2}],
    ("lfu", "oracle"): [{"prefetch": "oracle:2", "p": 0.7, "seed": 2**40 + 1}],
    ("prefill", "none"): [{}],
    ("prefill", "prefill"): [{}, {"prefetch_blocks": True}],
    ("ewma", "none"): [{}, {"alpha": 0.8}],
    ("ewma", "online"): [{"prefetch": "online:2"}, {"prefetch": "online:1", "prefetch_blocks": True}],
    ("ewma", "oracle"): [{"prefetch": "oracle:3"}],
    ("lfu-window", "none"): [{}],
    ("lfu-window", "online"): [{"prefetch": "online:2"}],
    ("lfuda", "none"): [{}, {"most_count": 2.5, "evicted_share": 0.25}],
    ("lfuda", "online"): [{"prefetch": "online:2", "most_count": 3}],
    ("lfuda", "oracle"): [{"prefetch": "oracle:2"}],
    ("foresee", "none"): [{}],
    ("foresee", "foresee"): [
        {},
        {"ahead_layers": 1, "margin": 0.0},
        {"ahead_layers": 0, "long_weight": 0.5},
        {"follows": False, "now_weight": 2.0},
    ],
    ("belady", "none"): [{}],
    ("fifo", "none"): [{}],
    ("fifo", "oracle"): [{"prefetch": "oracle:2"}],
    ("sieve", "none"): [{}],
    ("sieve", "oracle"): [{"prefetch": "oracle:2"}],
    ("lfu-in-cache", "none"): [{}],
    ("least-stale", "none"): [{}],
    ("least-stale", "oracle"): [{"prefetch": "oracle:2", "p": 0.6}],
    ("static-hindsight", "none"): [{}],
}


@dataclass
class Case:
    """One replay but for its policy; slots always given."""

    trace: OracleTrace
    model: Model
    system: System
    slots: int


def placements(units: int, loads: Path | None = None) -> list[str]:
    """Return the placements that `units` NDP units allow."""
    proper = [g for g in range(1, units) if units % g == 0]
    return ["ep", "ep-block", "tp", *(f"tp:{g}" for g in proper[-1:]), *(["ep-lpt"] if loads else [])]


def all_policies(units: int, loads: Path | None = None, static: Path | None = None) -> list[PolicySpec]:
    """List every allowed combination of the choices; `ep-lpt` and `static` only if their files are given."""
    policies = []
    dispatches = DISPATCHES if units else ("gpu",)
    for placement, dispatch, scope in product(
        placements(units, loads) if units else ["ep"], dispatches, ("layer", "global")
    ):
        if dispatch == "split" and placement != "tp":
            continue
        for (residency, prefetch), variants in RESIDENCIES.items():
            if residency == "static" and static is None:
                continue
            for parameters in variants:
                fields = {"prefetch": prefetch, "scope": scope} | parameters
                if residency == "foresee" and scope == "layer":  # all layers share the slots
                    continue
                if residency == "static":
                    fields["static"] = str(static)
                policies.append({"placement": placement, "dispatch": dispatch, "residency": residency} | fields)
    if units:
        policies += [{"placement": placement, "dispatch": "hot"} for placement in placements(units, loads)]
    for fields in policies:
        if fields["placement"] == "ep-lpt":
            fields["loads"] = str(loads)
    return [PolicySpec(name=" ".join(f"{value}" for value in fields.values()), **fields) for fields in policies]


def write_loads(path: Path, case: Case, seed: int = 0) -> Path:
    """Write loads for `ep-lpt`, small integers with ties, to path."""
    shape = (case.model.moe_layers, case.model.experts)
    np.savetxt(path, np.random.default_rng(seed).integers(0, 5, shape), fmt="%d", delimiter=",")
    return path


def write_static(path: Path, case: Case, seed: int = 0) -> Path:
    """Write as many experts of each layer as a static set may have, to path."""
    rng = np.random.default_rng(seed)
    layers, experts = case.model.moe_layers, case.model.experts
    chosen = [(layer, e) for layer in range(layers) for e in rng.permutation(experts)[: case.slots // layers]]
    path.write_text("".join(f"{layer},{e}\n" for layer, e in chosen))
    return path


def routing(rng: np.random.Generator, rows: int, shape: tuple[int, int, int], absent: float) -> np.ndarray:
    """Draw ids [rows, L, k]: skewed, often those of the row before, some cells and some (row, layer)s absent."""
    L, E, k = shape
    popularity = rng.dirichlet(np.full(E, 0.7), size=L) * 0.95 + 0.05 / E
    ids = np.empty((rows, L, k), dtype=np.int64)
    for row in range(rows):
        for layer in range(L):
            if row and rng.random() < 0.4:
                ids[row, layer] = ids[row - 1, layer]
            else:
                ids[row, layer] = rng.choice(E, k, replace=False, p=popularity[layer])
    ids[rng.random(ids.shape) < absent] = -1
    ids[rng.random((rows, L)) < absent] = -1
    return ids


def arrivals(rng: np.random.Generator, rows: int, wild: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw request, position and phase of each row: interleaved prompts, then answers; wild: phases at random."""
    requests = int(rng.integers(1, 5))
    names = rng.choice(20, requests, replace=False)
    prompt = rng.integers(0, 5, requests)
    seen = np.zeros(requests, dtype=np.int64)
    request, position, phase = np.empty((3, rows), dtype=np.int64)
    for row in range(rows):
        r = int(rng.integers(requests))
        request[row], position[row] = names[r], seen[r]
        phase[row] = rng.integers(2) if wild else (PREFILL if seen[r] < prompt[r] else DECODE)
        seen[r] += 1
    return request, position, phase


@st.composite
def traces(draw, max_steps: int = 12, max_experts: int = 12) -> tuple[OracleTrace, int]:
    """Draw a trace and its number of experts; sizes shrink, contents come from a seed."""
    rows_of = draw(st.lists(st.integers(1, 6), min_size=1, max_size=max_steps), label="rows of each step")
    L, E = draw(st.integers(1, 4), label="L"), draw(st.integers(2, max_experts), label="E")
    k = draw(st.integers(1, min(4, E)), label="k")
    absent = draw(st.sampled_from([0.0, 0.05, 0.4]), label="absent")
    wild = draw(st.booleans(), label="wild phases")
    sizes = draw(st.sampled_from([None, "layer", "expert"]), label="expert_bytes")
    rng = np.random.default_rng(draw(st.integers(0, 2**32), label="seed"))
    rows = sum(rows_of)
    request, position, phase = arrivals(rng, rows, wild)
    expert_bytes = None
    if sizes:
        expert_bytes = rng.integers(500_000, 1_500_000, L if sizes == "layer" else (L, E))
    offset = np.concatenate(([0], np.cumsum(rows_of)))
    return OracleTrace(routing(rng, rows, (L, E, k), absent), request, position, phase, offset, expert_bytes), E


@st.composite
def weight_tables(draw) -> WeightBits:
    """Draw bits of 4 to about 16 with what is stored beside them."""
    sparse, group = draw(st.sampled_from([0.0, 0.0045, 0.1])), draw(st.sampled_from([0, 32, 128]))
    return WeightBits(
        bits=draw(st.integers(4, 8).map(float)),
        codebook_bits=draw(st.sampled_from([0.0, 16.0])),
        sparse=sparse,
        index_bits=draw(st.sampled_from([16.0, 32.0])) if sparse else 32.0,
        group=group,
        scale_bits=16.0 if group else 0.0,
    )


@st.composite
def models(draw, layers: int, experts: int, top_k: int, ties: bool = False) -> Model:
    """Draw a model of experts of about 1 MB; its dense part is never free, so that every step takes time."""
    bits = st.sampled_from([8.0, 16.0]) if ties else st.floats(4, 16)
    weight_bits = draw(bits | st.lists(bits, min_size=layers, max_size=layers), label="weight_bits")
    sparse_launches = UNSET
    if not ties and draw(st.integers(0, 4), label="tables of bits") == 0:
        weight_bits = draw(weight_tables(), label="weight_bits")
        if weight_bits.sparse:
            sparse_launches = draw(st.sampled_from([UNSET, 0.0, 1.0, 2.5]), label="sparse_launches")
    return Model(
        name="random",
        moe_layers=layers,
        experts=experts,
        top_k=top_k,
        hidden=512,
        moe_hidden=draw(st.sampled_from([UNSET, 512, 256])),
        expert_intermediate=1024,
        expert_matrices=draw(st.sampled_from([1, 2])),
        weight_bits=weight_bits,
        sparse_launches=sparse_launches,
        dense_weight_bits=draw(st.sampled_from([8, 16])),
        activation_bytes=draw(st.sampled_from([1, 2])),
        dense_params_per_layer=draw(st.sampled_from([2**16, 2**19, 2**21])),
        once_params=draw(st.sampled_from([0, 2**20])),
        kv_bytes_per_token_layer=0 if ties else draw(st.floats(0, 4096)),
    )


@st.composite
def systems(draw, units: int, ties: bool = False) -> System:
    """Draw a machine on which an expert of 1 MB takes about 1 ms on the GPU and 0.5 to 16 ms elsewhere."""

    def ratio(low: float, high: float) -> float:
        exponents = st.integers(round(np.log2(low)), round(np.log2(high)))
        return draw(exponents.map(lambda e: 2.0**e) if ties else st.floats(low, high))

    def overhead_us() -> float:
        return 0.0 if ties else draw(st.floats(0, 300))

    gpu = Gpu(
        name="random",
        tflops=2.0**31 / 1e12 * ratio(0.25, 64),
        bandwidth_gb_s=2.0**30 / 1e9,
        memory_gb=1.0,
        reserve_gb=0.0,
        compute_efficiency=1.0 if ties else draw(st.floats(0.5, 1)),
        memory_efficiency=1.0 if ties else draw(st.floats(0.5, 1)),
        launch_us=overhead_us(),
    )
    ndp = Ndp(
        units=max(units, 1),
        gmac_s=2.0**30 / 1e9 * ratio(0.0625, 4),
        bandwidth_gb_s=2.0**30 / 1e9 * ratio(0.0625, 1),
        capacity_gb=1.0,
        command_us=overhead_us(),
    )
    link = Link(bandwidth_gb_s=2.0**30 / 1e9 * ratio(0.0625, 2), latency_us=overhead_us())
    return System(name="random", gpu=gpu, ndp=ndp if units else None, link=link)


@st.composite
def cases(draw, max_steps: int = 12, max_experts: int = 12, max_units: int = 6) -> Case:
    """Draw a trace, a model and a system that go together, and a number of slots; one in seven has no NDP units."""
    trace, experts = draw(traces(max_steps, max_experts))
    _, layers, top_k = trace.experts.shape
    ties = draw(st.booleans(), label="ties")
    if ties and trace.expert_bytes is not None:
        trace = replace(trace, expert_bytes=2 ** (19 + trace.expert_bytes % 2))
    units = draw(st.integers(0, max_units), label="N")
    model = draw(models(layers, experts, top_k, ties))
    slots = draw(st.integers(0, layers * experts), label="slots")
    return Case(trace, model, draw(systems(units, ties)), slots)


def policies(units: int, loads: Path | None = None, static: Path | None = None) -> st.SearchStrategy[PolicySpec]:
    """Draw one of all_policies, each dispatch as often as the others."""
    listed = all_policies(units, loads, static)
    kinds = dict.fromkeys(policy.dispatch for policy in listed)
    groups = [[policy for policy in listed if policy.dispatch == kind] for kind in kinds]
    return st.sampled_from(groups).flatmap(st.sampled_from)


def as_arrays(trace: OracleTrace, experts: int) -> dict[str, np.ndarray]:
    """Return the keywords of `Trace.from_arrays`: ids with the absent one, rows and phase of each step."""
    dtype, absent = (np.uint8, 255) if experts <= 255 else (np.uint16, 65535)
    arrays = {
        "experts": np.where(trace.experts < 0, absent, trace.experts).astype(dtype),
        "request": trace.request.astype(np.int32),
        "position": trace.position.astype(np.int32),
        "row_phase": trace.row_phase.astype(np.uint8),
        "steps": np.diff(trace.offset).astype(np.int64),
        "phase": np.array([trace.phase(step) for step in range(trace.steps)], dtype=np.uint8),
    }
    if trace.expert_bytes is not None:
        arrays["expert_bytes"] = trace.expert_bytes.astype(np.int64)
    if trace.gates is not None:
        arrays["gates"] = trace.gates
    return arrays
