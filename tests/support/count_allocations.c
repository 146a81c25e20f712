// Preloaded into a test's child process: counts the live bytes of every allocation, whoever makes
// it (torch, MKL, the C++ kernels, Python), and remembers the peak. glibc only: its own entry
// points are called directly, since dlsym itself allocates.
#define _GNU_SOURCE
#include <errno.h>
#include <malloc.h>
#include <stdatomic.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
extern void __libc_free(void*);

static atomic_llong live, peak;

static void count(long long bytes) {
  const long long now = atomic_fetch_add(&live, bytes) + bytes;
  long long seen = atomic_load(&peak);
  while (now > seen && !atomic_compare_exchange_weak(&peak, &seen, now)) {
  }
}

static void* counted(void* p) {
  if (p) count((long long)malloc_usable_size(p));
  return p;
}

long long counted_live(void) { return atomic_load(&live); }
long long counted_peak(void) { return atomic_load(&peak); }
void counted_reset(void) { atomic_store(&peak, atomic_load(&live)); }

void* malloc(size_t size) { return counted(__libc_malloc(size)); }
void* calloc(size_t n, size_t size) { return counted(__libc_calloc(n, size)); }
void* memalign(size_t alignment, size_t size) { return counted(__libc_memalign(alignment, size)); }
void* aligned_alloc(size_t alignment, size_t size) { return memalign(alignment, size); }

int posix_memalign(void** out, size_t alignment, size_t size) {
  void* p = memalign(alignment, size);
  if (!p) return ENOMEM;
  *out = p;
  return 0;
}

void* realloc(void* p, size_t size) {
  const long long before = p ? (long long)malloc_usable_size(p) : 0;
  void* q = __libc_realloc(p, size);
  if (q || size == 0) count((q ? (long long)malloc_usable_size(q) : 0) - before);
  return q;
}

void free(void* p) {
  if (p) count(-(long long)malloc_usable_size(p));
  __libc_free(p);
}

// Anonymous mappings, each in a slot so that munmap gives back what mmap took.
enum { SLOTS = 4096 };
static struct {
  _Atomic(void*) address;
  size_t size;
} mappings[SLOTS];

void* mmap(void* address, size_t size, int protection, int flags, int file, off_t offset) {
  void* p = (void*)syscall(SYS_mmap, address, size, protection, flags, file, offset);
  if (p == MAP_FAILED || !(flags & MAP_ANONYMOUS) || protection == PROT_NONE) return p;
  count((long long)size);
  for (int i = 0; i < SLOTS; ++i) {
    void* none = NULL;
    if (atomic_compare_exchange_strong(&mappings[i].address, &none, p)) {
      mappings[i].size = size;
      break;
    }
  }
  return p;
}

int munmap(void* address, size_t size) {
  for (int i = 0; i < SLOTS; ++i) {
    void* same = address;
    const size_t known = mappings[i].size;
    if (atomic_compare_exchange_strong(&mappings[i].address, &same, NULL)) {
      count(-(long long)known);
      break;
    }
  }
  return (int)syscall(SYS_munmap, address, size);
}
