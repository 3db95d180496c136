/* Attention of one token a sequence over a paged cache (decoding), for CPUs; see attention_body.h for the sums.

   Keys and values are read where they lie: nothing is gathered. One parallel region a call, over parts of PART keys of
   a sequence and up to HEADS queries: of one key/value head, or of several whole ones, so that what lies together is
   read together. Threads are those of torch's OpenMP runtime. */
#include "layout.h"

#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    KEYS = 32,  /* keys that are decoded and scored at once */
    PART = 256, /* keys of a sequence that one thread works on */
    HEADS = 16, /* queries that it works on */
    RUNS = 8,   /* runs of parts that each thread gets at least, so that all end together */
};
#define LOWEST -3.0e38f /* less than any score; minus infinity would give NaN as a difference */

/* Queries [head, head + heads) and keys [from, to). out: the unscaled sums of [heads, v_size]; most, sum: of each query's
   exponentials. */
typedef struct {
    int64_t sequence, head, heads, from, to;
    float *out, most[HEADS], sum[HEADS];
} Part;

/* The rows of the next tile, `keys` keys and then their values, of so many bytes each: those from `row`, byte `at`, up
   to `end` are still to be asked for, `pace` lines at each step of what is computed meanwhile. */
typedef struct {
    const char *rows[2 * KEYS];
    int64_t keys, k_bytes, v_bytes, row, at, end, pace;
} Coming;

/* What a thread writes. k_rows, v_rows: a tile's keys and values of the first key/value head, where they lie. keys,
   values: those of the head that is computed, maybe decoded to k and v. */
typedef struct {
    float *q, *k, *v, scores[HEADS * KEYS], fade[HEADS];
    int64_t slots[PART];
    const char *k_rows[KEYS], *v_rows[KEYS], *keys[KEYS], *values[KEYS];
    Coming next;
} Work;

typedef struct {
    void (*attend)(const Attention *, Part *, const Part *next, Work *);
    void (*join)(const Attention *, const Part *, int64_t count, int64_t step, int64_t h, void *y);
} Kernels;

/* Whether pairs of BF16 are multiplied. */
static int takes_pairs(const Attention *a) {
    return a->instructions >= AVX512_BF16 && a->format == BF16 && a->k_size % 32 == 0 && a->v_size % 32 == 0;
}

static int64_t queries_of(const Attention *a) { return a->heads / a->groups; } /* that share a key/value head */

static int64_t whole(int64_t size) { return (size + 15) / 16 * 16; }

/* The slots of keys [from, to). */
static void find(const Attention *a, const int64_t *table, int64_t from, int64_t to, int64_t *slots) {
    int64_t block = from / a->block, within = from % a->block;
    for (int64_t n = 0; n < to - from; n++) {
        slots[n] = table[block] * a->block + within;
        if (++within == a->block) within = 0, block++;
    }
}

static const char *key_at(const Attention *a, int64_t slot, int64_t group) {
    return (const char *)a->k + slot * a->k_slot + group * a->k_head;
}

static const char *value_at(const Attention *a, int64_t slot, int64_t group) {
    return (const char *)a->v + slot * a->v_slot + group * a->v_head;
}

static int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }

/* The keys of a part's tile that begins with key `from`. */
static int64_t keys_of(const Part *part, int64_t from) { return lesser(part->to - from, KEYS); }

/* Its key/value heads: some whole ones, or one, of some of whose queries it is. */
static int64_t groups_in(const Attention *a, const Part *part) {
    return part->heads > queries_of(a) ? part->heads / queries_of(a) : 1;
}

/* Where the next tile lies: that of key `from`, or the first of the part that comes then, if there is one. */
static void look_ahead(const Attention *a, const Part *part, int64_t from, const Part *then, Coming *next) {
    next->keys = next->row = next->at = next->end = 0;
    if (from >= part->to) {
        if (!then) return;
        part = then;
        from = part->from;
    }
    int64_t slots[KEYS];
    const int64_t group = part->head / queries_of(a), others = groups_in(a, part) - 1;
    next->keys = keys_of(part, from);
    next->k_bytes = others * a->k_head + bytes_of(a->format, a->k_size);
    next->v_bytes = others * a->v_head + bytes_of(a->format, a->v_size);
    find(a, a->tables + part->sequence * a->table_width, from, from + next->keys, slots);
    for (int64_t n = 0; n < next->keys; n++) {
        next->rows[n] = key_at(a, slots[n], group);
        next->rows[next->keys + n] = value_at(a, slots[n], group);
    }
}

/* So many steps are left to ask for all that is left. */
static inline void set_pace(Coming *next, int64_t steps) {
    const int64_t keys = lesser(next->end, next->keys) - lesser(next->row, next->keys);
    const int64_t values = next->end - next->row - keys;
    const int64_t lines = keys * ((next->k_bytes + 63) / 64) + values * ((next->v_bytes + 63) / 64);
    next->pace = (lines + steps - 1) / steps;
}

