//! libvirt's definitions of domains, as far as Highwater needs them. Pure, but for [`read_all`].
//!
//! Two forms: what was defined (`/etc/libvirt/qemu/NAME.xml`, a `<domain>`), and what runs (`/run/libvirt/qemu/NAME.xml`, a `<domstatus>` around
//! one). Files are read up to [`FILE_BYTES_MAX`], with 100,000 nodes at most, and without a document type, so that no entity expands.

use std::{
    fs, io,
    io::Read,
    path::{Path, PathBuf},
};

/// A definition takes some tens of KiB.
pub const FILE_BYTES_MAX: u64 = 4 << 20;
/// Elements, attributes and texts of one file.
const NODES_MAX: u32 = 100_000;
/// What is looked at of a directory.
const FILES_MAX: usize = 4096;
/// Where those lie that run, and those that are defined. The first has what was plugged in since.
pub const DIRS: [&str; 2] = ["/run/libvirt/qemu", "/etc/libvirt/qemu"];

/// The names that a channel to a guest's agent has: one of Highwater's own, for an agent beside the one that libvirt speaks to, and the usual one.
pub const CHANNELS: [&str; 2] = ["org.highwater.guest_agent.0", "org.qemu.guest_agent.0"];

/// What is known of a guest.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Domain {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Option<String>,
    /// The process that it is, while it runs.
    pub pid: Option<u32>,
    /// libvirt manages it.
    pub managed: bool,
    /// The host's end of the channel to its agent.
    pub agent: Option<PathBuf>,
    /// libvirt itself is connected there.
    pub agent_taken: bool,
    /// Its disks.
    pub disks: Vec<GuestDisk>,
    /// The block devices that its process has open. Anybody can start a process that calls itself so; who has a disk open is more.
    pub open: Vec<PathBuf>,
}

/// A disk of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestDisk {
    /// What it is called in the guest (`vda`), or an id.
    pub target: String,
    /// What it is on the host.
    pub source: Source,
    /// QEMU's cache mode, if it is said.
    pub cache: Option<String>,
    /// The format laid over the source, if it is said: `raw`, `qcow2`.
    pub format: Option<String>,
}

/// What a guest's disk is on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A block device.
    Block(PathBuf),
    /// A file.
    File(PathBuf),
    /// Somewhere else: protocol and name.
    Network(String),
    /// Something else, by its name.
    Other(String),
}

/// Reads one definition.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Domain, String> {
    let options = roxmltree::ParsingOptions { nodes_limit: NODES_MAX, ..Default::default() };
    let document =
        roxmltree::Document::parse_with_options(text, options).map_err(|error| error.to_string())?;
    let root = document.root_element();
    let domain = match root.tag_name().name() {
        "domain" => root,
        "domstatus" => child(root, "domain").ok_or("it has no <domain>")?,
        other => return Err(format!("its root is <{other}>, not <domain>")),
    };
    let text_of =
        |name: &str| child(domain, name).and_then(|node| node.text()).map(|text| text.trim().to_owned());
    let name = text_of("name").filter(|name| !name.is_empty()).ok_or("the domain has no <name>")?;
    let devices = child(domain, "devices");
    let all = |kind: &'static str| {
        devices.into_iter().flat_map(move |d| d.children().filter(move |node| node.has_tag_name(kind)))
    };
    let channel = |wanted: &str| {
        all("channel").find_map(|node| {
            let named = child(node, "target")?.attribute("name")? == wanted;
            let path = child(node, "source")?.attribute("path")?;
            (named && node.attribute("type") == Some("unix")).then(|| PathBuf::from(path))
        })
    };
    let own = channel(CHANNELS[0]);
    let usual = channel(CHANNELS[1]);
    let running = root.has_tag_name("domstatus");
    Ok(Domain {
        name,
        uuid: text_of("uuid"),
        pid: root.attribute("pid").and_then(|pid| pid.parse().ok()).filter(|_| running),
        managed: true,
        agent_taken: own.is_none() && usual.is_some(),
        agent: own.or(usual),
        disks: all("disk").filter_map(disk).collect(),
        open: vec![],
    })
}

fn child<'a, 'i>(node: roxmltree::Node<'a, 'i>, name: &str) -> Option<roxmltree::Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(name))
}

/// Only disks: CD drives and floppies hold nothing to protect.
fn disk(node: roxmltree::Node<'_, '_>) -> Option<GuestDisk> {
    if !matches!(node.attribute("device"), None | Some("disk" | "lun")) {
        return None;
    }
    let source = child(node, "source");
    let of = |name: &str| source.and_then(|source| source.attribute(name)).map(str::to_owned);
    let source = match node.attribute("type")? {
        "block" => Source::Block(of("dev")?.into()),
        "file" => Source::File(of("file")?.into()),
        "network" => Source::Network(format!(
            "{}:{}",
            of("protocol").unwrap_or_default(),
            of("name").unwrap_or_default()
        )),
        "volume" => Source::Other(format!(
            "volume {} of pool {}",
            of("volume").unwrap_or_default(),
            of("pool").unwrap_or_default()
        )),
        other => Source::Other(other.to_owned()),
    };
    let driver = |name: &str| child(node, "driver").and_then(|d| d.attribute(name)).map(str::to_owned);
    let target = child(node, "target").and_then(|t| t.attribute("dev")).unwrap_or("?").to_owned();
    Some(GuestDisk { target, source, cache: driver("cache"), format: driver("type") })
}

