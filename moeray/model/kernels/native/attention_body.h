/* Attention of one query over the keys of a paged cache; compiled once for each instruction set, with FN and SUMS
   (how many sums of 16 the registers hold) defined, and what vectors.h wants.

   Flash-decoding (Dao et al. 2023): parts of the keys by themselves, with a running maximum and a running sum of
   exponentials (online softmax), joined afterwards. Sums are fp32, their order follows from the sequence alone.

   As PAIRS, where the CPU multiplies pairs of BF16, two dimensions of a key, or two keys' values, are taken at once. */

#include "vectors.h"

/* What lies in arrays of vectors is to lie in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* `count` values (F32 or BF16) -> floats, filled up with zeros to whole vectors. */
INLINE void FN(unpack)(int64_t format, const char *from, int64_t count, float scale, float *to) {
    for (int64_t d = 0; d < whole(count); d += LANES) {
        float filler[LANES] = {0};
        const int in_part = d + LANES > count;
        if (in_part && d < count) memcpy(filler, from + bytes_of(format, d), bytes_of(format, count - d));
        const FN(vec) v = (in_part ? FN(load)(format, filler, 0) : FN(load)(format, from, d)) * scale;
        memcpy(to + d, &v, sizeof v);
    }
}

/* -- scores -------------------------------------------------------------------------------------------------------- */

/* sum + a b; as PAIRS, both products of a lane's two BF16. */
INLINE FN(vec) FN(multiply_add)(const int format, FN(vec) sum, FN(vec) a, FN(vec) b) {
#if defined(__AVX512BF16__)
    if (format == PAIRS) return (FN(vec))_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#endif
    return sum + a * b;
}

/* How many keys' products with so many queries are added up at once, and over how many dimensions a step. */
INLINE int FN(at_once)(const int heads) { return SUMS / heads; }

INLINE int64_t FN(stride)(const int format) { return format == PAIRS ? 32 : 16; }

/* The sums of LANES times 16 numbers, in order. */
INLINE FN(vec) FN(sums_of)(const FN(wide) *v) {
    FN(vec) folds[APIECE];
    UNROLL
    for (int i = 0; i < APIECE; i++) {
        FN(wide) some[OUTS];
        UNROLL
        for (int n = 0; n < OUTS; n++) some[n] = v[i + n * APIECE];
        folds[i] = FN(fold)(some);
    }
    return FN(unite)(folds);
}

/* 16 scores: of `heads` queries with 16 / heads keys, those of a query side by side. q_step: bytes. */
INLINE void FN(dots)(const int format, const int heads, const char *q, int64_t q_step, const char *const *keys,
                     int64_t width, float scale, float *scores, Coming *next) {
    const int count = 16 / heads, at_once = FN(at_once)(heads);
    const int64_t vector = FN(stride)(format);
    FN(wide) sums[16];
    for (int n = 0; n < count; n += at_once) {
        FN(wide) own[SUMS];
        UNROLL
        for (int i = 0; i < heads * at_once; i++)
            UNROLL
            for (int p = 0; p < PARTS; p++) own[i].part[p] = (FN(vec)){0};
        for (int64_t d = 0; d < width; d += vector) {
            fetch(next);
            UNROLL
            for (int i = 0; i < at_once * PARTS; i++) {
                const int j = i / PARTS, p = i % PARTS;
                const char *at = keys[n + j];
                FN(vec) key = format == PAIRS ? LOAD(FN(vec), at + 2 * d) : FN(load)(format, at, d + LANES * p);
                UNROLL
                for (int h = 0; h < heads; h++) {
                    FN(vec) query = LOAD(FN(vec), q + h * q_step + d * (64 / vector) + 4 * LANES * p);
                    FN(vec) *sum = &own[h * at_once + j].part[p];
                    *sum = FN(multiply_add)(format, *sum, query, key);
                }
            }
        }
        UNROLL
        for (int h = 0; h < heads; h++)
            UNROLL
            for (int j = 0; j < at_once; j++) sums[h * count + n + j] = own[h * at_once + j];
    }
    fetch(next);
    float all[16];
    UNROLL
    for (int p = 0; p < PARTS; p++) {
        const FN(vec) some = FN(sums_of)(sums + LANES * p) * scale;
        memcpy(all + LANES * p, &some, sizeof some);
    }
    UNROLL
    for (int h = 0; h < heads; h++) memcpy(scores + h * KEYS, all + h * count, 4 * count);
}

