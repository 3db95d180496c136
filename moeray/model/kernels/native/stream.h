/* Products of a few rows of inputs with weights in the order in which these lie in memory; part of body.h.

   What they wait for is memory, and that is read fastest like this: one weight row from its beginning to its end, then the
   next, while the inputs stay in the nearest cache. The bits are those of sums.h and digits.h: each sum takes the same
   products in the same order, or whole numbers. */

/* What is fetched while `bytes` of weight row n, from byte `at` on, of `end`: what comes so many bytes later, of this tile
   or the next. */
INLINE const uint8_t *FN(fetched)(const Row *w, int64_t n, int64_t at, int64_t bytes, int64_t end, Ahead ahead) {
    const int64_t fit = DISTANCE / bytes, later = n + (fit < 1 ? 1 : fit < TILE ? fit : TILE);
    if (later < TILE) return w[later].data + at;
    if (at + bytes < end) return w[later - TILE].data + at + bytes;
    return ahead.count ? ahead.rows[later - TILE].data : w[n].data + at;
}

/* Sums of all TILE weight rows -> folds. A fold takes those of weight rows that are APIECE apart. */
INLINE void FN(fold_all)(const int rows, FN(wide) (*sums)[STREAMED * OUTS], FN(vec) *folds) {
    for (int i = 0; i < TILE / OUTS; i++)
        for (int r = 0; r < rows; r++) folds[r * (TILE / OUTS) + i] = FN(fold)(sums[i] + r * OUTS);
}

/* Where a tile's sum of weight row n is folded from: among those that share a turn of FN(dot), as its fold has them. */
INLINE FN(wide) *FN(sum_of)(FN(wide) (*sums)[STREAMED * OUTS], int64_t n) {
    return sums[n / LANES * APIECE + n % APIECE] + n % LANES / APIECE;
}

/* To sums of `rows` rows of inputs the products with a block of weights. */
INLINE void FN(stream_step)(const int format, const int rows, Row w, const char *x, int64_t x_step, FN(wide) *sums) {
#pragma GCC unroll 8
    for (int j = 0; j < (int)vectors_of(format); j++)
#pragma GCC unroll 4
        for (int p = 0; p < PARTS; p++) {
            const FN(vec) weights = FN(decode)(format, w, j, p);
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++)
                sums[r].part[p] += LOAD(FN(vec), x + r * x_step + 64 * j + 4 * LANES * p) * weights;
        }
}

/* As FN(dot), of weights that are multiplied with floats. */
INLINE void FN(stream_floats)(const int format, const int rows, const Matrix *m, const Row *w, const char *x,
                              int64_t x_step, Ahead ahead, FN(vec) *folds) {
    const int64_t block = forms[format].block, stretch = stretch_of(format), whole = m->in / block * block;
    const int64_t bytes = bytes_of(format, m->in), lines = bytes_of(format, stretch) / 64;
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    for (int64_t n = 0; n < TILE; n++) {
        const uint8_t *next = FN(fetched)(w, n, 0, bytes, bytes, ahead);
        uint8_t filler[FILLER];
        const Row last = whole < m->in ? FN(filled)(format, m, w[n], whole, filler) : w[n];
        FN(wide) s[2] = {{{{0}}}};
        int64_t k = 0;
        for (; k + stretch <= m->in; k += stretch) {
            for (int64_t i = 0; i < lines; i++) __builtin_prefetch(next + bytes_of(format, k) + 64 * i, 0, FETCH_TO);
#pragma GCC unroll 8
            for (int64_t i = 0; i < stretch; i += block)
                FN(stream_step)(format, rows, FN(at)(format, m, w[n], k + i), x + 4 * (k + i), x_step, s);
        }
        for (; k < m->in; k += block)
            FN(stream_step)(format, rows, k < whole ? FN(at)(format, m, w[n], k) : last, x + 4 * k, x_step, s);
        for (int r = 0; r < rows; r++) FN(sum_of)(sums, n)[r * OUTS] = s[r];
    }
    FN(fold_all)(rows, sums, folds);
}

