"""Names that a shell completes: presets, or else files."""

from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem


class Named(click.ParamType):
    """A text that is one of some names or, if none begins so, a file's path. The named file is checked elsewhere."""

    name = "text"

    def __init__(self, names: Callable[[], Iterable[str]], files: bool = True) -> None:
        """`names` is only called when a shell asks."""
        self._names, self._files = names, files

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the names that begin so."""
        found = [CompletionItem(name) for name in self._names() if name.startswith(incomplete)]
        return found or ([CompletionItem(incomplete, type="file")] if self._files else [])


def _presets(kind: str) -> Callable[[], Iterable[str]]:
    def names() -> Iterable[str]:
        from moetrace.spec import list_presets

        return list_presets(kind)

    return names


def _profiles() -> Iterable[str]:
    from moetrace.generators import list_profiles

    return list_profiles()


def complete_spec(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the name of a model, system or policy, as the argument before it says."""
    kinds = {"model": MODEL, "system": SYSTEM, "policy": POLICY}
    return kinds[ctx.params["kind"]].shell_complete(ctx, param, incomplete) if ctx.params.get("kind") in kinds else []


MODEL, SYSTEM, POLICY = (Named(_presets(kind)) for kind in ("models", "systems", "policies"))
PROFILE = Named(_profiles)
