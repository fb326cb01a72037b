//! The memory of this process.

/// The kernel's types, read to load the programs, took some 15 MiB, which the allocator would keep for this process.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, and may be called at any time from any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
