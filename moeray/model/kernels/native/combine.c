/* The weighted sum of each token's expert outputs, in fp32, k = 0 first. */
#include "layout.h"

#include <omp.h>

#if defined(__x86_64__)
#define CLONED __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONED
#endif
/* A product is rounded before it is added, as in torch, so that both give the same bits. */
#define UNFUSED __attribute__((optimize("fp-contract=off")))

enum { PIECE = 512 }; /* floats of a row that are summed at once */

INLINE float wide(uint16_t bits) {
    uint32_t word = (uint32_t)bits << 16;
    return LOAD(float, &word);
}

/* To the nearest BF16, ties to even; NaN stays NaN. */
INLINE uint16_t narrow(float value) {
    uint32_t word = LOAD(uint32_t, &value);
    uint32_t rounded = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return (uint16_t)(value != value ? 0x7fc0 : rounded);
}

CLONED UNFUSED static void sum_f32(const float *rows, const float *weights, int64_t top_k, int64_t size, float *out) {
    for (int64_t from = 0; from < size; from += PIECE) {
        int64_t count = size - from < PIECE ? size - from : PIECE;
        for (int64_t d = 0; d < count; d++) out[from + d] = rows[from + d] * weights[0];
        for (int64_t k = 1; k < top_k; k++)
            for (int64_t d = 0; d < count; d++) out[from + d] += rows[k * size + from + d] * weights[k];
    }
}

CLONED UNFUSED static void sum_bf16(const uint16_t *rows, const float *weights, int64_t top_k, int64_t size,
                                    uint16_t *out) {
    float sums[PIECE];
    for (int64_t from = 0; from < size; from += PIECE) {
        int64_t count = size - from < PIECE ? size - from : PIECE;
        for (int64_t d = 0; d < count; d++) sums[d] = wide(rows[from + d]) * weights[0];
        for (int64_t k = 1; k < top_k; k++)
            for (int64_t d = 0; d < count; d++) sums[d] += wide(rows[k * size + from + d]) * weights[k];
        for (int64_t d = 0; d < count; d++) out[from + d] = narrow(sums[d]);
    }
}

/* rows [tokens, top_k, size] and out [tokens, size], both F32 or BF16; weights [tokens, top_k]. */
void moeray_combine(int64_t format, const void *rows, const float *weights, int64_t tokens, int64_t top_k, int64_t size,
                    void *out, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        if (format == F32)
            sum_f32((const float *)rows + t * top_k * size, weights + t * top_k, top_k, size, (float *)out + t * size);
        else
            sum_bf16((const uint16_t *)rows + t * top_k * size, weights + t * top_k, top_k, size,
                     (uint16_t *)out + t * size);
    }
}
