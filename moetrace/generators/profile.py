"""How a model routes, in a few numbers: read from a shipped or a user's TOML file, checked, and written."""

from __future__ import annotations

import hashlib
import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from moetrace.spec.errors import UsageError
from moetrace.spec.load import Loaded, convert, parse, read_text
from moetrace.spec.named import nearest
from moetrace.trace.atomic import whole_file
from moetrace.trace.schema import MAX_EXPERTS, MAX_LAYERS

MAX_DIMENSIONS = 64
MAX_ROWS = 1e6  # that a memory may span
MAX_SKEW = 8.0
MAX_ROUTER = 1 << 26  # numbers that the routers of all layers may have: 256 MiB

Share = Annotated[float, Meta(ge=0, le=1)]
Rows = Annotated[float, Meta(ge=1e-9, le=MAX_ROWS)]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a model routes: the figures that `ProfileDrawer` draws from (docs/generate.md, "The model").

    A router's logit of a row is a sum of independent parts. `request`, `slow`, `fast` and `token` are their shares of
    its variance and sum to 1 at most; the rest is new in every row.

    Attributes:
        name: Name of the profile.
        model: Name of the model that it describes.
        layers: Number of MoE layers.
        experts: Experts of a layer.
        top_k: Experts that a row chooses in a layer.
        dimensions: Number of directions that routers read.
        request: Share of the request's own preference.
        slow: Share of slow memory, from row to row of a request.
        slow_rows: Rows after which slow memory has fallen to 1/e.
        fast: Share of fast memory, from row to row of a request.
        fast_rows: Rows after which fast memory has fallen to 1/e.
        token: Share of the row's token.
        vocabulary: Number of tokens.
        token_zipf: The token of rank r has the frequency (r + 1) ** -token_zipf.
        depth: Correlation of the new part between one layer and the next.
        phase: Share of the variance of popularity that prompt and output do not have in common.
        sink: Chance that a request's first row takes the experts that all sink rows take.
        skew: Standard deviation of the logarithm of popularity, one number a layer.
        curve: Logarithm of popularity from the most to the least popular expert, at equal distances of rank.
    """

    name: str
    model: str
    layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    experts: Annotated[int, Meta(ge=2, le=MAX_EXPERTS)]
    top_k: Annotated[int, Meta(ge=1)]
    dimensions: Annotated[int, Meta(ge=2, le=MAX_DIMENSIONS)]
    request: Share
    slow: Share
    slow_rows: Rows
    fast: Share
    fast_rows: Rows
    token: Share
    vocabulary: Annotated[int, Meta(ge=1, le=65535)]
    token_zipf: Annotated[float, Meta(ge=0, le=8)]
    depth: Share
    phase: Share
    sink: Share
    skew: list[Annotated[float, Meta(ge=0, le=MAX_SKEW)]]
    curve: Annotated[list[Annotated[float, Meta(ge=-100, le=100)]], Meta(min_length=2, max_length=257)]

    @property
    def sha256(self) -> str:
        """Digest of every field, in the order of their names."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()


def list_profiles() -> list[str]:
    """Names of the profiles that ship with moetrace, sorted."""
    return sorted(entry.name[: -len(".toml")] for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def source_of(name: str) -> str:
    """Return in a few words what a shipped profile was fitted to, from the comments at its head."""
    text = _folder().joinpath(f"{name}.toml").read_text(encoding="utf-8")
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    told = " ".join(line[1:].strip() for line in lines).partition("Source: ")[2]
    return re.sub(r"^([\w-]+)/([\w-]+)$", r"\2 of \1", told.partition(" (")[0])


def load_profile(source: str | Path | Profile) -> Profile:
    """Load a profile and check it.

    Args:
        source: Name of a shipped profile, a TOML file or an instance. A text that ends in `.toml` or holds a slash is a
            file.

    Returns:
        The profile.

    Raises:
        UsageError: The name is unknown, or a value makes no sense. The message names the TOML key.
        MoetraceError: A file cannot be read.

    Examples:
        >>> import moetrace as mt
        >>> mt.load_profile("gpt-oss-20b").top_k
        4
    """
    if isinstance(source, Profile):
        loaded = Loaded(msgspec.to_builtins(source), f"profile {source.name}")
    elif not isinstance(source, str | Path):
        raise UsageError(f"A profile is a name, the path of a TOML file or a Profile, got {type(source).__name__}.")
    elif isinstance(source, Path) or source.endswith(".toml") or "/" in source or "\\" in source:
        loaded = Loaded(parse(read_text(source), str(source)), str(source))
    else:
        names = list_profiles()
        if source not in names:
            raise UsageError(
                f"No profile is called {source!r}{nearest(source, names)}; there are {', '.join(names)}, and a path "
                "that ends in .toml is read as a file."
            )
        text = _folder().joinpath(f"{source}.toml").read_text(encoding="utf-8")
        loaded = Loaded(parse(text, f"profile {source}"), f"profile {source}")
    profile = convert(loaded, Profile)
    if profile.top_k > profile.experts:
        loaded.refuse("top_k", f"at most the {profile.experts} experts that a layer has")
    check_router(loaded.where, profile.layers, profile.experts, profile.dimensions)
    if len(profile.skew) != profile.layers:
        raise UsageError(
            f"{loaded.where}: skew wants one number for each of the {profile.layers} layers, got {len(profile.skew)}."
        )
    if (total := profile.request + profile.slow + profile.fast + profile.token) > 1 + 1e-9:
        raise UsageError(f"{loaded.where}: request, slow, fast and token sum to {total:g}, but are shares of 1.")
    return profile


def check_router(where: str, layers: int, experts: int, dimensions: int) -> None:
    """Raise a UsageError that begins with `where` if routers of these sizes take too much memory."""
    if layers * experts * dimensions > MAX_ROUTER:
        raise UsageError(
            f"{where}: {layers} layers of {experts} experts are too many for a profile of {dimensions} dimensions."
        )


def save_profile(profile: Profile, path: str | Path, comment: str = "") -> None:
    """Write a profile to a TOML file that `load_profile` reads, whole or not at all.

    Args:
        profile: The profile.
        path: The new file.
        comment: Text that goes on top of the file, as a comment.

    Raises:
        MoetraceError: The system refuses.

    Examples:
        >>> import moetrace as mt
        >>> mt.save_profile(mt.load_profile("gpt-oss-20b"), "mine.toml", "A copy.")
        >>> mt.load_profile("mine.toml") == mt.load_profile("gpt-oss-20b")
        True
    """
    text = "".join(f"# {line}".rstrip() + "\n" for line in comment.splitlines())
    for name, value in msgspec.to_builtins(profile).items():
        text += f"{name} = {_toml(value)}\n"
    with whole_file(Path(path)) as file:
        file.write(text.encode())


def _toml(value: object) -> str:
    if isinstance(value, list):
        rows = [
            ", ".join(f"{number:.4g}" for number in value[start : start + 12]) for start in range(0, len(value), 12)
        ]
        return "[\n" + "".join(f"    {row},\n" for row in rows) + "]"
    # JSON's strings are TOML's basic strings.
    return msgspec.json.encode(value).decode()


def _folder():
    return resources.files("moetrace.generators").joinpath("profiles")
