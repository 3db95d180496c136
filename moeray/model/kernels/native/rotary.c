/* Rotary position embedding of the two halves of a head, rounded where torch rounds, so that both give the same bits. */
#include "numbers.h"

CLONED UNFUSED static void turn_f32(const float *restrict x, const float *restrict cosine, const float *restrict sine,
                                    int64_t half, float *restrict y) {
    for (int64_t d = 0; d < half; d++) y[d] = x[d] * cosine[d] + -x[d + half] * sine[d];
    for (int64_t d = half; d < 2 * half; d++) y[d] = x[d] * cosine[d] + x[d - half] * sine[d];
}

INLINE float rounded(float value) { return wide(narrow(value)); }

CLONED UNFUSED static void turn_bf16(const uint16_t *restrict x, const uint16_t *restrict cosine,
                                     const uint16_t *restrict sine, int64_t half, uint16_t *restrict y) {
    for (int64_t d = 0; d < half; d++)
        y[d] = narrow(rounded(wide(x[d]) * wide(cosine[d])) + rounded(-wide(x[d + half]) * wide(sine[d])));
    for (int64_t d = half; d < 2 * half; d++)
        y[d] = narrow(rounded(wide(x[d]) * wide(cosine[d])) + rounded(wide(x[d - half]) * wide(sine[d])));
}

/* x: heads of `size` numbers, `token` elements from a token's to the next's, `head` from a head to the next; cosine and
   sine [tokens, size]; y [tokens, heads, size]; all F32 or all BF16. */
void moeray_rotate(int64_t format, const void *x, int64_t token, int64_t head, int64_t tokens, int64_t heads,
                   int64_t size, const void *cosine, const void *sine, void *y, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t h = 0; h < heads; h++) {
            const int64_t from = t * token + h * head, to = (t * heads + h) * size, at = t * size;
            if (format == F32)
                turn_f32((const float *)x + from, (const float *)cosine + at, (const float *)sine + at, size / 2,
                         (float *)y + to);
            else
                turn_bf16((const uint16_t *)x + from, (const uint16_t *)cosine + at, (const uint16_t *)sine + at,
                          size / 2, (uint16_t *)y + to);
        }
}
