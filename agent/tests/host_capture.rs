//! Capture on this machine's kernel: the memory bases, and the stream as it comes out of the ring.

mod support;

use highwater_abi::stream::kind;
use highwater_agent::{
    capture::{Layout, Tap, record},
    device,
    tracker::{barrier::Barrier, probe::Kernel},
};
use std::{
    fs::File,
    os::unix::fs::{FileExt, OpenOptionsExt},
};

#[test]
fn what_is_written_is_in_the_stream() {
    let Some(_machine) = support::machine() else { return };
    let dir = support::scratch();
    let disk = support::Loop::create(dir.path(), "disk.img", 64 << 20);
    let kernel = Kernel::probe().unwrap();
    let layout = Layout::of(&kernel).unwrap();
    let barrier = Barrier::new(kernel.preemptible_tracepoints).unwrap();
    let device = device::inspect(&disk.path).unwrap();
    let (mut tap, mut ring) = Tap::load(layout, None, 16 << 20).unwrap();
    let found = tap.prepare(&mut ring, &device).unwrap();
    eprintln!("bases: {found:?}, {} copies", tap.copies());
    tap.begin([device.whole_kernel_dev()], &barrier).unwrap();
    let file = File::options().write(true).custom_flags(libc::O_DIRECT).open(&disk.path).unwrap();
    let mut memory = vec![0u8; (1 << 20) + 4096];
    let from = memory.as_ptr().align_offset(4096);
    for (at, byte) in memory.iter_mut().enumerate() {
        *byte = (at * 31 % 251) as u8;
    }
    let data = &memory[from..];
    for (at, bytes) in [(0u64, 4096usize), (8192, 512), (1 << 20, 1 << 20), (4 << 20, 12288), (5 << 20, 1536)]
    {
        file.write_all_at(&data[..bytes], at).unwrap();
    }
    tap.before().unwrap();
    barrier.wait().unwrap();
    assert_eq!(tap.after().unwrap(), None);
    let mut image = vec![0u8; 64 << 20];
    let (mut writes, mut completions) = (0, 0);
    while let Some((bytes, _)) = ring.take() {
        let (header, payload) = record::split(bytes).unwrap();
        match header.kind {
            kind::WRITE => {
                writes += 1;
                image[header.at as usize..][..payload.len()].copy_from_slice(payload);
            }
            kind::COMPLETE => completions += 1,
            other => panic!("{other}"),
        }
    }
    ring.release();
    assert!(writes >= 5 && completions >= 5, "{writes} {completions}");
    let mut content = vec![0u8; 64 << 20];
    File::open(&disk.path).unwrap().read_exact_at(&mut content, 0).unwrap();
    assert!(content == image, "the stream replayed is not the disk");
    println!("{:?}", tap.counters().unwrap());
}
