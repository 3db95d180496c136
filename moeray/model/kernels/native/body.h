/* The kernels in terms of 16 lanes; compiled once for each instruction set, with FN defined, the LANES of its vectors, and
   how many rows (MOST) and outputs (OUTS) of a product its registers hold.

   A sum is 16 partial sums, one a lane, each in the order of the inputs; they are added by one fixed tree. So the bits
   of an output depend on its own inputs and weights alone: not on other rows, threads, tiles, or, where there is a
   fused multiply-add, on the instruction set. The exception are BF16 inputs of BF16 and INT8 weights where the CPU
   multiplies pairs: such a sum has 16 parts as well, but each takes two products at a time, in the CPU's own way. */

#include "vectors.h"

#define PARTS (16 / LANES)
#if defined(__AVX512BF16__)
#define HAS_PAIRS 1
#define COMPUTED(EACH) FORMATS(EACH) EACH(PAIRS) EACH(INT8_PAIRS)
#else
#define HAS_PAIRS 0
#define COMPUTED FORMATS
#endif
#define APIECE (LANES / OUTS) /* products for a vector of outputs */

typedef float FN(vec) __attribute__((vector_size(4 * LANES)));
typedef int32_t FN(ivec) __attribute__((vector_size(4 * LANES)));
typedef uint32_t FN(uvec) __attribute__((vector_size(4 * LANES)));
typedef uint16_t FN(u16vec) __attribute__((vector_size(2 * LANES)));
typedef int16_t FN(i16vec) __attribute__((vector_size(2 * LANES)));
typedef int8_t FN(i8vec) __attribute__((vector_size(LANES)));

/* 16 lanes. */
typedef struct {
    FN(vec) part[PARTS];
} FN(wide);

/* -- decoding ------------------------------------------------------------------------------------------------------ */

/* The compiler converts elements one by one where it is not told the instruction. */
INLINE FN(vec) FN(half)(FN(u16vec) bits) {
#if defined(__AVX512F__)
    return (FN(vec))_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (FN(vec))_mm256_cvtph_ps((__m128i)bits);
#else
    FN(uvec) wide = __builtin_convertvector(bits, FN(uvec));
    return (FN(vec))((wide & 0x8000) << 16 | (wide & 0x7fff) << 13) * 0x1p112f;
#endif
}

INLINE FN(ivec) FN(widen)(const void *bytes) {
#if defined(__AVX512F__)
    return (FN(ivec))_mm512_cvtepi8_epi32(_mm_loadu_si128(bytes));
#elif defined(__AVX2__)
    return (FN(ivec))_mm256_cvtepi8_epi32(_mm_loadl_epi64(bytes));
#else
    return __builtin_convertvector(LOAD(FN(i8vec), bytes), FN(ivec));
#endif
}

/* E4M3 is FP16 with another bias and fewer digits: read as FP16 it is too small by 2^8, subnormals too. */
INLINE FN(vec) FN(e4m3)(const uint8_t *bytes) {
#if defined(__AVX512F__)
    FN(i16vec) wide = (FN(i16vec))_mm256_cvtepi8_epi16(_mm_loadu_si128((const void *)bytes));
#elif defined(__AVX2__)
    FN(i16vec) wide = (FN(i16vec))_mm_cvtepi8_epi16(_mm_loadl_epi64((const void *)bytes));
#else
    FN(i16vec) wide = __builtin_convertvector(LOAD(FN(i8vec), bytes), FN(i16vec));
#endif
    return FN(half)((FN(u16vec))(wide << 7 & (int16_t)0xbfff));
}

/* E2M1 values by their codes, the low 4 bits of each lane. */
INLINE FN(vec) FN(e2m1)(FN(ivec) codes) {
#if LANES == 16
    const FN(vec) values = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    return __builtin_shuffle(values, codes & 15);
#elif LANES == 8
    const FN(vec) values = {0, .5, 1, 1.5, 2, 3, 4, 6};
    return (FN(vec))((FN(uvec))__builtin_shuffle(values, codes & 7) | (FN(uvec))(codes & 8) << 28);
#else
    static const float values[] = {0, .5, 1, 1.5, 2, 3, 4, 6, -0.0, -.5, -1, -1.5, -2, -3, -4, -6};
    FN(vec) v;
    for (int i = 0; i < LANES; i++) v[i] = values[codes[i] & 15];
    return v;
#endif
}

/* Part p of 4 E8M0 bytes on 4 lanes each. A byte is the exponent of a float; the byte 0 is the subnormal 2^-127. */
INLINE FN(vec) FN(e8m0)(const uint8_t *scale, int p) {
#if defined(__AVX2__)
    __m128i lanes = _mm_add_epi8(_mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3),
                                 _mm_set1_epi8((char)(p * LANES / 4)));
    __m128i spread = _mm_shuffle_epi8(_mm_cvtsi32_si128(LOAD(int32_t, scale)), lanes);
