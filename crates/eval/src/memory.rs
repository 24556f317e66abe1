//! The process's peak resident memory, where the system tells it (Linux).

use std::fs;

/// Starts the peak anew from what is resident now. Where the system can't, the peak goes on from the process's start.
pub fn restart_peak() {
    // A failure leaves the older, larger peak standing, which is still a true statement.
    let _ = fs::write("/proc/self/clear_refs", "5");
}

/// Peak resident bytes; `None` where the system does not tell.
pub fn peak() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}
