//! How much of the allocator's memory the process keeps.

/// Many threads that each do little: one arena for all of them, memory that is
/// free given back, and large blocks taken from the kernel one by one. glibc
/// keeps an arena per thread otherwise, and what a burst of pods needed for
/// ever. Call it before the first thread is started.
#[cfg(target_env = "gnu")]
pub fn keep_little() {
    const KIB: libc::c_int = 1024;
    for (what, value) in
        [(libc::M_ARENA_MAX, 1), (libc::M_TRIM_THRESHOLD, 256 * KIB), (libc::M_MMAP_THRESHOLD, 128 * KIB)]
    {
        // SAFETY: mallopt takes two numbers and changes settings of the
        // allocator only; refused values leave them as they are.
        unsafe { libc::mallopt(what, value) };
    }
}

#[cfg(not(target_env = "gnu"))]
pub fn keep_little() {}
