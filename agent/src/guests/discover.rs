//! Which guests there are on this host, and which of their disks can be protected. Reads only; asks no guest and no agent.

use super::{
    GuestOptions,
    libvirt::{self, Domain, GuestDisk, Source},
    process,
};
use crate::{device, error::Coded};
use serde::Serialize;
use std::{
    cell::OnceCell,
    fmt::Write as _,
    path::{Path, PathBuf},
};

/// What was found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Discovery {
    /// Guests, by name.
    pub guests: Vec<FoundGuest>,
    /// What could not be read, and why.
    pub problems: Vec<String>,
}

/// A guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FoundGuest {
    /// Its name.
    pub name: String,
    /// Its UUID, if it is said.
    pub uuid: Option<String>,
    /// QEMU's process, while it runs.
    pub pid: Option<u32>,
    /// Whether libvirt manages it.
    pub libvirt: bool,
    /// The host's end of the channel to its agent.
    pub agent_socket: Option<PathBuf>,
    /// What hinders its use, if anything is known to.
    pub agent_note: Option<String>,
    /// Its disks.
    pub disks: Vec<FoundDisk>,
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FoundDisk {
    /// In the guest.
    pub target: String,
    /// On the host.
    pub source: String,
    /// Whether it can be protected from here.
    pub protectable: bool,
    /// Why not; or what to know.
    pub note: Option<String>,
}

/// Looks at this host.
#[must_use]
pub fn discover() -> Discovery {
    let dirs = libvirt::DIRS.map(PathBuf::from);
    let (domains, unread) = libvirt::read_all(&dirs);
    let guests = merge(domains, process::read_all(Path::new("/proc"))).iter().map(found).collect();
    let problems = unread
        .iter()
        .map(|(path, why)| format!("HW-1449: {} is no domain definition: {why}", path.display()));
    Discovery { guests, problems: problems.collect() }
}

/// What libvirt says counts; the process adds what was plugged in, and whatever it says that libvirt does not.
fn merge(mut domains: Vec<Domain>, processes: Vec<Domain>) -> Vec<Domain> {
    for running in processes {
        let same = |known: &&mut Domain| {
            known.pid.is_some() && known.pid == running.pid
                || known.uuid.is_some() && known.uuid == running.uuid
                || known.uuid.is_none() && known.name == running.name
        };
        let Some(known) = domains.iter_mut().find(same) else {
            domains.push(running);
            continue;
        };
        if running.open.is_empty() && known.pid != running.pid {
            // It may be anybody's that calls itself so.
            continue;
        }
        known.pid = known.pid.or(running.pid);
        known.open = running.open;
        if known.agent.is_none() {
            known.agent = running.agent;
        }
        for disk in running.disks {
            let Source::Block(path) = &disk.source else { continue };
            let same = |other: &GuestDisk| match &other.source {
                Source::Block(other) => real(other) == real(path),
                _ => false,
            };
            if !known.disks.iter().any(same) {
                known.disks.push(disk);
            }
        }
    }
    domains.sort_by(|a, b| a.name.cmp(&b.name));
    domains
}

fn real(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| path.to_owned())
}

fn found(domain: &Domain) -> FoundGuest {
    let note = match (&domain.agent, domain.agent_taken) {
        (None, _) => Some(
            "no socket of a guest agent: give the guest a virtio-serial channel named org.qemu.guest_agent.0"
                .to_owned(),
        ),
        (Some(_), true) => Some(format!(
            "libvirt is connected to it, and it serves one: add a channel named {} with a qemu-ga of its own",
            libvirt::CHANNELS[0]
        )),
        (Some(_), false) => None,
    };
    FoundGuest {
        name: domain.name.clone(),
        uuid: domain.uuid.clone(),
        pid: domain.pid,
        libvirt: domain.managed,
        agent_socket: domain.agent.clone(),
        agent_note: note,
        disks: domain.disks.iter().map(judge).collect(),
    }
}

