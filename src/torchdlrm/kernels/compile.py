"""Compiles functions on arrays to machine code, for the processor at hand, and keeps it on disk.

Numba compiles: it needs no compiler on the user's machine. Functions compile at their first call, which takes seconds;
later processes find them in the `__pycache__` next to the source, or in the user's cache folder (`NUMBA_CACHE_DIR` says
where else), and load them in milliseconds. They release the interpreter's lock.

What is kept on disk is compiled again when its own file changes, but not when another file does from which it calls a
function: so those that call each other stand in one file, and who edits this one removes `__pycache__`.

Arrays of bfloat16, which NumPy does not know, are seen as arrays of uint16.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_READ, _KEEP_IN_ALL_CACHES, _DATA = _I32(0), _I32(3), _I32(1)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that is compiled at its first call with arguments of these types.

    Sums over an array may be taken in any order that the processor likes, which is the same whenever it runs. Indices
    are not checked.
    """
    return _compiled(function)


def compiled_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a function that makes no arrays but views of others, on which it spends no time.

    References to views are not counted: that takes longer than a row of 16 numbers.
    """
    return _compiled(function, _nrt=False)


def inlined_loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `compiled_loop` for others to call: its code becomes part of theirs.

    Otherwise the process that compiles both calls the one that was compiled by itself, and a process that loads them
    from disk calls the copy in the caller's file, which may add up in another order.
    """
    return _compiled(function, _nrt=False, forceinline=True)


def _compiled(function: Callable[..., Any], **more: object) -> Callable[..., Any]:
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract", "reassoc", "nsz"}, **more}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # there is no folder that it may write to
        return njit(function, **options)


@intrinsic  # type: ignore[untyped-decorator]
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask for the cache line of array[index] before it is needed; an index outside the array is harmless."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        bytes_type = ir.IntType(8).as_pointer()
        address = builder.bitcast(builder.gep(data, [arguments[1]]), bytes_type)
        kind = ir.FunctionType(ir.VoidType(), [bytes_type, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [bytes_type], kind)
        builder.call(function, [address, _READ, _KEEP_IN_ALL_CACHES, _DATA])
        return context.get_dummy_value()

    return types.void(array, index), generate


@intrinsic  # type: ignore[untyped-decorator]
def widened(typing_context: Any, value: Any) -> Any:
    """A float32, or the bits of a bfloat16, as float32."""
    del typing_context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        if value == types.float32:
            return arguments[0]
        return builder.bitcast(builder.shl(builder.zext(arguments[0], _I32), _I32(16)), ir.FloatType())

    return types.float32(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def as_in(typing_context: Any, array: Any, value: Any) -> Any:
    """A float32 as the array has it: itself, or the bits of the nearest bfloat16, ties to even, as torch rounds."""
    del typing_context, value

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        if array.dtype == types.float32:
            return arguments[1]
        bits = builder.bitcast(arguments[1], _I32)
        is_odd = builder.and_(builder.lshr(bits, _I32(16)), _I32(1))
        rounded = builder.add(bits, builder.add(is_odd, _I32(0x7FFF)))
        return builder.trunc(builder.lshr(rounded, _I32(16)), ir.IntType(16))

    return array.dtype(array, types.float32), generate
