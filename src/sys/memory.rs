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

/// Program text counts as resident once it has been run. What only the start
/// needed goes; what is needed still comes back from the page cache, a few
/// microseconds for each 64 KiB.
#[cfg(target_os = "linux")]
pub fn forget_text() {
    let (Ok(maps), Ok(exe)) = (std::fs::read_to_string("/proc/self/maps"), std::env::current_exe()) else { return };
    let number = |text: &str| usize::from_str_radix(text, 16).ok();
    for line in maps.lines().filter(|line| line.ends_with(&*exe.to_string_lossy())) {
        let mut words = line.split_whitespace();
        let (Some(range), Some("r-xp")) = (words.next(), words.next()) else { continue };
        let Some((start, end)) = range.split_once('-').and_then(|(a, b)| Some((number(a)?, number(b)?))) else {
            continue;
        };
        // SAFETY: the range is a mapping of our own executable that nobody can
        // write to, so its pages are those of the file and are read from there
        // again when they are next touched.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

#[cfg(not(target_os = "linux"))]
pub fn forget_text() {}

#[cfg(test)]
mod tests {
    #[test]
    fn a_program_goes_on_without_its_text() {
        super::forget_text();
        assert_eq!((1..=10).map(|n| n * n).sum::<u32>(), 385);
    }
}