INLINE void FN(score)(const int format, const int heads, const Attention *a, Work *w, int64_t h) {
    const int64_t width = whole(a->k_size), q_step = 4 * width;
    for (int n = 0; n < KEYS; n += 16 / heads)
        FN(dots)(format, heads, (const char *)w->q + h * q_step, q_step, w->keys + n, width,
                 format == PAIRS ? a->scale : 1, w->scores + h * KEYS + n, &w->next);
}

/* -- values -------------------------------------------------------------------------------------------------------- */

/* out = out * fade + p V for `heads` queries and `vectors` vectors of the value from d on. */
INLINE void FN(mix)(const int format, const int heads, const int vectors, Work *w, int64_t h0, int64_t d, int64_t count,
                    float *out, int64_t width) {
    const float *weights = w->scores + h0 * KEYS;
    const int parts = vectors * PARTS;
    FN(vec) sums[16 * PARTS];
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int j = 0; j < parts; j++)
            sums[h * parts + j] = LOAD(FN(vec), out + h * width + d + LANES * j) * w->fade[h0 + h];
    for (int64_t n = 0; n < count; n++) {
        fetch(&w->next);
        UNROLL
        for (int j = 0; j < parts; j++) {
            FN(vec) value = FN(load)(format, w->values[n], d + LANES * j);
            UNROLL
            for (int h = 0; h < heads; h++) sums[h * parts + j] += value * weights[h * KEYS + n];
        }
    }
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int j = 0; j < parts; j++) memcpy(out + h * width + d + LANES * j, &sums[h * parts + j], 4 * LANES);
}

#if defined(__AVX512BF16__)
/* The same of two keys at once. Dimensions of `out` are in the order of unpacked words, until `in_order`. */
INLINE void FN(mix_pairs)(const int heads, const int vectors, Work *w, int64_t h0, int64_t d, int64_t count,
                          float *out, int64_t width) {
    FN(vec) sums[16];
    uint16_t p[4][KEYS];
    UNROLL
    for (int h = 0; h < heads; h++) {
        const float *scores = w->scores + (h0 + h) * KEYS;
        __m512bh rounded = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(scores + 16), _mm512_loadu_ps(scores));
        memcpy(p[h], &rounded, sizeof rounded);
        UNROLL
        for (int j = 0; j < vectors; j++)
            sums[h * vectors + j] = LOAD(FN(vec), out + h * width + d + 16 * j) * w->fade[h0 + h];
    }
    for (int64_t n = 0; n < count; n += 2) {
        fetch(&w->next);
        UNROLL
        for (int j = 0; j < vectors; j += 2) {
            __m512i a = LOAD(__m512i, w->values[n] + 2 * (d + 16 * j));
            __m512i b = LOAD(__m512i, w->values[n + 1] + 2 * (d + 16 * j));
            FN(vec) low = (FN(vec))_mm512_unpacklo_epi16(a, b), high = (FN(vec))_mm512_unpackhi_epi16(a, b);
            UNROLL
            for (int h = 0; h < heads; h++) {
                FN(vec) both = (FN(vec))_mm512_set1_epi32(LOAD(int32_t, p[h] + n)), *sum = sums + h * vectors + j;
                sum[0] = FN(multiply_add)(PAIRS, sum[0], low, both);
                sum[1] = FN(multiply_add)(PAIRS, sum[1], high, both);
            }
        }
    }
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int j = 0; j < vectors; j++) memcpy(out + h * width + d + 16 * j, &sums[h * vectors + j], 64);
}

/* Two vectors of unpacked words -> their 32 dimensions as they follow one another. */
static void FN(in_order)(float *out, int64_t count) {
    for (int64_t d = 0; d < count; d += 32) {
        FN(vec) low = LOAD(FN(vec), out + d), high = LOAD(FN(vec), out + d + 16);
        FN(vec) first = __builtin_shuffle(low, high, (i32x16){0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23});
        FN(vec) last = __builtin_shuffle(low, high, (i32x16){8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31});
        memcpy(out + d, &first, 64);
        memcpy(out + d + 16, &last, 64);
    }
}
#endif

INLINE void FN(mixed)(const int format, const int heads, const Attention *a, Work *w, int64_t h, int64_t count,
                      float *out) {
    const int64_t width = whole(a->v_size);
    int64_t d = 0;
#if defined(__AVX512BF16__)
    if (format == PAIRS) {
        for (; d + 64 <= width; d += 64) FN(mix_pairs)(heads, 4, w, h, d, count, out + h * width, width);
        for (; d < width; d += 32) FN(mix_pairs)(heads, 2, w, h, d, count, out + h * width, width);
        return;
    }
#endif
    for (; d + 4 * SUMS <= width; d += 4 * SUMS)
        FN(mix)(format, heads, SUMS / 4, w, h, d, count, out + h * width, width);
    for (; d < width; d += 16) FN(mix)(format, heads, 1, w, h, d, count, out + h * width, width);
}

