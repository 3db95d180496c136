#include "combine.h"

#include "numbers.h"

#include <omp.h>

enum { PIECE = 512 }; /* floats of a row that are summed at once */

CLONED UNFUSED static void sum_f32(const float *const *rows, const float *weights, int64_t top_k, int64_t size, float *out) {
    for (int64_t from = 0; from < size; from += PIECE) {
        int64_t count = size - from < PIECE ? size - from : PIECE;
        for (int64_t d = 0; d < count; d++) out[from + d] = rows[0][from + d] * weights[0];
        for (int64_t k = 1; k < top_k; k++)
            for (int64_t d = 0; d < count; d++) out[from + d] += rows[k][from + d] * weights[k];
    }
}

CLONED UNFUSED static void sum_bf16(const uint16_t *const *rows, const float *weights, int64_t top_k, int64_t size,
                                    uint16_t *out) {
    float sums[PIECE];
    for (int64_t from = 0; from < size; from += PIECE) {
        int64_t count = size - from < PIECE ? size - from : PIECE;
        for (int64_t d = 0; d < count; d++) sums[d] = wide(rows[0][from + d]) * weights[0];
        for (int64_t k = 1; k < top_k; k++)
            for (int64_t d = 0; d < count; d++) sums[d] += wide(rows[k][from + d]) * weights[k];
        for (int64_t d = 0; d < count; d++) out[from + d] = narrow(sums[d]);
    }
}

void moeray_combine(const Combine *c, const void *const *rows, int64_t tokens, int64_t top_k, int64_t size) {
#pragma omp parallel for num_threads((int)c->threads) if (c->threads > 1)
    for (int64_t t = 0; t < tokens; t++) {
        float weights[top_k];
        for (int64_t k = 0; k < top_k; k++)
            weights[k] = c->weights_format == F32 ? ((const float *)c->weights)[t * top_k + k]
                                                  : wide(((const uint16_t *)c->weights)[t * top_k + k]);
        if (c->format == F32)
            sum_f32((const float *const *)rows + t * top_k, weights, top_k, size, (float *)c->out + t * size);
        else
            sum_bf16((const uint16_t *const *)rows + t * top_k, weights, top_k, size, (uint16_t *)c->out + t * size);
    }
}
