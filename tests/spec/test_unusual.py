"""Values that may not be meant so: they are replayed, and a note says what holds."""

import pytest

import moetrace as mt
from moetrace.engine.setup import Setup, check_setup

TRACE = mt.generate_trace("deepseek-v2-lite", requests=1, prompt=2, output=2)
MODEL = mt.load_model("deepseek-v2-lite")
ROW_MB = MODEL.activation_row_bytes / 1e6


def notes(system: str, policy: str, overrides: dict[str, object]) -> list[str]:
    of = {
        kind: {path.partition(".")[2]: v for path, v in overrides.items() if path.startswith(kind)}
        for kind in ("s", "p")
    }
    setup = Setup(model=MODEL, system=mt.load_system(system, of["s"]), policies=[mt.load_policy(policy, of["p"])])
    return [note for note in check_setup(TRACE, setup)[1] if "without memory" not in note]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"system.host.slots": 5000}, "host.slots = 5,000 of rtx4090-nvme is more than the 1,664 experts of deepseek"),
        (
            {"system.host.slots": 1500, "system.host.memory_gb": 10},
            "take 26.0 GB, more than host.memory_gb = 10, and are",
        ),
        ({"system.host.slots": 500}, None),
        ({"system.host.slots": 0}, None),
    ],
)
def test_slots_of_host_memory(overrides, said):
    found = notes("rtx4090-nvme", "hybrid", overrides)
    assert found == [] if said is None else len(found) == 1 and said in found[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            {"policy.replicas": 33},
            "has replicas = 33, but a layer has 32 remote experts: more copies than that have noth",
        ),
        ({"policy.replicas": 32}, None),
        ({"policy.remote": 0.0, "policy.replicas": 500}, None),
        (
            {"policy.remote": 0.01},
            "has no remote experts: remote = 0.01 of the 64 experts of a layer is less than one.",
        ),
        (
            {"policy.plan_steps": TRACE.steps + 1},
            f"but the trace has {TRACE.steps} steps: its remote experts are chosen by",
        ),
        ({"policy.plan_steps": TRACE.steps}, None),
        ({"system.remote.payload_mb": ROW_MB / 3}, "row's activations: each row takes 3 calls."),
        ({"system.remote.payload_mb": ROW_MB}, None),
        (
            {"system.remote.payload_mb": 1e6},
            "is more than the 0.554 GB of memory that a function has in policy remoe: no",
        ),
        ({"system.remote.payload_mb": 600, "system.remote.memory_gb": 1}, None),
    ],
)
def test_remote_functions(overrides, said):
    found = notes("remoe", "remoe", overrides)
    assert found == [] if said is None else len(found) == 1 and said in found[0]


def test_a_payload_of_nothing_is_refused():
    with pytest.raises(mt.UsageError, match=r"remote.payload_mb wants a number from 1e-09 to 1e\+09, got 0"):
        mt.load_system("remoe", {"remote.payload_mb": 0})
