//! The eBPF object: loading, attaching, pinning, and taking over what an earlier life of the agent left pinned.
//!
//! Everything lives under one directory of the BPF filesystem, so tracking goes on while no agent runs:
//! `maps/<NAME>`, `programs/<program>`, `links/<program>`, `bits/<slot>-<a|b|pending>`.

use super::{TrackerError, probe::Kernel, proof::Misses};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{ArrayOfMaps, HashMap, Map, MapData, PerCpuArray},
    programs::{BtfTracePoint, ProgramInfo, links::FdLink},
};
use highwater_abi::{COPIES_MAX, Counters, Issued, Offsets, Target};
use std::{
    fs, io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/highwater-agent-ebpf.o"));

/// Program name stems and their tracepoints.
pub const HOOKS: [(&str, &str); 3] = [
    ("rq_complete", "block_rq_complete"),
    ("bio_queue", "block_bio_queue"),
    ("bio_complete", "block_bio_complete"),
];
/// The net beneath the completion programs: one copy, see `agent-ebpf/src/request.rs`.
const NET: (&str, &str) = ("rq_issue_1", "block_rq_issue");
const MAPS: [&str; 5] = ["BITMAPS", "TARGETS", "COUNTERS", "INFLIGHT", "ISSUED"];

macro_rules! pod {
    ($name:ident($inner:ty)) => {
        #[repr(transparent)]
        #[derive(Clone, Copy)]
        struct $name($inner);
        // SAFETY: `repr(C)` structures of integers without padding.
        unsafe impl aya::Pod for $name {}
    };
}
pod!(PodTarget(Target));
pod!(PodCounters(Counters));
pod!(PodOffsets(Offsets));
pod!(PodIssued(Issued));

/// The loaded programs and their maps.
pub struct Object {
    bitmaps: ArrayOfMaps<MapData, MapData>,
    targets: HashMap<MapData, u32, PodTarget>,
    counters: PerCpuArray<MapData, PodCounters>,
    issued: HashMap<MapData, u64, PodIssued>,
    inflight: HashMap<MapData, u64, PodIssued>,
    net: bool,
    // One list of descriptors a hook, in the order of the copies.
    programs: [Vec<OwnedFd>; HOOKS.len()],
}

impl Object {
    /// Loads and attaches `copies` copies of each program, and pins all of it under `dir`, which is emptied first.
    ///
    /// A crash in the middle leaves a partial directory; the caller's record (written after this) is what makes it valid.
    pub fn load(dir: &Path, kernel: &Kernel, copies: usize, net: bool) -> Result<Self, TrackerError> {
        if OBJECT.is_empty() {
            return Err(TrackerError::NoObject);
        }
        let copies = copies.clamp(1, COPIES_MAX);
        remove(dir)?;
        mount_bpffs()?;
        for sub in ["maps", "programs", "links", "bits"] {
            let path = dir.join(sub);
            fs::create_dir_all(&path)
                .map_err(|e| TrackerError::kernel(format!("make {}", path.display()), &e))?;
        }
        let offsets = PodOffsets(kernel.offsets()?);
        let (count, with_net) = (copies as u32, u32::from(net));
        let btf = Btf::from_sys_fs().map_err(|e| TrackerError::kernel("read the kernel's BTF", &e))?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", &offsets, true)
            .override_global("COPIES", &count, true)
            .override_global("NET", &with_net, true)
            // Silent unless a diagnosis asks for it: the verifier then removes the logging altogether.
            .override_global("AYA_LOG_LEVEL", &log_level(), false)
            .load(OBJECT)
            .map_err(|e| TrackerError::kernel("load the eBPF object", &e))?;
        for name in MAPS {
            let map = ebpf
                .map(name)
                .ok_or_else(|| TrackerError::Unsupported(format!("map {name} in the object")))?;
            map.pin(dir.join("maps").join(name))
                .map_err(|e| TrackerError::kernel(format!("pin {name}"), &e))?;
        }
        if net {
            // First: a completion must never be looked for before its issue could be noted.
            attach(&mut ebpf, &btf, dir, NET.0, NET.1)?;
        }
        for (stem, tracepoint) in HOOKS {
            for copy in 1..=copies {
                attach(&mut ebpf, &btf, dir, &format!("{stem}_{copy}"), tracepoint)?;
            }
        }
        Self::open(dir)
    }

    /// Takes over what is pinned under `dir`.
    pub fn open(dir: &Path) -> Result<Self, TrackerError> {
        let pinned = |name: &str| {
            MapData::from_pin(dir.join("maps").join(name))
                .map_err(|e| TrackerError::kernel(format!("open the pinned map {name}"), &e))
        };
        let wrong = |e: aya::maps::MapError| TrackerError::kernel("open a pinned map", &e);
        let bitmaps = ArrayOfMaps::try_from(Map::ArrayOfMaps(pinned("BITMAPS")?)).map_err(wrong)?;
        let targets = HashMap::try_from(Map::HashMap(pinned("TARGETS")?)).map_err(wrong)?;
        let counters = PerCpuArray::try_from(Map::PerCpuArray(pinned("COUNTERS")?)).map_err(wrong)?;
        let issued = HashMap::try_from(Map::HashMap(pinned("ISSUED")?)).map_err(wrong)?;
        let inflight = HashMap::try_from(Map::HashMap(pinned("INFLIGHT")?)).map_err(wrong)?;
        let net = dir.join("links").join(NET.0).exists();
        let mut programs = [const { Vec::new() }; HOOKS.len()];
        for (hook, (stem, _)) in HOOKS.iter().enumerate() {
            for copy in 1..=COPIES_MAX {
                let name = format!("{stem}_{copy}");
                // A program without its link is not attached and proves nothing.
                if !dir.join("links").join(&name).exists() {
                    break;
                }
                let info = ProgramInfo::from_pin(dir.join("programs").join(&name))
                    .map_err(|e| TrackerError::kernel(format!("open the pinned program {name}"), &e))?;
                let fd =
                    info.fd().map_err(|e| TrackerError::kernel(format!("open the program {name}"), &e))?;
                let fd = fd.as_fd().try_clone_to_owned();
                programs[hook]
                    .push(fd.map_err(|e| TrackerError::kernel(format!("keep the program {name}"), &e))?);
            }
            if programs[hook].is_empty() {
                return Err(TrackerError::Unsupported(format!("pinned program {stem}")));
            }
        }
        Ok(Self { bitmaps, targets, counters, issued, inflight, net, programs })
    }

    /// How many copies of each program are attached.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.programs.iter().map(Vec::len).min().unwrap_or(0)
    }

    /// The misses of every copy of every hook, in the order of [`HOOKS`].
    pub fn misses(&self) -> Result<[Misses; HOOKS.len()], TrackerError> {
        let mut all = [const { Misses(Vec::new()) }; HOOKS.len()];
        for (hook, programs) in self.programs.iter().enumerate() {
            for fd in programs {
                let misses =
                    recursion_misses(fd).map_err(|e| TrackerError::kernel("read a program's misses", &e))?;
                all[hook].0.push(misses);
            }
        }
        Ok(all)
    }

    /// Puts a bitmap in place. Returns after every running program is done with the one before.
    pub fn set_bitmap(&mut self, slot: u32, bitmap: &MapData) -> Result<(), TrackerError> {
        self.bitmaps.set(slot, bitmap, 0).map_err(|e| TrackerError::kernel("replace a bitmap", &e))
    }

    /// The kernel's id of the bitmap in place.
    pub fn bitmap_id(&self, slot: u32) -> Result<Option<u32>, TrackerError> {
        match self.bitmaps.get(&slot, 0) {
            Ok(data) => {
                let info = data.info().map_err(|e| TrackerError::kernel("read a bitmap's id", &e))?;
                Ok(Some(info.id()))
            }
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(TrackerError::kernel("find a bitmap", &e)),
        }
    }

    /// Begins or changes the tracking of a device.
    pub fn set_target(&mut self, dev: u32, target: &Target) -> Result<(), TrackerError> {
        self.targets
            .insert(dev, PodTarget(*target), 0)
            .map_err(|e| TrackerError::kernel("track a device", &e))
    }
    /// Whether and how a device is tracked.
    pub fn target(&self, dev: u32) -> Result<Option<Target>, TrackerError> {
        match self.targets.get(&dev, 0) {
            Ok(target) => Ok(Some(target.0)),
            Err(aya::maps::MapError::KeyNotFound) => Ok(None),
            Err(e) => Err(TrackerError::kernel("look a device up", &e)),
        }
    }
    /// Ends the tracking of a device.
    pub fn remove_target(&mut self, dev: u32) -> Result<(), TrackerError> {
        absent_is_removed(self.targets.remove(&dev))
            .map_err(|e| TrackerError::kernel("end the tracking of a device", &e))
    }

    /// Whether the net is there.
    #[must_use]
    pub fn net(&self) -> bool {
        self.net
    }

    /// The notes of a device that were made before `until_ns` (CLOCK_MONOTONIC) and whose completion no program has seen. To be
    /// called only when nothing that was issued before is in flight. Notes of requests are taken away. Those of bios
    /// stay (a driver that does not account its I/O would seem to be at rest) and are told again until their address is
    /// used again.
    pub fn reap(&mut self, dev: u32, bio: bool, until_ns: u64) -> Result<Vec<Issued>, TrackerError> {
        let fail = |e: aya::maps::MapError| TrackerError::kernel("look through the issued requests", &e);
        let map = if bio { &mut self.inflight } else { &mut self.issued };
        let mut old = vec![];
        for entry in map.iter() {
            let (address, note) = entry.map_err(fail)?;
            if note.0.dev == dev && note.0.issued_ns < until_ns {
                old.push((address, note.0));
            }
        }
        // A walk begins anew when the entry it stands on is taken away: it can see one twice, and misses none.
        old.sort_unstable_by_key(|(address, _)| *address);
        old.dedup_by_key(|(address, _)| *address);
        for (address, note) in &old {
            if bio && note.seen == 0 {
                continue;
            }
            absent_is_removed(map.remove(address)).map_err(fail)?;
        }
        Ok(old.into_iter().map(|(_, note)| note).filter(|n| n.seen == 0).collect())
    }

    /// The counters of one copy for one device, summed over the CPUs.
    pub fn counters(&self, counter: u32, copy: usize) -> Result<Counters, TrackerError> {
        let index = counter * COPIES_MAX as u32 + copy as u32;
        let values =
            self.counters.get(&index, 0).map_err(|e| TrackerError::kernel("read the counters", &e))?;
        let mut sum = Counters::default();
        for value in values.iter() {
            let c = &value.0;
            for class in 0..highwater_abi::class::COUNT {
                sum.events[class] += c.events[class];
                sum.sectors[class] += c.sectors[class];
                sum.queued_sectors[class] += c.queued_sectors[class];
                sum.late_sectors[class] += c.late_sectors[class];
                sum.first_sectors[class] += c.first_sectors[class];
            }
            sum.failed += c.failed;
            sum.inflight_full += c.inflight_full;
            sum.orphans += c.orphans;
            sum.unmarked += c.unmarked;
            sum.passthrough += c.passthrough;
        }
        Ok(sum)
    }
}

