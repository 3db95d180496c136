/* The kernels in terms of vectors of 16; compiled once for each instruction set, with FN, MOST and OUTS defined.

   A sum is 16 partial sums, one a lane, each in the order of the inputs; they are added by one fixed tree. So the bits
   of an output depend on its own inputs and weights alone: not on other rows, threads, tiles, or, where there is a
   fused multiply-add, on the instruction set. */

#include "vectors.h"

/* -- decoding ------------------------------------------------------------------------------------------------------ */

INLINE f32x16 FN(half)(u16x16 bits) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return JOIN(f32x16, _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)bits)),
                _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)bits, 1)));
#else
    u32x16 wide = __builtin_convertvector(bits, u32x16);
    return (f32x16)((wide & 0x8000) << 16 | (wide & 0x7fff) << 13) * 0x1p112f;
#endif
}

/* The compiler converts bytes one by one where it is not told the instruction. */
INLINE i32x16 FN(widen)(i8x16 bytes) {
#if defined(__AVX512F__)
    return (i32x16)_mm512_cvtepi8_epi32((__m128i)bytes);
#elif defined(__AVX2__)
    return JOIN(i32x16, _mm256_cvtepi8_epi32((__m128i)bytes),
                _mm256_cvtepi8_epi32(_mm_unpackhi_epi64((__m128i)bytes, (__m128i)bytes)));
#else
    return __builtin_convertvector(bytes, i32x16);
#endif
}

/* E4M3 is FP16 with another bias and fewer digits: read as FP16 it is too small by 2^8, subnormals too. */
INLINE f32x16 FN(e4m3)(i8x16 bytes) {
#if defined(__AVX2__)
    i16x16 wide = (i16x16)_mm256_cvtepi8_epi16((__m128i)bytes);
#else
    i16x16 wide = __builtin_convertvector(bytes, i16x16);
#endif
    return FN(half)((u16x16)(wide << 7 & (int16_t)0xbfff));
}

/* Each of 4 E8M0 bytes on 4 lanes. A byte is the exponent of a float; the byte 0 is the subnormal 2^-127. */
INLINE f32x16 FN(e8m0)(const uint8_t *scale) {
    i8x16 four = {0};
    memcpy(&four, scale, 4);
    four = __builtin_shuffle(four, (i8x16){0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3});
    u32x16 exponents = (u32x16)FN(widen)(four) << 23 & 0x7f800000;
    return (f32x16)(exponents | ((u32x16)(exponents == 0) & 0x400000));
}

/* Vector j of the block of weights at `w`. INT8 is scaled when its sum is complete. */
INLINE f32x16 FN(decode)(const int format, Row w, const int j) {
    switch (format) {
        case F32: return LOAD(f32x16, w.data);
        case F16: return FN(half)(LOAD(u16x16, w.data));
        case BF16: return (f32x16)(j ? LOAD(u32x16, w.data) & 0xffff0000 : LOAD(u32x16, w.data) << 16);
        case INT8: return __builtin_convertvector(FN(widen)(LOAD(i8x16, w.data)), f32x16);
        case FP8: return FN(e4m3)(LOAD(i8x16, w.data)) * (256.0f * LOAD(float, w.scale));
        default: {
            const f32x16 values = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
            i32x16 nibbles = LOAD(i32x16, w.data) >> (4 * j);
            return __builtin_shuffle(values, nibbles & 15) * FN(e8m0)(w.scale);
        }
    }
}

INLINE Row FN(at)(const int format, const Matrix *m, Row w, int64_t k) {
    int64_t scale = format == FP8 ? (k >> m->in_shift) * 4 : format == MXFP4 ? k / 32 : 0;
    return (Row){w.data + bytes_of(format, k), w.scale + scale};
}

/* The last block of a row where weights do not fill it, with zeros for the missing ones. */
INLINE Row FN(filled)(const int format, const Matrix *m, Row w, int64_t k, uint8_t filler[FILLER]) {
    Row from = FN(at)(format, m, w, k);
    memset(filler, 0, FILLER);
    memcpy(filler, from.data, bytes_of(format, m->in - k));
    if (format != MXFP4) return (Row){filler, from.scale};
    memcpy(filler + 64, from.scale, (m->in - k) / 32);
    return (Row){filler, filler + 64};
}

/* -- products ------------------------------------------------------------------------------------------------------ */

