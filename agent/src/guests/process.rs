//! QEMU processes: what their command lines say of a guest. Pure, but for [`read_all`].
//!
//! A command line says what the guest was started with. What was plugged in later is found among the files that the process has open.

use super::libvirt::{CHANNELS, Domain, GuestDisk, Source};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::Read,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

/// The kernel's own bound of a command line is 2 MiB, as a rule.
const CMDLINE_BYTES_MAX: u64 = 2 << 20;
const FDS_MAX: usize = 4096;

/// The options of one argument: `socket,id=a,path=/x` or `{"driver": …}`. A word without `=` is the value of the first key.
fn options(text: &str, first: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    if text.trim_start().starts_with('{') {
        if let Ok(value) = serde_json::from_str::<Value>(text) {
            flatten("", &value, &mut found);
        }
        return found;
    }
    // A comma in a value is doubled.
    for (at, part) in text.replace(",,", "\0").split(',').enumerate() {
        let part = part.replace('\0', ",");
        match part.split_once('=') {
            Some((key, value)) => found.insert(key.to_owned(), value.to_owned()),
            None if at == 0 => found.insert(first.to_owned(), part),
            None => found.insert(part, "on".to_owned()),
        };
    }
    found
}

fn flatten(prefix: &str, value: &Value, found: &mut BTreeMap<String, String>) {
    let Some(object) = value.as_object() else { return };
    for (key, value) in object {
        let key = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
        match value {
            Value::Object(_) => flatten(&key, value, found),
            Value::String(text) => drop(found.insert(key, text.clone())),
            other => drop(found.insert(key, other.to_string())),
        }
    }
}

/// What a command line says. `None`: it is not QEMU's.
#[must_use]
pub fn parse(words: &[String], is_block: impl Fn(&Path) -> bool) -> Option<Domain> {
    if !is_qemu(words.first()?) {
        return None;
    }
    let mut domain = Domain::default();
    let mut chardevs: BTreeMap<String, PathBuf> = BTreeMap::new();
    let mut ports: BTreeMap<String, String> = BTreeMap::new();
    let mut rest = words[1..].iter();
    while let Some(word) = rest.next() {
        let Some(option) = word.strip_prefix('-') else { continue };
        let option = option.strip_prefix('-').unwrap_or(option);
        let mut value = |first: &str| rest.next().map(|text| options(text, first)).unwrap_or_default();
        match option {
            "name" => {
                let found = value("guest");
                domain.name = found.get("guest").cloned().unwrap_or_default();
            }
            "uuid" => domain.uuid = value("uuid").remove("uuid"),
            "chardev" => {
                let mut found = value("backend");
                if let (Some(id), Some(path)) = (found.remove("id"), found.remove("path")) {
                    chardevs.insert(id, path.into());
                }
            }
            "device" => {
                let mut found = value("driver");
                if found.get("driver").is_some_and(|driver| driver == "virtserialport")
                    && let (Some(name), Some(chardev)) = (found.remove("name"), found.remove("chardev"))
                {
                    ports.insert(name, chardev);
                }
            }
            "drive" | "blockdev" | "hda" | "hdb" | "hdc" | "hdd" => {
                let first = if option == "blockdev" { "driver" } else { "file" };
                domain.disks.extend(disk(option, &value(first), &is_block));
            }
            _ => {}
        }
    }
    domain.agent = CHANNELS.iter().find_map(|name| chardevs.get(ports.get(*name)?)).cloned();
    Some(domain)
}

/// `/usr/bin/qemu-system-x86_64`, `/usr/libexec/qemu-kvm`, `kvm`.
fn is_qemu(program: &str) -> bool {
    let name = program.rsplit('/').next().unwrap_or(program);
    name.starts_with("qemu-system-") || name == "qemu-kvm" || name == "kvm"
}

fn disk(
    option: &str,
    found: &BTreeMap<String, String>,
    is_block: impl Fn(&Path) -> bool,
) -> Option<GuestDisk> {
    if found.get("media").is_some_and(|media| media == "cdrom")
        || found.get("if").is_some_and(|i| i == "pflash")
    {
        return None;
    }
    let get = |keys: &[&str]| keys.iter().find_map(|key| found.get(*key)).cloned();
    let named =
        get(&["filename", "file.filename"]).or_else(|| get(&["file"]).filter(|_| option != "blockdev"));
    let driver = get(&["file.driver", "driver"]);
    let target = get(&["id", "node-name"]).unwrap_or_else(|| option.to_owned());
    let source = match named {
        Some(name) if name.starts_with('/') && is_block(Path::new(&name)) => Source::Block(name.into()),
        Some(name) if name.starts_with('/') => Source::File(name.into()),
        Some(name) if name.contains(':') => Source::Network(name),
        Some(name) => Source::File(name.into()),
        // A format over another node, which is listed by itself.
        None if found.contains_key("file") => return None,
        None => match driver.as_deref() {
            Some(driver @ ("rbd" | "nbd" | "iscsi" | "nfs" | "http" | "https" | "ssh" | "gluster")) => {
                Source::Network(driver.to_owned())
            }
            _ => return None,
        },
    };
    let direct =
        get(&["cache.direct", "file.cache.direct"]).filter(|direct| direct == "on" || direct == "true");
    let cache = get(&["cache"]).or_else(|| direct.map(|_| "none".to_owned()));
    let format = get(&["format"]).or_else(|| get(&["driver"]).filter(|d| d == "raw" || d == "qcow2"));
    Some(GuestDisk { target, source, cache, format })
}

