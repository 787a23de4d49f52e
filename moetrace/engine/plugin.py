"""The one door for policies: ``@policy`` compiles a hook, a built-in one as well as a user's own."""

import dis
import inspect
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, cast

from moetrace.engine.policy_file import is_running, run_file
from moetrace.engine.residency import unchanged
from moetrace.engine.state import CPU, DISPATCH, OWN, RESIDENCY, UsersView
from moetrace.engine.tiers.tier_records import TERM
from moetrace.jit.compile import PURE_PYTHON, kernel
from moetrace.jit.dispatchers import settle
from moetrace.jit.refusals import READS_ONLY, RETURNS
from moetrace.spec.choices import find, legal
from moetrace.spec.errors import UsageError
from moetrace.spec.named import nearest

_ENGINE = __file__.removesuffix("plugin.py")  # as `co_filename` has it, with all its dots
_MAY_WRITE = {True: "plan, state, view.memory and view.groups", False: "state and view.memory"}
ARGUMENTS = ("state", "view", "layer", "load", "plan")


def policy(function: Callable) -> Any:
    """Compile a policy hook `function(state, view, layer, load, plan)`, which returns nothing.

    The same hook serves as a *dispatch*, called when the router of `layer` has spoken, which sets `plan[i] = 1` to run
    the i-th active expert on the GPU (2: on a CPU beside NDP units, with `with_cpu = true`); or as a *residency*,
    called after the layer, which writes `score` (the least is evicted first, infinity never) and `admit` (whether a
    copy that arrives may be kept) into `state`. docs/policies.md has the rules and an example of each.

    - `state[layer, expert]`: `score`, `admit`, `memory` (float64, the policy's own, 0 at the start), `touched` (when
      last, 0 = never), `resident` (for reading).
    - `view`: `step`, `phase` (0 prefill, 1 decode, 2 mixed), `rows`, `slots`, `share`, `out_s_per_row`,
      `link_latency_s`, `alpha`, `half_life`, `most_count`, `age`, scratch `view.groups[g]` (`busy_s`, `rows`,
      `count`), `view.active[i]` with `expert`, `resident`, `gpu_s`, `ndp_s`, `cpu_s`, `device_s`, `fetch_s`,
      `weight_bytes`, `group`, `view.gate_mass[i]` (sum of its rows' gates), and `view.memory` (float64 [64], the
      policy's own, of this layer, 0 at the start).
    - `load` int64 [n]: rows that chose each active expert, in demand order (most first, then by id).
    - `plan` uint8 [n]: 0 at the start.

    Args:
        function: A plain Python function of these five arguments that Numba can compile.

    Returns:
        The compiled hook, which `replay` takes as a policy. In a file that a policy names, it is compiled when it is
        chosen.

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
    if is_running() and inspect.isfunction(function):
        return kernel(function, inline=False, checked=True)  # compiled if it is chosen, or another one calls it
    return _compile(getattr(function, "py_func", function), decides=True)


def _compile(function: Callable, decides: bool) -> Any:
    """Compile a hook as `policy` does; unless it ``decides``, a user's may only read the plan."""
    if not inspect.isfunction(function) or inspect.iscoroutinefunction(function):
        raise UsageError(f"{getattr(function, '__name__', function)!r} is not a plain Python function.")
    where = _where(function)
    parameters = inspect.signature(function).parameters
    if len(parameters) != len(ARGUMENTS):
        raise UsageError(f"{where} takes {len(parameters)} arguments, but a policy takes ({', '.join(ARGUMENTS)}).")
    if PURE_PYTHON:
        return function
    if is_users(function) and "print" not in function.__globals__ and (line := _line_of(function, "print")):
        # a printed number never returned from compiled code, and SIGINT did not end the process
        raise UsageError(
            f"{where} prints{line}, which compiled code cannot; with NUMBA_DISABLE_JIT=1 it runs as plain Python."
        )
    from numba.core.errors import NumbaError, UnsupportedBytecodeError

    from moetrace.engine.state import hook_signature

    hook = hook_signature()
    written = _guarded(function, decides) if is_users(function) else function
    dispatcher = kernel(written, inline=False, checked=is_users(function)).entry()
    try:
        dispatcher.compile(hook.args)
    except (NumbaError, UnsupportedBytecodeError) as error:
        said = RETURNS if RETURNS in str(error) else f"is not a policy: {_cause(error, decides, function)}"
        raise UsageError(f"{where} {said}") from error
    except KeyError as error:  # what Numba says of a record without such a field
        line = _line_of(function, str(error.args[0]))
        raise UsageError(f"{where} is not a policy: there is no {error} in the record that it asks{line}.") from error
    except NotImplementedError as error:  # what Numba says of an assignment to the view, among others
        raise UsageError(f"{where} is not a policy: it does what Numba cannot compile; view is for reading.") from error
    settle(dispatcher)
    dispatcher.is_policy, dispatcher.py_func = True, function  # by whose name it is shown
    return dispatcher


