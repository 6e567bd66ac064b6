/* What is given to a sweep over a weight, and what it finds. */
#ifndef SWEEP_H
#define SWEEP_H

#include "module.h"

/* A weight that is made as it is read: base + scale * left @ right in float. */
typedef struct {
    const void *base;          /* [rows, columns] */
    const float *left, *right; /* [rows, rank] and [rank, columns] */
    float *strips;             /* room for `right` */
    float scale;
    Py_ssize_t columns, rank;
    int dtype; /* of the base */
} LowRank;

typedef struct {
    const void *weight, *first;
    const LowRank *made;  /* in place of a weight */
    void *before, *moved; /* moved: of two chunks, or NULL */
    Py_ssize_t count, chunk;
    int copied;
    double norm, drift, update, low, high;
    Py_ssize_t hottest; /* where the chunk begins that moved most */
    int half;           /* which half of `moved` has its differences */
} Sweep;

/* A chunk that is not finite is the hottest there is. */
INLINE int is_hotter(double square, double most) { return !(square <= most); }

#endif