/// Whether a disk can be protected here, and why not.
fn judge(disk: &GuestDisk) -> FoundDisk {
    let (source, refusal) = match &disk.source {
        Source::Block(path) => {
            let judged = device::inspect(path).and_then(|found| device::admit(&found));
            (path.display().to_string(), judged.err().map(|error| format!("{error}. {}", error.action())))
        }
        Source::File(path) => (
            path.display().to_string(),
            Some(
                "it is a file, not a block device: protect the host's disk that it lies on, or put the guest on a logical volume"
                    .to_owned(),
            ),
        ),
        Source::Network(name) => {
            (name.clone(), Some("it lies on another machine: protect it where it is served from".to_owned()))
        }
        Source::Other(what) => (what.clone(), Some("it is no block device of this host".to_owned())),
    };
    let protectable = refusal.is_none();
    let note = refusal.or_else(|| caution(disk));
    FoundDisk { target: disk.target.clone(), source, protectable, note }
}

/// What is to be known of a disk that can be protected.
fn caution(disk: &GuestDisk) -> Option<String> {
    if disk.cache.as_deref() == Some("unsafe") {
        return Some(
            "cache=unsafe: the guest's flushes are ignored, so crash-consistent points may be none".into(),
        );
    }
    (disk.format.as_deref() == Some("qcow2"))
        .then(|| "qcow2 on a block device: recovered as it is, and opened with QEMU, not mounted".into())
}

/// As a table.
#[must_use]
pub fn render(discovery: &Discovery) -> String {
    let mut text = String::new();
    if discovery.guests.is_empty() {
        text.push_str("No guests: libvirt has no domains here, and no QEMU process runs.\n");
    }
    for guest in &discovery.guests {
        let state = guest.pid.map_or_else(|| "not running".to_owned(), |pid| format!("process {pid}"));
        let by = if guest.libvirt { ", libvirt" } else { "" };
        let _ = writeln!(
            text,
            "{} ({state}{by}){}",
            guest.name,
            guest.uuid.as_ref().map_or(String::new(), |u| format!("  {u}"))
        );
        if let Some(socket) = &guest.agent_socket {
            let _ = writeln!(text, "  agent  {}", socket.display());
        }
        if let Some(note) = &guest.agent_note {
            let _ = writeln!(text, "  agent  {note}");
        }
        for disk in &guest.disks {
            let can = if disk.protectable { "can be protected" } else { "cannot be protected" };
            let _ = writeln!(text, "  {:<6} {}  {can}", disk.target, disk.source);
            if let Some(note) = &disk.note {
                let _ = writeln!(text, "         {note}");
            }
        }
    }
    for problem in &discovery.problems {
        let _ = writeln!(text, "{problem}");
    }
    text
}

/// Where a configured guest is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The socket of its agent.
    pub socket: Option<PathBuf>,
    /// Its disks on this host.
    pub disks: Vec<PathBuf>,
    /// Why there is no socket.
    pub why: String,
}

/// Looks for configured guests; the host is looked at once, and only if something is left out of the configuration.
#[derive(Default)]
pub struct Lookup {
    domains: OnceCell<Vec<Domain>>,
}

impl Lookup {
    fn domains(&self) -> &[Domain] {
        self.domains.get_or_init(|| {
            let (domains, _) = libvirt::read_all(&libvirt::DIRS.map(PathBuf::from));
            merge(domains, process::read_all(Path::new("/proc")))
        })
    }

