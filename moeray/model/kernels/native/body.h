/* The kernels in terms of 16 lanes; compiled once for each instruction set, with FN defined, the LANES of its vectors, and
   how many rows (MOST) and outputs (OUTS) of a product its registers hold; with 8 lanes, of more than 3 rows only half of
   each sum, so that a product goes over its weights once for each half.

   A sum is 16 partial sums, one a lane, each in the order of the inputs; they are added by one fixed tree. So the bits
   of an output depend on its own inputs and weights alone: not on other rows, threads, tiles, or, where there is a
   fused multiply-add, on the instruction set. The exception are BF16 inputs where the CPU multiplies pairs, of weights
   that have a format for it: such a sum has 16 parts as well, but each takes two products at a time, in the CPU's own
   way, and where FP8's scales change, the parts so far are scaled and added to those of the whole. */

#include "vectors.h"
#include "decode.h"

#define FETCH_TO (LANES == 16 ? 3 : 2) /* the nearest cache, or the one behind it */
#if LANES == 8
#define HOLD(address) __asm__("" : "+r"(address)) /* as it is; else there is one for each row, and no registers */
#else
#define HOLD(address)
#endif

#include "sums.h"
#if HAS_DIGITS
#include "digits.h"
#endif
#include "tile.h"

/* -- activation ---------------------------------------------------------------------------------------------------- */

/* Gates (and their ups) -> activated. */
INLINE FN(vec) FN(activated)(const Activation *a, int gated, FN(vec) g, FN(vec) up) {
    const FN(vec) limit = FN(splat)(a->limit);
    g = FN(least)(g, limit);
    FN(vec) z = g * (FN(least)(g * g, FN(splat)(1e30f)) * a->cubic + 1) * a->alpha;
    FN(vec) y = g / (FN(exponential)(-z) + 1);
    return gated ? y * (FN(most)(FN(least)(up, limit), -limit) + a->shift) : y;
}

/* Rows of gates, and beside each, 8 lanes on, its up. */
static void FN(activate)(const Activation *a, int gated, f32x16 *rows, int64_t count) {
    const int parts = gated && PARTS > 1 ? PARTS / 2 : PARTS;
    for (int64_t r = 0; r < count; r++) {
        FN(wide) row = LOAD(FN(wide), rows + r);
        for (int p = 0; p < parts; p++) {
#if LANES == 16
            const FN(vec) up = __builtin_shuffle(row.part[p], FN(lanes)() | 8);
#else
            const FN(vec) up = row.part[(p + PARTS / 2) % PARTS];
#endif
            row.part[p] = FN(activated)(a, gated, row.part[p], up);
        }
        memcpy(rows + r, &row, sizeof row);
    }
}

/* -- inputs and outputs -------------------------------------------------------------------------------------------- */

#if HAS_PAIRS
/* Inputs k to k + 64 of a row of BF16 in the order of blocks, filled up with zeros. */
INLINE void FN(pack_block)(const Matrix *m, const uint16_t *x, int64_t k, __m512i *packed) {
    const __m512i *order = (const __m512i *)input_at[m->format];
    __m512i filler[2] = {{0}};
    const void *from = k + 64 <= m->in ? x + k : memcpy(filler, x + k, 2 * (m->in - k));
    const __m512i low = LOAD(__m512i, from), high = LOAD(__m512i, (const char *)from + 64);
    for (int i = 0; i < 2; i++) packed[i] = _mm512_permutex2var_epi16(low, order[i], high);
}

INLINE void FN(pack_pairs)(const Matrix *m, const uint16_t *x, char *packed) {
    const int64_t end = 2 * padded(m->format, m->in);
    for (int64_t at = 0; at < end; at += 128) {
        __m512i block[2];
        FN(pack_block)(m, x, at / 2, block);
        memcpy(packed + at, block, end - at < 128 ? 64 : 128);
    }
}
#endif

/* A row of inputs (F32 or BF16) -> floats in the order of blocks, filled up with zeros; or as they are, in pairs; or in
   digits. */
static void FN(pack)(int64_t format, const void *x, const Matrix *m, char *packed) {
#if HAS_PAIRS
    if (in_pairs(m->format)) return FN(pack_pairs)(m, x, packed);
#endif
#if HAS_DIGITS
    if (in_digits(m->format)) return FN(pack_digits)(m, x, packed);
#endif
    const int64_t size = format == F32 ? 4 : 2, vectors = vectors_of(m->format), block = 16 * vectors;
    for (int64_t k = 0; k < m->in; k += block, packed += 4 * block) {
        FN(vec) natural[8 * PARTS];
        float filler[8 * 16] = {0};
        const void *from = (const char *)x + k * size;
        if (k + block > m->in) from = memcpy(filler, from, (m->in - k) * size);
        for (int64_t j = 0; j < vectors * PARTS; j++) natural[j] = FN(load)(format, from, LANES * j);
        if (vectors == 1) {
            memcpy(packed, natural, 64);
        } else if (vectors == 2) {
            FN(wide) even, odd;
            for (int p = 0; p < PARTS; p++) {
                even.part[p] = __builtin_shuffle(natural[2 * p], natural[2 * p + 1], 2 * FN(lanes)());
                odd.part[p] = __builtin_shuffle(natural[2 * p], natural[2 * p + 1], 2 * FN(lanes)() + 1);
            }
            memcpy(packed, &even, sizeof even);
            memcpy(packed + sizeof even, &odd, sizeof odd);
        } else {
            for (int64_t j = 0; j < vectors; j++)
                for (int64_t i = 0; i < 16; i++)
                    ((float *)packed)[16 * j + i] = ((const float *)natural)[i * vectors + j];
        }
    }
}