/// All QEMU processes of this host that can be looked at.
#[must_use]
pub fn read_all(proc: &Path) -> Vec<Domain> {
    let mut pids: Vec<u32> = (fs::read_dir(proc).into_iter().flatten().flatten())
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect();
    pids.sort_unstable();
    pids.into_iter().filter_map(|pid| read(&proc.join(pid.to_string()), pid)).collect()
}

fn read(dir: &Path, pid: u32) -> Option<Domain> {
    let mut bytes = vec![];
    fs::File::open(dir.join("cmdline")).ok()?.take(CMDLINE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    let words: Vec<String> =
        bytes.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let mut domain = parse(&words, is_block)?;
    domain.pid = Some(pid);
    if domain.name.is_empty() {
        domain.name = format!("qemu-{pid}");
    }
    let known: Vec<PathBuf> = (domain.disks.iter())
        .filter_map(
            |disk| if let Source::Block(path) = &disk.source { fs::canonicalize(path).ok() } else { None },
        )
        .collect();
    let fds = fs::read_dir(dir.join("fd")).into_iter().flatten().flatten().take(FDS_MAX);
    domain.open = (fds.filter_map(|fd| fs::read_link(fd.path()).ok()))
        .filter(|path| path.starts_with("/dev") && is_block(path))
        .collect();
    domain.open.sort();
    domain.open.dedup();
    let more = domain.open.iter().filter(|path| !known.contains(path));
    domain.disks.extend(more.map(|path| GuestDisk {
        target: "(open)".into(),
        source: Source::Block(path.clone()),
        cache: None,
        format: None,
    }));
    Some(domain)
}

fn is_block(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Option<Domain> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words, |path| path.starts_with("/dev"))
    }

    #[test]
    fn a_command_line_by_hand_is_read() {
        let domain = parsed(
            "/usr/bin/qemu-system-x86_64 -name mail -uuid 1-2 -enable-kvm \
             -drive file=/dev/loop7,if=none,id=d0,format=raw,cache=none -device virtio-blk-pci,drive=d0 \
             -drive file=/images/odd,,name.qcow2,id=d1 -drive file=rbd:pool/x,id=d2 -cdrom /x.iso \
             -drive file=/x.iso,media=cdrom -device virtio-serial \
             -chardev socket,path=/run/mail.qga,server=on,wait=off,id=qga0 \
             -device virtserialport,chardev=qga0,name=org.qemu.guest_agent.0",
        )
        .expect("QEMU");
        assert_eq!((domain.name.as_str(), domain.uuid.as_deref()), ("mail", Some("1-2")));
        assert_eq!(domain.agent, Some("/run/mail.qga".into()));
        assert!(!domain.managed && !domain.agent_taken);
        let disks: Vec<_> =
            domain.disks.iter().map(|d| (d.target.as_str(), d.source.clone(), d.cache.as_deref())).collect();
        let expected = [
            ("d0", Source::Block("/dev/loop7".into()), Some("none")),
            ("d1", Source::File("/images/odd,name.qcow2".into()), None),
            ("d2", Source::Network("rbd:pool/x".into()), None),
        ];
        assert_eq!(disks, expected);
    }

    #[test]
    fn libvirts_own_way_is_read() {
        let words = [
            "qemu-system-x86_64",
            "-name",
            "guest=web,debug-threads=on",
            "-blockdev",
            r#"{"driver":"host_device","filename":"/dev/vg0/web","node-name":"s1","cache":{"direct":true}}"#,
            "-blockdev",
            r#"{"node-name":"f1","driver":"raw","file":"s1"}"#,
            "-blockdev",
            "driver=qcow2,node-name=q,file.driver=file,file.filename=/images/b.qcow2",
            "-chardev",
            "socket,id=charchannel0,fd=31,server=on,wait=off",
            "-device",
            r#"{"driver":"virtserialport","chardev":"charchannel0","name":"org.qemu.guest_agent.0"}"#,
        ]
        .map(str::to_owned);
        let domain = parse(&words, |path| path.starts_with("/dev")).expect("QEMU");
        assert_eq!((domain.name.as_str(), domain.agent), ("web", None));
        let disks: Vec<_> = domain.disks.iter().map(|d| (d.target.as_str(), d.source.clone())).collect();
        assert_eq!(
            disks,
            [("s1", Source::Block("/dev/vg0/web".into())), ("q", Source::File("/images/b.qcow2".into()))]
        );
        assert_eq!(domain.disks[0].cache.as_deref(), Some("none"));
        assert_eq!(domain.disks[1].format.as_deref(), Some("qcow2"));
    }

    #[test]
    fn others_are_left_alone_and_nonsense_hinders_nothing() {
        assert_eq!(parsed("/bin/sh -name x"), None);
        assert_eq!(parse(&[], |_| false), None);
        for odd in ["qemu-kvm -drive", "kvm -name", "kvm -blockdev {", "kvm -chardev ,,,= -device {} -uuid"] {
            let domain = parsed(odd).expect("QEMU");
            assert!(domain.disks.is_empty() && domain.agent.is_none(), "{odd}");
        }
    }
}
