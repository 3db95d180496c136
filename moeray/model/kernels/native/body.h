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

#define APIECE (LANES / OUTS) /* products for a vector of outputs */
#define FETCH_TO (LANES == 16 ? 3 : 2) /* the nearest cache, or the one behind it */
#if LANES == 8
#define HOLD(address) __asm__("" : "+r"(address)) /* as it is; else there is one for each row, and no registers */
#else
#define HOLD(address)
#endif

/* -- products ------------------------------------------------------------------------------------------------------ */

/* Part p of OUTS sums, and to each a vector of inputs times one of weights. */
INLINE void FN(add_products)(const int format, FN(wide) *sums, int p, const char *input, const FN(vec) *weights) {
#if LANES == 8
    /* What compilers make of it holds more vectors at once than there are registers for. */
    __asm__ volatile("vmovups %2, %%ymm15\n\tvfmadd231ps %3, %%ymm15, %0\n\tvfmadd231ps %4, %%ymm15, %1"
                     : "+&x"(sums[0].part[p]), "+&x"(sums[1].part[p])
                     : "m"(*(const char(*)[32])input), "x"(weights[0]), "x"(weights[1])
                     : "xmm15");
#else
    const FN(vec) in = LOAD(FN(vec), input);
    for (int n = 0; n < OUTS; n++) {
        FN(vec) *sum = &sums[n].part[p];
#if HAS_PAIRS
        if (in_pairs(format)) {
            *sum = (FN(vec))_mm512_dpbf16_ps((__m512)*sum, (__m512bh)in, (__m512bh)weights[n]);
            continue;
        }
#endif
        *sum += in * weights[n];
    }
#endif
}

