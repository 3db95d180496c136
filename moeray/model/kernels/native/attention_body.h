/* Attention of one query over the keys of a paged cache; compiled once for each instruction set, with FN and SUMS
   (how many vectors of sums the registers hold) defined.

   Flash-decoding (Dao et al. 2023): parts of the keys by themselves, with a running maximum and a running sum of
   exponentials (online softmax), joined afterwards. Sums are fp32, their order follows from the sequence alone. */

#include "vectors.h"

/* What lies in arrays of vectors is to lie in registers. */
#define UNROLL _Pragma("GCC unroll 16")

/* `count` values (F32 or BF16) -> floats, filled up with zeros to whole vectors. */
INLINE void FN(unpack)(int64_t format, const char *from, int64_t count, float scale, float *to) {
    int64_t d = 0;
    f32x16 v;
    for (; d + 16 <= count; d += 16) {
        v = FN(load)(format, from, d) * scale;
        memcpy(to + d, &v, sizeof v);
    }
    if (d == count) return;
    float filler[16] = {0};
    memcpy(filler, from + bytes_of(format, d), bytes_of(format, count - d));
    v = FN(load)(format, filler, 0) * scale;
    memcpy(to + d, &v, sizeof v);
}

/* -- scores -------------------------------------------------------------------------------------------------------- */

/* 16 scores: of `heads` queries with 16 / heads keys, those of a query side by side. */
INLINE void FN(dots)(const int heads, const float *q, int64_t q_step, const float *k, int64_t k_step, int64_t width,
                     float *scores) {
    const int keys = 16 / heads, at_once = SUMS / heads > keys ? keys : SUMS / heads;
    f32x16 sums[16];
    for (int n = 0; n < keys; n += at_once) {
        f32x16 own[SUMS];
        UNROLL
        for (int i = 0; i < heads * at_once; i++) own[i] = (f32x16){0};
        for (int64_t d = 0; d < width; d += 16)
            UNROLL
            for (int j = 0; j < at_once; j++) {
                f32x16 key = LOAD(f32x16, k + (n + j) * k_step + d);
                UNROLL
                for (int h = 0; h < heads; h++) own[h * at_once + j] += LOAD(f32x16, q + h * q_step + d) * key;
            }
        UNROLL
        for (int h = 0; h < heads; h++)
            UNROLL
            for (int j = 0; j < at_once; j++) sums[h * keys + n + j] = own[h * at_once + j];
    }
    f32x16 all = FN(sums_of)(sums);
    UNROLL
    for (int h = 0; h < heads; h++) memcpy(scores + h * KEYS, (float *)&all + h * keys, 4 * keys);
}

INLINE void FN(score)(const int heads, const float *q, int64_t q_step, const float *k, int64_t k_step, int64_t width,
                      float *scores) {
    for (int n = 0; n < KEYS; n += 16 / heads)
        FN(dots)(heads, q, q_step, k + n * k_step, k_step, width, scores + n);
}

/* -- values -------------------------------------------------------------------------------------------------------- */

/* out = out * fade + p V for `heads` queries and `vectors` vectors of the value. */
INLINE void FN(mix)(const int heads, const int vectors, const float *p, const float *v, int64_t v_step, int64_t count,
                    const float *fade, float *out, int64_t out_step) {
    f32x16 sums[16];
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int j = 0; j < vectors; j++) sums[h * vectors + j] = LOAD(f32x16, out + h * out_step + 16 * j) * fade[h];
    for (int64_t n = 0; n < count; n++)
        UNROLL
        for (int j = 0; j < vectors; j++) {
            f32x16 value = LOAD(f32x16, v + n * v_step + 16 * j);
            UNROLL
            for (int h = 0; h < heads; h++) sums[h * vectors + j] += value * p[h * KEYS + n];
        }
    UNROLL
    for (int h = 0; h < heads; h++)
        UNROLL
        for (int j = 0; j < vectors; j++) memcpy(out + h * out_step + 16 * j, &sums[h * vectors + j], 64);
}

INLINE void FN(mixed)(const int heads, const float *p, const float *v, int64_t v_step, int64_t width, int64_t count,
                      const float *fade, float *out, int64_t out_step) {
    int64_t d = 0;
    for (; d + 4 * SUMS <= width; d += 4 * SUMS)
        FN(mix)(heads, SUMS / 4, p, v + d, v_step, count, fade, out + d, out_step);
    for (; d < width; d += 16) FN(mix)(heads, 1, p, v + d, v_step, count, fade, out + d, out_step);
}

/* -- softmax ------------------------------------------------------------------------------------------------------- */

#define FN_SWAP(v, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p) \
    __builtin_shuffle(v, (i32x16){a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p})

