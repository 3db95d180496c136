"""The experts' products in Triton, for GPUs: rows sorted by expert times each expert's stored weights, in one launch.

A program computes a tile: up to ROWS rows of one expert times OUTS outputs of its matrix. The weights are the left
operand of its products, so that tiles of few rows and of many use the same instructions, which add up a row's products
in the same order: what stands beside a row does not change its bits.

Shapes: O outputs and R rows of a tile, I inputs of a step. Importing this needs triton.
"""

import triton
import triton.language as tl

# layout.Format
INT8, FP8, MXFP4 = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)

# An expert is a layout.Expert: three `Outputs` (gate, up, down) of five fields (data, scale, bias, first, step).
DOWN = tl.constexpr(10)
UP = tl.constexpr(5)

GROUP = tl.constexpr(32)  # MXFP4 values that share a scale
FP16_OF_E4M3 = tl.constexpr(256.0)  # an fp16 with an E4M3's bits is so many times too small
FP16_OF_E2M1 = tl.constexpr(14)  # and one with an E2M1's bits so many powers of two
ALIGNED = tl.constexpr(16)  # bytes


@triton.jit
def _pointer(address, dtype: tl.constexpr):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(dtype)), ALIGNED)


@triton.jit
def _stored_rows(outputs, out_O):
    """Where the outputs' weights lie in the stored matrix."""
    return tl.load(outputs + 3) + tl.load(outputs + 4) * out_O