def _guarded(function: Callable, decides: bool) -> Callable:
    """Return a hook that calls a user's, which then can't write what the engine relies on.

    Its code is that of `_user_hook`, with names of its own: compiled code holds what they stood for.
    """
    from moetrace.jit.addresses import record_at
    from moetrace.jit.read_only import for_reading, nothing

    names = {
        "__name__": __name__,
        "UsersView": UsersView,
        "_function": kernel(function, inline=False, checked=True),
        "_nothing": nothing,
        "_for_reading": for_reading,
        "_record_at": record_at,
        "_own": OWN,
        "_term": TERM,
        "_cpu": CPU,
        "_plan_of": _as_it_is if decides else for_reading,
        "_decides": decides,
        "_role": DISPATCH if decides else RESIDENCY,
    }
    return FunctionType(_user_hook.__code__, names, function.__name__)


# `_guarded` gives the code of `_user_hook` other values of these names for each function.
_function = _nothing = _for_reading = _record_at = _plan_of = cast("Callable", None)
_role = 0
_decides = True
_own, _term, _cpu = OWN, TERM, CPU


def _user_hook(state, view, layer, load, plan):
    """Call a user's function, and check what it planned. It may write into state, view.groups and, to decide, plan."""
    own = _record_at(view.own, _own)
    own.step = view.step + 1
    own.role = _role
    seen = UsersView(
        view.step,
        view.phase,
        view.rows,
        view.slots,
        view.share,
        view.out_s_per_row,
        view.link_latency_s,
        view.alpha,
        view.half_life,
        view.most_count,
        view.age,
        view.gpu_start_s,
        view.home_start_s,
        view.gpu_rows,
        view.gpu_launch_s,
        view.home_launch_s,
        view.is_full,
        _for_reading(view.active),
        view.groups,
        _for_reading(view.active.gate_mass),
        own.memory,
    )
    _nothing(_function(state, seen, layer, _for_reading(load), _plan_of(plan)))
    if _decides:
        devices = _cpu
        if own.term_at != 0:
            devices += _record_at(own.term_at, _term).has_cpu
        for i in range(plan.size):
            if plan[i] >= devices:
                if devices > _cpu:
                    raise ValueError("plan[i] must be 0, 1 or 2")
                raise ValueError("plan[i] must be 0 or 1")


@kernel(inline=False)
def _as_it_is(plan):
    """Return a plan, and count the reference: a caller that was not given one would release it all the same."""
    return plan


def load_hook(kind: str, choice: str, own: Mapping[str, Callable] | None = None, tiers: bool = False) -> Any:
    """Return the compiled hook that a policy names: a key of ``own``, that of a record, or ``file.py:function``.

    ``tiers``: that of a record for machines with more tiers, if it has one.

    Raises UsageError if there is no such function, or it is no policy; MoetraceError if the file does not run.
    """
    if own and choice in own:
        return _kept_hook(kind, own[choice])
    record = find(kind, choice)
    if record is not None:
        return _kept_hook(kind, (getattr(record, "tiers_hook", None) if tiers else None) or record.hook or unchanged)
    file, _, name = choice.rpartition(":")
    if not file:
        raise UsageError(f"There is no {kind} {choice!r}; known are {', '.join(legal(kind))}.")
    module = run_file(Path(file))
    function = getattr(module, name, None)
    if function is None:
        there = [each for each, value in vars(module).items() if inspect.isfunction(getattr(value, "py_func", value))]
        raise UsageError(f"{file} defines no {name}{nearest(name, there)}.")
    if not callable(function):
        raise UsageError(f"{file}: {name} is not a function.")
    return _hook(kind, function)  # not kept: a file is run, and its functions made, each time


