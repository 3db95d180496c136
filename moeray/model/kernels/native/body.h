/* The kernels in terms of vectors of 16; compiled once for each instruction set, with FN, ROWS and OUTS defined.

   A sum is 16 partial sums, one a lane, each in the order of the inputs; they are added by one fixed tree. So the bits
   of an output depend on its own inputs and weights alone: not on other rows, threads, tiles, or, where there is a
   fused multiply-add, on the instruction set. */

#include "vectors.h"

/* -- decoding ------------------------------------------------------------------------------------------------------ */

INLINE f32x16 FN(half)(u16x16 bits) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128((__m256i)bits));
    __m256 high = _mm256_cvtph_ps(_mm256_extracti128_si256((__m256i)bits, 1));
    return LOAD(f32x16, ((__m256[2]){low, high}));
#else
    u32x16 wide = __builtin_convertvector(bits, u32x16);
    return (f32x16)((wide & 0x8000) << 16 | (wide & 0x7fff) << 13) * 0x1p112f;
#endif
}

/* E4M3 is FP16 with another bias and fewer digits: read as FP16 it is too small by 2^8, subnormals too. */
INLINE f32x16 FN(e4m3)(const uint8_t *bytes) {
    i16x16 wide = __builtin_convertvector(LOAD(i8x16, bytes), i16x16);
    return FN(half)((u16x16)((wide << 7) & (int16_t)0xbfff));
}

/* Each of 4 E8M0 bytes on 4 lanes. A byte is the exponent of a float; the byte 0 is the subnormal 2^-127. */
INLINE f32x16 FN(e8m0)(const uint8_t *s) {
    u32x16 exponents = {s[0], s[0], s[0], s[0], s[1], s[1], s[1], s[1], s[2], s[2], s[2], s[2], s[3], s[3], s[3], s[3]};
    return (f32x16)(exponents << 23 | ((u32x16)(exponents == 0) & 0x400000));
}

/* A block of weights at `w`: its `stride` vectors. INT8 is scaled when its sum is complete. */
INLINE void FN(decode)(const int format, Row w, f32x16 *v) {
    if (format == F32) v[0] = LOAD(f32x16, w.data);
    if (format == F16) v[0] = FN(half)(LOAD(u16x16, w.data));
    if (format == BF16) {
        u32x16 pairs = LOAD(u32x16, w.data);
        v[0] = (f32x16)(pairs << 16);
        v[1] = (f32x16)(pairs & 0xffff0000);
    }
    if (format == INT8)
        v[0] = __builtin_convertvector(__builtin_convertvector(LOAD(i8x16, w.data), i32x16), f32x16);
    if (format == FP8) v[0] = FN(e4m3)(w.data) * (256.0f * LOAD(float, w.scale));
    if (format == MXFP4) {
        const f32x16 values = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
        u32x16 nibbles = LOAD(u32x16, w.data);
        f32x16 scales = FN(e8m0)(w.scale);
        for (int j = 0; j < 8; j++) v[j] = __builtin_shuffle(values, (i32x16)(nibbles >> (4 * j))) * scales;
    }
}

INLINE Row FN(at)(const int format, const Matrix *m, Row w, int64_t k) {
    int64_t scale = format == FP8 ? (k >> m->scale_shift) * 4 : format == MXFP4 ? k / 32 : 0;
    return (Row){w.data + bytes_of(format, k), w.scale + scale};
}

/* The last block of a row that does not fill it, with zeros as the missing weights. */
INLINE Row FN(filled)(const int format, const Matrix *m, Row w, int64_t k, uint8_t filler[68]) {
    Row from = FN(at)(format, m, w, k);
    memset(filler, 0, 68);
    memcpy(filler, from.data, bytes_of(format, m->in - k));
    if (format != MXFP4) return (Row){filler, from.scale};
    memcpy(filler + 64, from.scale, (m->in - k) / 32);
    return (Row){filler, filler + 64};
}

/* -- products ------------------------------------------------------------------------------------------------------ */

/* A block of each of OUTS weight rows times that of `rows` rows of inputs. */
INLINE void FN(step)(const int format, const int rows, const Row *w, const float *x, int64_t x_step,
                     f32x16 sums[ROWS][OUTS]) {
    const int stride = (int)stride_of(format);
    f32x16 v[8];
    for (int n = 0; n < OUTS; n++) {
        FN(decode)(format, w[n], v);
        for (int j = 0; j < stride; j++)
            for (int r = 0; r < rows; r++) sums[r][n] += LOAD(f32x16, x + r * x_step + 16 * j) * v[j];
    }
}

