"""`none`: the GPU keeps no expert."""

from moetrace.spec.choices import BY_TOUCH, Residency

RECORD = Residency(name="none", meaning="the GPU keeps no expert", order=BY_TOUCH, admits=False, list_order=10)
