//! What runs inside a guest of `cargo xtask test --kernels`: the tracker on a stock kernel, on devices of every kind
//! together, under heavy load on several processors.
//!
//! 1. `exact`: with the copies of the programs that this kernel needs, no block is missed; nor is one that was discarded with many
//!    others in one request.
//! 2. `capture`: what is captured of every write is the devices' content, in an order that a crash could have cut off anywhere.
//! 3. `hazard`: with one copy on purpose, whatever is missed is reported.
//!
//! The machine's disks, in order: virtio with one queue (completes in softirq), nvme with several (completes in hard
//! interrupts), virtio below device-mapper, virtio with several queues and ext4, another without, one for LVM, one
//! whose writes are logged, and one for the log. Lines that begin
//! with `RESULT` are for a report.
//!
//! Arguments: seconds of load of the first part, seconds of one round of the third, most rounds of it, seconds of load of the
//! second part. 0 leaves a part out.

mod capture;
mod discards;
mod exact;
mod hazard;
mod load;
mod lvm;
mod machine;
mod mapper;
mod subject;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use highwater_agent::device::Hook;
use highwater_agent::tracker::{Options, probe::Kernel};

use subject::Subject;

const EXACT_S: u64 = 15;
const HAZARD_S: u64 = 5;
const HAZARD_ROUNDS_MAX: u64 = 3;
const CAPTURE_S: u64 = 12;
const ZRAM_MIB: u64 = 32;
/// Which of the devices takes many ranges in one discard.
const NVME: usize = 1;
/// Which of the devices has the file system.
const EXT4: usize = 4;