/* A block of each of `outs` weight rows times that of `rows` rows of inputs. */
INLINE void FN(step)(const int format, const int rows, const int outs, const Row *w, const float *x, int64_t x_step,
                     f32x16 *sums) {
    for (int j = 0; j < (int)stride_of(format); j++) {
        f32x16 v[4];
        for (int n = 0; n < outs; n++) v[n] = FN(decode)(format, w[n], j);
        for (int r = 0; r < rows; r++) {
            f32x16 in = LOAD(f32x16, x + r * x_step + 16 * j);
            for (int n = 0; n < outs; n++) sums[r * outs + n] += in * v[n];
        }
    }
}

/* `rows` rows of inputs against `outs` weight rows: the partial sums. */
INLINE void FN(dot)(const int format, const int rows, const int outs, const Matrix *m, const Row *w, const float *x,
                    int64_t x_step, Ahead ahead, f32x16 *partial) {
    const int64_t block = 16 * stride_of(format), whole = m->in / block * block;
    f32x16 sums[MOST * 4];
    Row at[4];
    for (int i = 0; i < rows * outs; i++) sums[i] = (f32x16){0};
    for (int64_t k = 0, line = 0; k < whole; k += block, line += 64) {
        for (int n = 0; n < outs; n++) at[n] = FN(at)(format, m, w[n], k);
        FN(step)(format, rows, outs, at, x + k, x_step, sums);
        if (line < ahead.bytes)
            for (int64_t a = 0; a < ahead.count; a++) __builtin_prefetch(ahead.rows[a].data + line, 0, 2);
    }
    if (whole < m->in) {
        uint8_t fillers[4][FILLER];
        for (int n = 0; n < outs; n++) at[n] = FN(filled)(format, m, w[n], whole, fillers[n]);
        FN(step)(format, rows, outs, at, x + whole, x_step, sums);
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < outs; n++) partial[r * TILE + n] = sums[r * outs + n];
}

/* Part i of n equal ones. */
INLINE Ahead FN(share)(Ahead all, int64_t i, int64_t n) {
    int64_t from = all.count * i / n, to = all.count * (i + 1) / n;
    return (Ahead){all.rows + from, to - from, all.bytes};
}

/* A function for each format and number of rows, so that each has all registers. `w`: a tile of weight rows. */
typedef void (*FN(Dot))(const Matrix *m, const Row *w, const float *x, int64_t x_step, Ahead ahead, f32x16 *partial);
#define DOT(format, rows)                                                                                              \
    static NOINLINE void FN(dot_##format##_##rows)(const Matrix *m, const Row *w, const float *x, int64_t x_step,      \
                                                   Ahead ahead, f32x16 *partial) {                                     \
        for (int n = 0; n < TILE; n += OUTS(rows))                                                                     \
            FN(dot)(format, rows, OUTS(rows), m, w + n, x, x_step, FN(share)(ahead, n / OUTS(rows), TILE / OUTS(rows)),  \
                    partial + n);                                                                                      \
    }
#define DOTS(format) UP_TO_MOST(DOT, format)
FORMATS(DOTS)
#define DOT_NAME(format, rows) FN(dot_##format##_##rows),
#define DOT_NAMES(format) {UP_TO_MOST(DOT_NAME, format)},
static const FN(Dot) FN(dot_of)[][MOST] = {FORMATS(DOT_NAMES)};

/* A row's weights, decoded. */
typedef void (*FN(Unpack))(const Matrix *m, Row w, float *decoded);
#define UNPACK(format)                                                                                                 \
    static void FN(unpack_##format)(const Matrix *m, Row w, float *decoded) {                                          \
        const int64_t stride = stride_of(format), block = 16 * stride;                                                 \
        for (int64_t k = 0; k < m->in; k += block, decoded += block) {                                                 \
            uint8_t filler[FILLER];                                                                                    \
            Row at = k + block <= m->in ? FN(at)(format, m, w, k) : FN(filled)(format, m, w, k, filler);               \
            for (int j = 0; j < stride; j++) ((f32x16 *)decoded)[j] = FN(decode)(format, at, j);                       \
        }                                                                                                              \
    }
FORMATS(UNPACK)
#define UNPACK_NAME(format) FN(unpack_##format),
static const FN(Unpack) FN(unpack_of)[] = {FORMATS(UNPACK_NAME)};