/* Adds the inputs from `from` to `to` to the partial sums, which begin with input 0. */
INLINE void FN(dot)(const int format, const int rows, const Matrix *m, const Row *w, const float *x, int64_t x_step,
                    int64_t from, int64_t to, f32x16 *partial) {
    const int64_t block = 16 * stride_of(format), whole = to <= m->in ? to : m->in / block * block;
    f32x16 sums[ROWS][OUTS];
    Row at[OUTS];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < OUTS; n++) sums[r][n] = from ? partial[r * TILE + n] : (f32x16){0};
    for (int64_t k = from; k < whole; k += block) {
        for (int n = 0; n < OUTS; n++) at[n] = FN(at)(format, m, w[n], k);
        FN(step)(format, rows, at, x + k, x_step, sums);
    }
    if (whole < to) {
        uint8_t fillers[OUTS][68];
        for (int n = 0; n < OUTS; n++) at[n] = FN(filled)(format, m, w[n], whole, fillers[n]);
        FN(step)(format, rows, at, x + whole, x_step, sums);
    }
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < OUTS; n++) partial[r * TILE + n] = sums[r][n];
}

/* `count` rows against a tile of weight rows. */
INLINE void FN(dots)(const int format, const Matrix *m, const Row *w, const float *x, int64_t x_step, int64_t count,
                     int64_t from, int64_t to, f32x16 *partial) {
    for (int n = 0; n < TILE; n += OUTS) {
        int64_t r = 0;
        for (; r + ROWS <= count; r += ROWS)
            FN(dot)(format, ROWS, m, w + n, x + r * x_step, x_step, from, to, partial + r * TILE + n);
        for (; r + 2 <= count; r += 2)
            FN(dot)(format, 2, m, w + n, x + r * x_step, x_step, from, to, partial + r * TILE + n);
        if (r < count) FN(dot)(format, 1, m, w + n, x + r * x_step, x_step, from, to, partial + r * TILE + n);
    }
}

/* The same for many rows: weights are decoded once, as much at a time as the nearest cache holds. */
INLINE void FN(dots_decoded)(const int format, const Matrix *m, const Row *w, const float *x, int64_t x_step,
                             int64_t count, f32x16 *partial, float *decoded) {
    const int64_t block = 16 * stride_of(format), end = padded(format, m->in);
    const Matrix dense = {.format = F32, .in = end};
    for (int64_t from = 0; from < end; from += DEPTH) {
        int64_t to = from + DEPTH < end ? from + DEPTH : end;
        Row rows[TILE];
        for (int n = 0; n < TILE; n++) {
            for (int64_t k = from; k < to; k += block) {
                uint8_t filler[68];
                Row at = k + block <= m->in ? FN(at)(format, m, w[n], k) : FN(filled)(format, m, w[n], k, filler);
                f32x16 v[8];
                FN(decode)(format, at, v);
                memcpy(decoded + n * DEPTH + k - from, v, 4 * block);
            }
            rows[n] = (Row){(const uint8_t *)(decoded + n * DEPTH - from), NULL};
        }
        FN(dots)(F32, &dense, rows, x, x_step, count, from, to, partial);
    }
}

INLINE void FN(tile_of)(const int format, const Matrix *m, const Row *w, const f32x16 *bias, const float *x,
                        int64_t x_step, int64_t count, f32x16 *out, f32x16 *partial, float *decoded) {
    f32x16 scale = SPLAT(1);
    if (format == INT8)
        for (int n = 0; n < TILE; n++) scale[n] = LOAD(float, w[n].scale);
    if (count <= FEW)
        FN(dots)(format, m, w, x, x_step, count, 0, padded(format, m->in), partial);
    else
        FN(dots_decoded)(format, m, w, x, x_step, count, partial, decoded);
    for (int64_t r = 0; r < count; r++) out[r] = FN(sums_of)(partial + r * TILE) * scale + *bias;
}

/* Up to CHUNK rows of inputs, in the order of the format's blocks and x_step floats apart, times TILE weight rows. */
static void FN(tile)(const Matrix *m, const Row *w, const f32x16 *bias, const float *x, int64_t x_step, int64_t count,
                     f32x16 *out, f32x16 *partial, float *decoded) {
    switch (m->format) {
        case F32: return FN(tile_of)(F32, m, w, bias, x, x_step, count, out, partial, decoded);
        case F16: return FN(tile_of)(F16, m, w, bias, x, x_step, count, out, partial, decoded);
        case BF16: return FN(tile_of)(BF16, m, w, bias, x, x_step, count, out, partial, decoded);
        case INT8: return FN(tile_of)(INT8, m, w, bias, x, x_step, count, out, partial, decoded);
        case FP8: return FN(tile_of)(FP8, m, w, bias, x, x_step, count, out, partial, decoded);
        case MXFP4: return FN(tile_of)(MXFP4, m, w, bias, x, x_step, count, out, partial, decoded);
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

static const Kernels FN(kernels) = {FN(tile), FN(activate), FN(pack), FN(store)};