#else
    int8_t spread[LANES];
    for (int i = 0; i < LANES; i++) spread[i] = (int8_t)scale[(p * LANES + i) / 4];
#endif
    FN(uvec) exponents = (FN(uvec))FN(widen)(&spread) << 23 & 0x7f800000;
    return (FN(vec))(exponents | ((FN(uvec))(exponents == 0) & 0x400000));
}

/* Part p of vector j of the block of weights at `w`. INT8 is scaled when its sum is complete. */
INLINE FN(vec) FN(decode)(const int format, Row w, const int j, const int p) {
    const int lane = p * LANES;
    switch (format) {
        case F32: return LOAD(FN(vec), w.data + 4 * lane);
        case F16: return FN(half)(LOAD(FN(u16vec), w.data + 2 * lane));
        case BF16: {
            FN(uvec) pairs = LOAD(FN(uvec), w.data + 4 * lane);
            return (FN(vec))(j ? pairs & 0xffff0000 : pairs << 16);
        }
        case INT8: return __builtin_convertvector(FN(widen)(w.data + lane), FN(vec));
        case FP8: return FN(e4m3)(w.data + lane) * (256.0f * LOAD(float, w.scale));
        default: return FN(e2m1)(LOAD(FN(ivec), w.data + 4 * lane) >> (4 * j)) * FN(e8m0)(w.scale, p);
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

#if HAS_PAIRS
/* A block of BF16 or INT8 as BF16, the latter as two vectors, in the order that place_of tells. */
INLINE void FN(decode_pairs)(const int format, const uint8_t *w, __m512i *v) {
    if (format == PAIRS) {
        *v = LOAD(__m512i, w);
        return;
    }
    const __m512i weights = LOAD(__m512i, w), size = _mm512_abs_epi8(weights);
    const __m512i low = _mm512_permutex2var_epi8(LOAD(__m512i, bf16_low), size, LOAD(__m512i, bf16_low + 64));
    const __m512i high = _mm512_permutex2var_epi8(LOAD(__m512i, bf16_high), size, LOAD(__m512i, bf16_high + 64));
    const __m512i with_sign = _mm512_ternarylogic_epi32(high, weights, _mm512_set1_epi8(-128), 0xf8); /* a | b & c */
    v[0] = _mm512_unpacklo_epi8(low, with_sign);
    v[1] = _mm512_unpackhi_epi8(low, with_sign);
}

INLINE void FN(step_pairs)(const int format, const int rows, const Row *w, const char *x, int64_t x_step,
                           FN(wide) *sums) {
    const int vectors = format == PAIRS ? 1 : 2;
    __m512i v[OUTS][2];
    for (int n = 0; n < OUTS; n++) FN(decode_pairs)(format, w[n].data, v[n]);
    for (int j = 0; j < vectors; j++)
        for (int r = 0; r < rows; r++) {
            __m512bh in = LOAD(__m512bh, x + r * x_step + 64 * j);
            for (int n = 0; n < OUTS; n++) {
                FN(vec) *sum = sums[r * OUTS + n].part;
                *sum = (FN(vec))_mm512_dpbf16_ps((__m512)*sum, in, (__m512bh)v[n][j]);
            }
        }
}
#endif

INLINE void FN(decode_block)(const int format, Row w, char *decoded) {
#if HAS_PAIRS
    if (in_pairs(format)) return FN(decode_pairs)(format, w.data, (__m512i *)decoded);
#endif
    for (int j = 0; j < (int)stride_of(format); j++)
        for (int p = 0; p < PARTS; p++) ((FN(vec) *)decoded)[j * PARTS + p] = FN(decode)(format, w, j, p);
}

/* A block of each of OUTS weight rows times that of `rows` rows of inputs. */
INLINE void FN(step)(const int format, const int rows, const Row *w, const char *x, int64_t x_step, FN(wide) *sums) {
#if HAS_PAIRS
    if (in_pairs(format)) return FN(step_pairs)(format, rows, w, x, x_step, sums);
#endif
    for (int j = 0; j < (int)stride_of(format); j++) {
        FN(wide) v[OUTS];
        for (int n = 0; n < OUTS; n++)
            for (int p = 0; p < PARTS; p++) v[n].part[p] = FN(decode)(format, w[n], j, p);
        for (int r = 0; r < rows; r++)
            for (int p = 0; p < PARTS; p++) {
                FN(vec) in = LOAD(FN(vec), x + r * x_step + 4 * (16 * j + p * LANES));
                for (int n = 0; n < OUTS; n++) sums[r * OUTS + n].part[p] += in * v[n].part[p];
            }
    }
}

/* Two vectors' halves, quarters, ... added at once: what is left of both lies side by side. */
#define MERGE(a, b, low, high)                                                                                         \
    (__builtin_shuffle(a, b, (FN(ivec))LANES_OF low) + __builtin_shuffle(a, b, (FN(ivec))LANES_OF high))
#define LANES_OF(...) {__VA_ARGS__}

/* Of OUTS sums the parts, then halves, then quarters, ..., added until they share one vector, in order. */
INLINE FN(vec) FN(fold)(FN(wide) *sums) {
    FN(vec) s[OUTS];
    for (int n = 0; n < OUTS; n++) {
        for (int left = PARTS / 2; left; left /= 2)
            for (int p = 0; p < left; p++) sums[n].part[p] += sums[n].part[p + left];
        s[n] = sums[n].part[0];
    }
#if LANES == 16
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(s[i], s[i + 2], (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                     (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    return MERGE(s[0], s[1], (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
                 (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
#elif LANES == 8
    return MERGE(s[0], s[1], (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15));
#else
    return MERGE(s[0], s[1], (0, 1, 4, 5), (2, 3, 6, 7));
#endif
}

/* Of APIECE folds what is left added: the sum of fold i's n-th in lane i + n * APIECE. */
INLINE FN(vec) FN(unite)(const FN(vec) *folds) {
#if LANES == 16
    FN(vec) s[2];
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(folds[i], folds[i + 2], (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
                     (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
    return MERGE(s[0], s[1], (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                 (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
#elif LANES == 8
    FN(vec) s[2];
    for (int i = 0; i < 2; i++)
        s[i] = MERGE(folds[i], folds[i + 2], (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15));
    return MERGE(s[0], s[1], (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15));
#else
    return MERGE(folds[0], folds[1], (0, 4, 2, 6), (1, 5, 3, 7));
#endif
}

/* `rows` rows of inputs against OUTS weight rows, APIECE apart: a fold for each row, TILE / OUTS folds apart. */
INLINE void FN(dot)(const int format, const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step,
                    Ahead ahead, FN(vec) *folds) {
    const int64_t block = block_of(format), whole = m->in / block * block;
    FN(wide) sums[MOST * OUTS];
    Row at[OUTS];
    for (int r = 0; r < rows; r++)
        for (int n = 0; n < OUTS; n++)
            for (int p = 0; p < PARTS; p++) sums[r * OUTS + n].part[p] = (FN(vec)){0};
    for (int64_t k = 0, byte = 0; k < whole; k += block, byte += block / 16 * ahead.pace) {
        for (int n = 0; n < OUTS; n++) at[n] = FN(at)(format, m, w[n * APIECE], k);
        FN(step)(format, rows, at, x + input_bytes(format) * k, x_step, sums);
        if (byte % 64 == 0 && byte < ahead.bytes)
            for (int64_t a = 0; a < ahead.count; a++) __builtin_prefetch(ahead.rows[a].data + byte, 0, 2);
    }
    if (whole < m->in) {
        uint8_t fillers[OUTS][FILLER];
        for (int n = 0; n < OUTS; n++) at[n] = FN(filled)(format, m, w[n * APIECE], whole, fillers[n]);
        FN(step)(format, rows, at, x + input_bytes(format) * whole, x_step, sums);
    }
    for (int r = 0; r < rows; r++) folds[r * (TILE / OUTS)] = FN(fold)(sums + r * OUTS);
}

/* Part i of n equal ones. */
INLINE Ahead FN(share)(Ahead all, int64_t i, int64_t n) {
    int64_t from = all.count * i / n, to = all.count * (i + 1) / n;
    return (Ahead){all.rows + from, to - from, all.bytes, all.pace};
}

/* A function for each format and number of rows, so that each has all registers. `w`: a tile of weight rows. */
typedef void (*FN(Dot))(const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead, FN(vec) *folds);
#define DOT(format, rows)                                                                                              \
    static NOINLINE void FN(dot_##format##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,       \
                                                   Ahead ahead, FN(vec) *folds) {                                      \
        for (int i = 0; i < TILE / OUTS; i++)                                                                          \
            FN(dot)(format, rows, m, w + i / APIECE * LANES + i % APIECE, x, x_step,                                   \
                    FN(share)(ahead, i, TILE / OUTS), folds + i);                                                      \
    }
#define DOTS(format) UP_TO_MOST(DOT, format)
COMPUTED(DOTS)
#define DOT_NAME(format, rows) FN(dot_##format##_##rows),
#define DOT_NAMES(format) {UP_TO_MOST(DOT_NAME, format)},
static const FN(Dot) FN(dot_of)[][MOST] = {COMPUTED(DOT_NAMES)};

/* A row's weights, decoded to F32, or from INT8_PAIRS to PAIRS. */
typedef void (*FN(Unpack))(const Matrix *m, Row w, char *decoded);
#define UNPACK(format)                                                                                                 \
    static void FN(unpack_##format)(const Matrix *m, Row w, char *decoded) {                                           \
        const int64_t block = block_of(format);                                                                        \
        for (int64_t k = 0; k < m->in; k += block, decoded += block * input_bytes(format)) {                           \
            uint8_t filler[FILLER];                                                                                    \
            Row at = k + block <= m->in ? FN(at)(format, m, w, k) : FN(filled)(format, m, w, k, filler);               \
            FN(decode_block)(format, at, decoded);                                                                     \
        }                                                                                                              \
    }
COMPUTED(UNPACK)
#define UNPACK_NAME(format) FN(unpack_##format),
static const FN(Unpack) FN(unpack_of)[] = {COMPUTED(UNPACK_NAME)};

/* Up to CHUNK rows of inputs, in the order of the format's blocks and x_step bytes apart, times TILE weight rows. */
static void FN(tile)(const Matrix *m, const Row *w, const float *bias, const char *x, int64_t x_step, int64_t count,
                     Ahead ahead, f32x16 *out, char *decoded) {
    const Matrix dense = {.format = m->format == INT8_PAIRS ? PAIRS : F32, .in = padded(m->format, m->in)};
    f32x16 scale = SPLAT(1), term = LOAD(f32x16, bias);
    FN(vec) folds[MOST * (TILE / OUTS)];
    Row rows[TILE];
    if (m->format == INT8 || m->format == INT8_PAIRS)
        for (int n = 0; n < TILE; n++) scale[n] = LOAD(float, w[n].scale);
    if (count > many_for(m->format)) {
        for (int n = 0; n < TILE; n++) {
            char *row = decoded + n * (dense.in * input_bytes(m->format) + APART);
            FN(unpack_of)[m->format](m, w[n], row);
            rows[n].data = (const uint8_t *)row;
        }
        m = &dense, w = rows;
    }
    const int64_t groups = (count + MOST - 1) / MOST;
    for (int64_t g = 0; g < groups; g++) {
        int64_t few = (count + groups - g - 1) / (groups - g);
        FN(dot_of)[m->format][few - 1](m, w, x, x_step, FN(share)(ahead, g, groups), folds);
        for (int64_t r = 0; r < few; r++) {
            FN(vec) sums[PARTS];
            for (int p = 0; p < PARTS; p++) sums[p] = FN(unite)(folds + r * (TILE / OUTS) + p * APIECE);
            out[r] = LOAD(f32x16, sums) * scale + term;
        }
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
    for (int64_t k = 0; k < count; k += block, packed += block) {
        f32x16 filler[8] = {{0}}, natural[8];
        const void *from = (const char *)x + k * size;
        if (k + block > count) from = memcpy(filler, from, (count - k) * size);
        for (int64_t j = 0; j < stride; j++) natural[j] = FN(load)(format, from, 16 * j);
        if (stride == 1) {
            memcpy(packed, natural, 64);
        } else if (stride == 2) {
            const i32x16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
            ((f32x16 *)packed)[0] = __builtin_shuffle(natural[0], natural[1], even);
            ((f32x16 *)packed)[1] = __builtin_shuffle(natural[0], natural[1], even + 1);
        } else {
            for (int64_t j = 0; j < stride; j++)
                for (int64_t i = 0; i < 16; i++) packed[16 * j + i] = ((float *)natural)[i * stride + j];
        }
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
    FN(vec) sums[MOST][OUTS * PARTS], factor = (FN(vec)){0} + 0.5f, term = (FN(vec)){0} + 1;
    __asm__ volatile("" : "+m"(factor), "+m"(term));
    for (int r = 0; r < MOST; r++)
        for (int n = 0; n < OUTS * PARTS; n++) sums[r][n] = term;
    for (int64_t t = 0; t < times; t++)
        for (int r = 0; r < MOST; r++)
            for (int n = 0; n < OUTS * PARTS; n++) sums[r][n] = MULTIPLY_ADD(sums[r][n], factor, term);
    for (int r = 0; r < MOST; r++)
        for (int n = 0; n < OUTS * PARTS; n++) __asm__ volatile("" : : "m"(sums[r][n]));
    return times * MOST * OUTS * (HAS_PAIRS ? 64 : 32);
}

static const Kernels FN(kernels) = {FN(tile), FN(activate), FN(pack), FN(store), FN(read), FN(multiply)};

#undef PARTS
#undef FN
#undef LANES
#undef MOST
#undef UP_TO_MOST
#undef OUTS
#undef APIECE
#undef HAS_PAIRS
#undef COMPUTED
#undef MULTIPLY_ADD
#undef MERGE
#undef LANES_OF
#undef DOT
#undef DOTS
#undef DOT_NAME
#undef DOT_NAMES
#undef UNPACK
#undef UNPACK_NAME
