//! From TOML with positions to a configuration and its problems.

use super::{ByteSize, Capture, CaptureMode, Config, Guest, LogFormat, OnHookFailure, Problem, Resync};
use crate::guests::GUESTS_MAX;
use std::{fmt::Display, net::SocketAddr, ops::Range, path::PathBuf, str::FromStr, time::Duration};
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

pub(super) struct Reader<'a> {
    text: &'a str,
    pub problems: Vec<Problem>,
}

type Table<'a> = Option<Spanned<DeTable<'a>>>;

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, problems: Vec::new() }
    }

    pub(super) fn config(&mut self) -> Config {
        let (root, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            self.problem(error.span().unwrap_or(0..0), "", error.message());
        }
        let mut config = Config::default();
        let mut root = Some(root);
        self.path(&mut root, "", "state-dir", &mut config.state_dir);
        self.path(&mut root, "", "run-dir", &mut config.run_dir);
        self.path(&mut root, "", "bpf-dir", &mut config.bpf_dir);
        let mut guardian = PathBuf::new();
        if self.path(&mut root, "", "guardian-path", &mut guardian) {
            config.guardian_path = Some(guardian);
        }
        let mut listen = config.metrics_listen.to_string();
        let form = |text: &String| {
            let wrong = text.parse::<SocketAddr>().is_err();
            wrong.then(|| "write an address and a port, like 127.0.0.1:9465 or [::1]:9465".to_owned())
        };
        self.parsed(&mut root, "", "metrics-listen", &mut listen, form);
        config.metrics_listen = listen.parse().unwrap_or(config.metrics_listen);
        self.log(&mut root, &mut config);
        self.collector(&mut root, &mut config);
        self.replication(&mut root, &mut config);
        self.tracking(&mut root, &mut config);
        self.capture(&mut root, &mut config);
        let mut hook = self.table(&mut root, "freeze-hook");
        self.command(&mut hook, &mut config);
        self.rest(hook, "freeze-hook.");
        self.application(&mut root, &mut config);
        self.group(&mut root, &mut config);
        self.limits(&mut root, &mut config);
        self.guests(&mut root, &mut config);
        self.rest(root, "");
        config
    }

    fn log(&mut self, root: &mut Table<'a>, config: &mut Config) {
        let mut table = self.table(root, "log");
        let mut format = String::from("text");
        let known =
            |f: &String| (f != "text" && f != "json").then(|| "write \"text\" or \"json\"".to_owned());
        self.parsed(&mut table, "log.", "format", &mut format, known);
        config.log.format = if format == "json" { LogFormat::Json } else { LogFormat::Text };
        let level = |l: &String| {
            (!LEVELS.contains(&l.as_str())).then(|| format!("write one of {}", LEVELS.join(", ")))
        };
        self.parsed(&mut table, "log.", "level", &mut config.log.level, level);
        self.rest(table, "log.");
    }

    fn collector(&mut self, root: &mut Table<'a>, config: &mut Config) {
        let mut table = self.table(root, "collector");
        let mut endpoint = String::new();
        let form = |text: &String| {
            let good = text
                .rsplit_once(':')
                .is_some_and(|(h, p)| !h.is_empty() && p.parse::<u16>().is_ok_and(|p| p > 0));
            (!good).then(|| "write host:port, like dr.example.org:9443".to_owned())
        };
        if self.parsed(&mut table, "collector.", "endpoint", &mut endpoint, form) {
            config.collector.endpoint = Some(endpoint);
        }
        let mut name = String::new();
        let filled = |text: &String| text.is_empty().then(|| "must not be empty".to_owned());
        if self.parsed(&mut table, "collector.", "server-name", &mut name, filled) {
            config.collector.server_name = Some(name);
        }
        self.rest(table, "collector.");
    }

    fn replication(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "replication.";
        let mut table = self.table(root, "replication");
        let r = &mut config.replication;
        let at_least = |limit: &'static str, low: bool| low.then(|| format!("must be at least {limit}"));
        let budget_at = table.as_ref().and_then(|t| t.get_ref().get("freeze-budget").map(|v| v.span()));
        self.parsed(&mut table, IN, "point-interval", &mut r.point_interval, |v| {
            at_least("1s", v.0 < Duration::from_secs(1))
        });
        self.parsed(&mut table, IN, "freeze-deadline", &mut r.freeze_deadline, |v| {
            let wrong = v.0 < Duration::from_millis(100) || v.0 > Duration::from_secs(120);
            wrong.then(|| "must be between 100ms and 2m".to_owned())
        });
        self.parsed(&mut table, IN, "freeze-budget", &mut r.freeze_budget, |v| {
            at_least("1MiB", v.0 < 1 << 20)
        });
        self.parsed(&mut table, IN, "memory", &mut r.memory, |v| at_least("8MiB", v.0 < 8 << 20));
        self.parsed(&mut table, IN, "bandwidth", &mut r.bandwidth, |_| None);
        self.parsed(&mut table, IN, "partial-commit", &mut r.partial_commit, |v| {
            at_least("1MiB", v.0 < 1 << 20)
        });
        self.parsed(&mut table, IN, "retry-unit", &mut r.retry_unit, |v| at_least("1ms", v.0.is_zero()));
        self.parsed(&mut table, IN, "compare-rate", &mut r.compare_rate, |_| None);
        r.rounds_max = self.integer(&mut table, IN, "rounds-max", r.rounds_max, 1..1001);
        r.readers = self.integer(&mut table, IN, "readers", r.readers, 1..65);
        r.compression_level = self.integer(&mut table, IN, "compression-level", r.compression_level, -7..20);
        let mut resync = String::from("automatic");
        let known = |w: &String| {
            (w != "automatic" && w != "manual").then(|| "write \"automatic\" or \"manual\"".to_owned())
        };
        self.parsed(&mut table, IN, "resync", &mut resync, known);
        r.resync = if resync == "manual" { Resync::Manual } else { Resync::Automatic };
        if r.freeze_budget > r.memory {
            let message = format!("is more than replication.memory ({}), which it is read into", r.memory);
            self.problem(budget_at.unwrap_or(0..0), "replication.freeze-budget", &message);
        }
        self.rest(table, IN);
    }

    fn tracking(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "tracking.";
        let mut table = self.table(root, "tracking");
        let copies = self.integer(&mut table, IN, "copies", 0u32, 1..7);
        config.tracking.copies = (copies > 0).then_some(copies);
        if let Some(value) = take(&mut table, "net") {
            match value.get_ref().as_bool() {
                Some(net) => config.tracking.net = net,
                None => self.problem(value.span(), "tracking.net", "must be true or false"),
            }
        }
        self.parsed(&mut table, IN, "bitmap-memory", &mut config.tracking.bitmap_memory, |v| {
            (v.0 < 64 << 10).then(|| "must be at least 64KiB".to_owned())
        });
        self.rest(table, IN);
    }

    fn capture(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "capture.";
        let mut table = self.table(root, "capture");
        let c = &mut config.capture;
        let mut mode = String::from("automatic");
        let known = |m: &String| {
            (m != "automatic" && m != "off").then(|| "write \"automatic\" or \"off\"".to_owned())
        };
        self.parsed(&mut table, IN, "mode", &mut mode, known);
        c.mode = if mode == "off" { CaptureMode::Off } else { CaptureMode::Automatic };
        self.parsed(&mut table, IN, "point-interval", &mut c.point_interval, |v| {
            let wrong = v.0 < Duration::from_secs(1) || v.0 > Duration::from_secs(3600);
            wrong.then(|| "must be between 1s and 1h".to_owned())
        });
        let mut memory = ByteSize(0);
        if self.parsed(&mut table, IN, "memory", &mut memory, |v| {
            let most = Capture::memory_max();
            (v.0 < 4 << 20 || v.0 > most.0)
                .then(|| format!("must be between 4MiB and half of the machine's, {}", most.rounded()))
        }) {
            c.memory = Some(memory);
        }
        let mut ring = ByteSize(0);
        let most = c.ring_max();
        if self.parsed(&mut table, IN, "ring", &mut ring, |v| {
            (v.0 < 1 << 20 || v.0 > most.0).then(|| {
                format!("must be between 1MiB and three quarters of capture.memory, {}", most.rounded())
            })
        }) {
            c.ring = Some(ring);
        }
        self.parsed(&mut table, IN, "verify-interval", &mut c.verify_interval, |v| {
            let wrong = v.0 < Duration::from_secs(1) || v.0 > Duration::from_secs(3600);
            wrong.then(|| "must be between 1s and 1h".to_owned())
        });
        let copies = self.integer(&mut table, IN, "copies", 0u32, 1..7);
        c.copies = (copies > 0).then_some(copies);
        self.rest(table, IN);
    }

    fn application(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "application.";
        let mut table = self.table(root, "application");
        let a = &mut config.application;
        self.path(&mut table, IN, "hooks-dir", &mut a.hooks_dir);
        self.parsed(&mut table, IN, "interval", &mut a.interval, |v| {
            let wrong = v.0 < Duration::from_secs(60) || v.0 > Duration::from_secs(86_400);
            wrong.then(|| "must be between 1m and 1d".to_owned())
        });
        for (key, limit) in [("hook-timeout", &mut a.hook_timeout), ("hold", &mut a.hold)] {
            self.parsed(&mut table, IN, key, limit, |v| {
                let wrong = v.0 < Duration::from_secs(1) || v.0 > Duration::from_secs(600);
                wrong.then(|| "must be between 1s and 10m".to_owned())
            });
        }
        let mut failure = String::from("degrade");
        let known = |f: &String| {
            (f != "degrade" && f != "abort").then(|| "write \"degrade\" or \"abort\"".to_owned())
        };
        self.parsed(&mut table, IN, "on-failure", &mut failure, known);
        a.on_failure = if failure == "abort" { OnHookFailure::Abort } else { OnHookFailure::Degrade };
        self.rest(table, IN);
    }

    fn group(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "group.";
        let mut table = self.table(root, "group");
        let mut listen = config.group.listen.to_string();
        self.parsed(&mut table, IN, "listen", &mut listen, |text: &String| {
            let wrong = text.parse::<SocketAddr>().map_or(true, |address| address.port() == 0);
            wrong.then(|| "write an address and a port, like 0.0.0.0:20004 or [::]:20004".to_owned())
        });
        config.group.listen = listen.parse().unwrap_or(config.group.listen);
        let mut host = String::new();
        let named = self.parsed(&mut table, IN, "advertise", &mut host, |text: &String| {
            let wrong = text.is_empty()
                || text.len() > 253
                || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b".-:".contains(&b));
            wrong.then(|| "write a host name or an address, without a port".to_owned())
        });
        if named {
            config.group.advertise = Some(host);
        }
        self.rest(table, IN);
    }

    fn limits(&mut self, root: &mut Table<'a>, config: &mut Config) {
        const IN: &str = "limits.";
        let mut table = self.table(root, "limits");
        let l = &mut config.limits;
        for (key, limit) in [
            ("silence", &mut l.silence),
            ("stall", &mut l.stall),
            ("stored", &mut l.stored),
            ("hang", &mut l.hang),
        ] {
            self.parsed(&mut table, IN, key, limit, |v| {
                let wrong = v.0 < Duration::from_secs(1) || v.0 > Duration::from_secs(86_400);
                wrong.then(|| "must be between 1s and 1d".to_owned())
            });
        }
        self.rest(table, IN);
    }

    fn guests(&mut self, root: &mut Table<'a>, config: &mut Config) {
        let Some(value) = take(root, "guest") else { return };
        let span = value.span();
        let DeValue::Array(items) = value.into_inner() else {
            return self.problem(span, "guest", "must be a list of tables: write [[guest]]");
        };
        if items.len() > GUESTS_MAX {
            return self.problem(span, "guest", &format!("are more than {GUESTS_MAX}"));
        }
        for item in items {
            let span = item.span();
            let DeValue::Table(table) = item.into_inner() else {
                self.problem(span, "guest", "must be a list of tables: write [[guest]]");
                continue;
            };
            let guest = self.guest(Some(Spanned::new(span, table)), config);
            config.guest.push(guest);
        }
    }

    fn guest(&mut self, mut table: Table<'a>, config: &Config) -> Guest {
        const IN: &str = "guest.";
        let mut guest = Guest::default();
        let begins = table.as_ref().map_or(0..0, Spanned::span);
        let taken = |name: &String| {
            let wrong =
                name.is_empty() || name.len() > 200 || name.contains(|c: char| c.is_control() || c == '/');
            let twice = config.guest.iter().any(|other| other.name == *name);
            wrong
                .then(|| "is no name".to_owned())
                .or_else(|| twice.then(|| "is the name of another guest".to_owned()))
        };
        let named = table.as_ref().is_some_and(|t| t.get_ref().contains_key("name"));
        self.parsed(&mut table, IN, "name", &mut guest.name, taken);
        if !named {
            self.problem(begins, "guest.name", "must be given");
        }
        let mut socket = PathBuf::new();
        if self.path(&mut table, IN, "agent-socket", &mut socket) {
            guest.agent_socket = Some(socket);
        }
        self.parsed(&mut table, IN, "freeze-timeout", &mut guest.freeze_timeout, |v| {
            let wrong = v.0 < Duration::from_millis(100) || v.0 > Duration::from_secs(60);
            wrong.then(|| "must be between 100ms and 1m".to_owned())
        });
        if let Some(value) = take(&mut table, "disks") {
            let paths = value.get_ref().as_array().map(|items| {
                items
                    .iter()
                    .map(|item| item.get_ref().as_str().map(PathBuf::from).filter(|p| p.is_absolute()))
                    .collect()
            });
            match paths {
                Some(Some(paths)) => guest.disks = paths,
                _ => {
                    self.problem(value.span(), "guest.disks", "must be a list of devices, by absolute paths")
                }
            }
        }
        if let Some(value) = take(&mut table, "application") {
            match value.get_ref().as_bool() {
                Some(application) => guest.application = application,
                None => self.problem(value.span(), "guest.application", "must be true or false"),
            }
        }
        self.rest(table, IN);
        guest
    }

    fn command(&mut self, table: &mut Table<'a>, config: &mut Config) {
        const KEY: &str = "freeze-hook.command";
        let Some(value) = take(table, "command") else { return };
        let span = value.span();
        let DeValue::Array(items) = value.into_inner() else {
            return self.problem(span, KEY, "must be a list: the program and its arguments");
        };
        let words: Option<Vec<String>> =
            items.iter().map(|item| item.get_ref().as_str().map(str::to_owned)).collect();
        match words {
            Some(words) if words.first().is_some_and(|program| program.starts_with('/')) => {
                config.freeze_hook.command = Some(words);
            }
            _ => self.problem(
                span,
                KEY,
                "must be a list of strings that starts with the program's absolute path",
            ),
        }
    }

    fn path(&mut self, table: &mut Table<'a>, prefix: &str, key: &str, target: &mut PathBuf) -> bool {
        let absolute = |path: &PathBuf| (!path.is_absolute()).then(|| "must be an absolute path".to_owned());
        self.parsed(table, prefix, key, target, absolute)
    }

    /// A string that is parsed and checked; whether it was there and good.
    fn parsed<T: FromStr>(
        &mut self,
        table: &mut Table<'a>,
        prefix: &str,
        key: &str,
        target: &mut T,
        check: impl Fn(&T) -> Option<String>,
    ) -> bool
    where
        T::Err: Display,
    {
        let Some(value) = take(table, key) else { return false };
        let span = value.span();
        let result = match value.get_ref().as_str() {
            None => Err("must be a string in quotes".to_owned()),
            Some(text) => text.parse::<T>().map_err(|error| error.to_string()),
        };
        match result.and_then(|good| check(&good).map_or(Ok(good), Err)) {
            Ok(good) => {
                *target = good;
                true
            }
            Err(message) => {
                self.problem(span, &format!("{prefix}{key}"), &message);
                false
            }
        }
    }

    fn integer<T>(
        &mut self,
        table: &mut Table<'a>,
        prefix: &str,
        key: &str,
        default: T,
        range: Range<i64>,
    ) -> T
    where
        T: TryFrom<i64>,
    {
        let Some(value) = take(table, key) else { return default };
        let number = match value.get_ref() {
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix()).ok(),
            _ => None,
        };
        let good = number.filter(|n| range.contains(n)).and_then(|n| T::try_from(n).ok());
        good.unwrap_or_else(|| {
            let message = format!("must be a whole number from {} to {}", range.start, range.end - 1);
            self.problem(value.span(), &format!("{prefix}{key}"), &message);
            default
        })
    }

    fn table(&mut self, root: &mut Table<'a>, key: &str) -> Table<'a> {
        let value = take(root, key)?;
        let span = value.span();
        if let DeValue::Table(table) = value.into_inner() {
            return Some(Spanned::new(span, table));
        }
        self.problem(span, key, "must be a table");
        None
    }

    /// Whatever nobody has taken is unknown.
    fn rest(&mut self, table: Table<'a>, prefix: &str) {
        for (key, _) in table.map(Spanned::into_inner).unwrap_or_default() {
            let name = format!("{prefix}{}", key.get_ref());
            self.problem(key.span(), &name, "is not a known key");
        }
    }

    fn problem(&mut self, span: Range<usize>, key: &str, message: &str) {
        let before = self.text.as_bytes().get(..span.start).unwrap_or_default();
        let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
        self.problems.push(Problem { line, key: key.to_owned(), message: message.to_owned() });
    }
}

fn take<'a>(table: &mut Table<'a>, key: &str) -> Option<Spanned<DeValue<'a>>> {
    table.as_mut()?.get_mut().remove(key)
}
