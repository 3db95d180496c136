/* Products of a few rows of inputs with weights in the order in which these lie in memory; part of body.h.

   What they wait for is memory, and that is read fastest like this: one weight row from its beginning to its end, then the
   next, while the inputs stay in the nearest cache. The bits are those of sums.h and digits.h: each sum takes the same
   products in the same order, or whole numbers. */

/* The weight row that is fetched during row n: so many bytes later, of this tile or the next. */
INLINE const uint8_t *FN(fetched)(const Row *w, int64_t n, int64_t bytes, Ahead ahead) {
    const int64_t fit = DISTANCE / bytes, later = n + (fit < 1 ? 1 : fit < TILE ? fit : TILE);
    if (later < TILE) return w[later].data;
    return ahead.count ? ahead.rows[later - TILE].data : w[n].data;
}

/* Sums of all TILE weight rows -> folds. A fold takes those of weight rows that are APIECE apart. */
INLINE void FN(fold_all)(const int rows, FN(wide) (*sums)[STREAMED * OUTS], FN(vec) *folds) {
    for (int i = 0; i < TILE / OUTS; i++)
        for (int r = 0; r < rows; r++) folds[r * (TILE / OUTS) + i] = FN(fold)(sums[i] + r * OUTS);
}

#if HAS_PAIRS
/* As FN(dot), of BF16. */
INLINE void FN(stream_pairs)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                             FN(vec) *folds) {
    const int64_t bytes = bytes_of(PAIRS, m->in);
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    for (int64_t n = 0; n < TILE; n++) {
        const uint8_t *weights = w[n].data, *next = FN(fetched)(w, n, bytes, ahead);
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
#endif

#if HAS_DIGITS
/* As FN(dot_digits), both digits at once. */
INLINE void FN(stream_digits)(const int rows, const Matrix *m, const Row *w, const char *x, int64_t x_step, Ahead ahead,
                              FN(vec) *folds) {
    const int64_t whole = m->in / DIGITS * DIGITS;
    const char *ends = x + 2 * padded(INT8_DIGITS, m->in);
    FN(wide) sums[TILE / OUTS][STREAMED * OUTS];
    for (int64_t n = 0; n < TILE; n++) {
        const uint8_t *weights = w[n].data, *next = FN(fetched)(w, n, m->in, ahead);
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

/* A function for each number of rows. */
#define STREAM(what, rows)                                                                                             \
    static NOINLINE void FN(stream_##what##_##rows)(const Matrix *m, const Row *w, const char *x, int64_t x_step,      \
                                                    Ahead ahead, FN(vec) *folds) {                                     \
        FN(stream_##what)(rows, m, w, x, x_step, ahead, folds);                                                        \
    }
#define STREAMS(what) STREAM(what, 1) STREAM(what, 2) STREAM(what, 3) STREAM(what, 4)
#define STREAM_NAMES(what)                                                                                             \
    {FN(stream_##what##_1), FN(stream_##what##_2), FN(stream_##what##_3), FN(stream_##what##_4)}
#if HAS_PAIRS
STREAMS(pairs)
static const FN(Dot) FN(streamed_pairs)[STREAMED] = STREAM_NAMES(pairs);
#endif
#if HAS_DIGITS
STREAMS(digits)
static const FN(Dot) FN(streamed_digits)[STREAMED] = STREAM_NAMES(digits);
#endif
