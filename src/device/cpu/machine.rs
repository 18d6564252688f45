//! What Linux says about memory.

use fs_err as fs;

/// Bytes of memory, in all and free for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MachineMemory {
    /// In all.
    pub total: u64,
    /// Free, or held by files that can be read again.
    pub available: u64,
}

impl MachineMemory {
    /// Of this machine, or of the control group that this program may use; `None` where it is not told.
    pub fn read() -> Option<Self> {
        let mut memory = Self::parse(&fs::read_to_string("/proc/meminfo").ok()?)?;
        let group = |file: &str| -> Option<u64> {
            fs::read_to_string(format!("/sys/fs/cgroup/{file}")).ok()?.trim().parse().ok()
        };
        if let (Some(most), Some(used)) = (group("memory.max"), group("memory.current")) {
            // What the group's own files hold is counted as used, and would be given back.
            let stat = fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
            let files =
                stat.lines().find_map(|line| line.strip_prefix("file ")?.parse::<u64>().ok());
            let used = used.saturating_sub(files.unwrap_or(0));
            memory.total = memory.total.min(most);
            memory.available = memory.available.min(most.saturating_sub(used));
        }
        Some(memory)
    }

    /// Of the text of `/proc/meminfo`.
    fn parse(info: &str) -> Option<Self> {
        let bytes = |key: &str| {
            let value = info.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
            Some(value.trim().strip_suffix(" kB")?.parse::<u64>().ok()? * 1024)
        };
        Some(Self { total: bytes("MemTotal")?, available: bytes("MemAvailable")? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read() {
        let info = "MemTotal:       16000 kB\nMemFree: 1 kB\nMemAvailable:    8000 kB\n";
        let memory = MachineMemory::parse(info).unwrap();
        assert_eq!((memory.total, memory.available), (16_384_000, 8_192_000));
        assert!(MachineMemory::parse("").is_none());
    }
}
