"""Operations on vectors of floats, for kernels that Numba compiles.

Compilers do not find vectors of channels in loops over windows and taps, so that the innermost
loops of such kernels are written as LLVM's vectors. Numba's cache on disk does not notice changes
of this file: remove it after them.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16  # channels in a vector
_INT = ir.IntType(32)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
CODES = ir.VectorType(ir.IntType(8), LANES)
ZEROS = ir.Constant(FLOATS, [0.0] * LANES)


class Vectors:
    """Writes operations on vectors to ``builder``. Addresses and offsets are in bytes; of what
    lies in memory, the first ``count`` lanes are read and written."""

    def __init__(self, builder: Any, count: Any) -> None:
        self.builder = builder
        lanes = ir.Constant(ir.VectorType(_INT, LANES), list(range(LANES)))
        self.mask = builder.icmp_signed("<", lanes, self.fill(builder.trunc(count, _INT)))

    def fill(self, value: Any) -> Any:
        """A value in all lanes."""
        kind = ir.VectorType(value.type, LANES)
        one = self.builder.insert_element(kind(ir.Undefined), value, _INT(0))
        nowhere = ir.Constant(ir.VectorType(_INT, LANES), [0] * LANES)
        return self.builder.shuffle_vector(one, kind(ir.Undefined), nowhere)

    def _at(self, kind: Any, address: Any, offset: int) -> Any:
        moved = self.builder.add(address, address.type(offset))
        return self.builder.inttoptr(moved, kind.as_pointer())

    def _call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}")
        return self.builder.call(function, arguments)

    def load(self, address: Any, offset: int = 0, kind: Any = FLOATS) -> Any:
        """A vector; 0 in the other lanes."""
        name, size = ("v16f32", 4) if kind == FLOATS else ("v16i8", 1)
        rest = ir.Constant(kind, [kind.element(0)] * LANES)
        at = self._at(kind, address, offset)
        return self._call(f"masked.load.{name}.p0", kind, at, _INT(size), self.mask, rest)

    def store(self, vector: Any, address: Any, offset: int = 0) -> None:
        """Write a vector."""
        name, size = ("v16f32", 4) if vector.type == FLOATS else ("v16i8", 1)
        at = self._at(vector.type, address, offset)
        void = ir.VoidType()
        self._call(f"masked.store.{name}.p0", void, vector, at, _INT(size), self.mask)

    def spread(self, address: Any, offset: int) -> Any:
        """The float at an address, in all lanes."""
        at = self._at(ir.FloatType(), address, offset)
        return self.fill(self.builder.load(at, align=4))

    def integer(self, address: Any, offset: int) -> Any:
        """The integer of 64 bits at an address."""
        return self.builder.load(self._at(ir.IntType(64), address, offset))

    def fma(self, one: Any, other: Any, summand: Any) -> Any:
        """one * other + summand, rounded once."""
        return self._call("fma.v16f32", FLOATS, one, other, summand)
