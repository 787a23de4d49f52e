"""Synthetic traces: who is in which step (`BatchSchedule`), and which experts a row takes (a drawer).

The two don't know each other: anything with ``draw(request, position) -> experts [rows, layers, top_k]`` fills a
schedule. `ZipfDrawer` draws by Zipf's law, `ProfileDrawer` as a `Profile` says that a captured model routes.
"""

from moetrace.generators.batch_schedule import BatchSchedule, StepBlock
from moetrace.generators.fill import generate, generate_trace, top_k_of
from moetrace.generators.imitate import ProfileDrawer
from moetrace.generators.profile import Profile, list_profiles, load_profile, save_profile
from moetrace.generators.streams import MAX_SEED, check_seed
from moetrace.generators.zipf import MAX_ZIPF, ZipfDrawer

__all__ = [
    "MAX_SEED",
    "MAX_ZIPF",
    "BatchSchedule",
    "Profile",
    "ProfileDrawer",
    "StepBlock",
    "ZipfDrawer",
    "check_seed",
    "generate",
    "generate_trace",
    "list_profiles",
    "load_profile",
    "save_profile",
    "top_k_of",
]
