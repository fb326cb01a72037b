//! `highwater-agent`: the daemon and the commands that talk to it.

use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use highwater_agent::{
    config::{Bandwidth, Config},
    control::{self, Request, Response},
    daemon,
    error::{Coded, OperatorError},
    freeze, tracker,
};
use highwater_wire::enroll::{Token, enroll};
use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const DEFAULT_CONFIG: &str = "/etc/highwater/agent.toml";
/// A point is answered when it is stored.
const PATIENCE: Duration = Duration::from_secs(310);

/// Replicates this machine's disks, block by block and continuously, to a Highwater collector.
#[derive(Parser)]
#[command(version, max_term_width = 110)]
struct Args {
    /// Configuration; without the default file, defaults count.
    #[arg(long, global = true, env = "HIGHWATER_AGENT_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// Answer in JSON.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Run the agent (by systemd, as a rule).
    Run,
    /// Obtain this machine's certificate from a collector, with a one-time token.
    Enroll {
        /// The collector's management address, `https://HOST[:PORT]`.
        url: String,
        /// As printed by `highwater-collector token create`; read from standard input if it is `-`.
        token: String,
        /// Enrol although this machine is enrolled already: it becomes another machine.
        #[arg(long)]
        again: bool,
    },
    /// Show how replication stands.
    Status,
    /// Protect a disk: any block device, by any path.
    Protect {
        /// The device: /dev/sdb, /dev/disk/by-id/…, /dev/vg0/data, a partition, a loop device.
        device: PathBuf,
        /// Its name in the vault and the console.
        #[arg(long)]
        name: Option<String>,
    },
    /// Stop protecting a disk. Its recovery points stay in the vault.
    Unprotect {
        /// Its id, name or path.
        disk: String,
    },
    /// Take a recovery point now, and wait until it is stored.
    Point,
    /// Compare a disk with the vault, and send what differs.
    Resync {
        /// Its id, name or path.
        disk: String,
    },
    /// Change the bandwidth limit of the running agent.
    Bandwidth {
        /// `50MiB` (per second), or `unlimited`.
        limit: String,
    },
    /// Look at the configuration.
    Config {
        #[command(subcommand)]
        verb: ConfigVerb,
    },
    /// Thaw whatever a dead agent left frozen (run by systemd after the agent has stopped).
    Thaw,
    /// End all tracking and remove the programs from the kernel. The disks must be compared with the vault afterwards.
    Detach {
        /// Without this, only say what would be done.
        #[arg(long)]
        yes: bool,
    },
    /// Print completions for a shell.
    Completions {
        /// Which.
        shell: clap_complete::Shell,
    },
    /// Print the man page.
    Man,
}

#[derive(Subcommand)]
enum ConfigVerb {
    /// Tell every problem of the configuration file.
    Check,
    /// Print it.
    Show {
        /// With all defaults.
        #[arg(long)]
        effective: bool,
    },
}

/// Exit codes.
#[derive(Clone, Copy, ValueEnum)]
enum Exit {
    Done = 0,
    Failed = 1,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(()) => ExitCode::from(Exit::Done as u8),
        Err(error) => {
            if args.json {
                let _ = writeln!(std::io::stderr(), "{}", serde_json::json!({ "error": error }));
            } else {
                let _ = writeln!(std::io::stderr(), "{error}");
            }
            ExitCode::from(Exit::Failed as u8)
        }
    }
}

fn run(args: &Args) -> Result<(), OperatorError> {
    match &args.verb {
        Verb::Completions { shell } => {
            clap_complete::generate(*shell, &mut Args::command(), "highwater-agent", &mut std::io::stdout());
            return Ok(());
        }
        Verb::Man => {
            let man = clap_mangen::Man::new(Args::command());
            return man.render(&mut std::io::stdout()).or_else(broken_pipe_is_fine);
        }
        _ => {}
    }
    let config = load_config(args)?;
    match &args.verb {
        Verb::Run => {
            let _log = daemon::start_logging(&config);
            daemon::run(&config).map_err(|e| plain(&e))
        }
        Verb::Enroll { url, token, again } => enrol(args, &config, url, token, *again),
        Verb::Config { verb: ConfigVerb::Check } => {
            say(args, "The configuration is valid.", &serde_json::json!({ "valid": true }))
        }
        Verb::Config { verb: ConfigVerb::Show { effective } } => {
            let text = match (effective, config_path(args)) {
                (false, Some(path)) => std::fs::read_to_string(path).unwrap_or_default(),
                _ => config.effective(),
            };
            if args.json {
                print(&serde_json::to_string(&config).unwrap_or_default())
            } else {
                print(text.trim_end())
            }
        }
        Verb::Thaw => {
            let thawed = freeze::thaw_all(&config.run_dir).map_err(|e| e.operator())?;
            let stuck: Vec<String> = thawed.stuck.iter().map(|p| p.display().to_string()).collect();
            let text = format!(
                "{} of {} recorded filesystems were frozen and are thawed.",
                thawed.thawed, thawed.armed
            );
            say(args, &text, &serde_json::json!({ "thawed": thawed.thawed, "stuck": stuck }))?;
            if stuck.is_empty() {
                Ok(())
            } else {
                Err(OperatorError {
                    code: 1478,
                    cause: format!("still frozen: {}", stuck.join(", ")),
                    action: "Thaw them with `fsfreeze --unfreeze MOUNTPOINT`".into(),
                })
            }
        }
        Verb::Detach { yes } => detach(args, &config, *yes),
        Verb::Status => ask(args, &config, &Request::Status),
        Verb::Protect { device, name } => {
            let path = std::path::absolute(device).unwrap_or_else(|_| device.clone());
            ask(args, &config, &Request::Protect { path, name: name.clone() })
        }
        Verb::Unprotect { disk } => ask(args, &config, &Request::Unprotect { disk: disk.clone() }),
        Verb::Point => ask(args, &config, &Request::Point {}),
        Verb::Resync { disk } => ask(args, &config, &Request::ResyncNow { disk: disk.clone() }),
        Verb::Bandwidth { limit } => {
            let bandwidth: Bandwidth = limit.parse().map_err(|e| OperatorError {
                code: 1479,
                cause: format!("{limit:?} is no bandwidth: {e}"),
                action: "Write `50MiB` (per second) or `unlimited`".into(),
            })?;
            ask(args, &config, &Request::SetBandwidth { bandwidth })
        }
        Verb::Completions { .. } | Verb::Man => Ok(()),
    }
}