/* The first `lanes` of a row to outputs (F32 or BF16). */
INLINE void FN(store_row)(int64_t format, char *y, const f32x16 *row, int64_t lanes) {
    const FN(wide) all = LOAD(FN(wide), row);
    for (int64_t p = 0; LANES * p < lanes; p++)
        FN(store)(format, y, LANES * p, all.part[p], lanes - LANES * p < LANES ? lanes - LANES * p : LANES);
}

/* Those of each of `count` rows, `step` bytes from one row's to the next's. */
static void FN(store_rows)(int64_t format, char *y, int64_t step, const f32x16 *rows, int64_t lanes, int64_t count) {
    if (format == BF16 && lanes == TILE) { /* whole vectors, without a call for each */
        for (int64_t r = 0; r < count; r++) FN(store_row)(BF16, y + r * step, rows + r, TILE);
    } else if (format == BF16 && lanes == TILE / 2) {
        for (int64_t r = 0; r < count; r++) FN(store_row)(BF16, y + r * step, rows + r, TILE / 2);
    } else {
        for (int64_t r = 0; r < count; r++) FN(store_row)(format, y + r * step, rows + r, lanes);
    }
}

/* -- ceilings ------------------------------------------------------------------------------------------------------ */

/* Reads all of `size` bytes, a multiple of READ, as fast as can be: four streams, fetched ahead, since one alone does
   not fill the memory's queue. What it read is of no use. */
static void FN(read)(const char *data, int64_t size) {
    FN(ivec) sums[4] = {{0}};
    for (const char *at = data; at < data + size; at += READ)
        for (int64_t i = 0; i < READ / 4; i += 64)
            for (int j = 0; j < 4; j++) {
                __builtin_prefetch(at + READ / 4 * j + i + READ, 0, 2);
                for (int p = 0; p < PARTS; p++) sums[j] += LOAD(FN(ivec), at + READ / 4 * j + i + 4 * LANES * p);
            }
    sums[0] += sums[1] + sums[2] + sums[3];
    __asm__ volatile("" : : "m"(sums[0]));
}

#if HAS_PAIRS
#define MULTIPLY_ADD(sum, a, b) ((FN(vec))_mm512_dpbf16_ps((__m512)(sum), (__m512bh)(a), (__m512bh)(b)))
#else
#define MULTIPLY_ADD(sum, a, b) ((sum) * (a) + (b))
#endif
/* Multiplies and adds in as many sums as a product has, `times` times: pairs of BF16 where there is an instruction for
   them, else floats. The operations. */
static int64_t FN(multiply)(int64_t times) {
    FN(vec) sums[MOST * OUTS], factor = (FN(vec)){0} + 0.5f, term = (FN(vec)){0} + 1;
    __asm__ volatile("" : "+m"(factor));
#pragma GCC unroll 24
    for (int i = 0; i < MOST * OUTS; i++) { /* all the same, and nobody knows: else one would do for all */
        __asm__ volatile("" : "+m"(term));
        sums[i] = term;
    }
    for (int64_t t = 0; t < times; t++)
#pragma GCC unroll 24
        for (int i = 0; i < MOST * OUTS; i++) sums[i] = MULTIPLY_ADD(sums[i], factor, term);
#pragma GCC unroll 24
    for (int i = 0; i < MOST * OUTS; i++) {
        term = sums[i];
        __asm__ volatile("" : : "m"(term));
    }
    return times * MOST * OUTS * (HAS_PAIRS ? 4 : 2) * LANES;
}

static const Kernels FN(kernels) = {FN(tile), FN(activate), FN(pack), FN(store_rows), FN(read), FN(multiply)};

#undef PARTS
#undef FN
#undef LANES
#undef MOST
#undef UP_TO_MOST
#undef OUTS
#undef APIECE
#undef FETCH_TO
#undef HOLD
#undef HAS_PAIRS
#undef HAS_DIGITS
#undef COMPUTED
#undef MULTIPLIED
#undef MULTIPLY_ADD
#undef MERGE
#undef LANES_OF
#undef DOT
#undef DOTS
#undef DOT_NAME
#undef DOT_NAMES
#undef UNPACK
#undef UNPACK_NAME
#undef STREAM
#undef STREAM_NAME
#undef STREAM_FLOATS
#undef UP_TO_4
#undef UP_TO_8
