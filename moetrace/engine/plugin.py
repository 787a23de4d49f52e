"""The one door for policies: ``@policy`` compiles a hook, a built-in one as well as a user's own."""

import hashlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from moetrace.engine.residency import unchanged
from moetrace.jit.compile import PURE_PYTHON, kernel
from moetrace.spec.choices import find, legal
from moetrace.spec.errors import MoetraceError, UsageError

_ENGINE = Path(__file__).parent
ARGUMENTS = ("state", "view", "layer", "load", "plan")


def policy(function: Callable) -> Any:
    """Compile a policy hook `function(state, view, layer, load, plan)`, which returns nothing.

    The same hook serves as a *dispatch*, called when the router of `layer` has spoken, which sets `plan[i] = 1` to run
    the i-th active expert on the GPU; or as a *residency*, called after the layer, which writes `score` (the least is
    evicted first, infinity never) and `admit` (whether a copy that arrives may be kept) into `state`. docs/policies.md
    has the rules and an example of each.

    - `state[layer, expert]`: `score`, `admit`, `memory` (float64, the policy's own, 0 at the start), `touched` (when
      last, 0 = never), `resident` (for reading).
    - `view`: `step`, `phase` (0 prefill, 1 decode, 2 mixed), `rows`, `slots`, `share`, `out_s_per_row`,
      `link_latency_s`, `alpha`, `half_life`, scratch `view.groups[g]` (`busy_s`, `rows`, `count`), and `view.active[i]`
      with `expert`, `resident`, `gpu_s`, `ndp_s`, `device_s`, `fetch_s`, `weight_bytes`, `group`.
    - `load` int64 [n]: rows that chose each active expert, in demand order (most first, then by id).
    - `plan` uint8 [n]: 0 at the start.

    Args:
        function: A plain Python function of these five arguments that Numba can compile.

    Returns:
        The compiled hook, which `replay` takes as a policy.

    Raises:
        UsageError: It does not compile to that. The message names file and line.

    Examples:
        >>> import moetrace as mt
        >>> @mt.policy
        ... def residents_only(state, view, layer, load, plan):
        ...     for i in range(load.size):
        ...         plan[i] = view.active[i].resident
        >>> mt.replay("traces/tiny-olmoe.h5", policies=residents_only, slots=48).summary["name"].to_list()
        ['residents_only']
    """
    if getattr(function, "is_policy", False):
        return function
    function = getattr(function, "py_func", function)
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise UsageError(f"{getattr(function, '__name__', function)!r} is not a plain Python function.")
    where = _where(function)
    parameters = inspect.signature(function).parameters
    if len(parameters) != len(ARGUMENTS):
        raise UsageError(f"{where} takes {len(parameters)} arguments, but a policy takes ({', '.join(ARGUMENTS)}).")
    if PURE_PYTHON:
        return function
    from numba.core.errors import NumbaError

    from moetrace.engine.state import hook_signature

    hook = hook_signature()
    dispatcher = kernel(function, inline=False, checked=_is_users(function)).entry()
    try:
        dispatcher.compile(hook.args)
    except NumbaError as error:
        raise UsageError(f"{where} is not a policy: {_first_cause(error)}") from error
    except KeyError as error:  # what Numba says of a record without such a field
        raise UsageError(f"{where} is not a policy: there is no {error} in the record that it asks.") from error
    except NotImplementedError as error:  # what Numba says of an assignment to the view, among others
        raise UsageError(f"{where} is not a policy: it does what Numba cannot compile; view is for reading.") from error
    returns = dispatcher.overloads[hook.args].signature.return_type
    if returns != hook.return_type:
        raise UsageError(f"{where} returns a value, but a policy returns nothing: it writes into plan or state.")
    dispatcher.disable_compile()
    dispatcher.is_policy = True
    return dispatcher


def load_hook(kind: str, choice: str, own: Mapping[str, Callable] | None = None) -> Any:
    """Return the compiled hook that a policy names: a key of ``own``, that of a record, or ``file.py:function``.

    Raises UsageError if there is no such function, or it is no policy; MoetraceError if the file does not run.
    """
    if own and choice in own:
        return _compiled(own[choice])
    record = find(kind, choice)
    if record is not None:
        return _compiled(record.hook or unchanged)
    file, _, name = choice.rpartition(":")
    if not file:
        raise UsageError(f"There is no {kind} {choice!r}; known are {', '.join(legal(kind))}.")
    function = getattr(_run(Path(file)), name, None)
    if function is None:
        raise UsageError(f"{file} defines no {name}.")
    if not callable(function):
        raise UsageError(f"{file}: {name} is not a function.")
    return policy(function)


_compiled = cache(policy)


def _run(path: Path) -> ModuleType:
    name = f"moetrace_policy_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise MoetraceError(f"{path} cannot be read as a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except MoetraceError:
        raise
    except (Exception, SystemExit) as error:
        raise MoetraceError(f"{path} does not run: {type(error).__name__}: {' '.join(str(error).split())}.") from error
    return module


def _is_users(function: Callable) -> bool:
    return not Path(function.__code__.co_filename).is_relative_to(_ENGINE)


def _where(function: Callable) -> str:
    code = function.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}: {function.__name__}"


def _first_cause(error: Exception) -> str:
    """Return what Numba found, in one line, with the line of the user's file where it says so."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    line = re.search(r'File "[^"]*?([^"/\\]+\.py)", line (\d+)', text)
    attribute = re.search(r"Unknown attribute '(\w+)' of type (\w+)", text)
    if attribute:
        names = {"View": "view", "Array": "an array", "Record": "a record"}
        cause = f"there is no {attribute[1]!r} in {names.get(attribute[2], attribute[2])}"
    else:
        lines = [part.strip() for part in text.splitlines() if part.strip()]
        cause = next((part for part in lines if not part.startswith(("Failed in", "During", "-", "File"))), lines[0])
    cause = cause if len(cause) <= 160 else f"{cause[:159]}…"
    return f"{cause.rstrip('.')}{f' ({line[1]}, line {line[2]})' if line else ''}."
