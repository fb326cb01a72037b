//! What the viewer sees: steps with their times, and the figures as JSON.

use std::io::Write;
use std::time::Instant;

use serde_json::{Map, Value, json};

/// Writes to standard output, or only keeps the figures.
pub struct Report {
    quiet: bool,
    began: Instant,
    step: Option<(String, Instant)>,
    steps: Vec<Value>,
    figures: Map<String, Value>,
}

impl Report {
    /// `quiet`: figures only.
    pub fn new(quiet: bool) -> Self {
        let (step, steps, figures) = (None, Vec::new(), Map::new());
        Report { quiet, began: Instant::now(), step, steps, figures }
    }

    /// A line. Whoever reads may have gone: that must not keep us from cleaning up.
    pub fn line(&self, text: impl AsRef<str>) {
        if !self.quiet {
            let mut out = std::io::stdout().lock();
            let _ = writeln!(out, "{}", text.as_ref()).and_then(|()| out.flush());
        }
    }

    /// What happened within a step.
    pub fn told(&self, text: impl AsRef<str>) {
        self.line(format!("   {}", text.as_ref()));
    }

    /// Begins a step, and so ends the one before.
    pub fn step(&mut self, title: &str) {
        self.end_step();
        let number = self.steps.len() + 1;
        self.line(format!("\n{number}. {title}"));
        self.step = Some((title.to_owned(), Instant::now()));
    }

    /// Ends the step under way, and tells how long it took.
    pub fn end_step(&mut self) {
        if let Some((title, began)) = self.step.take() {
            let seconds = began.elapsed().as_secs_f64();
            self.told(format!("({seconds:.1} s)"));
            self.steps.push(json!({ "step": title, "seconds": seconds }));
        }
    }

    /// A figure for the JSON.
    pub fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// The end: all figures.
    pub fn end(mut self) -> Value {
        self.end_step();
        self.figures.insert("steps".into(), self.steps.into());
        self.figures.insert("seconds".into(), self.began.elapsed().as_secs_f64().into());
        self.figures.into()
    }
}

/// Bytes for people.
pub fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib >= 1024.0 { format!("{:.1} GiB", mib / 1024.0) } else { format!("{mib:.1} MiB") }
}

/// MB (10⁶ bytes) per second.
pub fn rate_mb_per_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / 1e6 / seconds.max(1e-6)
}
