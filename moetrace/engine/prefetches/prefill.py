"""`prefill`: what the prompts used most moves after each prefill."""

from moetrace.engine.prefetch import FROM_PROMPT
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="prefill",
    meaning="what the prompts used most moves after each prefill",
    rule=FROM_PROMPT,
    parameters=("prefetch_blocks",),
    residencies=("prefill",),
    list_order=20,
)