    /// What is configured, and what is found for the rest, by name or UUID. Of processes that libvirt does not know, only one counts
    /// that has block devices open, and of its disks only these: anybody can call a process so.
    #[must_use]
    pub fn place(&self, guest: &GuestOptions) -> Place {
        let mut place =
            Place { socket: guest.socket.clone(), disks: guest.disks.clone(), why: String::new() };
        if place.socket.is_some() && !place.disks.is_empty() {
            return place;
        }
        let named = |domain: &&Domain| {
            let called = domain.name == guest.name || domain.uuid.as_deref() == Some(&guest.name);
            called && (domain.managed || !domain.open.is_empty())
        };
        let Some(domain) = self.domains().iter().find(named) else {
            place.why = "no guest of this name or UUID is on this host, with a block device open".into();
            return place;
        };
        if place.socket.is_none() {
            place.socket = domain.agent.clone();
            place.why = "it has no channel to a guest agent".into();
        }
        if place.disks.is_empty() {
            let block = |disk: &GuestDisk| match &disk.source {
                Source::Block(path) if domain.managed || domain.open.contains(&real(path)) => {
                    Some(path.clone())
                }
                _ => None,
            };
            place.disks = domain.disks.iter().filter_map(block).collect();
        }
        place
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain(name: &str, pid: Option<u32>, disks: &[Source]) -> Domain {
        let disk = |source: &Source| GuestDisk {
            target: "vda".into(),
            source: source.clone(),
            cache: None,
            format: None,
        };
        Domain { name: name.into(), pid, disks: disks.iter().map(disk).collect(), ..Domain::default() }
    }

    #[test]
    fn a_process_adds_to_what_libvirt_says() {
        let block = |path: &str| Source::Block(path.into());
        let libvirt = vec![Domain { managed: true, ..domain("web", Some(7), &[block("/dev/none-a")]) }];
        let running = Domain {
            agent: Some("/s".into()),
            ..domain("other", Some(7), &[block("/dev/none-a"), block("/dev/none-b")])
        };
        let pretender = Domain {
            agent: Some("/p".into()),
            open: vec![],
            ..domain("web", Some(9), &[block("/dev/none-c")])
        };
        let merged = merge(libvirt, vec![pretender, running, domain("by-hand", Some(8), &[])]);
        assert_eq!(merged[1].agent, Some("/s".into()));
        let names: Vec<_> =
            merged.iter().map(|d| (d.name.as_str(), d.disks.len(), d.agent.is_some())).collect();
        assert_eq!(names, [("by-hand", 0, false), ("web", 2, true)]);
    }

    #[test]
    fn what_cannot_be_protected_says_why_and_what_instead() {
        let all = [
            Source::Block("/dev/null".into()),
            Source::File("/images/a.qcow2".into()),
            Source::Network("rbd:pool/x".into()),
            Source::Other("nvme".into()),
        ];
        let guest = found(&domain("x", None, &all));
        assert!(guest.disks.iter().all(|disk| !disk.protectable && disk.note.is_some()), "{guest:?}");
        assert!(guest.agent_note.is_some());
        let text = render(&Discovery { guests: vec![guest], problems: vec!["HW-1449: x".into()] });
        assert!(text.contains("put the guest on a logical volume") && text.contains("HW-1449"), "{text}");
        assert!(render(&Discovery { guests: vec![], problems: vec![] }).contains("No guests"));
    }

    #[test]
    fn what_is_configured_is_not_looked_for() {
        let options = GuestOptions {
            name: "g".into(),
            socket: Some("/s".into()),
            disks: vec!["/dev/x".into()],
            freeze_timeout: std::time::Duration::from_secs(5),
            application: false,
        };
        let lookup = Lookup::default();
        assert_eq!(lookup.place(&options).disks, [PathBuf::from("/dev/x")]);
        assert!(lookup.domains.get().is_none());
        let lookup = Lookup {
            domains: OnceCell::from(vec![Domain {
                agent: Some("/t".into()),
                open: vec!["/dev/y".into()],
                ..domain("g", Some(1), &["/dev/y", "/dev/not-open"].map(|path| Source::Block(path.into())))
            }]),
        };
        let place = lookup.place(&GuestOptions { socket: None, disks: vec![], ..options.clone() });
        assert_eq!((place.socket, place.disks), (Some("/t".into()), vec![PathBuf::from("/dev/y")]));
        let pretender =
            Domain { agent: Some("/t".into()), ..domain("g", Some(1), &[Source::Block("/dev/y".into())]) };
        let fooled = Lookup { domains: OnceCell::from(vec![pretender]) };
        let place = fooled.place(&GuestOptions { socket: None, disks: vec![], ..options.clone() });
        assert_eq!((place.socket, place.disks), (None, vec![]), "it only calls itself so");
        let place = lookup.place(&GuestOptions { name: "h".into(), socket: None, ..options });
        assert!(place.socket.is_none() && place.why.contains("no guest"), "{place:?}");
    }
}