/* -- softmax ------------------------------------------------------------------------------------------------------- */

/* A query's scores of a tile -> exponentials; its maximum (on every lane) and its sum go on, and `fade` is for what was
   summed before. */
INLINE void FN(soften)(float softcap, int64_t count, float *scores, FN(vec) *most, FN(wide) *sum, float *fade) {
    FN(vec) s[KEYS / LANES], top = *most;
    FN(ivec) there[KEYS / LANES];
    UNROLL
    for (int j = 0; j < KEYS / LANES; j++) {
        there[j] = FN(lanes)() + LANES * j < (int32_t)count;
        s[j] = LOAD(FN(vec), scores + LANES * j);
        /* tanh x = 1 - 2 / (e^2x + 1) */
        if (softcap) s[j] = softcap - 2 * softcap / (FN(exponential)(s[j] * (2 / softcap)) + 1);
        s[j] = (FN(vec))(((FN(ivec))s[j] & there[j]) | ((FN(ivec))FN(splat)(LOWEST) & ~there[j]));
        top = FN(most)(top, s[j]);
    }
    top = FN(largest)(top);
    const FN(vec) less = FN(exponential)(*most - top);
    UNROLL
    for (int p = 0; p < PARTS; p++) sum->part[p] *= less;
    UNROLL
    for (int j = 0; j < KEYS / LANES; j++) {
        s[j] = (FN(vec))((FN(ivec))FN(exponential)(s[j] - top) & there[j]);
        sum->part[j % PARTS] += s[j];
        memcpy(scores + LANES * j, s + j, sizeof s[j]);
    }
    *most = top;
    *fade = less[0];
}

/* -- a part -------------------------------------------------------------------------------------------------------- */

/* Where a tile of `count` keys and values lies, the last one again behind them. */
static void FN(find_rows)(const Attention *a, const Part *part, const int64_t *slots, int64_t count, Work *w) {
    const int64_t group = part->head / queries_of(a);
    for (int64_t n = 0; n < KEYS; n++) {
        const int64_t slot = slots[n < count ? n : count - 1];
        w->k_rows[n] = key_at(a, slot, group);
        w->v_rows[n] = value_at(a, slot, group);
    }
}

/* Those of the part's key/value head i of `groups`. Its share of the next tile's rows is to be asked for. */
static void FN(take)(const Attention *a, int64_t i, int64_t groups, int decoded, Work *w) {
    const int64_t k_width = whole(a->k_size), v_width = whole(a->v_size);
    /* Where v is k, a value is the beginning of its key. */
    w->next.end = (a->v == a->k ? w->next.keys : 2 * w->next.keys) * (i + 1) / groups;
    for (int64_t n = 0; n < KEYS; n++) {
        w->keys[n] = w->k_rows[n] + i * a->k_head;
        w->values[n] = w->v_rows[n] + i * a->v_head;
    }
    for (int64_t n = 0; decoded && n < KEYS; n++) {
        float *k = w->k + n * k_width, *v = a->v == a->k ? k : w->v + n * v_width;
        FN(unpack)(a->format, w->keys[n], a->k_size, 1, k);
        if (v != k) FN(unpack)(a->format, w->values[n], a->v_size, 1, v); /* else a value is the beginning of its key */
        w->keys[n] = (const char *)k;
        w->values[n] = (const char *)v;
    }
}

/* How often a tile asks for lines: about as long as one step of summing takes the next one. */
INLINE int64_t FN(steps)(const int format, const int heads, const Attention *a, int64_t count) {
    const int64_t k_width = whole(a->k_size), v_width = whole(a->v_size), each = format == PAIRS ? 64 : 4 * SUMS;
    const int64_t scored = KEYS / FN(at_once)(heads) * (k_width / FN(stride)(format)) + KEYS * heads / 16;
    return scored + heads + (format == PAIRS ? (count + 1) / 2 : count) * ((v_width + each - 1) / each);
}

/* One tile for queries [h, h + heads), of which there are so many in `tiles`. */
INLINE void FN(tile)(const int format, const int heads, const Attention *a, Work *w, int64_t h, int64_t tiles,
                     int64_t count, FN(vec) *most, FN(wide) *sum, float *out) {
    set_pace(&w->next, tiles * FN(steps)(format, heads, a, count));
    FN(score)(format, heads, a, w, h);
    for (int i = 0; i < heads; i++) {
        fetch(&w->next);
        FN(soften)(a->softcap, count, w->scores + (h + i) * KEYS, most + h + i, sum + h + i, w->fade + h + i);
    }
    FN(mixed)(format, heads, a, w, h, count, out);
}