#if HAS_PAIRS
/* As FN(dot), of BF16. */
INLINE void FN(stream_pairs)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                             FN(vec) *folds) {
    const int64_t bytes = bytes_of(PAIRS, m->in);
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    for (int64_t n = 0; n < TILE; n++) {
        const uint8_t *weights = w[n].data, *next = FN(fetched)(w, n, 0, bytes, bytes, ahead);
        __m512 s[STREAMED];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_ps();
        for (int64_t at = 0; at < bytes; at += 64) {
            const __m512bh v = (__m512bh)LOAD(__m512i, weights + at);
            __builtin_prefetch(next + at, 0, FETCH_TO);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++)
                s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)LOAD(__m512i, x + r * x_step + at), v);
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sums[n % APIECE][r * OUTS + n / APIECE].part[0] = (FN(vec))s[r];
    }
    FN(fold_all)(rows, sums, folds);
}

/* Sums of `rows` rows of inputs with a block of FP8. From two addresses all rows are in reach: those of the first four and
   of the others, `step` and 3 of it. */
INLINE void FN(stream_block)(const int rows, Row w, const char *x, const char *upper, int64_t step, int64_t step3,
                             __m512 *s) {
    __m512i v[2];
    FN(decode_pairs)(FP8_PAIRS, w, v);
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++)
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const char *row = (r < 4 ? x : upper) + (r % 4 == 3 ? step3 : r % 4 * step) + 64 * j;
            s[r] = _mm512_dpbf16_ps(s[r], (__m512bh)LOAD(__m512i, row), (__m512bh)v[j]);
        }
}

/* So many inputs at a time, whole spans of them, that those of all rows stay in the nearest cache. */
INLINE int64_t FN(part_of)(int64_t rows, int64_t in, int64_t span) {
    const int64_t fit = INPUTS / (2 * rows) / span * span;
    return in * 2 * rows <= INPUTS ? in : fit ? fit : span;
}

/* As FN(dot_scaled), of FP8. */
INLINE void FN(stream_scaled)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                              FN(vec) *folds) {
    const int64_t span = (int64_t)1 << m->in_shift, part = FN(part_of)(rows, m->in, span);
    int64_t step3 = 3 * x_step;
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    __asm__("" : "+r"(step3)); /* or compilers reckon each row's address anew */
    for (int64_t begin = 0; begin < m->in; begin += part)
        for (int64_t n = 0; n < TILE; n++) {
            Row at = FN(at)(FP8_PAIRS, m, w[n], begin);
            const uint8_t *last = at.data + (begin + part < m->in ? part : m->in - begin);
            const uint8_t *next = FN(fetched)(w, n, begin, last - at.data, m->in, ahead);
            const char *in = x + 2 * begin, *upper = in + 4 * x_step;
            FN(wide) *mine = sums[n % APIECE] + n / APIECE;
            FN(vec) totals[STREAMED];
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) totals[r] = begin ? mine[r * OUTS].part[0] : (FN(vec)){0};
            for (; at.data < last; at.scale += sizeof(float)) {
                const uint8_t *to = last - at.data > span ? at.data + span : last;
                __m512 s[STREAMED];
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) s[r] = _mm512_setzero_ps();
#pragma GCC unroll 2
                for (; at.data < to; at.data += 64, next += 64, in += 128, upper += 128) {
                    __asm__("" : "+r"(in), "+r"(upper));
                    __builtin_prefetch(next, 0, FETCH_TO);
                    FN(stream_block)(rows, at, in, upper, x_step, step3, s);
                }
                const FN(vec) scale = (FN(vec))_mm512_set1_ps(LOAD(float, at.scale));
#pragma GCC unroll 8
                for (int r = 0; r < rows; r++) totals[r] = FN(scaled)(totals[r], (FN(vec))s[r], scale);
            }
#pragma GCC unroll 8
            for (int r = 0; r < rows; r++) mine[r * OUTS].part[0] = totals[r];
        }
    FN(fold_all)(rows, sums, folds);
}
#endif

