//! A vault whose bytes were changed.

use crate::common::{MIB, site, write};
use anyhow::{Context, Result, ensure};
use highwater_tests::{Arena, Backing, LoopDisk, Random, Site, SiteOptions, command, daemon};
use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    command::run("cp", &["-a", &from.to_string_lossy(), &to.to_string_lossy()]).map(drop)
}

fn files(dir: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() { files(&path, found)? } else { found.push(path) }
    }
    found.sort();
    Ok(())
}

#[test]
fn a_damaged_vault_says_so_and_hands_out_nothing_wrong() -> Result<()> {
    let arena = Arena::enter("damage")?;
    let disk = LoopDisk::new(Backing::Tmpfs, 48 * MIB)?;
    let (mut site, mounted, _) = site(&arena, &disk, &SiteOptions::default())?;
    site.wait_replicated()?;
    let mut points = vec![site.point()?];
    for seed in 2..4 {
        write(&mounted, "first", seed)?;
        points.push(site.point()?);
    }
    drop(mounted);
    let images: Vec<Vec<u8>> =
        points.iter().map(|p| Ok(fs::read(site.recover(*p)?.image("data"))?)).collect::<Result<_>>()?;
    let machine = site.machine()?;
    site.stop_agent()?;
    site.kill_collector()?;

    let good = arena.dir().join("good");
    copy_tree(site.vault(), &good)?;
    let mut all = Vec::new();
    files(site.vault(), &mut all)?;
    let of =
        |part: &str| all.iter().filter(|p| p.to_string_lossy().contains(part)).cloned().collect::<Vec<_>>();
    let (segments, manifest) = (of("/segments/"), of("/manifest/"));
    let key: Vec<_> =
        all.iter().filter(|p| p.file_name().is_some_and(|name| name == "key")).cloned().collect();
    ensure!(segments.len() > 2 && manifest.len() > 2 && key.len() == 1);
    let mut random = Random::new(5);
    #[expect(clippy::type_complexity, reason = "a name for it would be used once")]
    let mut damages: Vec<(String, Box<dyn Fn() -> Result<()>>)> = Vec::new();
    for (path, times) in segments.iter().map(|p| (p, 2)).chain(manifest.iter().chain(&key).map(|p| (p, 1))) {
        for _ in 0..times {
            let bytes = fs::read(path)?;
            let bit = random.next_u64() as usize % (bytes.len() * 8);
            let path = path.clone();
            damages.push((
                format!("bit {bit} of {}", path.display()),
                Box::new(move || {
                    let mut bytes = fs::read(&path)?;
                    bytes[bit / 8] ^= 1 << (bit % 8);
                    Ok(fs::write(&path, bytes)?)
                }),
            ));
        }
    }
    for path in [&segments[0], &segments[1], &manifest[1], &key[0]] {
        let (gone, short) = (path.clone(), path.clone());
        damages.push((format!("{} gone", path.display()), Box::new(move || Ok(fs::remove_file(&gone)?))));
        damages.push((
            format!("{} cut off", path.display()),
            Box::new(move || {
                let bytes = fs::read(&short)?;
                Ok(fs::write(&short, &bytes[..bytes.len() / 2])?)
            }),
        ));
    }
    for pair in [&segments[..2], &manifest[..2]] {
        let (a, b) = (pair[0].clone(), pair[1].clone());
        damages.push((
            format!("{} and {} exchanged", a.display(), b.display()),
            Box::new(move || {
                let (one, two) = (fs::read(&a)?, fs::read(&b)?);
                fs::write(&a, two)?;
                Ok(fs::write(&b, one)?)
            }),
        ));
    }
    let restore = |site: &Site| -> Result<()> {
        fs::remove_dir_all(site.vault())?;
        copy_tree(&good, site.vault())
    };
    let (mut refused, mut whole) = (0, 0);
    for (what, damage) in &damages {
        damage()?;
        let said = std::process::Command::new(daemon::program("highwater")?)
            .args(["--vault".as_ref(), site.vault(), "--key".as_ref(), site.key(), "verify".as_ref()])
            .output()?;
        ensure!(!said.status.success(), "verify finds nothing wrong with {what}");
        let said = String::from_utf8([said.stdout, said.stderr].concat())?;
        ensure!(said.contains("HW-12"), "{what}: no code in: {said}");
        for (point, image) in points.iter().zip(&images) {
            let to = tempfile::tempdir_in("/dev/shm")?;
            let to_text = to.path().to_string_lossy();
            match site.operator(&["recover", &machine, "--point", &point.to_string(), "--to", &to_text]) {
                Ok(_) => {
                    ensure!(
                        fs::read(to.path().join("data.img"))? == *image,
                        "{what}: wrong content of point {point}"
                    );
                    whole += 1;
                }
                Err(error) => {
                    ensure!(error.to_string().contains("HW-1"), "{what}: no code in: {error}");
                    ensure!(
                        fs::read_dir(to.path())?.count() == 0,
                        "{what}: something was left of a failed recovery"
                    );
                    refused += 1;
                }
            }
        }
        restore(&site)?;
    }
    println!("{} damages: {refused} recoveries refused, {whole} whole", damages.len());
    site.verify()?;

    // A collector does not write on top of a history it cannot read, and the agent says that somebody must act.
    site.allow("session ended");
    site.allow("cannot read a machine's state");
    site.allow("the collector cannot be used");
    let last = manifest.last().context("no record")?;
    let mut bytes = fs::read(last)?;
    bytes[60] ^= 4;
    fs::write(last, bytes)?;
    let count = fs::read_dir(last.parent().context("no directory")?)?.count();
    site.start_collector()?;
    site.start_agent()?;
    let until = Instant::now() + Duration::from_secs(30);
    loop {
        let status = site.status()?.to_string();
        if status.contains("critical") && status.contains("12") {
            break;
        }
        ensure!(Instant::now() < until, "not critical: {status}");
        thread::sleep(Duration::from_millis(100));
    }
    ensure!(
        fs::read_dir(last.parent().context("no directory")?)?.count() == count,
        "something was committed"
    );
    site.kill_collector()?;
    restore(&site)?;
    site.start_collector()?;
    let point = site.point()?;
    site.recover(point)?;
    site.verify()?;
    site.stop_agent()
}
