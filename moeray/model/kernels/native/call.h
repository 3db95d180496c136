/* A layer's experts, as whoever has them computed sees them; layout.h says what they are. */
#pragma once
#include <stdint.h>

typedef struct Layer Layer;
typedef struct Expert Expert;

/* rows: the row of x that each one is, or NULL where they lie one after the other. x_format, y_format: F32 or BF16.
   scratch: as many bytes as moeray_scratch says, aligned to 64. */
typedef struct {
    const void *x;
    const int64_t *rows;
    void *y;
    char *scratch;
    int64_t x_format, y_format, threads, instructions;
} Call;

int64_t moeray_scratch(const Layer *layer, int64_t rows, int64_t experts, const Call *call);
void moeray_forward(const Layer *layer, const Expert *const *experts, const int64_t *counts, int64_t count,
                    const Call *call);
