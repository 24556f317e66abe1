//! The process's peak resident memory, if the system reports it (Linux).

use std::fs;

/// Resets the peak to the current resident memory. If the system does not support it, the peak
/// remains that since the start of the process.
pub fn reset() {
    // After a failure the older, larger peak remains, which is still an upper bound.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Returns the peak resident memory in bytes; `None` if the system does not report it.
pub fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
