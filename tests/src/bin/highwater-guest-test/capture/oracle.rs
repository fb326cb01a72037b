//! What the states of a disk must be, by the log that was kept of its writes beneath: an independent witness.
//!
//! The log has what completed, in the order of completion or of the flush that followed. So at a mark that was set when all had
//! completed and was flushed, the log up to it is the disk, byte for byte. In between, less is known: each sector holds
//! something that was written to it at some time, and from one position to the next nothing goes back. The latter needs writes to
//! one sector to be in the log in their order, which `logged_writers` sees to.

use std::path::Path;

use anyhow::{Result, bail, ensure};

use super::write_log::{self, Entry, SECTOR};

/// A sector that a position has otherwise than the position before, and the hash of what it holds.
pub type Changes = Vec<(u32, u64)>;

/// The states of a disk that were seen.
#[derive(Default)]
pub struct States {
    /// The content when capture began.
    pub base: Vec<u8>,
    /// Its changes at each position, in order.
    pub positions: Vec<Changes>,
    /// The content at each mark, by name.
    pub marked: Vec<(String, Vec<u8>)>,
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// Entries of the log.
    pub entries: u64,
    /// Discards among them.
    pub discards: u64,
    /// Marks at which the content was equal.
    pub marks: usize,
    /// Sectors that were looked at in the positions between.
    pub sectors: usize,
}

/// Sectors that differ.
pub fn changes(before: &[u8], after: &[u8]) -> Changes {
    // Most of it is the same: larger pieces first.
    const PIECE: usize = SECTOR * 128;
    let mut changes = vec![];
    for (piece, (before, after)) in (0..).zip(before.chunks(PIECE).zip(after.chunks(PIECE))) {
        if before == after {
            continue;
        }
        for (at, (before, after)) in (0..).zip(before.chunks(SECTOR).zip(after.chunks(SECTOR))) {
            if before != after {
                changes.push((piece * (PIECE / SECTOR) as u32 + at, hash(after)));
            }
        }
    }
    changes
}

/// Replays the log, from the first mark on, which was set when the base was copied.
pub fn check(log: &Path, first_mark: &str, states: &States) -> Result<Found> {
    let mut image = states.base.clone();
    // What each sector held, one after the other.
    let mut versions: Vec<Vec<u64>> = image.chunks(SECTOR).map(|sector| vec![hash(sector)]).collect();
    let (mut found, mut begun) = (Found::default(), false);
    let mut marks = states.marked.iter();
    found.entries = write_log::read(log, |entry| {
        let (sector, content) = match entry {
            Entry::Mark(name) if name == first_mark => {
                begun = true;
                return Ok(());
            }
            _ if !begun => return Ok(()),
            Entry::Mark(name) => {
                let Some((expected, content)) = marks.next() else { return Ok(()) };
                ensure!(name == expected, "mark {name} where {expected} should be");
                equal(&image, content, name)?;
                found.marks += 1;
                return Ok(());
            }
            Entry::Write(sector, content) => (sector, content.to_vec()),
            Entry::Discard(sector, sectors) => {
                found.discards += 1;
                (sector, vec![0; sectors as usize * SECTOR])
            }
        };
        let at = sector as usize * SECTOR;
        ensure!(at + content.len() <= image.len(), "the log has a write behind the disk's end");
        image[at..at + content.len()].copy_from_slice(&content);
        for (versions, sector) in versions[sector as usize..].iter_mut().zip(content.chunks(SECTOR)) {
            versions.push(hash(sector));
        }
        Ok(())
    })?;
    ensure!(marks.next().is_none(), "the log lacks a mark: only {} of them are there", found.marks);
    let mut reached = vec![0; versions.len()];
    for (number, changes) in states.positions.iter().enumerate() {
        for (sector, held) in changes {
            let (versions, reached) = (&versions[*sector as usize], &mut reached[*sector as usize]);
            match versions[*reached..].iter().position(|version| version == held) {
                Some(further) => *reached += further,
                None if versions.contains(held) => bail!("position {number}: sector {sector} has gone back"),
                None => bail!("position {number}: sector {sector} holds what was never written to it"),
            }
            found.sectors += 1;
        }
    }
    Ok(found)
}