/* The largest lane, on every lane. */
INLINE f32x16 FN(largest)(f32x16 v) {
    v = -FN(least)(-v, -FN_SWAP(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = -FN(least)(-v, -FN_SWAP(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = -FN(least)(-v, -FN_SWAP(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    return -FN(least)(-v, -FN_SWAP(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
}
#undef FN_SWAP

/* A query's scores of a tile -> exponentials; its maximum and its sum go on, and `fade` is for what was summed before. */
INLINE void FN(soften)(float softcap, int64_t count, float *scores, f32x16 *most, f32x16 *sum, float *fade) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 s[KEYS / 16], top = *most;
    i32x16 there[KEYS / 16];
    UNROLL
    for (int j = 0; j < KEYS / 16; j++) {
        there[j] = lanes + 16 * j < (int32_t)count;
        s[j] = LOAD(f32x16, scores + 16 * j);
        /* tanh x = 1 - 2 / (e^2x + 1) */
        if (softcap) s[j] = softcap - 2 * softcap / (FN(exponential)(s[j] * (2 / softcap)) + 1);
        s[j] = (f32x16)(((i32x16)s[j] & there[j]) | ((i32x16)SPLAT(LOWEST) & ~there[j]));
        top = -FN(least)(-top, -s[j]);
    }
    top = FN(largest)(top);
    f32x16 less = FN(exponential)(*most - top);
    *sum *= less;
    UNROLL
    for (int j = 0; j < KEYS / 16; j++) {
        s[j] = (f32x16)((i32x16)FN(exponential)(s[j] - top) & there[j]);
        *sum += s[j];
        memcpy(scores + 16 * j, s + j, 64);
    }
    *most = top;
    *fade = less[0];
}

/* -- a part -------------------------------------------------------------------------------------------------------- */

/* Up to HEADS queries of one key/value head over keys [from, to) of one sequence. */
static void FN(attend)(const Attention *a, Part *part, Work *w) {
    const int64_t heads = part->heads, k_width = whole(a->k_size), v_width = whole(a->v_size);
    const int64_t group = part->head / (a->heads / a->groups);
    const char *q = (const char *)a->q + part->sequence * a->q_row + part->head * a->q_head;
    f32x16 most[HEADS], sum[HEADS];
    for (int64_t h = 0; h < heads; h++) {
        FN(unpack)(a->format, q + h * a->q_head, a->k_size, a->scale, w->q + h * k_width);
        most[h] = SPLAT(LOWEST);
        sum[h] = SPLAT(0);
    }
    memset(part->out, 0, heads * v_width * 4);
    find(a, a->tables + part->sequence * a->table_width, part->from, part->to, w->slots);
    for (int64_t from = part->from; from < part->to; from += KEYS) {
        const int64_t count = part->to - from < KEYS ? part->to - from : KEYS;
        const float *v = w->k;
        int64_t v_step = k_width;
        for (int64_t n = 0; n < count; n++) {
            const int64_t i = from - part->from + n, slot = w->slots[i];
            if (i + AHEAD < part->to - part->from) fetch(a, w->slots[i + AHEAD], group);
            FN(unpack)(a->format, key_at(a, slot, group), a->k_size, 1, w->k + n * k_width);
            if (a->v == a->k) continue; /* a value is the beginning of its key */
            FN(unpack)(a->format, value_at(a, slot, group), a->v_size, 1, w->v + n * v_width);
        }
        if (a->v != a->k) v = w->v, v_step = v_width;
        int64_t h = 0;
        for (; h + 4 <= heads; h += 4) FN(score)(4, w->q + h * k_width, k_width, w->k, k_width, k_width, w->scores + h * KEYS);
        for (; h + 2 <= heads; h += 2) FN(score)(2, w->q + h * k_width, k_width, w->k, k_width, k_width, w->scores + h * KEYS);
        for (; h < heads; h++) FN(score)(1, w->q + h * k_width, k_width, w->k, k_width, k_width, w->scores + h * KEYS);
        for (h = 0; h < heads; h++) FN(soften)(a->softcap, count, w->scores + h * KEYS, most + h, sum + h, w->fade + h);
        h = 0;
        for (; h + 4 <= heads; h += 4)
            FN(mixed)(4, w->scores + h * KEYS, v, v_step, v_width, count, w->fade + h, part->out + h * v_width, v_width);
        for (; h + 2 <= heads; h += 2)
            FN(mixed)(2, w->scores + h * KEYS, v, v_step, v_width, count, w->fade + h, part->out + h * v_width, v_width);
        for (; h < heads; h++)
            FN(mixed)(1, w->scores + h * KEYS, v, v_step, v_width, count, w->fade + h, part->out + h * v_width, v_width);
    }
    for (int64_t h = 0; h < heads; h++) {
        part->most[h] = most[h][0];
        part->sum[h] = 0;
        for (int i = 0; i < 16; i++) part->sum[h] += sum[h][i];
    }
}

/* One query's parts -> its output. A sink is one more key without a value. */
static void FN(join)(const Attention *a, const Part *parts, int64_t count, int64_t step, int64_t h, void *y) {
    const int64_t width = whole(a->v_size);
    float most = a->sinks ? a->sinks[parts->head + h] : LOWEST, sum = 0;
    for (int64_t i = 0; i < count; i++) most = parts[i * step].most[h] > most ? parts[i * step].most[h] : most;
    if (a->sinks) sum = FN(exponential)(SPLAT(a->sinks[parts->head + h] - most))[0];
    for (int64_t i = 0; i < count; i++)
        sum += parts[i * step].sum[h] * FN(exponential)(SPLAT(parts[i * step].most[h] - most))[0];
    for (int64_t d = 0; d < width; d += 16) {
        f32x16 out = {0};
        for (int64_t i = 0; i < count; i++) {
            const Part *part = parts + i * step;
            f32x16 less = FN(exponential)(SPLAT(part->most[h] - most));
            out += LOAD(f32x16, part->out + h * width + d) * less;
        }
        out /= sum;
        FN(store)(a->format, y, d, &out, a->v_size - d < 16 ? a->v_size - d : 16);
    }
}

static const Kernels FN(kernels) = {FN(attend), FN(join)};
