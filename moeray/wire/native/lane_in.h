/* What has come on a lane: messages that lie whole in its buffer, and their payloads. */
#pragma once
#include "lane.h"
#include "message.h"

enum { QUICK_BYTES = 1 << 20 }; /* larger ones take so long to read that other threads are to run */

/* A message that lies whole in a lane's buffer: its header, and the bytes of it there. */
typedef struct {
    In header;
    int64_t payload, body;
} Whole;

enum { MORE, TAKEN, OTHER };

/* MORE: it is not there yet. OTHER: what is there is not for here. */
static inline int find_whole(const Lane *lane, Whole *w) {
    const uint8_t *from = lane->buffer + lane->start;
    const int64_t have = lane->end - lane->start;
    uint32_t prefix[2];
    if (have < PREFIX) return MORE;
    memcpy(prefix, from, PREFIX);
    w->payload = prefix[1];
    w->body = aligned(PREFIX + (int64_t)prefix[0]);
    if (!prefix[0] || prefix[0] > lane->most_header || w->payload > lane->most_payload) return OTHER;
    if (w->payload > QUICK_BYTES || w->body > lane->room) return OTHER;
    if (have < w->body) return MORE;
    w->header = (In){from + PREFIX, from + PREFIX + prefix[0], 0};
    return TAKEN;
}

/* Where the payload of a whole message lies: in the peer's ring, or behind its header. MORE: it has not all come. */
static inline int find_payload(Lane *lane, const Whole *w, int64_t where, const uint8_t **payload) {
    if (where == INLINE) {
        *payload = lane->buffer + lane->start + w->body;
        if (w->body + w->payload > lane->room) return OTHER;
        return lane->end - lane->start < w->body + w->payload ? MORE : TAKEN;
    }
    if (!lane->in) return OTHER;
    release(lane->in);
    /* Where the position is odd, receiver.py says so, to which the ring is as it was. */
    const int64_t head = lane->in->head;
    *payload = hold(lane->in, where, w->payload, ALIGN);
    if (!*payload) lane->in->head = head;
    return *payload ? TAKEN : OTHER;
}

static inline void pass(Lane *lane, const Whole *w, int64_t where) {
    lane->start += w->body + (where == INLINE ? w->payload : 0);
}
