//! `cargo xtask`: the one door to building, trying, testing, measuring and checking Highwater.
//!
//! Every verb that needs tools or the eBPF object calls [`setup`] and [`ebpf`] itself, so that each of
//! `cargo xtask demo` and `cargo xtask test` is the only command needed on a fresh Debian machine.

mod check;
mod demo;
mod ebpf;
mod fuzz;
mod kernels;
mod setup;
mod sh;
mod test;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Parser, Subcommand};

use kernels::{Disk, Guest};
use setup::Purpose;

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about, disable_help_subcommand = true)]
struct Door {
    #[command(subcommand)]
    verb: Verb,
}

/// The one door: set up, build, try, test, measure and check Highwater.
#[derive(Subcommand)]
enum Verb {
    /// Install what is missing, and only that (Debian, as root; elsewhere it says what to install)
    Setup {
        /// What the machine is to be made ready for
        #[arg(long = "for", value_enum, default_value = "build")]
        purpose: Purpose,
    },
    /// Compile the eBPF programs to target/ebpf/highwater-agent-ebpf.o
    BuildEbpf,
    /// Protect a disk, destroy it, recover it; leaves nothing behind
    Demo {
        /// Passed on to the demo
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the unit tests, then the end-to-end tests
    Test {
        /// Only tests whose name contains this
        #[arg(long)]
        filter: Option<String>,
        /// Then test on real kernels in virtual machines: these versions, or the usual ones
        #[arg(long, num_args = 0.., value_name = "VERSION")]
        kernels: Option<Vec<String>>,
    },
    /// Measure: `tracking`, `capture`, `replicate`, `vault` or `markers`
    Bench {
        /// What to measure
        #[arg(value_parser = ["tracking", "capture", "replicate", "vault", "markers"])]
        subject: String,
        /// Passed on to the benchmark
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fuzz the decoders, led by coverage (the tests do it for a moment without)
    Fuzz {
        /// Seconds for each target
        #[arg(long, default_value_t = 15)]
        seconds: u64,
        /// Only this one, as in fuzz/fuzz_targets
        target: Option<String>,
    },
    /// Check format, lints, documentation, dependencies and units
    Check {
        /// Only these: fmt, fmt-ebpf, clippy, doc, deny, units
        only: Vec<String>,
    },
    /// Fetch real kernels and run programs on them in virtual machines
    #[command(subcommand)]
    Kernels(KernelsVerb),
}

#[derive(Subcommand)]
enum KernelsVerb {
    /// Download and unpack kernels below target/kernels
    Fetch {
        /// Series like 6.1 or 7; the usual ones where none is given
        versions: Vec<String>,
    },
    /// Boot kernels and run one static program on each
    Run(RunArgs),
}

#[derive(Args)]
struct RunArgs {
    /// Series like 6.1 or 7; the usual ones where none is given
    versions: Vec<String>,
    /// The program, linked statically; the project's own guest test where none is given
    #[arg(long)]
    payload: Option<PathBuf>,
    /// A directory laid over the guest's root
    #[arg(long)]
    overlay: Option<PathBuf>,
    /// A disk, `virtio:MIB` or `nvme:MIB`, then `:QUEUES` and `:ext4` if wanted; repeat for more. None: those of the
    /// project's own guest test, if that is run
    #[arg(long = "disk")]
    disks: Vec<Disk>,
    /// Processors of the guest
    #[arg(long, default_value_t = 4)]
    smp: u32,
    /// Let the kernel choose its addresses at random (it unpacks itself then, which takes longer)
    #[arg(long)]
    kaslr: bool,
    /// Memory of the guest in MiB
    #[arg(long, default_value_t = test::GUEST_MEMORY_MIB)]
    memory_mib: u32,
    /// Seconds until a guest is given up
    #[arg(long, default_value_t = 300)]
    timeout_s: u64,
    /// Arguments of the program
    #[arg(last = true)]
    args: Vec<String>,
}

fn main() -> ExitCode {
    // Without a backtrace, whatever the environment says: what is told is what the user can act on.
    match execute(Door::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn execute(verb: Verb) -> Result<()> {
    match verb {
        Verb::Setup { purpose } => setup::setup(purpose),
        Verb::BuildEbpf => ebpf::build().map(drop),
        Verb::Demo { args } => demo::demo(&args),
        Verb::Test { filter, kernels } => test::test(filter.as_deref(), kernels.as_deref()),
        Verb::Bench { subject, args } => demo::bench(&subject, &args),
        Verb::Fuzz { seconds, target } => fuzz::fuzz(seconds, target.as_deref()),
        Verb::Check { only } => check::check(&only),
        Verb::Kernels(KernelsVerb::Fetch { versions }) => fetch_kernels(&versions),
        Verb::Kernels(KernelsVerb::Run(args)) => run_kernels(args),
    }
}

fn fetch_kernels(versions: &[String]) -> Result<()> {
    let versions = kernels::versions_or_default(versions)?;
    setup::setup(Purpose::Kernels)?;
    for kernel in kernels::fetch(&versions)? {
        println!("kernel {}: {}", kernel.version, kernel.release);
    }
    Ok(())
}

fn run_kernels(args: RunArgs) -> Result<()> {
    let versions = kernels::versions_or_default(&args.versions)?;
    setup::setup(Purpose::Kernels)?;
    let own = args.payload.is_none();
    let disks = if own && args.disks.is_empty() { test::guest_disks()? } else { args.disks };
    let payload = args.payload.map_or_else(test::build_guest_test, Ok)?;
    let kernels = kernels::fetch(&versions)?;
    let guest = Guest {
        payload,
        args: args.args,
        overlay: args.overlay,
        disks,
        cpus: args.smp,
        kaslr: args.kaslr,
        memory_mib: args.memory_mib,
        timeout: Duration::from_secs(args.timeout_s),
    };
    kernels::run(&kernels, &guest)
}