/* Asks for the lines of one step. Of many at once a CPU forgets some, as it waits for so many at a time at most. */
static inline void fetch(Coming *next) {
    for (int64_t i = 0; i < next->pace && next->row < next->end; i++) {
        __builtin_prefetch(next->rows[next->row] + next->at);
        if ((next->at += 64) >= (next->row < next->keys ? next->k_bytes : next->v_bytes)) next->at = 0, next->row++;
    }
}

#define FN(name) name##_portable
#define LANES 4
#define OUTS 2
#define SUMS 4
#include "attention_body.h"

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define FN(name) name##_avx2
#define LANES 8
#define OUTS 2
#define SUMS 4
#include "attention_body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,fma")
#define FN(name) name##_avx512
#define LANES 16
#define OUTS 4
#define SUMS 16
#include "attention_body.h"
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")
#define FN(name) name##_avx512_bf16
#define LANES 16
#define OUTS 4
#define SUMS 16
#include "attention_body.h"
#pragma GCC pop_options
#endif

static const Kernels *kernels_of(int64_t instructions) {
#if defined(__x86_64__)
    if (instructions >= AVX512_BF16) return &kernels_avx512_bf16;
    if (instructions >= AVX512) return &kernels_avx512;
    if (instructions == AVX2) return &kernels_avx2;
#endif
    (void)instructions;
    return &kernels_portable;
}

static int64_t parts_of(const Attention *a, int64_t sequence) {
    return (a->end[sequence] - a->first[sequence] + PART - 1) / PART;
}

/* How many key/value heads a part has: as many as there may be, while there are parts for all threads. */
static int64_t groups_of(const Attention *a) {
    int64_t units = 0, most = HEADS / queries_of(a);
    for (int64_t i = 0; i < a->sequences; i++) units += parts_of(a, i) * a->groups;
    if (units / (2 * a->threads) < most) most = units / (2 * a->threads);
    if (a->groups < most) most = a->groups;
    return most > 1 ? most : 1;
}

/* Parts of the same keys. */
static int64_t blocks_of(const Attention *a, int64_t together) {
    return together > 1 ? (a->groups + together - 1) / together : (queries_of(a) + HEADS - 1) / HEADS * a->groups;
}

static int64_t work_floats(const Attention *a) {
    return HEADS * whole(a->k_size) + KEYS * (whole(a->k_size) + whole(a->v_size));
}

int64_t moeray_attention_scratch(const Attention *a) {
    int64_t parts = 0;
    for (int64_t i = 0; i < a->sequences; i++) parts += parts_of(a, i);
    parts *= blocks_of(a, groups_of(a));
    return parts * ((int64_t)sizeof(Part) + HEADS * whole(a->v_size) * 4 + 64) + 4 * a->threads * work_floats(a) + 128;
}

void moeray_attention(const Attention *a) {
    const Kernels *k = kernels_of(a->instructions);
    const int64_t together = groups_of(a), blocks = blocks_of(a, together), out = HEADS * whole(a->v_size);
    const int64_t in_group = blocks < a->groups ? 1 : blocks / a->groups, queries = queries_of(a) * together;
    int64_t count = 0;
    for (int64_t i = 0; i < a->sequences; i++) count += parts_of(a, i) * blocks;
    float *works = (float *)a->scratch, *outs = works + a->threads * work_floats(a);
    Part *parts = (Part *)(outs + count * out);
    for (int64_t i = 0, n = 0; i < a->sequences; i++)
        for (int64_t p = 0; p < parts_of(a, i); p++)
            for (int64_t b = 0; b < blocks; b++, n++) {
                int64_t within = b % in_group * HEADS, head = b / in_group * queries + within;
                int64_t from = a->first[i] + p * PART, heads = queries - within;
                if (a->heads - head < heads) heads = a->heads - head;
                parts[n].sequence = i;
                parts[n].head = head;
                parts[n].heads = heads < HEADS ? heads : HEADS;
                parts[n].from = from;
                parts[n].to = from + PART < a->end[i] ? from + PART : a->end[i];
                parts[n].out = outs + n * out;
            }
    /* So many one after the other: a thread asks for the next one's keys while it works on the one before. */
    const int64_t run = 1 + count / (RUNS * a->threads);
#pragma omp parallel num_threads(a->threads) if (a->threads > 1)
    {
        Work work;
        work.q = works + omp_get_thread_num() * work_floats(a);
        work.k = work.q + HEADS * whole(a->k_size);
        work.v = work.k + KEYS * whole(a->k_size);
#pragma omp for schedule(dynamic)
        for (int64_t from = 0; from < count; from += run)
            for (int64_t n = from; n < count && n < from + run; n++)
                k->attend(a, parts + n, n + 1 < count && n + 1 < from + run ? parts + n + 1 : NULL, &work);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < count; n++) {
            const Part *part = parts + n;
            if (part->from != a->first[part->sequence]) continue;
            char *y = (char *)a->y + bytes_of(a->format, (part->sequence * a->heads + part->head) * a->v_size);
            for (int64_t h = 0; h < part->heads; h++)
                k->join(a, part, parts_of(a, part->sequence), blocks, h, y + bytes_of(a->format, h * a->v_size));
        }
    }
}