/* ... for queries [h, end). */
INLINE void FN(tiles)(const int format, const Attention *a, const Part *part, int64_t h, int64_t end, int64_t count,
                      Work *w, FN(vec) *most, FN(wide) *sum) {
    for (; h + 4 <= end; h += 4) FN(tile)(format, 4, a, w, h, (end - h) / 4, count, most, sum, part->out);
    for (; h + 2 <= end; h += 2) FN(tile)(format, 2, a, w, h, 1, count, most, sum, part->out);
    for (; h < end; h++) FN(tile)(format, 1, a, w, h, end - h, count, most, sum, part->out);
}

/* The queries of one key/value head, or of several, over keys [from, to) of one sequence. next: the part that comes
   then, or NULL. */
static void FN(attend)(const Attention *a, Part *part, const Part *next, Work *w) {
    const int64_t heads = part->heads, k_width = whole(a->k_size), groups = groups_in(a, part), each = heads / groups;
    const char *q = (const char *)a->q + part->sequence * a->q_row + part->head * a->q_head;
    const int pairs = takes_pairs(a);
    /* For more than 4 queries keys are decoded once; only whole vectors can be read where they lie. */
    const int decoded = !pairs && (each > 4 || k_width != a->k_size || whole(a->v_size) != a->v_size);
    FN(vec) most[HEADS];
    FN(wide) sum[HEADS] = {{{{0}}}};
    for (int64_t h = 0; h < heads; h++) {
        if (pairs)
            memcpy(w->q + h * k_width, q + h * a->q_head, 2 * a->k_size);
        else
            FN(unpack)(a->format, q + h * a->q_head, a->k_size, a->scale, w->q + h * k_width);
        most[h] = FN(splat)(LOWEST);
    }
    memset(part->out, 0, heads * whole(a->v_size) * 4);
    find(a, a->tables + part->sequence * a->table_width, part->from, part->to, w->slots);
    for (int64_t from = part->from; from < part->to; from += KEYS) {
        const int64_t count = keys_of(part, from);
        FN(find_rows)(a, part, w->slots + from - part->from, count, w);
        look_ahead(a, part, from + KEYS, next, &w->next);
        for (int64_t i = 0; i < groups; i++) {
            FN(take)(a, i, groups, decoded, w);
            const int64_t h = i * each;
#if defined(__AVX512BF16__)
            if (pairs) {
                FN(tiles)(PAIRS, a, part, h, h + each, count, w, most, sum);
                continue;
            }
#endif
            if (decoded || a->format == F32)
                FN(tiles)(F32, a, part, h, h + each, count, w, most, sum);
            else
                FN(tiles)(BF16, a, part, h, h + each, count, w, most, sum);
        }
    }
#if defined(__AVX512BF16__)
    if (pairs) FN(in_order)(part->out, heads * whole(a->v_size));
#endif
    for (int64_t h = 0; h < heads; h++) {
        part->most[h] = most[h][0];
        part->sum[h] = 0;
        for (int i = 0; i < 16; i++) part->sum[h] += sum[h].part[i / LANES][i % LANES];
    }
}

/* One query's parts -> its output. A sink is one more key without a value. */
static void FN(join)(const Attention *a, const Part *parts, int64_t count, int64_t step, int64_t h, void *y) {
    const int64_t width = whole(a->v_size);
    float most = a->sinks ? a->sinks[parts->head + h] : LOWEST, sum = 0;
    for (int64_t i = 0; i < count; i++) most = parts[i * step].most[h] > most ? parts[i * step].most[h] : most;
    if (a->sinks) sum = FN(exponential)(FN(splat)(a->sinks[parts->head + h] - most))[0];
    for (int64_t i = 0; i < count; i++)
        sum += parts[i * step].sum[h] * FN(exponential)(FN(splat)(parts[i * step].most[h] - most))[0];
    for (int64_t d = 0; d < a->v_size; d += LANES) {
        FN(vec) out = {0};
        for (int64_t i = 0; i < count; i++) {
            const Part *part = parts + i * step;
            FN(vec) less = FN(exponential)(FN(splat)(part->most[h] - most));
            out += LOAD(FN(vec), part->out + h * width + d) * less;
        }
        FN(store)(a->format, y, d, out / sum, lesser(a->v_size - d, LANES));
    }
}

static const Kernels FN(kernels) = {FN(attend), FN(join)};

#undef UNROLL
#undef PARTS
#undef APIECE
#undef MERGE
#undef LANES_OF
#undef FN
#undef LANES
#undef OUTS
#undef SUMS
