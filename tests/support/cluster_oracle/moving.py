"""Plans that change: when they are made, what moves, and when they take effect."""

from dataclasses import dataclass

from support.cluster_oracle.parts import Machine, Network, Plan, Plans, Policy, Step, less


def loads_of(steps: list[Step], experts: list[int]) -> list[list[int]]:
    """Choices of each expert, [layer][expert]."""
    loads = [[0] * number for number in experts]
    for step in steps:
        for row in step.rows:
            for layer, chosen in enumerate(row.choices):
                for expert in chosen:
                    loads[layer][expert] += 1
    return loads


def moved_into(old: Plan, new: Plan, W: list[list[float]]) -> list[float]:
    """Bytes that each GPU gets: of every layer the experts that it is to hold and does not hold."""
    moved = []
    for gpu in range(len(new[0])):
        wanted = [(layer, expert) for layer in range(len(new)) for expert in sorted(set(new[layer][gpu]) - {-1})]
        moved.append(sum(W[layer][expert] for layer, expert in wanted if expert not in old[layer][gpu]))
    return moved


@dataclass
class Change:
    """What a step has to do with plans before it starts."""

    pause_s: float = 0.0
    moved_bytes: float = 0.0
    made: bool = False


class Rebalance:
    """The plan in force, and the one under way."""

    def __init__(self, machine: Machine, policy: Policy, plans: Plans):
        self.machine, self.policy, self.plans = machine, policy, plans
        self.plan, self.number = plans.first, 0
        self.coming: Plan | None = None
        self.effective_s = 0.0

    @property
    def migrating(self) -> bool:
        return self.coming is not None

    def due(self, number: int) -> bool:
        """Whether a plan is due just before this step."""
        window, interval = self.policy.window, self.policy.interval
        if self.plans.make is None or number < window:
            return False
        return number == window or (interval > 0 and (number - window) % interval == 0)

    def before(self, number: int, steps: list[Step], start_s: float, net: Network) -> Change:
        """Do what comes before a step that starts at `start_s`."""
        if self.coming is not None and not less(start_s, self.effective_s):
            self._put(self.coming)
        if self.coming is not None or not self.due(number):
            return Change()
        assert self.plans.make is not None
        new = self.plans.make(loads_of(steps[number - self.policy.window : number], self.machine.experts))
        into = moved_into(self.plan, new, self.machine.W)
        most, moved = max(into), sum(into)
        if most == 0:
            self._put(new)
            return Change(made=True)
        if self.policy.migrate == "async":
            self.coming = new
            self.effective_s = start_s + most / (self.policy.migrate_share * net.B_net)
            return Change(moved_bytes=moved, made=True)
        self._put(new)
        return Change(net.dispatch_s + most / net.B_net, moved, True)

    def _put(self, plan: Plan) -> None:
        self.plan, self.coming = plan, None
        self.number += 1
