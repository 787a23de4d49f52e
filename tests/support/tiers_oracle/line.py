"""One layer's time line with the mechanisms of version 2 (sections A, C, D, F, G, I)."""

import math
from dataclasses import dataclass, field

from support.oracle_layer import demand_order, less
from support.tiers_oracle.functions import Calls
from support.tiers_oracle.link import BACK, CPU, HOME, OUT, View
from support.tiers_oracle.machine import Tiers, Units

AUTO = (1, 2, 4, 8, 16, 32, 64)


@dataclass
class Situation:
    """A layer when its router has spoken; remote experts are not among n."""

    layer: int
    n: dict[int, int]
    T: int
    resident: set[int]
    units: list[Units]  # of each expert, as things lie now
    away: dict[int, int] = field(default_factory=dict)  # rows of remote experts
    calls: Calls = field(default_factory=Calls)
    reads: dict[int, float] = field(default_factory=dict)  # expert -> when the disk has read it
    mass: dict[int, float] = field(default_factory=dict)  # expert -> sum of the gates that chose it

    @property
    def order(self) -> list[int]:
        return demand_order(self.n)


@dataclass
class Exchange:
    """Activations out, work, activations back, of one device."""

    sent_bytes: float = 0.0  # the same number comes back
    out_s: float = 0.0  # on the link, latencies included
    back_s: float = 0.0
    chunks: int = 1
    T: float = 0.0
    resent_out: float = 0.0
    resent_in: float = 0.0


@dataclass
class Line:
    """What happens in one layer; what `support.oracle_memory` reads has the names that it knows."""

    on_gpu: list[int]
    at_home: list[int]
    on_cpu: list[int]
    fetched: list[int]
    gpu_busy: float
    busy: list[float]  # of each unit, or of the CPU that is home
    ends: list[float]  # of each unit; 0 without an expert
    cpu_busy: float
    fetch_s: float
    T_gpu: float
    home: Exchange
    cpu: Exchange
    T_remote: float
    resent_fetching: float
    share: None = None
    streamed: float = 0.0
    run_whole: list[int] = field(default_factory=list)

    @property
    def moe(self) -> float:
        return max(self.T_gpu, self.home.T, self.cpu.T, self.T_remote)

    @property
    def device_of(self) -> dict[int, int]:
        """0 home, 1 GPU, 2 CPU of each expert."""
        return dict.fromkeys(self.at_home, 0) | dict.fromkeys(self.on_gpu, 1) | dict.fromkeys(self.on_cpu, 2)


def chunked_s(x: float, c: float, y: float, t_l: float, start: float, C: int) -> float:
    """Return the time of an exchange in C chunks; x and y are without latencies."""
    if C == 1:
        return x + t_l + c + (y + t_l)
    x, c, y = x / C + t_l, c / C + start, y / C + t_l
    return x + c + y + (C - 1) * max(x, c, y)


def best_chunks(x: float, c: float, y: float, t_l: float, start: float) -> int:
    """Return the number of chunks that takes least, the smallest on a tie."""
    best = 1
    for C in AUTO:
        if less(chunked_s(x, c, y, t_l, start, C), chunked_s(x, c, y, t_l, start, best)):
            best = C
    return best


def exchange(m: Tiers, view: View, device: int, volume: float, c: float, start: float, chunks: int | str) -> Exchange:
    """Time an exchange whose busiest device takes c; start is what each further chunk adds."""
    out = view.send_rows(volume, 0.0, device, OUT)
    x = out.body_s
    back = view.send_rows(volume, x + m.t_l + c, device, BACK)
    y = back.body_s
    C = best_chunks(x, c, y, m.t_l, start) if chunks == "auto" else int(chunks)
    T = chunked_s(x, c, y, m.t_l, start, C)
    return Exchange(volume, x + C * m.t_l, y + C * m.t_l, C, T, out.resent_bytes, back.resent_bytes)


def fetches(m: Tiers, s: Situation, view: View, missing: list[int]) -> tuple[dict[int, tuple[float, float]], float]:
    """Return from when to when each expert is fetched, one after another, and the bytes that were resent."""
    when: dict[int, tuple[float, float]] = {}
    free, resent = 0.0, 0.0
    for e in missing:
        begin = max(free, s.reads.get(e, 0.0))
        transfer = view.fetch(s.layer, e, s.units[e], begin)
        free = begin + (transfer.body_s + m.t_l)
        when[e] = (begin, free)
        resent += transfer.resent_bytes
    return when, resent


def streamed_end(free: float, begin: float, end: float, work: float, C: int) -> float:
    """Return when a fetched expert is done that arrives in C parts; 0: without limit."""
    if C == 1:
        return max(free, end) + work
    if C == 0:
        return max(max(free, begin) + work, end)
    return max(max(free, begin + (end - begin) / C) + work, end + work / C)