/* Up to CHUNK rows of inputs, in the order of the format's blocks and x_step floats apart, times TILE weight rows. */
static void FN(tile)(const Matrix *m, const Row *w, const f32x16 *bias, const float *x, int64_t x_step, int64_t count,
                     Ahead ahead, f32x16 *out, float *decoded) {
    const Matrix dense = {.format = F32, .in = padded(m->format, m->in)};
    f32x16 scale = SPLAT(1), partial[MOST * TILE];
    Row rows[TILE];
    if (m->format == INT8)
        for (int n = 0; n < TILE; n++) scale[n] = LOAD(float, w[n].scale);
    if (count > MANY && is_costly(m->format)) {
        for (int n = 0; n < TILE; n++) {
            float *row = decoded + n * (dense.in + APART);
            FN(unpack_of)[m->format](m, w[n], row);
            rows[n].data = (const uint8_t *)row;
        }
        m = &dense, w = rows;
    }
    const int64_t groups = (count + MOST - 1) / MOST;
    for (int64_t g = 0; g < groups; g++) {
        int64_t few = (count + groups - g - 1) / (groups - g);
        FN(dot_of)[m->format][few - 1](m, w, x, x_step, FN(share)(ahead, g, groups), partial);
        for (int64_t r = 0; r < few; r++) out[r] = FN(sums_of)(partial + r * TILE) * scale + *bias;
        count -= few, x += few * x_step, out += few;
    }
}

/* -- activation ---------------------------------------------------------------------------------------------------- */

/* Rows of gates (and beside each, 8 lanes on, its up) -> activated. */
static void FN(activate)(const Activation *a, int gated, f32x16 *rows, int64_t count) {
    const i32x16 upper = {8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t r = 0; r < count; r++) {
        f32x16 g = FN(least)(rows[r], SPLAT(a->limit));
        f32x16 up = __builtin_shuffle(rows[r], upper);
        f32x16 z = g * (FN(least)(g * g, SPLAT(1e30f)) * a->cubic + 1) * a->alpha;
        f32x16 y = g / (FN(exponential)(-z) + 1);
        if (gated) y *= -FN(least)(-FN(least)(up, SPLAT(a->limit)), SPLAT(a->limit)) + a->shift;
        rows[r] = y;
    }
}

/* -- inputs and outputs -------------------------------------------------------------------------------------------- */

/* A row of `count` inputs (F32 or BF16) -> floats in the order of blocks of `stride` vectors, filled up with zeros. */
static void FN(pack)(int64_t format, const void *x, int64_t count, int64_t stride, float *packed) {
    const int64_t size = format == F32 ? 4 : 2, block = 16 * stride;
    for (int64_t k = 0; k < count; k += block) {
        float filler[128] = {0}, natural[128];
        const void *from = (const char *)x + k * size;
        if (k + block > count) from = memcpy(filler, from, (count - k) * size);
        for (int64_t j = 0; j < stride; j++) {
            f32x16 v = FN(load)(format, from, 16 * j);
            memcpy(natural + 16 * j, &v, sizeof v);
        }
        for (int64_t j = 0; j < stride; j++)
            for (int64_t i = 0; i < 16; i++) packed[k + 16 * j + i] = natural[i * stride + j];
    }
}

/* -- ceilings ------------------------------------------------------------------------------------------------------ */

/* Reads all of `size` bytes, a multiple of 256, as fast as can be; what it read is of no use. */
static void FN(read)(const char *data, int64_t size) {
    i32x16 sums[4] = {{0}};
    for (int64_t i = 0; i < size; i += 256)
        for (int j = 0; j < 4; j++) sums[j] += LOAD(i32x16, data + i + 64 * j);
    sums[0] += sums[1] + sums[2] + sums[3];
    __asm__ volatile("" : : "r"(sums) : "memory");
}

/* Multiplies and adds in as many sums as a product has, `times` times; the operations. */
static int64_t FN(multiply)(int64_t times) {
    f32x16 sums[MOST * OUTS(MOST)], factor = SPLAT(0.5f), term = SPLAT(1);
    __asm__ volatile("" : "+m"(factor), "+m"(term));
    for (int i = 0; i < MOST * OUTS(MOST); i++) sums[i] = SPLAT((float)i);
    for (int64_t t = 0; t < times; t++)
        for (int i = 0; i < MOST * OUTS(MOST); i++) sums[i] = sums[i] * factor + term;
    __asm__ volatile("" : : "r"(sums) : "memory");
    return times * MOST * OUTS(MOST) * 32;
}

static const Kernels FN(kernels) = {FN(tile), FN(activate), FN(pack), FN(store), FN(read), FN(multiply)};
