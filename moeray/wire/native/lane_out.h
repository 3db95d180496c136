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

/* Whether its bytes are copied under the interpreter's lock. Nobody else may come to the end, or close it, meanwhile. */
static inline int stays_locked(int64_t size) { return size < UNLOCKED_FROM; }

/* Whether the rows went out, as a FORWARD, without waiting. */
static inline int send_rows(Lane *lane, const Ids *ids, const Rows *rows) {
    const int64_t payload = rows_payload(rows);
    Message m;
    if (!stays_locked(payload) || !may_send(lane) || !place(&m, lane, payload)) return 0;
    const int64_t bytes = put_rows_message(&m, ids, rows);
    if (!bytes || !send_now(lane, bytes)) return 0;
    commit(lane, &m);
    return 1;
}
