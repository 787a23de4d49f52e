"""The arguments of a user's compiled code: arrays that it may only read, and a record by its address.

Numba knows arrays of numbers for reading only; here are records whose fields are.

A field that is assigned to is refused when the function is compiled, however the record was reached. Nothing is checked
when it runs: the arrays are the same, only their types differ.
"""

from typing import Any

from numba.core import types
from numba.core.datamodel.models import NestedArrayModel, RecordModel
from numba.core.datamodel.registry import register_default
from numba.core.errors import NumbaTypeError
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, lower_setattr_generic, overload

from moetrace.jit.addresses import record_at
from moetrace.jit.refusals import READS_ONLY, RETURNS


class ReadingRecord(types.Record):
    """A record whose fields can't be assigned to."""

    mutable = False

    def __init__(self, record: types.Record) -> None:
        fields: Any = [(name, field._asdict()) for name, field in record.fields.items()]
        for _, field in fields:
            if isinstance(field["type"], types.NestedArray):
                field["type"] = ReadingNestedArray(field["type"].dtype, field["type"].shape)
        super().__init__(fields, record.size, record.aligned)
        self.name = f"Reading{self.name}"

    def can_convert_to(self, typingctx: Any, other: Any) -> None:
        """Say that it is no other record, one that could be assigned to."""


class ReadingNestedArray(types.NestedArray):
    """An array within a record, whose items can't be assigned to."""

    def __init__(self, dtype: Any, shape: tuple[int, ...]) -> None:
        super().__init__(dtype, shape)
        self.mutable = False
        self.name = f"reading{self.name}"


register_default(ReadingRecord)(RecordModel)
register_default(ReadingNestedArray)(NestedArrayModel)


@lower_setattr_generic(ReadingRecord)
def _refuse_field(context: Any, builder: Any, sig: Any, args: Any, attr: str) -> None:
    raise NumbaTypeError(f"{READS_ONLY} ({attr})")


def for_reading(array: Any) -> Any:
    """Return an array of numbers or records as one that a compiled function may read only; as it is, in Python."""
    return array


@overload(for_reading, strict=False)
def _for_reading(array: Any) -> Any:
    return lambda array: _same_for_reading(array)  # type: ignore[call-arg]  an intrinsic's first argument is Numba's


@intrinsic
def _same_for_reading(typingctx: Any, array: Any) -> Any:
    dtype = ReadingRecord(array.dtype) if isinstance(array.dtype, types.Record) else array.dtype

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return impl_ret_borrowed(context, builder, sig.return_type, args[0])

    return array.copy(dtype=dtype, readonly=True)(array), codegen


def nothing(returned: None) -> None:
    """Take what a function returned, which must be nothing: anything else is refused when it is compiled."""
    return  # Numba names the line after a docstring in debug information, so there must be one


@overload(nothing, strict=False)
def _nothing(returned: Any) -> Any:
    if not isinstance(returned, types.NoneType):
        raise NumbaTypeError(RETURNS)
    return lambda returned: None


@overload(record_at, strict=False)
def _record_at(address: Any, dtype: Any) -> Any:
    return lambda address, dtype: _same_record(address, dtype)  # type: ignore[call-arg]


@intrinsic
def _same_record(typingctx: Any, address: Any, dtype: Any) -> Any:
    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

    return dtype.dtype(types.int64, dtype), codegen
