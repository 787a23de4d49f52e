"""The decisions of a cluster's policy: the fields that it may set, which go together, and its schedule as numbers."""

import re
from typing import NamedTuple

from moetrace.spec.system import System

# Fields of a policy that only a policy of a cluster reads, and those that only one of a single GPU reads.
FIELDS = (
    "schedule",
    "order",
    "shared",
    "execution",
    "kernels_per_layer",
    "redundant",
    "interval",
    "window",
    "copies",
    "migrate",
    "migrate_share",
    "nodes",
    "groups",
    "plan_steps",
)
ONE_GPU = ("dispatch", "residency", "prefetch", "scope")
PLACEMENTS = ("ep", "ep-block", "ep-lpt", "eplb", "eplb-hierarchical", "plan")
PLANNED = ("ep-lpt", "eplb", "eplb-hierarchical")  # from the rows of the steps before
COPYING = ("eplb", "eplb-hierarchical", "plan")
SERIAL, AUTO = "serial", "pipeline:auto"
MOST_PARTS = 256  # micro-batches of a step, and chunks of a micro-batch
_SCHEDULE = re.compile(r"pipeline:([0-9]{1,3}),([0-9]{1,3})", re.ASCII)

SCHEDULES = f"{SERIAL}, {AUTO} or pipeline:r1,r2 with whole numbers from 1 to {MOST_PARTS}"

# Defaults of fields that are not set.
WINDOW, INTERVAL, MIGRATE_SHARE, PLAN_STEPS = 32, 0, 0.1, 32
COPIES = ("even", "row", "random", "nearest")

# Who reads a field, for messages.
_READERS = {
    "order": "schedule pipeline:r1,r2",
    "execution": "schedule serial",
    "kernels_per_layer": "schedule serial",
    "redundant": "placement eplb or eplb-hierarchical",
    "nodes": "placement eplb-hierarchical",
    "groups": "placement eplb-hierarchical",
    "interval": "placement ep-lpt, eplb or eplb-hierarchical",
    "window": "placement ep-lpt, eplb or eplb-hierarchical",
    "migrate": "placement ep-lpt, eplb or eplb-hierarchical",
    "migrate_share": 'migrate = "async"',
    "copies": "placement eplb, eplb-hierarchical or plan",
    "seed": 'copies = "random"',
    "plan": "placement plan",
    "plan_steps": f"schedule {AUTO}",
}


class Parts(NamedTuple):
    """Into how many parts a step is cut."""

    micro_batches: int  # r1
    chunks: int  # r2, of a micro-batch


def parts_of(schedule: str) -> Parts | None:
    """Return r1 and r2 of a schedule, (1, 1) of `serial`; None of `pipeline:auto` and of a text that is no schedule."""
    if schedule == SERIAL:
        return Parts(1, 1)
    found = _SCHEDULE.fullmatch(schedule)
    if found is None or not all(1 <= int(number) <= MOST_PARTS for number in found.groups()):
        return None
    return Parts(int(found[1]), int(found[2]))


def is_schedule(text: str) -> bool:
    """Whether a text is a schedule."""
    return text == AUTO or parts_of(text) is not None


def fields_read(placement: str, schedule: str, copies: str | None, migrate: str | None) -> set[str]:
    """Return the fields, beside the name and the placement, that a policy of a cluster reads."""
    read = {"schedule", "shared"}
    if schedule == SERIAL:
        read |= {"execution", "kernels_per_layer"}
    elif schedule == AUTO:
        read |= {"plan_steps"}
    else:
        read |= {"order"}
    if placement in PLANNED:
        read |= {"interval", "window", "migrate"} | ({"migrate_share"} if migrate == "async" else set())
    if placement in COPYING:
        read |= {"copies"} | ({"seed"} if copies == "random" else set())
    if placement in ("eplb", "eplb-hierarchical"):
        read |= {"redundant"}
    if placement == "eplb-hierarchical":
        read |= {"nodes", "groups"}
    if placement == "plan":
        read |= {"plan"}
    return read


def reader_of(field: str) -> str:
    """Say which policies of a cluster read a field."""
    return _READERS.get(field, "policies of one GPU, which have no schedule,")


def other_kind(policy: str, system: System) -> str:
    """Say in one sentence that a policy is of the other kind of machine, and what to do."""
    if system.cluster is None:
        return (
            f"Policy {policy} has a schedule, so it is one of a cluster, and system {system.name} has one GPU; use a "
            "system with [cluster] (as h100-x8) or a policy without a schedule."
        )
    return (
        f"Policy {policy} is one of a single GPU, and system {system.name} is a cluster of {system.cluster.all_gpus} "
        "GPUs; use a policy with a schedule (as ep-serial)."
    )
