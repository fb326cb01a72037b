//! Debian's archive, read through apt with lists of our own: the machine's package state is not touched.
//!
//! Which mirror to ask is taken from the machine's own apt configuration, and so are proxies and the like.

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::sh;

/// Suites that between them have every kernel series asked for. A mirror that lacks one is no error.
const SUITES: [&str; 3] = ["bookworm", "trixie", "trixie-backports"];
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Access to the archive. Lists are fetched when first needed.
pub struct Archive {
    dir: PathBuf,
    updated: bool,
}

/// A package in one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Package {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

impl Archive {
    /// An archive whose lists are kept below `base`.
    pub fn new(base: &Path) -> Self {
        Archive { dir: base.join("apt"), updated: false }
    }

    /// The newest kernel image of a series.
    pub fn newest_image(&mut self, series: &str) -> Result<Package> {
        self.update()?;
        let names = sh::output(&mut self.apt("apt-cache", &["pkgnames", "linux-image-"]))?;
        let release = names
            .lines()
            .filter_map(|name| name.strip_prefix("linux-image-"))
            .filter(|release| is_stock(release) && in_series(release, series))
            .max_by(|a, b| compare(a, b));
        let Some(release) = release else {
            bail!("the archive has no kernel {series}.x (suites {})", SUITES.join(", "));
        };
        let name = format!("linux-image-{release}");
        let version = self.newest_version(&name)?;
        Ok(Package { name, version })
    }

    /// The package and the parts it was split into, if it was (`linux-binary-…`, `linux-modules-…`).
    pub fn with_parts(&mut self, package: Package) -> Result<Vec<Package>> {
        let exact = format!("{}={}", package.name, package.version);
        let shown = sh::output(&mut self.apt("apt-cache", &["show", &exact]))?;
        let depends = shown.lines().find_map(|line| line.strip_prefix("Depends:")).unwrap_or_default();
        let parts: Vec<String> = depends
            .split(',')
            .filter_map(|item| item.split_whitespace().next())
            .filter(|name| name.starts_with("linux-binary-") || name.starts_with("linux-modules-"))
            .map(str::to_owned)
            .collect();
        let mut all = vec![package];
        for name in parts {
            let version = self.newest_version(&name)?;
            all.push(Package { name, version });
        }
        Ok(all)
    }

    /// Downloads packages into a directory.
    pub fn download(&mut self, packages: &[Package], into: &Path) -> Result<()> {
        fs::create_dir_all(into)?;
        let exact: Vec<String> = packages.iter().map(|p| format!("{}={}", p.name, p.version)).collect();
        let words: Vec<&str> =
            ["-qq", "download"].into_iter().chain(exact.iter().map(String::as_str)).collect();
        sh::output(self.apt("apt-get", &words).current_dir(into)).map(drop)
    }

    fn newest_version(&self, name: &str) -> Result<String> {
        let table = sh::output(&mut self.apt("apt-cache", &["madison", name]))?;
        table
            .lines()
            .next()
            .and_then(|line| line.split('|').nth(1))
            .map(|version| version.trim().to_owned())
            .with_context(|| format!("the archive has no package {name}"))
    }

    fn update(&mut self) -> Result<()> {
        if self.updated {
            return Ok(());
        }
        fs::create_dir_all(self.dir.join("lists/partial"))?;
        fs::create_dir_all(self.dir.join("cache/archives/partial"))?;
        fs::write(self.dir.join("status"), "")?;
        let mirror = mirror()?;
        let sources: String =
            SUITES.map(|suite| format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n")).concat();
        fs::write(self.dir.join("sources.list"), sources)?;
        sh::step("reading the archive's kernel lists");
        sh::output(&mut self.apt("apt-get", &["-qq", "update"]))?;
        self.updated = true;
        Ok(())
    }

    fn apt(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for option in [
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::State::status={dir}/status"),
            format!("Dir::Cache={dir}/cache"),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::PDiffs=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command.args(words);
        command
    }
}

/// The mirror of Debian's main archive that this machine uses.
fn mirror() -> Result<String> {
    let format = "$(REPO_URI)|$(LABEL)|$(CODENAME)";
    let targets = sh::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        format,
        "Created-By: Packages",
    ]))
    .context("kernel packages come from Debian's archive through apt; run this on Debian")?;
    pick_mirror(&targets).context(
        "apt is not configured with Debian's main archive: run `apt-get update`, or add it to /etc/apt/sources.list.d",
    )
}

/// Labels are known only after an update; before it, the address tells.
fn pick_mirror(targets: &str) -> Option<String> {
    let rows: Vec<(&str, &str)> =
        targets.lines().filter_map(|line| Some((line.split('|').next()?, line.split('|').nth(1)?))).collect();
    rows.iter()
        .find(|(_, label)| *label == "Debian")
        .or_else(|| rows.iter().find(|(uri, _)| uri.trim_end_matches('/').ends_with("/debian")))
        .map(|(uri, _)| (*uri).to_owned())
}

/// An ordinary kernel of this architecture: no cloud, real-time, debug or unsigned flavour.
fn is_stock(release: &str) -> bool {
    release.strip_suffix("-amd64").is_some_and(|rest| {
        rest.starts_with(|first: char| first.is_ascii_digit())
            && !rest.split('-').any(|word| word == "rt" || word == "cloud")
            && !rest.contains("~rc")
            && !rest.contains("-rc")
    })
}

/// Whether `6.12.107+deb13-amd64` belongs to the series `6.12`.
fn in_series(release: &str, series: &str) -> bool {
    let numbers = numbers(release);
    series
        .split('.')
        .map(str::parse::<u64>)
        .enumerate()
        .all(|(at, part)| part.ok() == numbers.get(at).copied())
}

fn compare(a: &str, b: &str) -> Ordering {
    numbers(a).cmp(&numbers(b)).then_with(|| a.cmp(b))
}

fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_a_prefix_by_components() {
        assert!(in_series("6.1.0-50-amd64", "6.1"));
        assert!(!in_series("6.12.107+deb13-amd64", "6.1"));
        assert!(in_series("7.1.13+deb13-amd64", "7"));
        assert!(!in_series("6.1.0-50-amd64", "6.1.0.50.64.1"));
    }

    #[test]
    fn newer_is_by_number_and_not_by_letter() {
        assert_eq!(compare("7.1.13+deb13-amd64", "7.1.8+deb13-amd64"), Ordering::Greater);
        assert_eq!(compare("6.1.0-9-amd64", "6.1.0-50-amd64"), Ordering::Less);
    }

    #[test]
    fn flavours_are_left_out() {
        assert!(is_stock("6.12.107+deb13-amd64"));
        assert!(!is_stock("6.12.107+deb13-rt-amd64"));
        assert!(!is_stock("6.12.107+deb13-cloud-amd64"));
        assert!(!is_stock("6.1.0-50-amd64-unsigned"));
        assert!(!is_stock("amd64"));
    }

    #[test]
    fn the_main_archive_is_preferred_to_others() {
        let table = "http://a.example/debian-security|Debian-Security|x\nhttp://b.example/other|Debian|x\n";
        assert_eq!(pick_mirror(table).as_deref(), Some("http://b.example/other"));
        let bare = "http://a.example/debian-security/|$(LABEL)|x\nhttp://a.example/debian/|$(LABEL)|x\n";
        assert_eq!(pick_mirror(bare).as_deref(), Some("http://a.example/debian/"));
        assert_eq!(pick_mirror(""), None);
    }
}