/// All domains of these directories; the first definition of a name counts. Also what could not be read, and why.
#[must_use]
pub fn read_all(dirs: &[PathBuf]) -> (Vec<Domain>, Vec<(PathBuf, String)>) {
    let (mut domains, mut problems): (Vec<Domain>, Vec<(PathBuf, String)>) = (vec![], vec![]);
    for dir in dirs {
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => {
                problems.push((dir.clone(), error.to_string()));
                continue;
            }
        };
        let mut paths: Vec<PathBuf> = (entries.flatten().map(|entry| entry.path()))
            .filter(|path| path.extension().is_some_and(|extension| extension == "xml"))
            .take(FILES_MAX)
            .collect();
        paths.sort();
        for path in paths {
            match read(&path) {
                Ok(domain) if domains.iter().any(|known| known.name == domain.name) => {}
                Ok(domain) => domains.push(domain),
                Err(why) => problems.push((path, why)),
            }
        }
    }
    (domains, problems)
}

fn read(path: &Path) -> Result<Domain, String> {
    let mut text = String::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_BYTES_MAX).read_to_string(&mut text).map_err(|error| error.to_string())?;
    parse(&text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RUNNING: &str = r#"<!--
WARNING: THIS IS AN AUTO-GENERATED FILE.
-->
<domstatus state='running' reason='booted' pid='4711'>
  <monitor path='/var/lib/libvirt/qemu/domain-3-web/monitor.sock' type='unix'/>
  <domain type='kvm' id='3'>
    <name>web</name>
    <uuid>0f2c2d3e-1111-4222-8333-444455556666</uuid>
    <devices>
      <disk type='block' device='disk'>
        <driver name='qemu' type='raw' cache='none' io='native'/>
        <source dev='/dev/vg0/web' index='2'/>
        <target dev='vda' bus='virtio'/>
      </disk>
      <disk type='file' device='disk'><driver type='qcow2'/><source file='/images/a.qcow2'/><target dev='vdb'/></disk>
      <disk type='network'><source protocol='rbd' name='pool/b'><host name='mon'/></source><target dev='vdc'/></disk>
      <disk type='file' device='cdrom'><target dev='sda'/></disk>
      <channel type='unix'>
        <source mode='bind' path='/run/libvirt/qemu/channel/3-web/org.qemu.guest_agent.0'/>
        <target type='virtio' name='org.qemu.guest_agent.0' state='connected'/>
      </channel>
      <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
    </devices>
  </domain>
</domstatus>"#;

    #[test]
    fn a_running_domain_is_read() {
        let domain = parse(RUNNING).expect("good");
        assert_eq!((domain.name.as_str(), domain.pid, domain.managed), ("web", Some(4711), true));
        assert_eq!(domain.uuid.as_deref(), Some("0f2c2d3e-1111-4222-8333-444455556666"));
        assert_eq!(domain.agent, Some("/run/libvirt/qemu/channel/3-web/org.qemu.guest_agent.0".into()));
        assert!(domain.agent_taken, "libvirt is connected to it");
        let sources: Vec<(&str, Source)> =
            domain.disks.iter().map(|disk| (disk.target.as_str(), disk.source.clone())).collect();
        let expected = [
            ("vda", Source::Block("/dev/vg0/web".into())),
            ("vdb", Source::File("/images/a.qcow2".into())),
            ("vdc", Source::Network("rbd:pool/b".into())),
        ];
        assert_eq!(sources, expected);
        assert_eq!(domain.disks[0].cache.as_deref(), Some("none"));
    }

    #[test]
    fn a_channel_of_our_own_is_preferred() {
        let own = RUNNING.replace(
            "<channel type='spicevmc'>",
            "<channel type='unix'><source mode='bind' path='/run/hw/web'/><target type='virtio' \
             name='org.highwater.guest_agent.0'/></channel><channel type='spicevmc'>",
        );
        let domain = parse(&own).expect("good");
        assert_eq!((domain.agent, domain.agent_taken), (Some("/run/hw/web".into()), false));
    }

    #[test]
    fn what_is_no_domain_is_told() {
        for (text, why) in [
            ("", "root"),
            ("<network/>", "<network>"),
            ("<domain/>", "<name>"),
            ("<domstatus pid='1'/>", "<domain>"),
            ("<!DOCTYPE d [<!ENTITY a 'b'>]><domain><name>&a;</name></domain>", "DTD"),
        ] {
            let told = parse(text).expect_err(text);
            assert!(told.contains(why), "{text}: {told}");
        }
        let many = format!("<domain><name>x</name>{}</domain>", "<a/>".repeat(NODES_MAX as usize + 1));
        assert!(parse(&many).is_err());
    }

    #[test]
    fn the_running_definition_counts_and_bad_files_hinder_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (run, etc) = (dir.path().join("run"), dir.path().join("etc"));
        fs::create_dir_all(&run).unwrap();
        fs::create_dir_all(&etc).unwrap();
        fs::write(run.join("web.xml"), RUNNING).unwrap();
        fs::write(etc.join("web.xml"), "<domain><name>web</name></domain>").unwrap();
        fs::write(etc.join("off.xml"), "<domain><name>off</name></domain>").unwrap();
        fs::write(etc.join("bad.xml"), "<domain>").unwrap();
        fs::write(etc.join("notes.txt"), "").unwrap();
        let (domains, problems) = read_all(&[run, etc.clone(), dir.path().join("absent")]);
        let names: Vec<(&str, bool)> = domains.iter().map(|d| (d.name.as_str(), d.pid.is_some())).collect();
        assert_eq!(names, [("web", true), ("off", false)]);
        assert_eq!(problems.iter().map(|p| p.0.clone()).collect::<Vec<_>>(), [etc.join("bad.xml")]);
    }

    proptest! {
        #[test]
        fn anything_may_lie_there(cut in 0..RUNNING.len(), junk in ".{0,40}") {
            let text = format!("{}{junk}{}", &RUNNING[..cut], &RUNNING[RUNNING.len() - cut / 2..]);
            let _ = parse(&text);
        }
    }
}
