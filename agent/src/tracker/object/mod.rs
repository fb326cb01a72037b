//! The eBPF object: loading, attaching, pinning, and taking over what an earlier life of the agent left pinned.
//!
//! Everything lives under one directory of the BPF filesystem, so tracking goes on while no agent runs:
//! `maps/<NAME>`, `programs/<program>`, `links/<program>`, `bits/<slot>-<a|b|pending>`.

mod hooks;

pub use hooks::{HOOKS, hooks_of};

use super::{TrackerError, bpf, probe::Kernel, proof::Misses};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{ArrayOfMaps, HashMap, Map, MapData, PerCpuArray},
    programs::BtfTracePoint,
};
use highwater_abi::{COPIES_MAX, Counters, Issued, Offsets, Target};
use hooks::Hooks;
use serde::{Deserialize, Serialize};
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/highwater-agent-ebpf.o"));

const MAPS: [&str; 6] = ["BITMAPS", "EPOCHS", "TARGETS", "COUNTERS", "INFLIGHT", "ISSUED"];
const SUBDIRECTORIES: [&str; 4] = ["maps", "programs", "links", "bits"];

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

/// Which note: that of a request, while it is used for the same I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Noted {
    address: u64,
    started_ns: u64,
}

/// The loaded programs and their maps.
pub struct Object {
    dir: PathBuf,
    bitmaps: ArrayOfMaps<MapData, MapData>,
    targets: HashMap<MapData, u32, PodTarget>,
    counters: PerCpuArray<MapData, PodCounters>,
    issued: HashMap<MapData, u64, PodIssued>,
    inflight: HashMap<MapData, u64, PodIssued>,
    hooks: Hooks,
    // To pin them again.
    maps: Vec<(&'static str, OwnedFd)>,
}

impl Object {
    /// Loads `copies` copies of each program, and pins all of it under `dir`, which is emptied first. Nothing is attached
    /// yet ([`Object::attach`]).
    ///
    /// A crash in the middle leaves a partial directory; the caller's record (written after this) is what makes it valid.
    pub fn load(dir: &Path, kernel: &Kernel, copies: usize, net: bool) -> Result<Self, TrackerError> {
        if OBJECT.is_empty() {
            return Err(TrackerError::NoObject);
        }
        let copies = copies.clamp(1, COPIES_MAX);
        remove(dir)?;
        make_directories(dir)?;
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
        for (name, tracepoint) in hooks::programs(copies, net) {
            load_program(&mut ebpf, &btf, dir, &name, tracepoint)?;
        }
        Self::open(dir)
    }

    /// Takes over what is pinned under `dir`.
    pub fn open(dir: &Path) -> Result<Self, TrackerError> {
        let mut maps = vec![];
        let mut pinned = |name: &'static str| {
            let map = MapData::from_pin(dir.join("maps").join(name))
                .map_err(|e| TrackerError::kernel(format!("open the pinned map {name}"), &e))?;
            let fd = map.fd().as_fd().try_clone_to_owned();
            maps.push((name, fd.map_err(|e| TrackerError::kernel(format!("keep the map {name}"), &e))?));
            Ok::<_, TrackerError>(map)
        };
        let wrong = |e: aya::maps::MapError| TrackerError::kernel("open a pinned map", &e);
        let bitmaps = ArrayOfMaps::try_from(Map::ArrayOfMaps(pinned("BITMAPS")?)).map_err(wrong)?;
        let targets = HashMap::try_from(Map::HashMap(pinned("TARGETS")?)).map_err(wrong)?;
        let counters = PerCpuArray::try_from(Map::PerCpuArray(pinned("COUNTERS")?)).map_err(wrong)?;
        let issued = HashMap::try_from(Map::LruHashMap(pinned("ISSUED")?)).map_err(wrong)?;
        let inflight = HashMap::try_from(Map::HashMap(pinned("INFLIGHT")?)).map_err(wrong)?;
        // Read and written through memory: see `Epochs`.
        drop(pinned("EPOCHS")?);
        let hooks = Hooks::open(dir)?;
        Ok(Self { dir: dir.to_owned(), bitmaps, targets, counters, issued, inflight, hooks, maps })
    }

    /// Where the map of epochs is pinned.
    pub fn epochs_path(&self) -> PathBuf {
        self.dir.join("maps/EPOCHS")
    }

    /// Attaches the programs of a hook, where they are not; whatever else of the pins is gone (somebody removed them) is pinned
    /// again.
    pub fn attach(&self, hook: u32) -> Result<(), TrackerError> {
        make_directories(&self.dir)?;
        for (name, fd) in &self.maps {
            let path = self.dir.join("maps").join(name);
            if !path.exists() {
                bpf::pin(fd, &path).map_err(|e| TrackerError::kernel(format!("pin {name}"), &e))?;
            }
        }
        self.hooks.pin_again()?;
        self.hooks.attach(hook)
    }
    /// Detaches the programs of a hook.
    pub fn detach(&self, hook: u32) {
        self.hooks.detach(hook);
    }
    /// Whether all programs of a hook are attached.
    #[must_use]
    pub fn attached(&self, hook: u32) -> bool {
        self.hooks.attached(hook)
    }