/* Parts [part, part + parts) of the sums: a block of each of OUTS weight rows times that of `rows` rows of inputs. */
INLINE void FN(step)(const int format, const int rows, const int parts, int part, const Row *w, const char *x,
                     int64_t x_step, FN(wide) *sums) {
    const char *upper = x + MOST / 2 * x_step;
    HOLD(upper); /* from two addresses all rows are in reach */
#if HAS_PAIRS
    __m512i pairs[OUTS][2];
    if (in_pairs(format))
        for (int n = 0; n < OUTS; n++) FN(decode_pairs)(format, w[n], pairs[n]);
#endif
#pragma GCC unroll 8
    for (int j = 0; j < (int)vectors_of(format); j++)
#pragma GCC unroll 4
        for (int p = 0; p < parts; p++) {
            FN(vec) v[OUTS];
            for (int n = 0; n < OUTS; n++) {
#if HAS_PAIRS
                if (in_pairs(format)) v[n] = (FN(vec))pairs[n][j];
                else
#endif
                v[n] = FN(decode)(format, w[n], j, part + p);
            }
            for (int r = 0; r < rows; r++) {
                const char *row = r < MOST / 2 ? x + r * x_step : upper + (r - MOST / 2) * x_step;
                FN(add_products)(format, sums + r * OUTS, p, row + 64 * j + 4 * LANES * p, v);
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

/* Parts [part, part + parts) of the sums over the inputs [from, to), or of those so far and these. */
INLINE void FN(sum_parts)(const int format, const int rows, const int parts, int part, const Matrix *m, const Row *w,
                          const char *x, int64_t x_step, int64_t from, int64_t to, int more, Ahead ahead,
                          FN(wide) *sums) {
    const int64_t block = forms[format].block, stretch = LANES == 8 ? stretch_of(format) : block;
    const int64_t bytes = bytes_of(format, stretch), lines = (bytes + 63) / 64, of_a_line = bytes < 64 ? 64 / bytes : 1;
    const int64_t pace = stretch / 16 * ahead.pace;
    const uint8_t *next[OUTS];
    FN(wide) s[MOST * OUTS];
    uint8_t fillers[OUTS][FILLER];
    Row rows_of[OUTS], at[OUTS], last[OUTS];
    for (int n = 0; n < OUTS; n++) {
        rows_of[n] = w[n * APIECE];
        next[n] = n < ahead.count ? ahead.rows[n * ahead.step].data + from / 16 * ahead.pace : rows_of[n].data;
    }
    if (to % block) /* before there are sums: a call takes their registers */
        for (int n = 0; n < OUTS; n++) last[n] = FN(filled)(format, m, rows_of[n], to / block * block, fillers[n]);
    /* Unrolled, or the sums would be in memory instead of registers: compilers do so by themselves up to 16 times. */
#pragma GCC unroll 24
    for (int i = 0; i < rows * OUTS; i++)
        for (int p = 0; p < parts; p++) s[i].part[p] = more ? sums[i].part[part + p] : (FN(vec)){0};
    x += input_bytes(format) * from + 4 * LANES * part;
    for (; from + stretch <= to; from += stretch, x += input_bytes(format) * stretch) {
        HOLD(x);
#pragma GCC unroll 8
        for (int64_t k = 0; k < stretch; k += block) {
            for (int n = 0; n < OUTS; n++) at[n] = FN(at)(format, m, rows_of[n], from + k);
            FN(step)(format, rows, parts, part, at, x + input_bytes(format) * k, x_step, s);
        }
        for (int n = 0; n < OUTS; n++) {
            for (int64_t i = 0; n < ahead.count && from / stretch % of_a_line == 0 && i < lines; i++)
                __builtin_prefetch(next[n] + 64 * i, 0, FETCH_TO);
            next[n] += pace;
        }
    }
    for (; !in_pairs(format) && from < to; from += block, x += input_bytes(format) * block) {
        for (int n = 0; n < OUTS; n++) at[n] = from + block <= to ? FN(at)(format, m, rows_of[n], from) : last[n];
        FN(step)(format, rows, parts, part, at, x, x_step, s);
    }
#pragma GCC unroll 24
    for (int i = 0; i < rows * OUTS; i++)
        for (int p = 0; p < parts; p++) sums[i].part[part + p] = s[i].part[p];
}

/* Whether the registers hold no more than half of each sum. */
INLINE int FN(in_halves)(int rows) { return LANES == 8 && rows > 3; }

/* Part i of n equal ones. */
INLINE Ahead FN(share)(Ahead all, int64_t i, int64_t n) {
    const int64_t from = all.count * i / n, to = all.count * (i + 1) / n;
    return (Ahead){all.rows + from * all.step, to - from, all.step, all.bytes, all.pace, all.near};
}

/* Sums over the inputs [from, to), of OUTS weight rows, APIECE apart, and `rows` rows of inputs. */
INLINE void FN(sum_up)(const int format, const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step,
                       int64_t from, int64_t to, int more, Ahead ahead, FN(wide) *sums) {
    const int parts = FN(in_halves)(rows) ? 1 : PARTS;
    for (int part = 0; part < PARTS; part += parts)
        FN(sum_parts)(format, rows, parts, part, m, w, x, x_step, from, to, more,
                      FN(share)(ahead, part / parts, PARTS / parts), sums);
}

#if HAS_PAIRS
/* Of OUTS sums the quarters, then what is left of them added, until four of all share one vector, in turns: a tree of
   instructions that take little from multiplying. */
INLINE __m512 FN(mix)(const FN(wide) *sums) {
    __m512d s[2];
    for (int i = 0; i < 2; i++) {
        const __m512 a = (__m512)sums[2 * i].part[0], b = (__m512)sums[2 * i + 1].part[0];
        s[i] = (__m512d)(_mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b));
    }
    return (__m512)_mm512_unpacklo_pd(s[0], s[1]) + (__m512)_mm512_unpackhi_pd(s[0], s[1]);
}

/* The scales of OUTS sums, in turns. */
INLINE __m512 FN(scales)(const int format, const Matrix *m, const Row *w, int64_t k) {
    float each[OUTS];
    for (int n = 0; n < OUTS; n++) each[n] = LOAD(float, FN(at)(format, m, w[n * APIECE], k).scale);
    return _mm512_broadcast_f32x4(_mm_setr_ps(each[0], each[1], each[2], each[3]));
}

/* Sums over inputs that share scales are mixed, scaled and added; a fold for each row, TILE / OUTS folds apart. */
INLINE void FN(dot_scaled)(const int format, const int rows, const Matrix *m, const Row *w, const char *x,
                           int64_t x_step, Ahead ahead, FN(vec) *folds) {
    const __m512i in_order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const int64_t span = (int64_t)1 << m->in_shift;
    __m512 totals[MOST] = {{0}};
    for (int64_t k = 0; k < m->in; k += span) {
        FN(wide) sums[MOST * OUTS];
        FN(sum_up)(format, rows, m, w, x, x_step, k, k + span < m->in ? k + span : m->in, 0, ahead, sums);
        const __m512 scales = FN(scales)(format, m, w, k);
        for (int r = 0; r < rows; r++) totals[r] += FN(mix)(sums + r * OUTS) * scales;
    }
    for (int r = 0; r < rows; r++) folds[r * (TILE / OUTS)] = (FN(vec))_mm512_permutexvar_ps(in_order, totals[r]);
}
#endif

#if HAS_DIGITS
#include "digits.h"
#endif

/* Of a tile the first of the OUTS rows that are multiplied together, in turn i. */
INLINE const Row *FN(turn)(const Row *w, int64_t i) { return w + i / APIECE * LANES + i % APIECE; }

/* What is fetched during turn i: a part of the next tile; or the rows of the next turn, which is far enough where memory
   is what turns wait for, and near enough for the nearest cache. */
INLINE Ahead FN(soon)(const Row *w, int64_t i, Ahead ahead) {
    enum { TURNS = TILE / OUTS };
    if (!ahead.near) return FN(share)(ahead, i, TURNS);
    const int last = i + 1 == TURNS;
    const Row *next = last ? ahead.rows : FN(turn)(w, i + 1);
    return (Ahead){next, last && !ahead.count ? 0 : OUTS, APIECE, ahead.bytes, ahead.pace, 1};
}

/* While outputs are finished, memory would have nothing to do: the first of what comes after the next tile's first turn. */
INLINE void FN(fetch_meanwhile)(Ahead ahead) {
    const Row *w = FN(turn)(ahead.rows, 1);
    for (int64_t byte = 0; byte < MEANWHILE && byte < ahead.bytes; byte += 64)
        for (int n = 0; n < OUTS; n++) __builtin_prefetch(w[n * APIECE].data + byte, 0, FETCH_TO);
}

/* TILE weight rows times `rows` rows of inputs: TILE / OUTS folds for each row. SPAN inputs at a time, so that those of
   all rows stay in the nearest cache while the weights pass by, unless one pass over the weights does. */
INLINE void FN(dot)(const int format, const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step,
                    Ahead ahead, FN(vec) *folds) {
    enum { TURNS = TILE / OUTS };
#if HAS_PAIRS
    if (scales_sums(format)) {
        for (int i = 0; i < TURNS; i++)
            FN(dot_scaled)(format, rows, m, FN(turn)(w, i), x, x_step, FN(soon)(w, i, ahead), folds + i);
        return;
    }
#endif
#if HAS_DIGITS
    if (in_digits(format)) {
        for (int i = 0; i < TURNS; i++)
            FN(dot_digits)(rows, m, FN(turn)(w, i), x, x_step, FN(soon)(w, i, ahead), folds + i);
        return;
    }
#endif
    FN(wide) sums[LANES == 8 ? TURNS : 1][MOST * OUTS];
    const int64_t in = m->in, span = FN(in_halves)(rows) ? SPAN : in;
    for (int64_t from = 0; from < in; from += span) {
        const int64_t to = from + span < in ? from + span : in;
        for (int i = 0; i < TURNS; i++) {
            FN(wide) *mine = sums[LANES == 8 ? i : 0];
            FN(sum_up)(format, rows, m, FN(turn)(w, i), x, x_step, from, to, from > 0, FN(soon)(w, i, ahead), mine);
            for (int r = 0; to == in && r < rows; r++) folds[r * TURNS + i] = FN(fold)(mine + r * OUTS);
        }
    }
}

/* A function for each format and number of rows, so that each has all registers. */
typedef void (*FN(Dot))(const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead, FN(vec) *folds);
#define DOT(format, rows)                                                                                              \
    static NOINLINE void FN(dot_##format##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,       \
                                                   Ahead ahead, FN(vec) *folds) {                                      \
        FN(dot)(format, rows, m, w, x, x_step, ahead, folds);                                                          \
    }
#define DOTS(format) UP_TO_MOST(DOT, format)
MULTIPLIED(DOTS)
#define DOT_NAME(format, rows) FN(dot_##format##_##rows),
#define DOT_NAMES(format) [format] = {UP_TO_MOST(DOT_NAME, format)},
static const FN(Dot) FN(dot_of)[][MOST] = {MULTIPLIED(DOT_NAMES)};

/* A row's weights of inputs [from, to), decoded; `from` begins a block. */
typedef void (*FN(Unpack))(const Matrix *m, Row w, int64_t from, int64_t to, char *decoded);
#define UNPACK(format)                                                                                                 \
    static void FN(unpack_##format)(const Matrix *m, Row w, int64_t from, int64_t to, char *decoded) {                 \
        const int64_t block = forms[format].block;                                                                     \
        for (int64_t k = from; k < to; k += block, decoded += block * input_bytes(format)) {                           \
            uint8_t filler[FILLER];                                                                                    \
            Row at = k + block <= m->in ? FN(at)(format, m, w, k) : FN(filled)(format, m, w, k, filler);               \
            FN(decode_block)(format, at, decoded);                                                                     \
        }                                                                                                              \
    }
COMPUTED(UNPACK)
#define UNPACK_NAME(format) FN(unpack_##format),
static const FN(Unpack) FN(unpack_of)[] = {COMPUTED(UNPACK_NAME)};

/* In how many groups so many rows are multiplied. A few wait for memory most of the time, and less of it where a product
   goes over its weights once, all parts together, while more of them are on the way. */
INLINE int64_t FN(groups_for)(int64_t count) {
    if (LANES == 8 && count <= 8) return count / 3 + 1;
    return (count + MOST - 1) / MOST;
}

/* Up to CHUNK rows of inputs, in the order of the format's blocks and x_step bytes apart, times TILE weight rows. */
static void FN(tile)(const Matrix *m, const Row *w, const float *bias, const char *x, int64_t x_step, int64_t count,
                     Ahead ahead, f32x16 *out, char *decoded) {
    const Matrix dense = {.format = forms[m->format].decoded, .in = padded(m->format, m->in), .in_shift = m->in_shift};
    f32x16 scale = SPLAT(1), term = LOAD(f32x16, bias);
    FN(vec) folds[MOST * (TILE / OUTS)];
    Row rows[TILE];
    if (in_int8(m->format))
        for (int n = 0; n < TILE; n++) scale[n] = LOAD(float, w[n].scale);
    if (is_decoded(m, count)) {
        for (int n = 0; n < TILE; n++) {
            char *row = decoded + n * (dense.in * input_bytes(m->format) + APART);
            FN(unpack_of)[m->format](m, w[n], 0, m->in, row);
            rows[n] = (Row){(const uint8_t *)row, w[n].scale};
        }
        m = &dense, w = rows;
    }
    const int64_t groups = FN(groups_for)(count);
    ahead.near = LANES == 16 && groups == 1 && m != &dense;
    for (int64_t g = 0; g < groups; g++) {
        int64_t few = (count + groups - g - 1) / (groups - g);
        FN(dot_of)[m->format][few - 1](m, w, x, x_step, FN(share)(ahead, g, groups), folds);
        if (ahead.near && ahead.count) FN(fetch_meanwhile)(ahead);
        for (int64_t r = 0; r < few; r++) {
            FN(vec) sums[PARTS];
            for (int p = 0; p < PARTS; p++) sums[p] = FN(unite)(folds + r * (TILE / OUTS) + p * APIECE);
            out[r] = LOAD(f32x16, sums) * scale + term;
        }
        count -= few, x += few * x_step, out += few;
    }
}

/* -- activation ---------------------------------------------------------------------------------------------------- */

/* Gates (and their ups) -> activated. */
INLINE f32x16 FN(activated)(const Activation *a, int gated, f32x16 g, f32x16 up) {
    g = FN(least)(g, SPLAT(a->limit));
    f32x16 z = g * (FN(least)(g * g, SPLAT(1e30f)) * a->cubic + 1) * a->alpha;
    f32x16 y = g / (FN(exponential)(-z) + 1);
    return gated ? y * (-FN(least)(-FN(least)(up, SPLAT(a->limit)), SPLAT(a->limit)) + a->shift) : y;
}

/* Rows of gates, and beside each, 8 lanes on, its up. */
static void FN(activate)(const Activation *a, int gated, f32x16 *rows, int64_t count) {
    const i32x16 upper = {8, 9, 10, 11, 12, 13, 14, 15, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int64_t r = 0; r < count; r++) rows[r] = FN(activated)(a, gated, rows[r], __builtin_shuffle(rows[r], upper));
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
        f32x16 filler[8] = {{0}}, natural[8];
        const void *from = (const char *)x + k * size;
        if (k + block > m->in) from = memcpy(filler, from, (m->in - k) * size);
        for (int64_t j = 0; j < vectors; j++) natural[j] = FN(load)(format, from, 16 * j);
        if (vectors == 1) {
            memcpy(packed, natural, 64);
        } else if (vectors == 2) {
            const i32x16 even = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
            ((f32x16 *)packed)[0] = __builtin_shuffle(natural[0], natural[1], even);
            ((f32x16 *)packed)[1] = __builtin_shuffle(natural[0], natural[1], even + 1);
        } else {
            for (int64_t j = 0; j < vectors; j++)
                for (int64_t i = 0; i < 16; i++)
                    ((float *)packed)[16 * j + i] = ((const float *)natural)[i * vectors + j];
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

static const Kernels FN(kernels) = {FN(tile), FN(activate), FN(pack), FN(store), FN(read), FN(multiply)};

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
