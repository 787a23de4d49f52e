"""What stands for an input in a baseline."""

from moetrace.batch.identity import identity


def test_fields_that_are_not_set_and_names_do_not_count():
    spec = {"name": "a", "alpha": 0.3, "gpu": {"name": "x", "cpu": None}, "plan": None}
    assert identity(spec) == identity({"name": "b", "alpha": 0.3, "gpu": {"name": "x"}})
    assert identity(spec) != identity(spec | {"plan": "p.json"})
    assert identity(spec) != identity(spec | {"gpu": {"name": "y"}})
