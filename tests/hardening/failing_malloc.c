// Preloaded by refused_memory.py: after refuse(n, bytes) the n-th allocation of at least so many bytes fails, in
// whatever thread it is.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>

static long counted, refused;
static size_t least;

void refuse(long which, size_t bytes) {
  counted = 0, least = bytes;
  __atomic_store_n(&refused, which, __ATOMIC_SEQ_CST);
}

static int fails(size_t bytes) {
  if (!__atomic_load_n(&refused, __ATOMIC_SEQ_CST) || bytes < least) return 0;
  return __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST) == refused;
}

extern void *__libc_malloc(size_t), *__libc_memalign(size_t, size_t);  // of glibc

void *malloc(size_t bytes) {
  if (!fails(bytes)) return __libc_malloc(bytes);
  errno = ENOMEM;
  return NULL;
}

void *aligned_alloc(size_t alignment, size_t bytes) {
  if (!fails(bytes)) return __libc_memalign(alignment, bytes);
  errno = ENOMEM;
  return NULL;
}

int posix_memalign(void **memory, size_t alignment, size_t bytes) {
  void *made = fails(bytes) ? NULL : __libc_memalign(alignment, bytes);
  if (made == NULL) return ENOMEM;
  *memory = made;
  return 0;
}
