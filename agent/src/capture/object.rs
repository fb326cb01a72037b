//! The eBPF object of capture: loading, attaching, and what it counts.
//!
//! Nothing of it is pinned. Capture ends with the process that reads the stream: what that process held in memory is lost
//! then, so the stream could not be continued, and a ring that nobody reads costs every write for nothing. The tracking beneath
//! goes on, and all that was not stored is in its bitmaps.

use super::{CaptureError, Layout, places::Places};
use crate::tracker::{bitmap::Bitmap, bpf, proof::Misses};
use aya::{
    Btf, Ebpf, EbpfLoader,
    maps::{Array, Map, MapData, PerCpuArray},
    programs::BtfTracePoint,
};
use highwater_abi::stream::{Bases, CAPTURE_COPIES_MAX, CaptureCounters, CaptureOffsets, PROBE_COPY, Probe};
use std::{
    collections::BTreeMap,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::atomic::Ordering,
};

static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/highwater-capture-ebpf.o"));

macro_rules! pod {
    ($name:ident($inner:ty)) => {
        #[repr(transparent)]
        #[derive(Clone, Copy)]
        struct $name($inner);
        // SAFETY: `repr(C)` structures of integers without padding.
        unsafe impl aya::Pod for $name {}
    };
}
pod!(PodBases(Bases));
pod!(PodProbe(Probe));
pod!(PodCounters(CaptureCounters));
pod!(PodOffsets(CaptureOffsets));

const SUBMIT: &str = "block_bio_queue";
const PROBE_PROGRAM: &str = "capture_probe";
const COMPLETE: [(&str, &str); 2] =
    [("capture_rq_complete", "block_rq_complete"), ("capture_bio_complete", "block_bio_complete")];

#[derive(Default)]
struct Links {
    complete: Vec<OwnedFd>,
    copies: Vec<OwnedFd>,
    probe: Option<OwnedFd>,
}

/// The loaded programs. Dropped, they are detached and their memory is given back.
pub struct Object {
    captured: Array<MapData, u32>,
    places: Places,
    bases: Array<MapData, PodBases>,
    probe: Array<MapData, PodProbe>,
    counters: PerCpuArray<MapData, PodCounters>,
    handled: Bitmap,
    stream: OwnedFd,
    ring_bytes: usize,
    /// One a copy, in their order.
    copies: Vec<OwnedFd>,
    /// The others, by name.
    others: BTreeMap<&'static str, OwnedFd>,
    /// Of what is attached; closing one detaches it.
    links: Links,
}

