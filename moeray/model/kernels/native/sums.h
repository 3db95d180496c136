/* Products of a few rows of inputs with OUTS rows of weights; part of body.h. */

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
/* 16 parts of a sum over inputs that share a scale, to those of the whole. */
INLINE FN(vec) FN(scaled)(FN(vec) total, FN(vec) sum, FN(vec) scale) {
    return (FN(vec))_mm512_fmadd_ps((__m512)sum, (__m512)scale, (__m512)total);
}

/* Sums over inputs that share scales are scaled and added; a fold for each row, TILE / OUTS folds apart. */
INLINE void FN(dot_scaled)(const int format, const int rows, const Matrix *m, const Row *w, const char *x,
                           int64_t x_step, Ahead ahead, FN(vec) *folds) {
    const int64_t span = (int64_t)1 << m->in_shift;
    FN(wide) totals[MOST * OUTS] = {{{{0}}}};
    for (int64_t k = 0; k < m->in; k += span) {
        FN(wide) sums[MOST * OUTS];
        FN(sum_up)(format, rows, m, w, x, x_step, k, k + span < m->in ? k + span : m->in, 0, ahead, sums);
        for (int n = 0; n < OUTS; n++) {
            const FN(vec) scale = (FN(vec)){0} + LOAD(float, FN(at)(format, m, w[n * APIECE], k).scale);
            for (int r = 0; r < rows; r++) {
                FN(vec) *total = &totals[r * OUTS + n].part[0];
                *total = FN(scaled)(*total, sums[r * OUTS + n].part[0], scale);
            }
        }
    }
    for (int r = 0; r < rows; r++) folds[r * (TILE / OUTS)] = FN(fold)(totals + r * OUTS);
}
#endif