@triton.jit
def _half(bits, sign: tl.constexpr, shift: tl.constexpr):
    """A small float's bits in an fp16, too small by a constant factor: `sign` its sign bit, `shift` up to fp16's."""
    wide = bits.to(tl.uint16)
    return ((wide & sign) * (0x8000 // sign) | (wide & (sign - 1)) << shift).to(tl.float16, bitcast=True)


@triton.jit
def _mxfp4(data, scale, row_O, seen_O, k, inputs, row_step, scale_step, INS: tl.constexpr):
    """[O, I] fp32: a byte holds two E2M1 values, the low nibble first, and a group of them shares a power of two (of at
    most 2^113, where weights never come)."""
    byte_I = k // 2 + tl.arange(0, INS // 2)
    pairs = tl.load(
        data + row_O[:, None] * row_step + byte_I[None, :],
        mask=seen_O[:, None] & (byte_I < inputs // 2)[None, :],
        other=0,
    )
    group_G = k // GROUP + tl.arange(0, INS // GROUP)
    exponents = tl.load(
        scale + row_O[:, None] * scale_step + group_G[None, :],
        mask=seen_O[:, None] & (group_G < inputs // GROUP)[None, :],
        other=0,
    )
    power = ((exponents.to(tl.int32) + FP16_OF_E2M1) << 23).to(tl.float32, bitcast=True)
    values = tl.interleave(_half(pairs, 8, 9), _half(pairs >> 4, 8, 9)).to(tl.float32)
    grouped = tl.reshape(values, (values.shape[0], INS // GROUP, GROUP)) * power[:, :, None]
    return tl.reshape(grouped, (values.shape[0], INS))


@triton.jit
def _add(
    sums_OR, x_IR, data, scale, row_O, seen_O, k, inputs, row_step, scale_step, out_shift, in_shift,
    INS: tl.constexpr, FORMAT: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """The sums and the products of the inputs from `k` on."""
    if FORMAT == MXFP4:
        w_OI = _mxfp4(data, scale, row_O, seen_O, k, inputs, row_step, scale_step, INS)
        return tl.dot(w_OI.to(x_IR.dtype).to(OPERAND), x_IR.to(OPERAND), sums_OR, input_precision="ieee")
    in_I = k + tl.arange(0, INS)
    w_OI = tl.load(
        data + row_O[:, None] * row_step + in_I[None, :], mask=seen_O[:, None] & (in_I < inputs)[None, :], other=0
    )
    if FORMAT == INT8:
        w_OI = w_OI.to(tl.float32)
    if FORMAT == FP8:  # the step lies within one block
        products_OR = tl.dot(_half(w_OI, 0x80, 7).to(OPERAND), x_IR.to(OPERAND), input_precision="ieee")
        scale_O = tl.load(scale + (row_O >> out_shift) * scale_step + (k >> in_shift), mask=seen_O, other=0)
        return sums_OR + products_OR * (scale_O * FP16_OF_E4M3)[:, None]
    return tl.dot(w_OI.to(x_IR.dtype).to(OPERAND), x_IR.to(OPERAND), sums_OR, input_precision="ieee")


@triton.jit
def _finished(sums_OR, outputs, scale, row_O, seen_O, FORMAT: tl.constexpr, BIASED: tl.constexpr):
    """The sums with what belongs to each output."""
    if FORMAT == INT8:
        sums_OR *= tl.load(scale + row_O, mask=seen_O, other=0)[:, None]
    if BIASED:
        sums_OR += tl.load(_pointer(outputs + 2, tl.float32) + row_O, mask=seen_O, other=0)[:, None]
    return sums_OR


@triton.jit
def _activated(gate_OR, up_OR, alpha, cubic, limit, shift, GATED: tl.constexpr):
    """layout.Activation."""
    g = tl.minimum(gate_OR, limit, propagate_nan=tl.PropagateNan.ALL)
    y = g * tl.sigmoid(alpha * (g + cubic * g * g * g))
    if GATED:
        y *= tl.clamp(up_OR, -limit, limit, propagate_nan=tl.PropagateNan.ALL) + shift
    return y


@triton.jit
def experts_kernel(
    tiles, x, y, inputs, outputs, row_step, scale_step, out_shift, in_shift, alpha, cubic, limit, shift,
    UPWARDS: tl.constexpr, GATED: tl.constexpr, BIASED: tl.constexpr, FORMAT: tl.constexpr, STORED: tl.constexpr,
    SCALES: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, INS: tl.constexpr, OPERAND: tl.constexpr,
):  # fmt: skip
    """y [rows, outputs] = x [rows, inputs] times each expert's matrix: up (and the gate) with the activation, or down.

    tiles [programs, 3]: address of the expert, its first row and the one after its last, of those that are the tile's.
    """
    tile = tiles + 3 * tl.program_id(0)
    expert = tl.load(tile).to(tl.pointer_type(tl.int64))
    row_R = tl.load(tile + 1) + tl.arange(0, ROWS)
    there_R = row_R < tl.load(tile + 2)
    out_O = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    seen_O = out_O < outputs

    main = expert + UP if UPWARDS else expert + DOWN
    row_O = _stored_rows(main, out_O)
    data, scale = _pointer(main, STORED), _pointer(main + 1, SCALES)
    sums_OR = tl.zeros((OUTS, ROWS), tl.float32)
    gate_row_O, gate_data, gate_scale, gate_OR = row_O, data, scale, sums_OR
    if GATED:
        gate_row_O = _stored_rows(expert, out_O)
        gate_data, gate_scale = _pointer(expert, STORED), _pointer(expert + 1, SCALES)

    for k in range(0, inputs, INS):
        in_I = k + tl.arange(0, INS)
        kept = (in_I < inputs)[:, None] & there_R[None, :]
        x_IR = tl.load(x + row_R[None, :] * inputs + in_I[:, None], mask=kept, other=0)
        sums_OR = _add(
            sums_OR,
            x_IR,
            data,
            scale,
            row_O,
            seen_O,
            k,
            inputs,
            row_step,
            scale_step,
            out_shift,
            in_shift,
            INS,
            FORMAT,
            OPERAND,
        )
        if GATED:
            gate_OR = _add(
                gate_OR, x_IR, gate_data, gate_scale, gate_row_O, seen_O, k, inputs, row_step, scale_step, out_shift,
                in_shift, INS, FORMAT, OPERAND,
            )  # fmt: skip

    sums_OR = _finished(sums_OR, main, scale, row_O, seen_O, FORMAT, BIASED)
    if UPWARDS:
        if GATED:
            gate_OR = _finished(gate_OR, expert, gate_scale, gate_row_O, seen_O, FORMAT, BIASED)
            sums_OR = _activated(gate_OR, sums_OR, alpha, cubic, limit, shift, GATED)
        else:
            sums_OR = _activated(sums_OR, sums_OR, alpha, cubic, limit, shift, GATED)
    places = y + row_R[None, :] * outputs + out_O[:, None]
    tl.store(places, sums_OR.to(y.dtype.element_ty), mask=seen_O[:, None] & there_R[None, :])
