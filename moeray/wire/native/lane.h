/* A channel's end as Python and C share it; lane.py describes the fields and has the same structures. */
#pragma once
#include <errno.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

typedef struct {
    uint8_t *memory;
    int64_t capacity;
    uint64_t *progress;
    int64_t head, done, start;
} Ring;

typedef struct {
    int64_t fd, busy;
    uint8_t *buffer;
    int64_t room, start, end;
    uint8_t *message;
    int64_t message_room, unsent_from, unsent_to, reading;
    Ring *out, *in;
    int64_t most_header, most_payload, ring_from;
} Lane;

/* By the clock of time.monotonic and time.perf_counter. */
static inline double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

enum { NO_ROOM = -1, LIE = -2 };

static inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

/* The position where so many bytes fit in one piece, as ring.py's RingWriter.reserve. */
static inline int64_t reserve(Ring *ring, int64_t size) {
    const uint64_t progress = __atomic_load_n(ring->progress, __ATOMIC_ACQUIRE);
    if (progress > (uint64_t)ring->head || progress < (uint64_t)ring->done) return LIE;
    ring->done = (int64_t)progress;
    const int empty = ring->done == ring->head;
    int64_t position = ring->head;
    if (empty || position % ring->capacity + size > ring->capacity) position = round_up(position, ring->capacity);
    if (empty) ring->start = position;
    const int64_t read = ring->done > ring->start ? ring->done : ring->start;
    const int64_t room = read + ring->capacity - position;
    return size <= room ? position : NO_ROOM;
}

/* Give the payload that was read last back to its sender. */
static inline void release(Ring *ring) {
    if (!ring || ring->head == ring->done) return;
    ring->done = ring->head;
    __atomic_store_n(ring->progress, (uint64_t)ring->done, __ATOMIC_RELEASE);
}

/* Where a payload lies in the peer's ring, held until it is released; NULL outside, as RingReader.hold. */
static inline const uint8_t *hold(Ring *ring, int64_t position, int64_t size, int64_t align) {
    if (position < 0 || position % align) return NULL;
    const int64_t ahead = position - ring->done;
    if (ahead < 0 || ahead > 2 * ring->capacity) return NULL;
    if (size > ring->capacity - position % ring->capacity) return NULL;
    ring->head = position + size;
    return ring->memory + position % ring->capacity;
}

/* Whether anything may be sent: not where somebody is about it, or a message has not gone out whole. */
static inline int may_send(const Lane *lane) {
    return lane && lane->fd >= 0 && !lane->busy && lane->unsent_from == lane->unsent_to;
}

/* Send the bytes of `message` now; 0 where nothing went out. What did not is left to the next sender. */
static inline int send_now(Lane *lane, int64_t size) {
    const ssize_t sent = send((int)lane->fd, lane->message, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent <= 0) return 0;
    lane->unsent_from = sent;
    lane->unsent_to = size;
    return 1;
}

/* Read what has come. 0 where there is no room for it, or the peer is gone. */
static inline int receive_now(Lane *lane) {
    if (lane->start == lane->end) lane->start = lane->end = 0;
    if (lane->end == lane->room) return 0;
    const ssize_t got = recv((int)lane->fd, lane->buffer + lane->end, (size_t)(lane->room - lane->end), MSG_DONTWAIT);
    if (got > 0) lane->end += got;
    return got > 0 || (got < 0 && (errno == EAGAIN || errno == EINTR));
}
