//! A virtual machine that is protected from within: a stock kernel, the agent on it, a network to the other machines of the test, and a hand.
//!
//! Two disks: the one that is protected, and one for what the agent keeps, so that both are there again when it has lost its power.

use super::{Initrd, Machine, Vm};
use crate::{Hand, Headquarters, Lan, command, daemon, daemon::program, hand};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{
    fs::{self, File},
    net::SocketAddr,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

const GUARD: Duration = Duration::from_secs(180);

const SCRIPT: &str = r"
mkdir -p /data /state
hostname $2
modprobe ext4; modprobe virtio_net
ip link set eth0 up && ip address add $1/24 dev eth0 || exit 8
mount -t ext4 /dev/vdb /state || exit 9
mount -t ext4 /dev/vda /data || exit 9
exec /sbin/hand
";

/// See the module. Dropped: powered off, as by a pulled plug.
pub struct ProtectedVm {
    dir: PathBuf,
    name: String,
    /// What it calls itself.
    pub host_name: String,
    kernel: &'static str,
    initrd: PathBuf,
    devices: Vec<String>,
    /// Its network address.
    pub address: SocketAddr,
    /// Its id, once enrolled.
    pub id: String,
    vm: Option<Vm>,
}

impl ProtectedVm {
    /// Makes the machine that has this place in the network, boots it, and protects its disk; more lines are for the agent's configuration.
    pub fn new(
        dir: &Path,
        (hq, lan, at): (&Headquarters, &Lan, usize),
        kernel: &'static str,
        config: &str,
    ) -> Result<Self> {
        let host_name = format!("vm{at}");
        let dir = dir.join(&host_name);
        fs::create_dir(&dir)?;
        let script = Initrd::new(&dir, SCRIPT, &[&lan.address(at).to_string(), &host_name])?;
        for (program_name, name) in [("highwater-agent", "highwater-agent"), ("highwater-hand", "hand")] {
            script.add_program(&program(program_name)?, name)?;
        }
        let guardian = program("highwater-guardian")?;
        script.add_program(&guardian, "highwater-guardian")?;
        let config = format!("state-dir = \"/state/highwater\"\nrun-dir = \"/run/highwater\"\n{config}");
        script.add_file("etc/highwater/agent.toml", config.as_bytes())?;
        let mut devices = vec![];
        for (disk, mib) in [("data", 64), ("state", 64)] {
            let path = dir.join(disk);
            File::create(&path)?.set_len(mib << 20)?;
            command::run("mkfs.ext4", &["-q", "-F", &path.to_string_lossy()])?;
            let drive = format!("file={},if=none,id={disk},format=raw,cache=writeback", path.display());
            devices.extend(["-drive".to_owned(), drive]);
            devices.extend(["-device".to_owned(), format!("virtio-blk-pci,drive={disk},serial={disk}")]);
        }
        let tap = format!("tap,id=lan,ifname={},script=no,downscript=no", lan.outer(at));
        let card = format!("virtio-net-pci,netdev=lan,mac=52:54:00:00:00:{:02x}", 10 + at);
        devices.extend(["-netdev".to_owned(), tap, "-device".to_owned(), card]);
        let mut new = Self {
            name: format!("hwtest-{host_name}"),
            host_name,
            kernel,
            initrd: script.pack(kernel, 2)?,
            devices,
            address: (lan.address(at), hand::PORT).into(),
            id: String::new(),
            dir,
            vm: None,
        };
        new.power_on()?;
        new.enrol(hq)?;
        Ok(new)
    }

    fn enrol(&mut self, hq: &Headquarters) -> Result<()> {
        let mut hand = self.hand()?;
        hand.run(&["sh", "-c", &format!("umask 077; echo {} > /run/token", hq.token()?)])?;
        hand.run(&["highwater-agent", "enroll", &hq.management_url(), "--token-file", "/run/token"])?;
        self.start_agent()?;
        hand.run(&["highwater-agent", "protect", "/dev/vda", "--name", "data"])?;
        self.id = self.status()?["machine"].as_str().context("no machine")?.to_owned();
        Ok(())
    }

    /// Boots it; its hand is there on return.
    pub fn power_on(&mut self) -> Result<()> {
        let machine = Machine {
            name: &self.name,
            kernel: self.kernel,
            initrd: &self.initrd,
            memory_mib: 768,
            devices: self.devices.clone(),
        };
        self.vm = Some(Vm::boot(&self.dir, &machine, |said| said.contains("the hand is there"))?);
        Ok(())
    }

    /// Pulls the plug.
    pub fn power_off(&mut self) -> Result<()> {
        self.vm.take().map_or(Ok(()), Vm::power_off)
    }

    /// A hand in it.
    pub fn hand(&self) -> Result<Hand> {
        Hand::connect(self.address)
    }

    /// Starts its agent; it answers on return.
    pub fn start_agent(&self) -> Result<()> {
        let start =
            "setsid highwater-agent run >> /state/agent.log 2>&1 < /dev/null & echo $! > /run/agent.pid";
        self.hand()?.run(&["env", "NO_COLOR=1", "sh", "-c", start])?;
        let until = Instant::now() + GUARD;
        while self.status().is_err() {
            ensure!(Instant::now() < until, "no agent in {}:\n{}", self.name, self.agent_log()?);
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    /// Kills its agent with no chance to do anything.
    pub fn kill_agent(&self) -> Result<()> {
        self.hand()?.run(&["sh", "-c", "kill -9 $(cat /run/agent.pid)"]).map(drop)
    }

    /// What its agent says of itself.
    pub fn status(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.hand()?.run(&["highwater-agent", "status", "--json"])?)?)
    }

    /// Waits until its disk is in a state.
    pub fn wait_state(&self, state: &str) -> Result<()> {
        let until = Instant::now() + GUARD;
        loop {
            let status = self.status()?;
            if status["disks"][0]["state"] == state {
                return Ok(());
            }
            ensure!(
                Instant::now() < until,
                "{} is not {state}: {status:#}\n{}",
                self.name,
                self.agent_log()?
            );
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// What its agent has logged.
    pub fn agent_log(&self) -> Result<String> {
        self.hand()?.run(&["cat", "/state/agent.log"])
    }

    /// Fails on the first warning or error of its agent that has none of these texts.
    pub fn judge(&self, allowed: &[&str]) -> Result<()> {
        let log = self.agent_log()?;
        let bad = daemon::complaints(&log, allowed);
        ensure!(
            bad.is_empty(),
            "the agent in {} logged what was not expected:\n{}",
            self.name,
            bad.join("\n")
        );
        Ok(())
    }
}
