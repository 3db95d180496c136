/* RESULTs that are waited for on several lanes, and where their rows go. */
#pragma once
#include <sched.h>

#include "lane_in.h"

enum { MAX_LANES = 1024 };
enum { NONE_IN_TIME = -1, FAILED = -2 };

/* Where outputs go: rows of a tensor [out_rows, width], each of row_bytes. */
typedef struct {
    int64_t dtype, width, row_bytes, out_rows;
    char *out;
} Target;

/* The answer to the frame `id` on a lane: `rows` of them, to these rows `to` of the target. */
typedef struct {
    Lane *lane;
    int64_t id, rows;
    const int64_t *to;
} Wanted;

/* An answer that lies on its lane, its rows one after the other. */
typedef struct {
    double compute_s, queue_s;
    int64_t where;
    Whole whole;
    const uint8_t *rows;
} Answer;

/* Whether the header is that of the RESULT of the frame `id` with so many rows as the target takes. */
static inline int read_result(In in, int64_t id, int64_t rows, const Target *t, Answer *a) {
    want_array(&in, 9);
    int same = get_int(&in) == VERSION;
    same &= get_int(&in) == RESULT;
    same &= get_int(&in) == id;
    get_int(&in);
    get_int(&in);
    want_map(&in, 2);
    want_text(&in, "compute_s");
    a->compute_s = get_double(&in);
    want_text(&in, "queue_s");
    a->queue_s = get_double(&in);
    want_array(&in, 1);
    want_array(&in, 2);
    same &= get_int(&in) == rows;
    same &= get_int(&in) == t->width;
    want_array(&in, 1);
    same &= get_int(&in) == t->dtype;
    a->where = get_int(&in);
    return same && !in.bad && in.at == in.end;
}

/* TAKEN: the answer is all there, and its lane must `be_done` with it before anything else is read or the interpreter's
   lock is let go. */
static inline int find_answer(const Wanted *w, const Target *t, Answer *a) {
    Lane *lane = w->lane;
    if (!lane || lane->fd < 0 || lane->reading) return OTHER;
    const int found = find_whole(lane, &a->whole);
    if (found != TAKEN) return found;
    if (!read_result(a->whole.header, w->id, w->rows, t, a)) return OTHER;
    if (a->whole.payload != aligned(w->rows * t->row_bytes)) return OTHER;
    return find_payload(lane, &a->whole, a->where, &a->rows);
}

static inline void be_done(Lane *lane, const Answer *a) {
    if (a->where != INLINE) release(lane->in);
    pass(lane, &a->whole, a->where);
}

/* Put the rows of an answer to their places. */
static inline void take(const Wanted *w, const Target *t, const Answer *a) {
    for (int64_t r = 0; r < w->rows; r++)
        memcpy(t->out + w->to[r] * t->row_bytes, a->rows + r * t->row_bytes, t->row_bytes);
    be_done(w->lane, a);
}

/* A core that has gone idle takes 30 us to come back, and a layer's answers come soon after one another. */
static const double SPIN_S = 100e-6, TAKEN_S = 50e-6;

/* As poll, and awake for a while before it sleeps, as long as nobody else wants the core: whoever does has it at each
   turn, and for good where a turn takes long. */
static inline int poll_awake(struct pollfd *polled, nfds_t count, int wait_ms) {
    const double until = seconds() + SPIN_S;
    for (double now = until - SPIN_S, before = now; now < until && now - before < TAKEN_S; now = seconds()) {
        const int ready = poll(polled, count, 0);
        if (ready) return ready;
        before = now;
        sched_yield();
    }
    return poll(polled, count, wait_ms);
}

/* Which of the wanted, MAX_LANES at most, has something to be read first: its answer, as `find_answer` has it, or OTHER.
   NONE_IN_TIME; FAILED with an exception. `soon`: to be awake when it comes. Other threads run meanwhile. */
static inline int64_t find_first(const Wanted *wanted, int64_t count, const Target *t, double wait_s, int soon, Answer *a,
                                 int *found) {
    struct pollfd polled[MAX_LANES];
    const double until = seconds() + wait_s;
    for (int waited = 0;; waited = 1) {
        for (int64_t i = 0; i < count; i++) {
            *found = find_answer(wanted + i, t, a);
            if (*found == MORE && waited && polled[i].revents)
                *found = receive_now(wanted[i].lane) ? find_answer(wanted + i, t, a) : OTHER;
            if (*found != MORE) return i;
            polled[i] = (struct pollfd){(int)wanted[i].lane->fd, POLLIN, 0};
        }
        const double left = until - seconds();
        if (waited && left <= 0) return NONE_IN_TIME; /* something came, again and again, and never all of it */
        const int wait_ms = left > 3600 ? 3600000 : left > 0 ? (int)(left * 1000) + 1 : 0;
        int ready;
        Py_BEGIN_ALLOW_THREADS
        ready = soon && !waited ? poll_awake(polled, (nfds_t)count, wait_ms) : poll(polled, (nfds_t)count, wait_ms);
        Py_END_ALLOW_THREADS
        if (ready < 0 && errno == EINTR && !PyErr_CheckSignals()) continue;
        if (ready < 0 && !PyErr_Occurred()) PyErr_SetFromErrno(PyExc_OSError);
        if (ready < 0) return FAILED;
        if (!ready) return NONE_IN_TIME;
    }
}
