/* The weighted sum of each token's expert outputs, in fp32, k = 0 first. */
#include "numbers.h"

#include <omp.h>

enum { PIECE = 512 }; /* floats of a row that are summed at once */

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