fn main() -> ExitCode {
    match test() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("guest: FAILED: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn test() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let mut number = |default| arguments.next().map_or(Ok(default), |text| text.parse::<u64>());
    let (exact_s, hazard_s) = (number(EXACT_S)?, number(HAZARD_S)?);
    let (rounds_max, capture_s) = (number(HAZARD_ROUNDS_MAX)?, number(CAPTURE_S)?);
    let cpus = std::thread::available_parallelism().map_or(1, |count| count.get());
    let release = machine::kernel_release();
    let kaslr = match machine::kaslr() {
        Some(true) => "KASLR on",
        Some(false) => "KASLR off",
        None => "KASLR not told",
    };
    println!("guest: kernel {release}, {cpus} processors, {kaslr}");
    let kernel = Kernel::probe().context("this kernel cannot be tracked")?;
    println!("guest: {:?}", kernel.offsets()?);

    machine::keep_tracepoints_busy()?;
    let mut subjects = subjects()?;
    let mut options = Options {
        bpf_dir: "/sys/fs/bpf/highwater".into(),
        run_dir: "/run/highwater".into(),
        copies: None,
        net: true,
        bits_max: 1 << 28,
    };
    if exact_s > 0 {
        exact_part(&release, &options, &mut subjects, Duration::from_secs(exact_s))?;
    }
    if capture_s > 0 {
        capture_part(&release, &kernel, &mut subjects, Duration::from_secs(capture_s))?;
    }
    if hazard_s > 0 && rounds_max > 0 {
        options.copies = Some(1);
        options.net = false;
        hazard_part(&release, &options, &mut subjects, rounds_max, Duration::from_secs(hazard_s))?;
    }
    Ok(())
}

/// The devices of all parts.
fn subjects() -> Result<Vec<Subject>> {
    let linear = mapper::swapped_halves(&machine::wait_for("/dev/vdb")?)?;
    let zram = machine::zram(ZRAM_MIB)?;
    let subjects = vec![
        Subject::new("virtio", &machine::wait_for("/dev/vda")?)?,
        Subject::new("nvme", &machine::wait_for("/dev/nvme0n1")?)?,
        Subject::new("linear", &linear)?,
        Subject::new("zram", &zram)?,
        Subject::new("ext4", &machine::wait_for("/dev/vdc")?)?,
    ];
    for (subject, hook) in
        subjects.iter().zip([Hook::Request, Hook::Request, Hook::Bio, Hook::Bio, Hook::Request])
    {
        tell(subject);
        if subject.device.hook != hook {
            bail!("{} is taken for {:?}", subject.name, subject.device.hook);
        }
    }
    Ok(subjects)
}

fn tell(subject: &Subject) {
    let queues = std::fs::read_dir(Path::new("/sys/block").join(&subject.device.name).join("mq"));
    let queues = queues.map_or(0, Iterator::count);
    println!("guest: {}: {} MiB, {queues} queues", subject.name, subject.device.size_bytes >> 20);
}

fn exact_part(release: &str, options: &Options, subjects: &mut [Subject], load: Duration) -> Result<()> {
    let started = Instant::now();
    println!("guest: discards of many ranges in one request");
    let discards = discards::run(options, &mut subjects[NVME])?;
    println!(
        "RESULT {release} discards: {} ranges of {} blocks in {} requests, 0 missed, {:.1} s",
        discards.ranges,
        discards.blocks,
        discards.requests,
        started.elapsed().as_secs_f64()
    );
    let started = Instant::now();
    println!("guest: with the copies needed");
    let exact = exact::run(options, subjects, (NVME, EXT4), load)?;
    println!(
        "RESULT {release} exact: {} events, {} skipped, 0 missed, {} epochs, {:.1} s",
        exact.events,
        exact.skipped,
        exact.epochs,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

fn capture_part(release: &str, kernel: &Kernel, subjects: &mut Vec<Subject>, load: Duration) -> Result<()> {
    let started = Instant::now();
    println!("guest: write-ordered capture");
    // A device of its own: the other one with several queues has the file system.
    let queues = Subject::new("queues", &machine::wait_for("/dev/vdd")?)?;
    tell(&queues);
    let [data, log] = lvm::volumes(&machine::wait_for("/dev/vde")?)?;
    let mut volumes = [Subject::new("data", &data)?, Subject::new("log", &log)?];
    volumes.iter().for_each(tell);
    subjects.push(queues);
    let logged =
        capture::LoggedDisks { disk: machine::wait_for("/dev/vdf")?, log: machine::wait_for("/dev/vdg")? };
    let disks = capture::Disks { subjects, ext4: EXT4, nvme: NVME, volumes: &mut volumes, logged };
    let capture = capture::run(kernel, disks, load);
    subjects.pop();
    let capture = capture?;
    println!(
        "RESULT {release} volumes: {} writes, {} positions right, {} of them between a log's record and its data, exact",
        capture.volumes.writes, capture.volumes.positions, capture.volumes.between,
    );
    let logged = &capture.logged;
    println!(
        "RESULT {release} logged: {} operations, equal to the log of {} entries at {} marks, {} sectors right at {} positions",
        logged.operations, logged.found.entries, logged.found.marks, logged.found.sectors, logged.positions,
    );
    println!(
        "RESULT {release} capture: bases {}, {} copies, {} changes, {} MiB, {} windows proved, {} states right, \
         {} skipped, {} rounds not proved, exact; {:.1} s{}",
        capture.bases,
        capture.copies,
        capture.events,
        capture.bytes >> 20,
        capture.windows,
        capture.states,
        capture.skipped,
        capture.lost,
        started.elapsed().as_secs_f64(),
        capture.too_few.map_or(String::new(), |told| format!("; with one copy: {told}"))
    );
    Ok(())
}

fn hazard_part(
    release: &str,
    options: &Options,
    subjects: &mut [Subject],
    rounds_max: u64,
    round: Duration,
) -> Result<()> {
    // The file system is not mounted any more, and its disk is written like the others.
    let started = Instant::now();
    println!("guest: with one copy and no net, on purpose");
    let hazard = hazard::run(options, subjects, rounds_max as usize, round)?;
    let verdict = match (hazard.skipped, hazard.missed) {
        (0, _) => "the hazard was NOT provoked",
        (_, 0) => "skipped, and nothing missed",
        _ => "all that was missed was reported",
    };
    println!(
        "RESULT {release} hazard: {} events, {} skipped, {} missed, suspect in {} of {} rounds, {:.1} s: {verdict}",
        hazard.events,
        hazard.skipped,
        hazard.missed,
        hazard.suspect,
        hazard.rounds,
        started.elapsed().as_secs_f64()
    );
    Ok(())
}
