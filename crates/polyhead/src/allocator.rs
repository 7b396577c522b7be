//! Settings of the C library's allocator that suit training: the same few large buffers come and go in every step.
//!
//! By default glibc gives large buffers back to the system at once, and takes them again, page by page, zeroed: a tenth of
//! the time of a step. Here it keeps them.

/// Call it first of all, before there are threads.
pub fn keep_large_buffers() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets numbers inside the allocator; a value that it does not like is left alone.
    unsafe {
        // From the heap up to the largest size that it allows on 64-bit systems.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 16 << 20);
    }
}