#if HAS_DIGITS
/* As FN(dot_digits), both digits at once. */
INLINE void FN(stream_digits)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                              FN(vec) *folds) {
    const int64_t whole = m->in / DIGITS * DIGITS;
    const char *ends = x + 2 * padded(INT8_DIGITS, m->in);
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    for (int64_t n = 0; n < TILE; n++) {
        const uint8_t *weights = w[n].data, *next = FN(fetched)(w, n, 0, m->in, m->in, ahead);
        uint8_t filler[FILLER];
        u32x16 high[STREAMED], low[STREAMED];
        if (whole < m->in) FN(filled)(INT8_DIGITS, m, w[n], whole, filler);
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) high[r] = low[r] = (u32x16){0};
        for (int64_t k = 0; k < m->in; k += DIGITS) {
            const __m512i v = _mm512_xor_si512(LOAD(__m512i, k < whole ? weights + k : filler), _mm512_set1_epi8(-128));
            __builtin_prefetch(next + k, 0, FETCH_TO);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) { /* compilers keep what the intrinsic makes in memory, too */
                const __m512i *in = (const __m512i *)(x + r * x_step + 2 * k);
                __asm__("vpdpbusd %2, %1, %0" : "+v"(high[r]) : "v"(v), "v"(LOAD(__m512i, in)));
                __asm__("vpdpbusd %2, %1, %0" : "+v"(low[r]) : "v"(v), "v"(LOAD(__m512i, in + 1)));
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            const u32x16 s = (high[r] << 8) + LOAD(u32x16, ends + r * x_step + offsetof(Digits, excess)) + low[r];
            sums[n % APIECE][r * OUTS + n / APIECE].part[0] = __builtin_convertvector((i32x16)s, f32x16);
        }
    }
    FN(fold_all)(rows, sums, folds);
    for (int r = 0; r < rows; r++)
        for (int i = 0; i < TILE / OUTS; i++)
            folds[r * (TILE / OUTS) + i] *= LOAD(float, ends + r * x_step + offsetof(Digits, unit));
}
#endif

/* A function for each kind and number of rows. */
#define STREAM(kind, rows)                                                                                             \
    static NOINLINE void FN(stream_##kind##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,      \
                                                    Ahead ahead, FN(vec) *folds) {                                     \
        FN(stream_##kind)(rows, m, w, x, x_step, ahead, folds);                                                        \
    }
#define STREAM_NAME(kind, rows) FN(stream_##kind##_##rows),
#define STREAM_FLOATS(format, rows)                                                                                    \
    static NOINLINE void FN(stream_##format##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,    \
                                                      Ahead ahead, FN(vec) *folds) {                                   \
        FN(stream_floats)(format, rows, m, w, x, x_step, ahead, folds);                                                \
    }
#define UP_TO_4(EACH, kind) EACH(kind, 1) EACH(kind, 2) EACH(kind, 3) EACH(kind, 4)
#define UP_TO_8(EACH, kind) UP_TO_4(EACH, kind) EACH(kind, 5) EACH(kind, 6) EACH(kind, 7) EACH(kind, 8)
UP_TO_2(STREAM_FLOATS, F16)
UP_TO_2(STREAM_FLOATS, BF16)
#if HAS_PAIRS
UP_TO_4(STREAM, pairs)
UP_TO_8(STREAM, scaled)
#endif
#if HAS_DIGITS
UP_TO_4(STREAM, digits)
#endif
static const FN(Dot) FN(streamed)[][STREAMED] = {
#if HAS_PAIRS
    [PAIRS] = {UP_TO_4(STREAM_NAME, pairs)},
    [FP8_PAIRS] = {UP_TO_8(STREAM_NAME, scaled)},
#endif
#if HAS_DIGITS
    [INT8_DIGITS] = {UP_TO_4(STREAM_NAME, digits)},
#endif
    [F16] = {UP_TO_2(STREAM_NAME, F16)},
    [BF16] = {UP_TO_2(STREAM_NAME, BF16)},
};
