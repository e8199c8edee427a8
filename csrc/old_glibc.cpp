// The std::shared_ptr of GCC 12, which holds torch's tensors, reads a variable of glibc 2.32: whether the process has
// one thread, and counts need no atomics. This one says no, so that the modules load wherever torch does.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}