/// Who removes what is not there (any more) has what it wants. Removal tells that by an error of its system call.
fn absent_is_removed(result: Result<(), aya::maps::MapError>) -> Result<(), aya::maps::MapError> {
    match result {
        Err(aya::maps::MapError::KeyNotFound) => Ok(()),
        Err(aya::maps::MapError::SyscallError(e)) if e.io_error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(())
        }
        other => other,
    }
}

fn attach(ebpf: &mut Ebpf, btf: &Btf, dir: &Path, name: &str, tracepoint: &str) -> Result<(), TrackerError> {
    let fail = |what: &str, e: &dyn std::error::Error| TrackerError::kernel(format!("{what} {name}"), e);
    let program: &mut BtfTracePoint = ebpf
        .program_mut(name)
        .ok_or_else(|| TrackerError::Unsupported(format!("program {name} in the object")))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| fail("use the program", &e))?;
    program.load(tracepoint, btf).map_err(|e| fail("load the program", &e))?;
    program.pin(dir.join("programs").join(name)).map_err(|e| fail("pin the program", &e))?;
    let id = program.attach().map_err(|e| fail("attach the program", &e))?;
    let link: FdLink = program.take_link(id).map_err(|e| fail("keep the link of", &e))?.into();
    link.pin(dir.join("links").join(name)).map_err(|e| fail("pin the link of", &e))?;
    Ok(())
}

