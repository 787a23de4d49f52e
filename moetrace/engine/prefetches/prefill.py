"""`prefill`: the experts that the prompts used most move after each prefill."""

from moetrace.engine.prefetch import FROM_PROMPT
from moetrace.spec.choices import Prefetch

RECORD = Prefetch(
    name="prefill",
    meaning="the experts that the prompts used most move after each prefill",
    rule=FROM_PROMPT,
    parameters=("prefetch_blocks",),
    residencies=("prefill",),
    list_order=20,
)
