/* A layer's plan in one pass, where no expert has so many rows that it might be split: plan.py and balance.py say the
   same in Python, which the numbers here follow to the last bit. */
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

/* A layer's replicas, as plan.py packs them; behind it `rates` [actors], `first` [experts + 1] and the actors of every
   expert, those of expert e from first[e] on. */
typedef struct {
    double near, decay;
    int64_t read, split_from, experts, actors;
} Table;

/* The rows of one actor: plan.py's Share. `used`: how many tokens. */
typedef struct {
    int64_t actor, expert_count, rows, used;
    int64_t *experts, *counts, *row, *tokens, *token_of_row;
} Share;

typedef struct {
    const Table *table;
    const double *rates;
    const int32_t *first, *hosts;
    const int64_t *ids;
    int64_t rows, top_k, present_count, share_count;
    /* of every expert: its rows, the actor that serves them, where the next of them goes; those that are chosen */
    int32_t *count, *owner, *present, *free;
    int64_t **next;
    double *cost, *carry;
    int32_t *place; /* of every token: in the share at hand */
    Share *shares;
    int64_t *ints; /* where the shares' numbers go */
} Deal;

/* Whether the table and carry are as long as they say, and all rates such that no cost is infinite or none. */
static inline int deal_fits(const Deal *d, int64_t table_bytes, int64_t carry_bytes) {
    const int64_t actors = d->table->actors, hosts = (const char *)d->hosts - (const char *)d->table;
    if (carry_bytes != actors * (int64_t)sizeof(double) || hosts > table_bytes) return 0;
    if (table_bytes != hosts + d->first[d->table->experts] * (int64_t)sizeof(int32_t)) return 0;
    for (int64_t a = 0; a < actors; a++)
        if (!(d->rates[a] > 1e-100 && d->rates[a] < 1e100)) return 0;
    return d->rows <= INT32_MAX;
}

static inline int64_t replicas_of(const Deal *d, int32_t expert) { return d->first[expert + 1] - d->first[expert]; }

/* Counts the rows. 0 where one of its experts has no replica, or so many rows that it may be split. */
static inline int count_rows(Deal *d) {
    for (int64_t r = 0; r < d->rows; r++) {
        if (d->ids[r] < 0 || d->ids[r] >= d->table->experts) return 0;
        d->count[d->ids[r]]++;
    }
    for (int32_t e = 0; e < d->table->experts; e++) {
        if (!d->count[e]) continue;
        if (!replicas_of(d, e) || (replicas_of(d, e) > 1 && d->count[e] >= d->table->split_from)) return 0;
        d->present[d->present_count++] = e;
    }
    return 1;
}

/* What an expert costs, in rows: its weights are read also for few. */
static inline double work(const Deal *d, int32_t expert) {
    return d->count[expert] > d->table->read ? d->count[expert] : d->table->read;
}

/* The actor that is done first with the expert's rows; among nearly equal ones the one rested longest. */
static inline int32_t cheapest(const Deal *d, int32_t expert) {
    int32_t best = -1;
    double best_done = HUGE_VAL, least = HUGE_VAL;
    for (int32_t i = d->first[expert]; i < d->first[expert + 1]; i++) {
        const int32_t actor = d->hosts[i];
        const double done = d->cost[actor] + work(d, expert) * (1.0 / d->rates[actor]);
        if (done < least) least = done;
        const int near = done <= d->table->near * least;
        const int rested = best >= 0 && (d->carry[actor] < d->carry[best] ||
                                         (d->carry[actor] == d->carry[best] && done < best_done));
        if (best_done > d->table->near * least || (near && rested)) best = actor, best_done = done;
    }
    return best;
}

/* Most rows first, then in order. */
static inline void sort_free(const int32_t *count, int32_t *free, int64_t size) {
    for (int64_t i = 1; i < size; i++) {
        const int32_t expert = free[i];
        int64_t to = i;
        for (; to > 0 && count[free[to - 1]] < count[expert]; to--) free[to] = free[to - 1];
        free[to] = expert;
    }
}

static inline void rest(Deal *d, int32_t expert) {
    d->carry[d->owner[expert]] += work(d, expert) / d->rates[d->owner[expert]];
}

