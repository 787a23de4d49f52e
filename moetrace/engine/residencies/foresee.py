"""`foresee`: the GPU keeps the experts of greatest worth, predicted from routing so far (`engine/foresight.py`)."""

from moetrace.spec.choices import Residency

RECORD = Residency(
    name="foresee",
    meaning="the GPU keeps the experts most likely at the next visit and in the long run, learned from routing so far",
    parameters=("ahead_layers", "follows", "now_weight", "long_weight"),
    shares_slots=True,
    foresees=True,
    list_order=105,
)
