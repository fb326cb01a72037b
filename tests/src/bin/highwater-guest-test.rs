//! What runs inside a guest of `cargo xtask kernels`: checks that the machine offers what the tests need.

use std::fs;
use std::process::ExitCode;

fn main() -> ExitCode {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
    println!("guest: kernel {}, {cpus} processors", release.trim());
    let mut disks: Vec<String> = fs::read_dir("/sys/block")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with("vd") || name.starts_with("nvme"))
        .collect();
    disks.sort();
    for disk in &disks {
        let queues = fs::read_dir(format!("/sys/block/{disk}/mq")).map_or(0, Iterator::count);
        let sectors = fs::read_to_string(format!("/sys/block/{disk}/size")).unwrap_or_default();
        println!("guest: disk {disk}: {} sectors, {queues} queues", sectors.trim());
    }
    for needed in ["/sys/kernel/btf/vmlinux", "/sys/fs/bpf", "/sys/kernel/tracing/events/block"] {
        if fs::metadata(needed).is_err() {
            println!("guest: {needed} is missing");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