fn equal(logged: &[u8], captured: &[u8], mark: &str) -> Result<()> {
    let wrong = changes(logged, captured);
    ensure!(
        wrong.is_empty(),
        "at mark {mark}, {} sectors are not those of the log: {:?}",
        wrong.len(),
        wrong.iter().take(8).map(|(sector, _)| sector).collect::<Vec<_>>()
    );
    Ok(())
}

fn hash(sector: &[u8]) -> u64 {
    let mut hash = 0_u64;
    for word in sector.chunks_exact(8) {
        let word = u64::from_le_bytes(word.try_into().expect("8 bytes"));
        hash = (hash.rotate_left(5) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECTORS: usize = 300;

    /// An entry's own sector, and what follows it.
    fn entry(sector: u64, sectors: u64, flags: u64, data: &[u8]) -> Vec<u8> {
        let is_mark = flags == 8;
        let words = [sector, sectors, flags, if is_mark { data.len() as u64 } else { 0 }];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        if is_mark {
            bytes.extend(data);
        }
        bytes.resize(SECTOR, 0);
        if !is_mark {
            bytes.extend(data);
        }
        bytes
    }

    fn log(entries: &[Vec<u8>]) -> tempfile::NamedTempFile {
        let mut bytes: Vec<u8> = [0x006a_7366_7773_6872_u64, 1, entries.len() as u64]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        bytes.extend(512_u32.to_le_bytes());
        bytes.resize(SECTOR, 0);
        bytes.extend(entries.concat());
        let file = tempfile::NamedTempFile::new_in("/var/tmp").unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        file
    }

    fn with(base: &[u8], sectors: &[(usize, u8)]) -> Vec<u8> {
        let mut content = base.to_vec();
        for (sector, value) in sectors {
            content[sector * SECTOR..][..SECTOR].fill(*value);
        }
        content
    }

    #[test]
    fn the_log_tells_right_states_from_wrong_ones() {
        let base = with(&vec![0; SECTORS * SECTOR], &[(5, 9)]);
        let file = log(&[
            entry(0, 1, 0, &[7; SECTOR]),
            entry(0, 0, 8, b"begin\0"),
            entry(2, 2, 0, &[1; 2 * SECTOR]),
            entry(290, 1, 2, &[2; SECTOR]),
            entry(2, 1, 0, &[3; SECTOR]),
            entry(5, 1, 4, &[]),
            entry(0, 0, 1, &[]),
            entry(0, 0, 8, b"still\0"),
        ]);
        let last = with(&base, &[(2, 3), (3, 1), (5, 0), (290, 2)]);
        let states = |between: &[Vec<u8>], marked: Vec<u8>| {
            let mut before = base.clone();
            let mut positions = vec![];
            for content in between.iter().chain([&marked]) {
                positions.push(changes(&before, content));
                before.clone_from(content);
            }
            States { base: base.clone(), positions, marked: vec![("still".into(), marked)] }
        };
        let told = |states| check(file.path(), "begin", &states).unwrap_err().to_string();
        let (early, late) = (with(&base, &[(2, 1)]), with(&base, &[(2, 3), (5, 0)]));
        let found =
            check(file.path(), "begin", &states(&[early.clone(), late.clone()], last.clone())).unwrap();
        assert_eq!((found.entries, found.discards, found.marks, found.sectors), (8, 1, 1, 5));
        assert!(told(states(&[late, early], last.clone())).contains("gone back"));
        assert!(told(states(&[with(&base, &[(3, 8)])], last.clone())).contains("never written"));
        assert!(told(states(&[], with(&last, &[(290, 0)]))).contains("at mark still, 1 sectors"));
        let more = States {
            marked: vec![("still".into(), last.clone()), ("more".into(), last)],
            ..states(&[], base.clone())
        };
        assert!(check(file.path(), "begin", &more).is_err());
    }
}
