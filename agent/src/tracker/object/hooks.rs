//! The programs, their copies and tracepoints, and when they are attached: each hook's only while a device needs it, because
//! a program costs something with every I/O of the machine.

use super::super::{TrackerError, bpf, proof::Misses};
use aya::programs::ProgramInfo;
use highwater_abi::{COPIES_MAX, hook};
use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

/// Program name stems and their tracepoints.
pub const HOOKS: [(&str, &str); 3] = [
    ("rq_complete", "block_rq_complete"),
    ("bio_queue", "block_bio_queue"),
    ("bio_complete", "block_bio_complete"),
];
/// The net beneath the completion programs: one copy, see `agent-ebpf/src/request.rs`.
pub const NET: (&str, &str) = ("rq_issue_1", "block_rq_issue");

/// Which of [`HOOKS`] a device needs (`hook` is one of `highwater_abi::hook`).
#[must_use]
pub fn hooks_of(hook: u32) -> &'static [usize] {
    if hook == hook::BIO { &[1, 2] } else { &[0] }
}

/// The names and tracepoints of all programs of a tracker with so many copies.
pub fn programs(copies: usize, net: bool) -> impl Iterator<Item = (String, &'static str)> {
    let net = net.then(|| (NET.0.to_owned(), NET.1)).into_iter();
    net.chain(HOOKS.into_iter().flat_map(move |(stem, tracepoint)| {
        (1..=copies).map(move |copy| (format!("{stem}_{copy}"), tracepoint))
    }))
}

/// A loaded program.
struct Program {
    name: String,
    fd: OwnedFd,
}

/// All loaded programs, and the pins of their links: a program is attached for as long as the pin of its link exists.
pub struct Hooks {
    dir: PathBuf,
    net: Option<Program>,
    // In the order of `HOOKS`, and of the copies.
    copies: [Vec<Program>; HOOKS.len()],
}

impl Hooks {
    /// The programs pinned under `dir`.
    pub fn open(dir: &Path) -> Result<Self, TrackerError> {
        let open = |name: String| -> Result<Option<Program>, TrackerError> {
            let path = dir.join("programs").join(&name);
            if !path.exists() {
                return Ok(None);
            }
            let fail =
                |what: &str, e: &dyn std::error::Error| TrackerError::kernel(format!("{what} {name}"), e);
            let info = ProgramInfo::from_pin(&path).map_err(|e| fail("open the pinned program", &e))?;
            let fd = info.fd().map_err(|e| fail("open the program", &e))?;
            let fd = std::os::fd::AsFd::as_fd(&fd)
                .try_clone_to_owned()
                .map_err(|e| fail("keep the program", &e))?;
            Ok(Some(Program { name, fd }))
        };
        let mut copies = [const { Vec::new() }; HOOKS.len()];
        for (hook, (stem, _)) in HOOKS.iter().enumerate() {
            for copy in 1..=COPIES_MAX {
                let Some(program) = open(format!("{stem}_{copy}"))? else { break };
                copies[hook].push(program);
            }
            if copies[hook].is_empty() || copies[hook].len() != copies[0].len() {
                return Err(TrackerError::Unsupported(format!("as many pinned programs {stem}")));
            }
        }
        Ok(Self { dir: dir.to_owned(), net: open(NET.0.to_owned())?, copies })
    }

    /// How many copies of each program there are.
    #[must_use]
    pub fn copies(&self) -> usize {
        self.copies[0].len()
    }

    /// Whether there is a net beneath the completion programs of requests.
    #[must_use]
    pub fn has_net(&self) -> bool {
        self.net.is_some()
    }

    /// The misses of every copy of every hook, in the order of [`HOOKS`].
    pub fn misses(&self) -> Result<[Misses; HOOKS.len()], TrackerError> {
        let mut all = [const { Misses(Vec::new()) }; HOOKS.len()];
        for (hook, programs) in self.copies.iter().enumerate() {
            for program in programs {
                let misses = bpf::recursion_misses(&program.fd)
                    .map_err(|e| TrackerError::kernel("read a program's misses", &e))?;
                all[hook].0.push(misses);
            }
        }
        Ok(all)
    }

    /// Whether every program of a device's hook is attached.
    #[must_use]
    pub fn attached(&self, hook: u32) -> bool {
        self.of(hook).all(|program| self.link(program).exists())
    }

    /// Attaches what of a device's hook is not attached. A failure leaves a part attached: to be tried again, or detached.
    pub fn attach(&self, hook: u32) -> Result<(), TrackerError> {
        for program in self.of(hook) {
            let path = self.link(program);
            if path.exists() {
                continue;
            }
            let fail =
                |what: &str, e: std::io::Error| TrackerError::kernel(format!("{what} {}", program.name), &e);
            let link = bpf::attach(&program.fd).map_err(|e| fail("attach the program", e))?;
            bpf::pin(&link, &path).map_err(|e| fail("pin the link of", e))?;
        }
        Ok(())
    }

    /// Detaches all of a device's hook.
    pub fn detach(&self, hook: u32) {
        for program in self.of(hook) {
            let _ = fs::remove_file(self.link(program));
        }
    }

    /// Pins the programs again whose pins are gone.
    pub fn pin_again(&self) -> Result<(), TrackerError> {
        for program in self.net.iter().chain(self.copies.iter().flatten()) {
            let path = self.dir.join("programs").join(&program.name);
            if !path.exists() {
                bpf::pin(&program.fd, &path)
                    .map_err(|e| TrackerError::kernel(format!("pin the program {}", program.name), &e))?;
            }
        }
        Ok(())
    }

    /// The net first: a completion must never be looked for before its issue could be noted.
    fn of(&self, hook: u32) -> impl Iterator<Item = &Program> {
        let net = self.net.as_ref().filter(|_| hook == hook::REQUEST);
        net.into_iter().chain(hooks_of(hook).iter().flat_map(|h| &self.copies[*h]))
    }

    fn link(&self, program: &Program) -> PathBuf {
        self.dir.join("links").join(&program.name)
    }
}
