"""Costs of experts on a machine with more tiers: on a CPU beside units, and read from outside."""

from moetrace.engine.cost import varied_s
from moetrace.engine.tiers.tier_times import outside_s_per_byte
from moetrace.jit.compile import kernel


@kernel
def price_tiers(tiers, machine, active, size):
    """Set what the CPU takes for each active expert, and what reading it from outside takes."""
    term, cpu, link = tiers.term[0], tiers.cpu[0], machine.link[0]
    for i in range(size):
        expert = active[i]
        each_s = outside_s_per_byte(term, machine.share, expert.group)
        expert.outside_s = expert.weight_bytes * each_s if term.contends else 0.0
        if not expert.resident:
            expert.fetch_s = expert.weight_bytes * max(link.s_per_byte, each_s) + link.latency_s
        if term.has_cpu:
            read_bytes = expert.weight_bytes * max(1.0, each_s / cpu.s_per_byte)  # at the slower rate
            expert.cpu_s = varied_s(cpu, expert.rows, read_bytes, cpu.each_s)
