"""`foresee`: the GPU keeps what is worth most, by what routing so far lets expect (`engine/foresight.py`)."""

from moetrace.spec.choices import Residency

RECORD = Residency(
    name="foresee",
    meaning="the GPU keeps what is most likely at the next visit and in the long run, learned from routing so far",
    parameters=("ahead_layers", "follows", "now_weight", "long_weight"),
    shares_slots=True,
    foresees=True,
    list_order=105,
)
