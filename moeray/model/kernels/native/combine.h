/* The weighted sum of each token's expert outputs, in fp32, k = 0 first, as those see it who have the rows. */
#pragma once
#include <stdint.h>

/* Where the sums of rows go, [tokens, size], and their weights, [tokens, top_k]; formats F32 or BF16, `format` that of
   rows and sums. */
typedef struct {
    int64_t format, weights_format;
    const void *weights;
    void *out;
    int64_t threads;
} Combine;

/* rows: the addresses of tokens * top_k rows of `size` numbers; none where top_k is 0. */
void moeray_combine(const Combine *call, const void *const *rows, int64_t tokens, int64_t top_k, int64_t size);