def _hook(kind: str, function: Callable) -> Any:
    """Compile a function for what it is to be: a user's residency may not change the plan, which was carried out."""
    if getattr(function, "is_policy", False) and kind != "residency":
        return function
    written = getattr(function, "py_func", function)
    return _compile(written, decides=kind != "residency" or not (inspect.isfunction(written) and is_users(written)))


_kept_hook = cache(_hook)


def is_users(function: Callable) -> bool:
    """Whether a hook, compiled or not, is a user's or another package's."""
    return not getattr(function, "py_func", function).__code__.co_filename.startswith(_ENGINE)


def weighs_gates(hook: Callable) -> bool:
    """Whether a user's hook, compiled or not, or a function that it names asks the view for sums of gates."""
    return is_users(hook) and _names_gates(getattr(hook, "py_func", hook), set())


def _names_gates(value: Any, seen: set[int]) -> bool:
    function = getattr(value, "py_func", value)
    if not inspect.isfunction(function) or id(function) in seen:
        return False
    seen.add(id(function))
    codes = [function.__code__]
    for code in codes:
        if "gate_mass" in (*code.co_names, *code.co_consts):
            return True
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
    named = {name for code in codes for name in code.co_names}
    modules = [each for name in named if inspect.ismodule(each := function.__globals__.get(name))]
    inner = [cell.cell_contents for cell in function.__closure__ or ()]
    inner += [space[name] for space in (function.__globals__, *map(vars, modules)) for name in named & space.keys()]
    return any(_names_gates(each, seen) for each in inner)


def _where(function: Callable) -> str:
    code = function.__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}: {function.__name__}"


def _line_of(function: Callable, name: str) -> str:
    """Return where a function first names something, as `` (mine.py, line 7)``; nothing if it does not."""
    line = function.__code__.co_firstlineno
    for each in dis.get_instructions(function):
        line = each.starts_line if type(each.starts_line) is int else getattr(each.positions, "lineno", None) or line
        if each.argval == name and each.opname.startswith(("LOAD_", "STORE_ATTR")):
            return f" ({Path(function.__code__.co_filename).name}, line {line})"
    return ""


def _cause(error: Exception, decides: bool, function: Callable) -> str:
    """Return what Numba found, in one line, with the line of the user's file where it is known."""
    file = Path(function.__code__.co_filename).name
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    named = re.findall(r'File "[^"]*?([^"/\\]+)", line (\d+)', text) + re.findall(r"([^/\\\n]+) \((\d+)\)$", text, re.M)
    lines = [line for line in named if line[0] == file]
    undefined = re.search(r"name '(\w+)' is not defined", text)
    call = re.search(r"No implementation of function .* found for signature:\s*>>> (.+)", text)
    attribute = re.search(r"Unknown attribute '(\w+)' of type (\w+)", text)
    if attribute:
        names = {"UsersView": "view", "Array": "an array", "Record": "a record", "ReadingRecord": "a record"}
        cause = f"there is no {attribute[1]!r} in {names.get(attribute[2], attribute[2])}"
    elif READS_ONLY in text or "readonly array" in text:
        cause = f"{READS_ONLY}: a {'dispatch' if decides else 'residency'} may write into {_MAY_WRITE[decides]} only"
    elif "unsupported opcode" in text:
        cause = "compiled code knows no import, class, global or with inside a function: put those outside"
    elif "Cannot capture the non-constant value" in text:
        cause = "a lambda or a function within it uses its variables, which compiled code cannot: write a loop"
    elif call:
        cause = f"Numba knows no {call[1].strip()}"
    else:
        parts = [part.strip() for part in text.splitlines() if part.strip()]
        cause = next((part for part in parts if not part.startswith(("Failed in", "During", "-", "File"))), parts[0])
    cause = cause if len(cause) <= 160 else f"{cause[:159]}…"
    found = f" ({file}, line {lines[0][1]})" if lines else _line_of(function, undefined[1]) if undefined else ""
    return f"{cause.rstrip('.')}{found}."
