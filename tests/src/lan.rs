//! A network of one's own: a bridge, and a network namespace for each machine of a test, or a tap for each virtual machine.
//!
//! Names carry the test's process id; all of it goes with the destructor.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::command::{self, find};

/// The bridge's own address; machine `n` has the one `10 + n` behind it.
const HOST: Ipv4Addr = Ipv4Addr::new(10, 219, 0, 1);

/// See the module.
pub struct Lan {
    bridge: String,
    machines: usize,
}

impl Lan {
    /// Makes it, for so many machines (up to 200).
    pub fn new(machines: usize) -> Result<Self> {
        let lan = Self::bridge(machines)?;
        for machine in 0..machines {
            let (space, outer) = (lan.space(machine), lan.outer(machine));
            ip(&["netns", "add", &space])?;
            ip(&["link", "add", &outer, "type", "veth", "peer", "name", "eth0", "netns", &space])?;
            ip(&["link", "set", &outer, "master", &lan.bridge, "up"])?;
            let address = format!("{}/24", lan.address(machine));
            ip(&["-n", &space, "address", "add", &address, "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
        }
        Ok(lan)
    }

    /// Makes it, for so many virtual machines (up to 200): QEMU opens their taps, they give themselves their addresses.
    pub fn of_vms(machines: usize) -> Result<Self> {
        let lan = Self::bridge(machines)?;
        for machine in 0..machines {
            let tap = lan.outer(machine);
            ip(&["tuntap", "add", "dev", &tap, "mode", "tap"])?;
            ip(&["link", "set", &tap, "master", &lan.bridge, "up"])?;
        }
        Ok(lan)
    }

    fn bridge(machines: usize) -> Result<Self> {
        ensure!(machines <= 200, "too many machines");
        let lan = Self { bridge: format!("hwt{}", std::process::id() % 1_000_000), machines };
        ip(&["link", "add", &lan.bridge, "type", "bridge"])?;
        ip(&["address", "add", &format!("{HOST}/24"), "dev", &lan.bridge])?;
        ip(&["link", "set", &lan.bridge, "up"])?;
        Ok(lan)
    }

    /// Where the host of the test is reached from all of them.
    #[must_use]
    pub fn host(&self) -> Ipv4Addr {
        HOST
    }

    /// A machine's address.
    #[must_use]
    pub fn address(&self, machine: usize) -> Ipv4Addr {
        let [a, b, c, _] = HOST.octets();
        Ipv4Addr::new(a, b, c, 10 + machine as u8)
    }

    /// A command that runs in a machine's network; of mounts and devices it sees what everybody does.
    #[must_use]
    pub fn command(&self, machine: usize, program: &str) -> Command {
        let mut command = Command::new(find("nsenter"));
        command.arg(format!("--net=/run/netns/{}", self.space(machine))).arg("--").arg(program);
        command
    }

    /// Cuts a machine off, or connects it again.
    pub fn set_connected(&self, machine: usize, connected: bool) -> Result<()> {
        ip(&["link", "set", &self.outer(machine), if connected { "up" } else { "down" }])
    }

    /// What a machine sends takes at most so many kilobits a second; none: as fast as it can.
    pub fn set_rate(&self, machine: usize, kbit_per_s: Option<u32>) -> Result<()> {
        let space = self.space(machine);
        let tc = |args: &[&str]| command::run("tc", args).map(drop);
        let Some(rate) = kbit_per_s else {
            return tc(&["-n", &space, "qdisc", "del", "dev", "eth0", "root"]);
        };
        let rate = format!("{rate}kbit");
        tc(&[
            "-n", &space, "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate, "burst", "2k",
            "latency", "2s",
        ])
    }

    fn space(&self, machine: usize) -> String {
        format!("hwtest-{}-{machine}", std::process::id())
    }

    /// The end of a machine's network that lies here.
    pub(crate) fn outer(&self, machine: usize) -> String {
        format!("{}m{machine}", self.bridge)
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        for machine in 0..self.machines {
            // The pair goes at once, the namespace with its last process.
            ip(&["link", "del", &self.outer(machine)]).ok();
            ip(&["netns", "del", &self.space(machine)]).ok();
        }
        ip(&["link", "del", &self.bridge]).ok();
    }
}

fn ip(args: &[&str]) -> Result<()> {
    command::run("ip", args).map(drop)
}
