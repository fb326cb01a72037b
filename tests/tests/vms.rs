//! Virtual machines with stock kernels as one group: the agent runs in each, the collector on the machine of the test, and writes of one cause
//! writes of the other.

use anyhow::{Context, Result, ensure};
use highwater_tests::{
    Arena, Causal, Headquarters, Lan, causal,
    causal::Entries,
    fleet::{DISCONNECTED, DISTURBED},
    hand::HandEntries,
    metric,
    vm::ProtectedVm,
};
use serde_json::Value;
use std::{
    collections::BTreeSet,
    thread,
    time::{Duration, Instant},
};

const CHAINS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(180);
/// The oldest kernel that is supported, and the newest.
const KERNELS: [&str; 2] = ["6.1", "7"];
const CONFIG: &str = "[replication]\npoint-interval = \"1h\"\nretry-unit = \"50ms\"\n";
const HOOK: &str = "cd /etc/highwater && mkdir freeze-hook.d && cd freeze-hook.d && \
    printf '#!/bin/sh\\necho $1 >> /run/hook\\n' > 50-app && chmod 755 50-app";
/// In bitmap mode, and write-ordered.
const MODES: [(&str, &str); 2] = [
    ("bitmap", "[capture]\nmode = \"off\"\n"),
    ("write-ordered", "[capture]\nmemory = \"64MiB\"\npoint-interval = \"2s\"\n"),
];
/// What may be warned of, and these.
fn warnings(more: &[&'static str]) -> Vec<&'static str> {
    [DISTURBED, &DISCONNECTED, more].concat()
}

/// Two machines that are one group, and chains of writes from one to the other.
struct Stand {
    vms: Vec<ProtectedVm>,
    hq: Headquarters,
    lan: Lan,
}

impl Stand {
    fn new(arena: &Arena) -> Result<Self> {
        let lan = Lan::of_vms(KERNELS.len())?;
        let mut hq = Headquarters::new(arena.dir(), lan.host())?;
        warnings(&[]).iter().for_each(|text| hq.allow(text));
        let mut vms = vec![];
        for (at, kernel) in KERNELS.into_iter().enumerate() {
            let config = format!("{CONFIG}{}", MODES[at].1);
            vms.push(ProtectedVm::new(arena.dir(), (&hq, &lan, at), kernel, &config)?);
        }
        let stand = Self { vms, hq, lan };
        stand.wait_states()?;
        Ok(stand)
    }

    fn wait_states(&self) -> Result<()> {
        (self.vms.iter().zip(MODES)).try_for_each(|(vm, (state, _))| vm.wait_state(state))
    }

    fn start_chains(&self) -> Result<Causal> {
        let mut chains: Vec<Vec<Box<dyn Entries>>> = vec![];
        for chain in 0..CHAINS {
            let path = format!("/data/{}", causal::name(chain));
            let blocks = causal::CHAIN_BYTES / 4096;
            let make = format!("dd if=/dev/zero of={path} bs=4096 count={blocks} conv=fsync 2> /dev/null");
            let mut parts: Vec<Box<dyn Entries>> = vec![];
            for vm in &self.vms {
                vm.hand()?.run(&["sh", "-c", &make])?;
                parts.push(Box::new(HandEntries::new(vm.address, &path)));
            }
            chains.push(parts);
        }
        Causal::start_on(chains, 0)
    }

    fn points(&self) -> Result<Vec<Value>> {
        self.hq.group_points("shop")
    }

    /// Waits for so many points more.
    fn wait_points(&self, more: usize) -> Result<()> {
        let (before, until) = (self.points()?.len(), Instant::now() + PATIENCE);
        while self.points()?.len() < before + more {
            ensure!(Instant::now() < until, "{} points, and {more} more were awaited", before);
            thread::sleep(Duration::from_millis(200));
        }
        Ok(())
    }

    /// Recovers each machine's point of a group's point, and holds it against the chains.
    fn check(&self, point: &Value) -> Result<Vec<u64>> {
        let marker = point["point"].as_str().context("a marker")?;
        let dir = tempfile::Builder::new().prefix("hwtest-recovered-").tempdir_in("/dev/shm")?;
        let to = dir.path().to_string_lossy().into_owned();
        self.hq.operator(&["recover", "--group", "shop", "--point", marker, "--to", &to])?;
        let images: Vec<_> =
            self.vms.iter().map(|vm| dir.path().join(&vm.host_name).join("data.img")).collect();
        causal::check(&images, CHAINS).with_context(|| format!("group point {marker}"))
    }
}

#[test]
fn two_vms_are_one_group() -> Result<()> {
    let arena = Arena::enter("vms")?;
    let mut stand = Stand::new(&arena)?;
    let ids: Vec<&str> = stand.vms.iter().map(|vm| vm.id.as_str()).collect();
    stand.hq.group("shop", &ids, &["--crash-every", "1s"])?;
    let chains = stand.start_chains()?;
    stand.wait_points(5)?;

    // With applications: one has a hook.
    let mut hand = stand.vms[0].hand()?;
    hand.run(&["sh", "-c", HOOK])?;
    let point =
        stand.hq.asked(&["point", "create", "--application", "--group", "shop", "--timeout", "60s"])?;
    ensure!(point["consistency"] == "application", "{point:#}");
    ensure!(hand.run(&["cat", "/run/hook"])? == "freeze\nthaw", "the hook was not called");

    // An agent dies, and is started again.
    stand.vms[1].kill_agent()?;
    stand.vms[1].start_agent()?;
    stand.wait_points(3)?;

    // A machine is cut off from all others.
    stand.lan.set_connected(0, false)?;
    thread::sleep(Duration::from_secs(3));
    stand.lan.set_connected(0, true)?;
    stand.wait_points(3)?;

    // A machine loses its power.
    stand.vms[0].power_off()?;
    stand.vms[0].power_on()?;
    stand.vms[0].start_agent()?;
    stand.wait_states()?;
    stand.wait_points(3)?;

    let metrics = stand.vms[1].hand()?.run(&["wget", "-q", "-O", "-", "http://127.0.0.1:9465/metrics"])?;
    let stored = metric(&metrics, "highwater_agent_group_markers_total{stage=\"stored\"}");
    ensure!(stored.is_some_and(|count| count >= 3.0), "{metrics}");
    ensure!(metric(&metrics, "highwater_agent_group_members") == Some(2.0), "{metrics}");

    let (writes, slowest) = chains.stop()?;
    let points = stand.points()?;
    let mut held = BTreeSet::new();
    for point in &points {
        held.insert(stand.check(point)?);
    }
    println!("{} points of the group, {writes} writes, the slowest {slowest:?}: {held:?}", points.len());
    ensure!(held.len() > points.len() / 2, "{held:?}");
    // The one that lost its power has nobody's word for what was written before.
    stand.vms[0].judge(&warnings(&["no tracking was recorded on this boot"]))?;
    stand.vms[1].judge(&warnings(&[]))?;
    stand.hq.operator(&["verify"]).map(drop)
}