def gpu_line(m: Tiers, s: Situation, on_gpu: list[int], when: dict) -> tuple[float, float]:
    """Return the end and the busy seconds of the GPU: residents first, then what is fetched, as it arrives."""
    there = [e for e in on_gpu if e in s.resident]
    T_gpu = busy = m.gpu.layer_start if there else 0.0
    for e in there:
        T_gpu += m.gpu_s(s.layer, e, s.n[e], True)
        busy += m.gpu_s(s.layer, e, s.n[e], True)
    for e, (begin, end) in when.items():
        work = m.gpu_s(s.layer, e, s.n[e], False)
        T_gpu = streamed_end(T_gpu, begin, end, work, m.stream)
        busy += work
    return T_gpu, busy


def home_busy(m: Tiers, s: Situation, at_home: list[int], outside: list[int]) -> list[float]:
    """Return the busy seconds of each unit; outside: experts that others read from the units in this layer."""
    busy = [0.0] * m.N
    for u in range(m.N):
        shards = [e for e in at_home if u in s.units[e]]
        if shards:
            busy[u] = m.home.layer_start + math.fsum(m.home_s(s.layer, e, s.n[e], len(s.units[e])) for e in shards)
            if m.contention and not m.home_is_cpu:
                busy[u] += sum(m.W[s.layer, e] / m.cap(s.units[e]) for e in outside if u in s.units[e])
    return busy


def until_read_s(m: Tiers, s: Situation, at_home: list[int], act: float) -> float:
    """Return the seconds from act to the CPU's last end: it runs one expert after another, each when it is read."""
    clock = act + m.home.layer_start
    for e in at_home:
        clock = max(clock, s.reads.get(e, 0.0)) + m.home_s(s.layer, e, s.n[e], 1)
    return clock - act


def sent_bytes(m: Tiers, s: Situation, at_home: list[int]) -> float:
    """Return the bytes of activations that go to home."""
    counts = [sum(s.n[e] for e in at_home if u in s.units[e]) for u in range(m.N)]
    if m.host_activations:
        counts = [sum(s.n[e] for e in at_home)]
    return m.activation_row_bytes * sum(min(s.T, rows) for rows in counts)


def time_line(
    m: Tiers, s: Situation, view: View, G: set[int], C: set[int] = frozenset(), chunks: tuple | None = None
) -> Line:
    """Run the experts of G on the GPU, those of C on the CPU, the others at home; chunks: of home and CPU."""
    on_gpu = [e for e in s.order if e in G]
    on_cpu = [e for e in s.order if e in C]
    at_home = [e for e in s.order if e not in G and e not in C]
    when, resent = fetches(m, s, view, [e for e in on_gpu if e not in s.resident])
    T_gpu, gpu_busy = gpu_line(m, s, on_gpu, when)
    busy = home_busy(m, s, at_home, [*when, *on_cpu])
    home_chunks, cpu_chunks = chunks or (m.home_chunks, m.cpu_chunks)
    home, cpu, ends, cpu_busy = Exchange(), Exchange(), [0.0] * m.N, 0.0
    if at_home:
        X = sent_bytes(m, s, at_home)
        longest = max(busy)
        if s.reads:
            longest = until_read_s(m, s, at_home, view.send_rows(X, 0.0, HOME, OUT).body_s + m.t_l)
        home = exchange(m, view, HOME, X, longest, m.home.start, home_chunks)
        ends = [
            exchange(m, view, HOME, X, longest if s.reads else c, m.home.start, home.chunks).T if c else 0.0
            for c in busy
        ]
    if on_cpu:
        X = m.activation_row_bytes * min(s.T, sum(s.n[e] for e in on_cpu))
        cpu_busy = m.cpu.layer_start + math.fsum(m.cpu_cost_s(s.layer, e, s.n[e], s.units[e]) for e in on_cpu)
        cpu = exchange(m, view, CPU, X, cpu_busy, m.cpu.start, cpu_chunks)
    fetch_s = 0.0
    for begin, end in when.values():
        fetch_s += end - begin
    if not s.reads:  # they follow each other without a gap
        fetch_s = max((end for _, end in when.values()), default=0.0)
    return Line(
        on_gpu,
        at_home,
        on_cpu,
        list(when),
        gpu_busy,
        busy,
        ends,
        cpu_busy,
        fetch_s,
        T_gpu,
        home,
        cpu,
        s.calls.T,
        resent,
    )


def timed(m: Tiers, s: Situation, now: float, key: tuple[int, int], decided: Line) -> Line:
    """Time what was decided, with draws and the rates of the moments."""
    chunks = (decided.home.chunks, decided.cpu.chunks)
    return time_line(m, s, View(m, now, key), set(decided.on_gpu), set(decided.on_cpu), chunks)