    /// How many copies of each program there are.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.hooks.copies()
    }

    /// The misses of every copy of every hook, in the order of [`HOOKS`].
    pub fn misses(&self) -> Result<[Misses; HOOKS.len()], TrackerError> {
        self.hooks.misses()
    }

    /// Puts one of a slot's two bitmaps in place.
    pub fn set_bitmap(&mut self, slot: u32, parity: u32, bitmap: &MapData) -> Result<(), TrackerError> {
        self.bitmaps
            .set(slot * 2 + parity, bitmap, 0)
            .map_err(|e| TrackerError::kernel("put a bitmap in place", &e))
    }

    /// The kernel's id of one of a slot's two bitmaps.
    pub fn bitmap_id(&self, slot: u32, parity: u32) -> Result<Option<u32>, TrackerError> {
        match self.bitmaps.get(&(slot * 2 + parity), 0) {
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
        self.hooks.has_net()
    }

    /// The notes of a device that were made before `until_ns` (CLOCK_MONOTONIC) and whose completion no program has seen. To be
    /// called only when nothing that was issued before is in flight. They stay: those of requests until they are
    /// [forgotten](Self::forget), those of bios until their address is used again (a driver that does not account its I/O would
    /// seem to be at rest).
    pub fn unseen(
        &mut self,
        dev: u32,
        bio: bool,
        until_ns: u64,
    ) -> Result<Vec<(Noted, Issued)>, TrackerError> {
        let name = if bio { "INFLIGHT" } else { "ISSUED" };
        let Some((_, fd)) = self.maps.iter().find(|(map, _)| *map == name) else { return Ok(vec![]) };
        let all: Vec<(u64, PodIssued)> = bpf::elements(fd).map_err(|e| looking(name, &e))?;
        let mut unseen = vec![];
        for (address, PodIssued(note)) in all {
            if note.dev != dev || note.issued_ns >= until_ns {
                continue;
            }
            if note.seen == 0 {
                unseen.push((Noted { address, started_ns: note.started_ns }, note));
            } else if bio && self.still(&self.inflight, address, &note) {
                // What was seen of requests stays with them, to be written over; the address of a bio may not come back.
                absent_is_removed(self.inflight.remove(&address)).map_err(|e| looking(name, &e))?;
            }
        }
        Ok(unseen)
    }

    /// How many bios of a device were noted at these times (CLOCK_MONOTONIC), and not seen to complete.
    pub fn unseen_bios(&self, dev: u32, at_ns: std::ops::Range<u64>) -> Result<usize, TrackerError> {
        let Some((name, fd)) = self.maps.iter().find(|(map, _)| *map == "INFLIGHT") else { return Ok(0) };
        let all: Vec<(u64, PodIssued)> = bpf::elements(fd).map_err(|e| looking(name, &e))?;
        let old = |PodIssued(note): &PodIssued| {
            note.dev == dev && note.seen == 0 && at_ns.contains(&note.issued_ns)
        };
        Ok(all.iter().filter(|(_, note)| old(note)).count())
    }

    /// Takes the note of a request away, or finds it gone. False if another is in its place: the request has been used again, and
    /// the issue program has counted what was left of it, or it has ended after all.
    pub fn forget(&mut self, noted: &Noted) -> Result<bool, TrackerError> {
        match self.issued.get(&noted.address, 0) {
            Ok(PodIssued(note)) if note.started_ns == noted.started_ns && note.seen == 0 => {
                absent_is_removed(self.issued.remove(&noted.address)).map_err(|e| looking("ISSUED", &e))?;
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(aya::maps::MapError::KeyNotFound) => Ok(true),
            Err(e) => Err(looking("ISSUED", &e)),
        }
    }

    /// Whether an element is still this one: what was read a moment ago may have made place for another.
    fn still(&self, map: &HashMap<MapData, u64, PodIssued>, address: u64, note: &Issued) -> bool {
        map.get(&address, 0).is_ok_and(|PodIssued(now)| now == *note)
    }

    /// Puts a note into the net, as if no completion had been shown.
    #[cfg(test)]
    pub fn forge(&mut self, address: u64, note: Issued) {
        self.issued.insert(address, PodIssued(note), 0).unwrap();
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

fn looking(map: &str, cause: &dyn std::error::Error) -> TrackerError {
    TrackerError::kernel(format!("look through {map}"), cause)
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

fn load_program(
    ebpf: &mut Ebpf,
    btf: &Btf,
    dir: &Path,
    name: &str,
    tracepoint: &str,
) -> Result<(), TrackerError> {
    let fail = |what: &str, e: &dyn std::error::Error| TrackerError::kernel(format!("{what} {name}"), e);
    let program: &mut BtfTracePoint = ebpf
        .program_mut(name)
        .ok_or_else(|| TrackerError::Unsupported(format!("program {name} in the object")))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| fail("use the program", &e))?;
    program.load(tracepoint, btf).map_err(|e| fail("load the program", &e))?;
    program.pin(dir.join("programs").join(name)).map_err(|e| fail("pin the program", &e))
}

fn make_directories(dir: &Path) -> Result<(), TrackerError> {
    mount_bpffs()?;
    for sub in SUBDIRECTORIES {
        let path = dir.join(sub);
        fs::create_dir_all(&path)
            .map_err(|e| TrackerError::kernel(format!("make {}", path.display()), &e))?;
    }
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