impl Object {
    /// Loads `copies` copies, with a ring of `ring_bytes` (a power of two). Nothing is attached yet.
    ///
    /// # Errors
    /// The kernel refuses something, a ring of that size among it.
    pub fn load(layout: &Layout, copies: usize, ring_bytes: usize) -> Result<Self, CaptureError> {
        if OBJECT.is_empty() {
            return Err(CaptureError::NoObject);
        }
        let entries = u32::try_from(ring_bytes)
            .map_err(|_| CaptureError::Unsupported("a ring of more than 2 GiB".into()))?;
        let offsets = PodOffsets(layout.offsets);
        let btf = Btf::from_sys_fs().map_err(|e| CaptureError::kernel("read the kernel's BTF", &e))?;
        let mut ebpf = EbpfLoader::new()
            .btf(Some(&btf))
            .override_global("OFFSETS", &offsets, true)
            .map_max_entries("STREAM", entries)
            .load(OBJECT)
            .map_err(|e| CaptureError::kernel("load the capture programs", &e))?;
        let mut copy_programs = vec![];
        for copy in 1..=copies.clamp(1, CAPTURE_COPIES_MAX) {
            copy_programs.push(load(&mut ebpf, &btf, &format!("capture_{copy}"), SUBMIT)?);
        }
        let mut others = BTreeMap::new();
        for (name, tracepoint) in COMPLETE.into_iter().chain([(PROBE_PROGRAM, SUBMIT)]) {
            others.insert(name, load(&mut ebpf, &btf, name, tracepoint)?);
        }
        let mut take = |name: &'static str| {
            ebpf.take_map(name)
                .ok_or_else(|| CaptureError::Unsupported(format!("a map {name} in the object")))
        };
        let wrong = |e: aya::maps::MapError| CaptureError::kernel("open a map", &e);
        let captured = Array::try_from(take("CAPTURED")?).map_err(wrong)?;
        let bases = Array::try_from(take("BASES")?).map_err(wrong)?;
        let probe = Array::try_from(take("PROBE")?).map_err(wrong)?;
        let counters = PerCpuArray::try_from(take("CAPTURE_COUNTERS")?).map_err(wrong)?;
        let (Map::Array(handled), Map::RingBuf(stream)) = (take("HANDLED")?, take("STREAM")?) else {
            return Err(CaptureError::Unsupported("maps of the kinds expected in the object".into()));
        };
        let handled = Bitmap::of(handled).map_err(|e| CaptureError::kernel("map the slots", &e))?;
        let stream = stream.fd().as_fd().try_clone_to_owned();
        let stream = stream.map_err(|e| CaptureError::kernel("keep the stream", &e))?;
        Ok(Self {
            captured,
            places: Places::default(),
            bases,
            probe,
            counters,
            handled,
            stream,
            ring_bytes,
            copies: copy_programs,
            others,
            links: Links::default(),
        })
    }

    /// The ring, for its reader.
    pub fn stream(&self) -> (BorrowedFd<'_>, usize) {
        (self.stream.as_fd(), self.ring_bytes)
    }
    /// How many copies are loaded.
    pub fn copies(&self) -> usize {
        self.copies.len()
    }

    /// Attaches the completion programs, then all copies: what is in the stream as submitted and completes later is seen to.
    pub fn attach(&mut self) -> Result<(), CaptureError> {
        if !self.links.copies.is_empty() {
            return Ok(());
        }
        let mut links = Links { probe: self.links.probe.take(), ..Links::default() };
        for (name, _) in COMPLETE {
            links.complete.push(self.attach_other(name)?);
        }
        for program in &self.copies {
            links.copies.push(attach(program, "capture")?);
        }
        self.links = links;
        Ok(())
    }
    /// Detaches everything.
    pub fn detach(&mut self) {
        self.links = Links::default();
    }
    /// Attaches the probe, for as long as it is needed.
    pub fn attach_probe(&mut self) -> Result<(), CaptureError> {
        self.links.probe = Some(self.attach_other(PROBE_PROGRAM)?);
        Ok(())
    }
    /// Detaches it.
    pub fn detach_probe(&mut self) {
        self.links.probe = None;
    }

    fn attach_other(&self, name: &'static str) -> Result<OwnedFd, CaptureError> {
        let program = self.others.get(name);
        attach(program.ok_or_else(|| CaptureError::Unsupported(format!("a program {name}")))?, name)
    }

    /// Begins to capture a whole device, by its `dev_t`.
    pub fn capture(&mut self, dev: u32) -> Result<(), CaptureError> {
        let place = self.places.take(dev);
        let place = place.ok_or_else(|| CaptureError::Unsupported("this many devices at once".into()))?;
        self.captured.set(place, dev, 0).map_err(|e| CaptureError::kernel("capture a device", &e))
    }
    /// Captures no device any more. What a program does already it goes on with.
    pub fn capture_none(&mut self) -> Result<(), CaptureError> {
        for place in self.places.all() {
            self.captured
                .set(place, 0, 0)
                .map_err(|e| CaptureError::kernel("end the capture of a device", &e))?;
            self.places.give_back(place);
        }
        Ok(())
    }

    /// Tells the programs where memory is.
    pub fn set_bases(&mut self, bases: Bases) -> Result<(), CaptureError> {
        self.bases.set(0, PodBases(bases), 0).map_err(|e| CaptureError::kernel("set the bases", &e))
    }
    /// Asks for a probe.
    pub fn set_probe(&mut self, probe: Probe) -> Result<(), CaptureError> {
        self.probe.set(0, PodProbe(probe), 0).map_err(|e| CaptureError::kernel("ask for a probe", &e))
    }
    /// What a probe found.
    pub fn probe(&self) -> Result<Probe, CaptureError> {
        Ok(self.probe.get(&0, 0).map_err(|e| CaptureError::kernel("read a probe", &e))?.0)
    }

    /// The misses of every copy.
    pub fn misses(&self) -> Result<Misses, CaptureError> {
        let read =
            |fd| bpf::recursion_misses(fd).map_err(|e| CaptureError::kernel("read a program's misses", &e));
        Ok(Misses(self.copies.iter().map(read).collect::<Result<_, _>>()?))
    }

    /// What all programs but the probe counted, summed.
    pub fn counters(&self) -> Result<CaptureCounters, CaptureError> {
        let mut sum = CaptureCounters::default();
        for copy in 0..PROBE_COPY {
            let values =
                self.counters.get(&copy, 0).map_err(|e| CaptureError::kernel("read the counters", &e))?;
            for PodCounters(c) in values.iter() {
                sum.bios += c.bios;
                sum.bytes += c.bytes;
                sum.dropped += c.dropped;
                sum.faults += c.faults;
                sum.unsupported += c.unsupported;
            }
        }
        Ok(sum)
    }

    /// Empties the slots in which copies tell each other what they have handled. After a barrier: what an event left there that
    /// is over by then can mislead no later one.
    pub fn clear_slots(&self) {
        for word in self.handled.words() {
            word.store(0, Ordering::Release);
        }
    }
}

fn attach(program: &OwnedFd, name: &str) -> Result<OwnedFd, CaptureError> {
    bpf::attach(program).map_err(|e| CaptureError::kernel(format!("attach {name}"), &e))
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &str) -> Result<&'e mut BtfTracePoint, CaptureError> {
    ebpf.program_mut(name)
        .ok_or_else(|| CaptureError::Unsupported(format!("a program {name} in the object")))?
        .try_into()
        .map_err(|e: aya::programs::ProgramError| CaptureError::kernel(format!("use {name}"), &e))
}

fn load(ebpf: &mut Ebpf, btf: &Btf, name: &str, tracepoint: &str) -> Result<OwnedFd, CaptureError> {
    let fail = |e: &dyn std::error::Error| CaptureError::kernel(format!("load {name}"), e);
    let program = program(ebpf, name)?;
    program.load(tracepoint, btf).map_err(|e| fail(&e))?;
    let fd = program.fd().map_err(|e| fail(&e))?.as_fd().try_clone_to_owned();
    fd.map_err(|e| fail(&e))
}
