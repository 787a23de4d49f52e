"""Accounts of a replay: its energy and its price by part, from seconds and bytes (timing model, section 10)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from moetrace.spec.rates import Watts
from moetrace.spec.system import System

_HOUR_S = 3600.0


class Account(NamedTuple):
    """Energy and cost of one part of the machine; None where the system lists no rate of it.

    Attributes:
        part: `gpu`, `ndp` (all units), `cpu`, `disk`, `link` (both directions), `host` (memory), `machine` (everything
            without a price of its own), or `remote` (functions, paid by use).
        idle_j: Joules that it draws while it waits, over the whole time.
        active_j: Joules that it draws beyond that while it works.
        link_j: Joules that the link draws for the bytes that it carries.
        usd: Its cost, USD.
    """

    part: str
    idle_j: float | None = None
    active_j: float | None = None
    link_j: float | None = None
    usd: float | None = None

    @property
    def energy_j(self) -> float | None:
        """All that it drew."""
        return _sum((self.idle_j, self.active_j, self.link_j))


def accounts_of(system: System, total_s: float, busy_s: Mapping[str, float], link_bytes: float) -> list[Account]:
    """Return the account of each part that has a rate, in the order of `Account.part`.

    Args:
        system: The machine, with its rates.
        total_s: Seconds of the whole replay, waits included.
        busy_s: Busy seconds of each part, by its name in `units.parquet`; of a GPU at lower frequency levels, the
            seconds at the top level that draw the same energy.
        link_bytes: Bytes that the link carried, both ways.
    """
    drawn = _drawn(system, total_s, busy_s, link_bytes)
    spent = {part: rate * (total_s / _HOUR_S) for part, rate in system.usd_hour_by_part.items()}
    parts = [
        part for part in ("gpu", "ndp", "cpu", "disk", "link", "host", "machine") if part in drawn or part in spent
    ]
    return [drawn.get(part, Account(part))._replace(usd=spent.get(part)) for part in parts]


def account_figures(accounts: Sequence[Account], decode_rows: int) -> dict[str, float | None]:
    """Return the figures of `summary.json` that the accounts add up to; those of a table that is not there are not."""
    found: dict[str, float | None] = {}
    energy_j, usd = _sum(one.energy_j for one in accounts), _sum(one.usd for one in accounts)
    if energy_j is not None:
        found |= {"energy_j": energy_j, "energy_per_token_j": energy_j / decode_rows if decode_rows else None}
    if usd is not None:
        found |= {"price_usd": usd, "usd_per_million_tokens": 1e6 * usd / decode_rows if decode_rows else None}
    return found


def unlisted(system: System) -> list[str]:
    """Return the parts of a machine with `[energy]` that are not in its account of energy; `remote` never is."""
    parts = {name: getattr(system, name) for name in ("gpu", "ndp", "cpu", "disk", "link", "remote")}
    return [name for name, part in parts.items() if part is not None and getattr(system.energy, name, None) is None]


def _drawn(system: System, total_s: float, busy_s: Mapping[str, float], link_bytes: float) -> dict[str, Account]:
    energy, found = system.energy, {}
    if energy is None:
        return found
    units = [f"ndp{unit}" for unit in range(system.units)]
    gpus = ["gpu"] if system.cluster is None else system.cluster.names
    for part, names in (("gpu", gpus), ("ndp", units), ("cpu", ["cpu"]), ("disk", ["disk"])):
        watts: Watts | None = getattr(energy, part)
        if watts is not None:
            found[part] = _of_devices(part, watts, total_s, [busy_s[name] for name in names])
    if energy.link is not None:
        found["link"] = Account("link", link_j=energy.link.joule_per_gb * (link_bytes / 1e9))
    return found


def _of_devices(part: str, watts: Watts, total_s: float, busy_s: Sequence[float]) -> Account:
    """The account of equal devices."""
    active_w = watts.active_w - watts.idle_w
    return Account(part, len(busy_s) * watts.idle_w * total_s, active_w * math.fsum(busy_s))


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return math.fsum(known) if known else None
