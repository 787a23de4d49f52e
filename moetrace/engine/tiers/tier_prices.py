"""What experts cost on a machine with more tiers: on a CPU beside units, and read from outside."""

from moetrace.engine.cost import varied_s
from moetrace.jit.compile import kernel


@kernel
def price_tiers(tiers, machine, active, size):
    """Set what the CPU takes for each active expert, and what reading it from outside takes."""
    term, cpu, link = tiers.term[0], tiers.cpu[0], machine.link[0]
    for i in range(size):
        expert = active[i]
        spread = machine.share > 1 or expert.group == term.all_group
        outside_s_per_byte = term.all_s_per_byte if spread else term.one_s_per_byte
        expert.outside_s = expert.weight_bytes * outside_s_per_byte if term.contends else 0.0
        if not expert.resident:
            expert.fetch_s = expert.weight_bytes * max(link.s_per_byte, outside_s_per_byte) + link.latency_s
        if term.has_cpu:
            read_bytes = expert.weight_bytes * max(1.0, outside_s_per_byte / cpu.s_per_byte)  # at the slower rate
            expert.cpu_s = varied_s(cpu, expert.rows, read_bytes, cpu.each_s)
