"""Triton's interpreter, as these tests use it: kernels run on the CPU, in this process only, and bf16 as a GPU has it.

The stock interpreter keeps bf16 as its 16 bits: tl.dot multiplies bit patterns, and a store to bf16 cuts off instead of
rounding to the nearest even number. `install` mends both. Other arithmetic on bf16 is refused: a kernel raises what it
loads to fp32 first. Checked against the versions below; a new one has to be looked at.
"""

import os
import sys

import numpy as np

CHECKED = ("3.7.", "3.9.")


def to_fp32(bits: np.ndarray) -> np.ndarray:
    """bf16 bits, uint16, as the fp32 numbers they stand for."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def to_bf16(numbers: np.ndarray) -> np.ndarray:
    """fp32 numbers as bf16 bits, uint16, ties to even."""
    numbers = np.asarray(numbers, dtype=np.float32)
    bits = numbers.view(np.uint32)
    # half a step of the 16 bits that go, and one less where the last bit that stays is even: a tie goes down there
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def install() -> None:
    """Interpret every kernel that is imported from now on. Processes started from here know nothing of it."""
    if "triton" in sys.modules:
        raise RuntimeError("Triton was imported already: its own library would not be interpreted")
    os.environ["TRITON_INTERPRET"] = "1"  # read as Triton's own functions are defined
    import triton
    import triton.language as tl
    from triton import knobs
    from triton.runtime import interpreter

    if not triton.__version__.startswith(CHECKED):
        raise RuntimeError(f"Triton {triton.__version__}: its interpreter was not looked at; versions {CHECKED} were")
    del os.environ["TRITON_INTERPRET"]
    knobs.propagate_env = False
    knobs.runtime.interpret = True

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    stock_cast, stock_binary, stock_unary, stock_dot = (
        builder.cast_impl,
        builder.binary_op,
        builder.unary_op,
        builder.create_dot,
    )

    def cast(self, source, wanted):
        have, want = source.dtype.scalar, wanted.scalar
        if have == want or tl.bfloat16 not in (have, want):
            return stock_cast(self, source, wanted)
        if have == tl.bfloat16:
            return stock_cast(self, handle(to_fp32(source.data), tl.float32), wanted)
        return handle(to_bf16(source.data), tl.bfloat16)

    def refuse(*operands):
        if any(x.dtype.scalar == tl.bfloat16 for x in operands):
            raise TypeError("arithmetic on bf16: raise it to fp32 first")

    def binary(self, left, right, operation):
        refuse(left, right)
        return stock_binary(self, left, right, operation)

    def unary(self, operand, operation):
        refuse(operand)
        return stock_unary(self, operand, operation)

    def dot(self, a, b, total, *more):
        a, b = (handle(to_fp32(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return stock_dot(self, a, b, total, *more)

    builder.cast_impl, builder.binary_op, builder.unary_op, builder.create_dot = cast, binary, unary, dot
    builder.create_fp_to_fp = lambda self, source, wanted, rounding: cast(self, source, wanted)
    reduce = interpreter.ReduceOps.apply_impl

    def apply(self, operands):
        refuse(*(x.handle for x in operands))
        return reduce(self, operands)

    interpreter.ReduceOps.apply_impl = apply
