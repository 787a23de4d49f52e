"""`prefill`: the GPU keeps the experts that the running requests' prompts used most (its books: `engine/prompt.py`)."""

from moetrace.spec.choices import BY_TOUCH, Residency

RECORD = Residency(
    name="prefill",
    meaning="the GPU keeps the experts that the running requests' prompts used most",
    order=BY_TOUCH,
    admits=False,
    counts_prompts=True,
    list_order=40,
)
