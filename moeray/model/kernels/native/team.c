/* The threads that compute for one that calls a kernel: its team, as OpenMP has it. */
#define _GNU_SOURCE
#include <omp.h>
#include <sched.h>
#include <stdint.h>

/* The calling thread and the one that computes with it stay on a core each, from now on. How many of both could not. */
int64_t moeray_part(int64_t own, int64_t other) {
    int64_t failed = 0;
#pragma omp parallel num_threads(2) reduction(+ : failed)
    {
        cpu_set_t core;
        CPU_ZERO(&core);
        CPU_SET((int)(omp_get_thread_num() ? other : own), &core);
        failed += sched_setaffinity(0, sizeof core, &core) != 0;
    }
    return failed;
}
