/* In the place of NVIDIA's runtime where there is no GPU: the same calls, over files of shared memory. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef struct {
    char reserved[64];
} Handle;

enum { OK, INVALID_VALUE, OUT_OF_MEMORY, MANY = 16, MOST = 16 << 20 };

static struct {
    void *at;
    size_t size;
    int fd;
} regions[MANY];
static int last;

static int fails(int code) { return last = code; }

static int find(const void *at) {
    for (int i = 0; i < MANY; i++)
        if (at && regions[i].at == at) return i;
    return -1;
}

static int keep(void **at, size_t size, int fd) {
    for (int i = 0; i < MANY; i++) {
        if (regions[i].at) continue;
        *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (*at == MAP_FAILED) return fails(INVALID_VALUE);
        regions[i].at = *at, regions[i].size = size, regions[i].fd = fd;
        return OK;
    }
    return fails(OUT_OF_MEMORY);
}

static int drop(void *at) {
    const int i = find(at);
    if (i < 0) return fails(INVALID_VALUE);
    munmap(at, regions[i].size);
    close(regions[i].fd);
    regions[i].at = NULL;
    return OK;
}

int cudaMalloc(void **at, size_t size) {
    if (size > MOST) return fails(OUT_OF_MEMORY);
    const int fd = memfd_create("device", 0);
    if (ftruncate(fd, (off_t)size)) return fails(OUT_OF_MEMORY);
    return keep(at, size, fd);
}

int cudaFree(void *at) { return drop(at); }

/* Its first byte is 0, and its last ones count: whoever takes it for a text loses both. */
int cudaIpcGetMemHandle(Handle *handle, void *at) {
    const int i = find(at);
    if (i < 0) return fails(INVALID_VALUE);
    memset(handle, 0, sizeof *handle);
    snprintf(handle->reserved + 1, 40, "/proc/%d/fd/%d", getpid(), regions[i].fd);
    memcpy(handle->reserved + 56, &regions[i].size, 8);
    return OK;
}

int cudaIpcOpenMemHandle(void **at, Handle handle, unsigned flags) {
    size_t size;
    memcpy(&size, handle.reserved + 56, 8);
    const int fd = handle.reserved[0] || flags != 1 ? -1 : open(handle.reserved + 1, O_RDWR);
    return fd < 0 ? fails(INVALID_VALUE) : keep(at, size, fd);
}

int cudaIpcCloseMemHandle(void *at) { return drop(at); }

int cudaGetLastError(void) {
    const int code = last;
    last = OK;
    return code;
}

const char *cudaGetErrorString(int code) { return code == OUT_OF_MEMORY ? "out of memory" : "invalid argument"; }
