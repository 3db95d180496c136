/* Where a message that goes out on a lane is put: behind its header, or in the ring. */
#pragma once
#include "lane.h"
#include "message.h"

static inline Message message_on(Lane *lane) {
    return (Message){.memory = lane->message, .room = lane->message_room, .where = INLINE, .most = lane->most_header};
}

static inline void put_in_ring(Message *m, Lane *lane, int64_t position, int64_t size) {
    m->ring = lane->out->memory + position % lane->out->capacity;
    m->ring_bytes = size;
    m->where = position;
}

/* Where a message's payload goes; 0 where it is not for here. */
static inline int place(Message *m, Lane *lane, int64_t size) {
    *m = message_on(lane);
    if (size > lane->most_payload) return 0;
    if (!lane->out || size < lane->ring_from || size > lane->out->capacity) return 1;
    const int64_t position = reserve(lane->out, size);
    if (position == LIE) return 0;
    if (position != NO_ROOM) put_in_ring(m, lane, position, size);
    return 1;
}

static inline void commit(Lane *lane, const Message *m) {
    if (m->ring) lane->out->head = m->where + m->ring_bytes;
}