/// Mounts the BPF filesystem where nobody has (systemd does at boot).
fn mount_bpffs() -> Result<(), TrackerError> {
    const ROOT: &str = "/sys/fs/bpf";
    let is_bpffs = || {
        nix::sys::statfs::statfs(ROOT).is_ok_and(|s| s.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
    };
    if is_bpffs() {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), ROOT, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
        .map_err(|e| TrackerError::kernel(format!("mount the BPF filesystem at {ROOT}"), &e))
}

/// Removes everything pinned under `dir`: programs without pin or descriptor are detached by the kernel.
pub fn remove(dir: &Path) -> Result<(), TrackerError> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(TrackerError::kernel(format!("remove {}", dir.display()), &e))
        }
        _ => Ok(()),
    }
}

/// The pin of one of a slot's three bitmaps.
pub fn bits_path(dir: &Path, slot: u32, which: &str) -> PathBuf {
    dir.join("bits").join(format!("{slot}-{which}"))
}

/// `HIGHWATER_EBPF_LOG=debug` turns the programs' diagnostics on at load.
fn log_level_from(text: Option<&str>) -> u8 {
    match text {
        Some("error") => 1,
        Some("warn") => 2,
        Some("info") => 3,
        Some("debug") => 4,
        Some("trace") => 5,
        _ => 0,
    }
}
fn log_level() -> u8 {
    log_level_from(std::env::var("HIGHWATER_EBPF_LOG").ok().as_deref())
}

/// `bpf_prog_info.recursion_misses`, which aya does not show.
fn recursion_misses(program: &OwnedFd) -> io::Result<u64> {
    use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_prog_info};
    // SAFETY: both are plain data for which zeros are valid.
    let (mut info, mut attr): (bpf_prog_info, bpf_attr) = unsafe { (std::mem::zeroed(), std::mem::zeroed()) };
    attr.info.bpf_fd = program.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_prog_info>() as u32;
    attr.info.info = &raw mut info as u64;
    // SAFETY: the kernel writes at most `info_len` bytes to `info`, and reads the attribute's own size.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            bpf_cmd::BPF_OBJ_GET_INFO_BY_FD as libc::c_long,
            &raw mut attr,
            size_of::<bpf_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info.recursion_misses) }
}
