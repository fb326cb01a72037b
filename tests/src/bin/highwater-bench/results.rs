//! Medians, spread, the table and the file.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Several measurements of the same thing.
#[derive(Debug, Clone, Default)]
pub struct Series(Vec<f64>);

impl Series {
    /// One more.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The values.
    pub fn values(&self) -> &[f64] {
        &self.0
    }

    /// The value below which this part of them lies; 0 if there are none.
    pub fn quantile(&self, part: f64) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().saturating_sub(1);
        sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(0.0)
    }

    /// The middle one.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Median and range, for people.
    pub fn told(&self, unit: &str) -> String {
        if self.0.is_empty() {
            return "none".to_owned();
        }
        format!(
            "{} {unit} ({} to {})",
            short(self.median()),
            short(self.quantile(0.0)),
            short(self.quantile(1.0))
        )
    }

    /// Round by round, ours by theirs: what the machine did meanwhile cancels out.
    pub fn ratio(&self, base: &Series) -> Series {
        Series(self.0.iter().zip(&base.0).map(|(ours, theirs)| ours / theirs.max(1e-9)).collect())
    }

    fn json(&self) -> Value {
        json!({ "median": self.median(), "min": self.quantile(0.0), "max": self.quantile(1.0), "values": self.0 })
    }
}

impl From<f64> for Series {
    fn from(value: f64) -> Self {
        Series(vec![value])
    }
}

fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 1000.0 => format!("{value:.0}"),
        v if v >= 100.0 => format!("{value:.1}"),
        v if v >= 10.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// The table as it grows.
#[derive(Default)]
pub struct Results {
    rows: Vec<[String; 3]>,
    figures: Vec<Value>,
    notes: Vec<String>,
}

impl Results {
    /// One row; it is shown at once too, since benchmarks take a while.
    pub fn row(&mut self, what: &str, series: &Series, unit: &str, target: &str) {
        eprintln!("  {what}: {}", series.told(unit));
        let told = match series.values().len() {
            0 | 2.. => series.told(unit),
            1 => format!("{} {unit}", short(series.median())),
        };
        self.rows.push([what.to_owned(), told, target.to_owned()]);
        self.figures.push(json!({ "what": what, "unit": unit, "target": target, "figures": series.json() }));
    }

    /// Something to be known with the table.
    pub fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// Prints the table and writes the file.
    pub fn finish(self, subject: &str) -> Result<()> {
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let profile =
            if cfg!(debug_assertions) { "development build: figures are too low" } else { "release build" };
        println!("\n{subject}: kernel {release}, {cpus} processors, {profile}\n");
        let width =
            |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        for [what, told, target] in &self.rows {
            println!("{what:first$}  {told:second$}  {target}");
        }
        for note in &self.notes {
            println!("\n{note}");
        }
        let document = json!({
            "subject": subject, "kernel": release, "processors": cpus, "profile": profile,
            "rows": self.figures, "notes": self.notes,
        });
        let path = directory()?.join(format!("{subject}.json"));
        fs::write(&path, format!("{document:#}\n"))?;
        println!("\n{}", path.display());
        Ok(())
    }
}

/// `target/bench`, wherever `target` is.
fn directory() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let dir = program.ancestors().nth(2).context("the program lies in no target directory")?.join("bench");
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_and_ratios() {
        let mut series = Series::default();
        for value in [3.0, 1.0, 2.0] {
            series.push(value);
        }
        assert_eq!((series.median(), series.quantile(0.0), series.quantile(1.0)), (2.0, 1.0, 3.0));
        assert_eq!(series.ratio(&series).values(), [1.0, 1.0, 1.0]);
        assert_eq!(Series::default().median(), 0.0);
    }
}
