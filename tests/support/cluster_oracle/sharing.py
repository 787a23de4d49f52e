"""Which copy of an expert each row goes to, and how a step is cut into micro-batches and chunks."""

from support.cluster_oracle.parts import Chunk, Machine, MicroBatch, Plan, Policy, Step

Place = tuple[int, int]  # GPU, slot
Choice = tuple[int, int, int]  # expert, GPU, slot

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mix(z: int) -> int:
    """SplitMix64's output for a state."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def drawn(seed: int, *parts: int) -> int:
    """A number of 32 bits that depends on the seed and all parts."""
    state = seed
    for part in parts:
        state = mix((state + GOLDEN * (part + 1)) & MASK)
    return state >> 32


def copies_of(held: list[list[int]], expert: int) -> list[Place]:
    """Places of an expert in one layer, by ascending GPU, then slot."""
    return [(gpu, slot) for gpu, slots in enumerate(held) for slot, e in enumerate(slots) if e == expert]


def share(step: Step, number: int, plan: Plan, machine: Machine, policy: Policy) -> list[list[list[Choice]]]:
    """[layer][row]: where each choice of each row is run. `number` is the step's."""
    shared = []
    for layer in range(machine.L):
        seen: dict[int, int] = {}  # rows of each expert so far
        of_rows = []
        for index, row in enumerate(step.rows):
            of_row = []
            for expert in row.choices[layer]:
                places = copies_of(plan[layer], expert)
                if not places:
                    raise ValueError(f"the plan of layer {layer} has no copy of expert {expert}")
                x = seen.get(expert, 0)
                seen[expert] = x + 1
                if policy.copies == "even":
                    place = places[(x - number) % len(places)]
                elif policy.copies == "random":
                    place = places[drawn(policy.seed, number, layer, index, expert) % len(places)]
                elif policy.copies == "nearest":
                    place = nearest(places, index, machine)
                else:
                    place = places[index % len(places)]
                of_row.append((expert, *place))
            of_rows.append(of_row)
        shared.append(of_rows)
    return shared


def nearest(places: list[Place], index: int, machine: Machine) -> Place:
    """The first copy on the row's own GPU, else as `row`."""
    if machine.colocated:
        for place in places:
            if place[0] == index % machine.attention:
                return place
    return places[index % len(places)]


def cut(T: int, r1: int, r2: int) -> list[MicroBatch]:
    """Micro-batches of T rows, each with its chunks; empty ones are left out."""
    batches = []
    for i in range(r1):
        batch = MicroBatch(i * T // r1, (i + 1) * T // r1)
        for j in range(r2):
            chunk = Chunk(batch.first + j * len(batch) // r2, batch.first + (j + 1) * len(batch) // r2)
            if len(chunk):
                batch.chunks.append(chunk)
        if len(batch):
            batches.append(batch)
    return batches


def context(step: Step, batch: Chunk) -> int:
    """Cached tokens that the rows attend to: of each request, the highest position among these rows, plus 1."""
    highest: dict[int, int] = {}
    for row in step.rows[batch.first : batch.last]:
        highest[row.request] = max(highest.get(row.request, -1), row.position)
    return sum(position + 1 for position in highest.values())