static inline void choose_owners(Deal *d) {
    int64_t free = 0;
    for (int64_t i = 0; i < d->present_count; i++) {
        const int32_t e = d->present[i], actor = d->hosts[d->first[e]];
        if (replicas_of(d, e) > 1) {
            d->free[free++] = e;
            continue;
        }
        d->owner[e] = actor;
        d->cost[actor] += work(d, e) / d->rates[actor];
    }
    sort_free(d->count, d->free, free);
    for (int64_t i = 0; i < free; i++) {
        const int32_t e = d->free[i], actor = d->owner[e] = cheapest(d, e);
        d->cost[actor] += work(d, e) * (1.0 / d->rates[actor]);
    }
    for (int64_t a = 0; a < d->table->actors; a++) d->carry[a] = d->carry[a] > 1e-6 ? d->carry[a] * d->table->decay : 0;
    for (int64_t i = 0; i < d->present_count; i++)
        if (replicas_of(d, d->present[i]) == 1) rest(d, d->present[i]);
    for (int64_t i = 0; i < free; i++) rest(d, d->free[i]);
}

/* -- the shares ---------------------------------------------------------------------------------------------------- */

static inline int64_t *take_ints(Deal *d, int64_t count) {
    int64_t *ints = d->ints;
    d->ints += count;
    return ints;
}

/* The actor's experts; the rows are filled in later, each to its expert's `next`. */
static inline void begin_share(Deal *d, int32_t actor) {
    Share *s = d->shares + d->share_count++;
    *s = (Share){.actor = actor, .experts = d->ints};
    for (int64_t i = 0; i < d->present_count; i++)
        if (d->owner[d->present[i]] == actor) s->experts[s->expert_count++] = d->present[i];
    s->experts = take_ints(d, s->expert_count);
    s->counts = take_ints(d, s->expert_count);
    for (int64_t i = 0; i < s->expert_count; i++) s->rows += s->counts[i] = d->count[s->experts[i]];
    int64_t *next = s->row = take_ints(d, s->rows);
    for (int64_t i = 0; i < s->expert_count; i++) {
        d->next[s->experts[i]] = next;
        next += s->counts[i];
    }
}

/* The distinct tokens of its rows, and each row's place among them. */
static inline void end_share(Deal *d, Share *s) {
    const int64_t tokens = d->rows / d->top_k;
    memset(d->place, 0, tokens * sizeof *d->place);
    for (int64_t i = 0; i < s->rows; i++) d->place[s->row[i] / d->top_k] = 1;
    s->tokens = d->ints;
    for (int64_t t = 0; t < tokens; t++) {
        if (!d->place[t]) continue;
        s->tokens[s->used] = t;
        d->place[t] = (int32_t)s->used++;
    }
    take_ints(d, s->used);
    s->token_of_row = take_ints(d, s->rows);
    for (int64_t i = 0; i < s->rows; i++) s->token_of_row[i] = d->place[s->row[i] / d->top_k];
}

/* Those of all actors that get rows, in the actors' order. */
static inline void make_shares(Deal *d) {
    for (int32_t a = 0; a < d->table->actors; a++)
        if (d->cost[a]) begin_share(d, a);
    for (int64_t r = 0; r < d->rows; r++) *d->next[d->ids[r]]++ = r;
    for (int64_t i = 0; i < d->share_count; i++) end_share(d, d->shares + i);
}

/* -- what others call ---------------------------------------------------------------------------------------------- */

/* Points `d` into the table and into `memory`, or says how much of that it needs where there is none. */
static inline int64_t lay_out(Deal *d, const char *table, char *memory) {
    const int64_t experts = d->table->experts, actors = d->table->actors, tokens = d->rows / d->top_k;
    const int64_t present = experts < d->rows ? experts : d->rows;
    d->rates = (const double *)(table + sizeof(Table));
    d->first = (const int32_t *)(d->rates + actors);
    d->hosts = d->first + experts + 1;
    d->cost = (double *)memory;
    d->next = (int64_t **)(d->cost + actors);
    d->shares = (Share *)(d->next + experts);
    d->ints = (int64_t *)(d->shares + actors);
    d->count = (int32_t *)(d->ints + 2 * present + 3 * d->rows);
    d->owner = d->count + experts;
    d->present = d->owner + experts;
    d->free = d->present + experts;
    d->place = d->free + experts;
    return (char *)(d->place + tokens) - memory;
}

/* Shares for all rows, and `carry` as it is afterwards; 0 where it takes more than this. The memory is zeroed. */
static inline int deal_rows(Deal *d, const char *table, int64_t table_bytes, int64_t carry_bytes, char *memory) {
    lay_out(d, table, memory);
    if (!deal_fits(d, table_bytes, carry_bytes) || !count_rows(d)) return 0;
    choose_owners(d);
    make_shares(d);
    return 1;
}
