/* Tokens' keys or values into the slots of a cache. */
#include "layout.h"

#include <string.h>

/* x: `tokens` tokens, `token` bytes apart, of `heads` heads, `head` bytes apart, of `bytes` each. cache: slots of heads *
   bytes, in the order of memory. */
void moeray_keep(const char *x, int64_t token, int64_t head, int64_t tokens, int64_t heads, int64_t bytes,
                 const int64_t *slots, char *cache) {
    for (int64_t t = 0; t < tokens; t++) {
        char *slot = cache + slots[t] * heads * bytes;
        if (head == bytes) memcpy(slot, x + t * token, heads * bytes);
        else
            for (int64_t h = 0; h < heads; h++) memcpy(slot + h * bytes, x + t * token + h * head, bytes);
    }
}
