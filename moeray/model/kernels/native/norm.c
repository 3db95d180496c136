/* Root mean square norms. Sums are in fp32, sixteen at once whatever the CPU, so that their bits are always the same. */
#include "numbers.h"

#include <math.h>

enum { LANES = 16 };

INLINE float lanes_of(const float *sums) {
    float total = 0;
    for (int64_t i = 0; i < LANES; i++) total += sums[i];
    return total;
}

INLINE float scale_of(float squares, int64_t size, float eps) { return 1.0f / sqrtf(squares / (float)size + eps); }

CLONED UNFUSED static void norm_f32(const float *x, const float *weight, int64_t size, float eps, float *y) {
    float sums[LANES] = {0};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES)
        for (int64_t i = 0; i < LANES; i++) sums[i] += x[d + i] * x[d + i];
    for (int64_t i = 0; d + i < size; i++) sums[i] += x[d + i] * x[d + i];
    const float scale = scale_of(lanes_of(sums), size, eps);
    for (d = 0; d < size; d++) y[d] = x[d] * scale * weight[d];
}

CLONED UNFUSED static void norm_bf16(const uint16_t *x, const float *weight, int64_t size, float eps, int64_t early,
                                     uint16_t *y) {
    float sums[LANES] = {0};
    int64_t d = 0;
    for (; d + LANES <= size; d += LANES)
        for (int64_t i = 0; i < LANES; i++) sums[i] += wide(x[d + i]) * wide(x[d + i]);
    for (int64_t i = 0; d + i < size; i++) sums[i] += wide(x[d + i]) * wide(x[d + i]);
    const float scale = scale_of(lanes_of(sums), size, eps);
    if (early)
        for (d = 0; d < size; d++) y[d] = narrow(wide(narrow(wide(x[d]) * scale)) * weight[d]);
    else
        for (d = 0; d < size; d++) y[d] = narrow(wide(x[d]) * scale * weight[d]);
}

/* x and y [rows, size], both F32 or BF16; weight [size]. early: numbers are rounded before they are weighed, too. */
void moeray_norm(int64_t format, const void *x, const float *weight, int64_t rows, int64_t size, float eps,
                 int64_t early, void *y, int64_t threads) {
#pragma omp parallel for num_threads((int)threads) if (threads > 1)
    for (int64_t r = 0; r < rows; r++) {
        if (format == F32)
            norm_f32((const float *)x + r * size, weight, size, eps, (float *)y + r * size);
        else
            norm_bf16((const uint16_t *)x + r * size, weight, size, eps, early, (uint16_t *)y + r * size);
    }
}