fn config_path(args: &Args) -> Option<PathBuf> {
    args.config.clone().or_else(|| Path::new(DEFAULT_CONFIG).exists().then(|| DEFAULT_CONFIG.into()))
}

fn load_config(args: &Args) -> Result<Config, OperatorError> {
    match config_path(args) {
        Some(path) => Config::load(&path).map_err(|e| e.operator()),
        None => Ok(Config::default()),
    }
}

fn ask(args: &Args, config: &Config, request: &Request) -> Result<(), OperatorError> {
    let response = control::call(&config.run_dir, request, PATIENCE).map_err(|e| e.operator())?;
    if let Response::Error(error) = response {
        return Err(error);
    }
    if args.json {
        let value = match &response {
            Response::Status(status) => serde_json::to_value(status),
            other => serde_json::to_value(other),
        };
        return print(&value.unwrap_or_default().to_string());
    }
    match response {
        Response::Status(status) => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_millis() as u64);
            print(control::render(&status, now).trim_end())
        }
        Response::Protected { disk, name, size_bytes, identity, notes } => {
            print(&format!("Protected {name}, {size_bytes}, known by {identity}.\nDisk id: {disk}"))?;
            notes.iter().try_for_each(|note| print(&format!("Note: {note}.")))
        }
        Response::Done { message } => print(&message),
        Response::Error(error) => Err(error),
    }
}

fn enrol(args: &Args, config: &Config, url: &str, token: &str, again: bool) -> Result<(), OperatorError> {
    if daemon::is_enrolled(&config.state_dir) && !again {
        return Err(OperatorError {
            code: 1480,
            cause: "this machine is enrolled already".into(),
            action: "Use --again to enrol it as another machine".into(),
        });
    }
    let token = if token == "-" {
        let mut line = String::new();
        std::io::stdin().read_line(&mut line).map_err(|e| plain(&e.into()))?;
        line
    } else {
        token.to_owned()
    };
    let wire = |e: highwater_wire::WireError| OperatorError {
        code: e.code(),
        cause: e.to_string(),
        action: e.action(),
    };
    let token: Token = token.trim().parse().map_err(wire)?;
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(|e| plain(&e.into()))?;
    let enrolled = runtime.block_on(enroll(url, &token, host.trim())).map_err(wire)?;
    daemon::save_enrolment(&config.state_dir, &enrolled.identity, &enrolled.endpoint)
        .map_err(|e| plain(&e))?;
    let text = format!(
        "Enrolled as machine {}; the collector is {}. Restart the agent if it is running.",
        enrolled.identity.machine, enrolled.endpoint
    );
    say(
        args,
        &text,
        &serde_json::json!({ "machine": enrolled.identity.machine, "endpoint": enrolled.endpoint }),
    )
}

fn detach(args: &Args, config: &Config, yes: bool) -> Result<(), OperatorError> {
    if control::call(&config.run_dir, &Request::Status, Duration::from_secs(5)).is_ok() {
        return Err(OperatorError {
            code: 1481,
            cause: "the agent is running".into(),
            action: "Stop it first with `systemctl stop highwater-agent`".into(),
        });
    }
    if !yes {
        let text = format!(
            "Would remove the tracking programs pinned in {}. Protected disks become suspect, and are compared with the vault \
             when the agent runs again. Repeat with --yes to do it.",
            config.bpf_dir.display()
        );
        return say(args, &text, &serde_json::json!({ "would-remove": config.bpf_dir }));
    }
    tracker::detach_all(&config.bpf_dir, &config.run_dir).map_err(|e| e.operator())?;
    say(args, "Nothing is tracked any more.", &serde_json::json!({ "removed": config.bpf_dir }))
}

fn say(args: &Args, text: &str, json: &serde_json::Value) -> Result<(), OperatorError> {
    if args.json { print(&json.to_string()) } else { print(text) }
}

fn print(text: &str) -> Result<(), OperatorError> {
    writeln!(std::io::stdout(), "{text}").or_else(broken_pipe_is_fine)
}

fn broken_pipe_is_fine(error: std::io::Error) -> Result<(), OperatorError> {
    if error.kind() == std::io::ErrorKind::BrokenPipe { Ok(()) } else { Err(plain(&error.into())) }
}

/// An error whose text tells all that is known; with a code of its own if it has none in front.
fn plain(error: &anyhow::Error) -> OperatorError {
    OperatorError { code: 1482, cause: format!("{error:#}"), action: "See the text above".into() }
}
