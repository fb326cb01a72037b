//! What a state of data and log must have, from one position to the next, and the order among the writers.

use anyhow::{Context, Result, ensure};

use super::{BLOCK, DATA_BLOCKS, LOG_BLOCKS, Plan, SECTOR, Times, Volume, encode};

/// What a state must have, kept for one position after the other.
pub struct Journals {
    plan: Plan,
    writers: Vec<Journal>,
    /// How many writes of each writer each position had.
    pub positions: Vec<Vec<u64>>,
}

/// Of one writer: how many of its writes there were, and of which transaction each of its blocks is then.
struct Journal {
    writes: u64,
    data: Vec<u64>,
    log: Vec<u64>,
}

impl Journals {
    /// Before the first write.
    pub fn new(plan: Plan) -> Self {
        let journal =
            |_| Journal { writes: 0, data: vec![0; DATA_BLOCKS as usize], log: vec![0; LOG_BLOCKS as usize] };
        Self { writers: (0..plan.writers).map(journal).collect(), plan, positions: vec![] }
    }

    /// Holds the volumes' content at a position to be the outcome of the first writes of each writer.
    pub fn check(&mut self, data: &[u8], log: &[u8]) -> Result<()> {
        let plan = &self.plan;
        let mut all = vec![];
        for (writer, journal) in (0..).zip(&mut self.writers) {
            let found = |volume| {
                let content = if volume == Volume::Data { data } else { log };
                transactions(plan, volume, writer, content).with_context(|| format!("writer {writer}"))
            };
            let (data, log) = (found(Volume::Data)?, found(Volume::Log)?);
            let last = |found: &[u64]| found.iter().copied().max().unwrap_or(0);
            let (changed, logged) = (last(&data), last(&log));
            ensure!(
                changed <= logged,
                "writer {writer}: data of transaction {changed} is there, but its log has {logged} only"
            );
            let writes = if changed == logged { logged * 2 } else { logged * 2 - 1 };
            ensure!(
                writes >= journal.writes,
                "writer {writer}: {writes} writes are there, {} were before",
                journal.writes
            );
            journal.advance(plan, writer, writes);
            for (volume, found, expected) in
                [(Volume::Data, &data, &journal.data), (Volume::Log, &log, &journal.log)]
            {
                let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
                if let Some(at) = wrong {
                    anyhow::bail!(
                        "writer {writer}, {writes} writes: block {at} of its {volume:?} is of transaction {}, not {}",
                        found[at],
                        expected[at]
                    );
                }
            }
            all.push(writes);
        }
        self.positions.push(all);
        Ok(())
    }

    /// Holds every position to have whatever had ended before something began that it has; the last, to have all.
    pub fn check_order(&self, times: &[Times]) -> Result<()> {
        for (number, position) in self.positions.iter().enumerate() {
            for (writer, writes) in position.iter().enumerate() {
                let Some(last) = (*writes as usize).checked_sub(1) else { continue };
                let began = times[writer][last].0;
                for (other, others) in times.iter().enumerate() {
                    let ended = others.partition_point(|(_, ended)| *ended < began) as u64;
                    ensure!(
                        position[other] >= ended,
                        "position {number}: write {writes} of writer {writer} is there, but not write {ended} of writer {other}, \
                         which had ended before it began"
                    );
                }
            }
        }
        let all: Vec<u64> = times.iter().map(|times| times.len() as u64).collect();
        ensure!(self.positions.last() == Some(&all), "at rest, not all writes are there");
        Ok(())
    }
}

impl Journal {
    fn advance(&mut self, plan: &Plan, writer: u64, writes: u64) {
        for index in self.writes + 1..=writes {
            let write = plan.write(writer, index);
            let (start, _) = plan.part(write.volume, writer);
            let blocks = if write.volume == Volume::Data { &mut self.data } else { &mut self.log };
            let first = (write.first - start) as usize;
            blocks[first..first + write.blocks as usize].fill(write.transaction);
        }
        self.writes = writes;
    }
}

/// Of which transaction each block of a writer's part is; 0: of none yet. Every sector is looked at.
fn transactions(plan: &Plan, volume: Volume, writer: u64, content: &[u8]) -> Result<Vec<u64>> {
    let (start, blocks) = plan.part(volume, writer);
    let mut expected = [0; SECTOR];
    (start..start + blocks)
        .map(|block| {
            let content = &content[block as usize * BLOCK..][..BLOCK];
            // load::encode: the fifth word is the sequence.
            let transaction = u64::from_le_bytes(content[32..40].try_into()?);
            for (sector, content) in (block * (BLOCK / SECTOR) as u64..).zip(content.chunks_exact(SECTOR)) {
                expected.fill(0);
                if transaction > 0 {
                    encode(&mut expected, plan.seed, sector, writer, transaction);
                }
                ensure!(
                    content == expected,
                    "{volume:?} block {block} is of transaction {transaction}, but its sector {sector} is not"
                );
            }
            Ok(transaction)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The volumes after so many writes of each writer.
    fn after(plan: &Plan, writes: &[u64]) -> [Vec<u8>; 2] {
        let mut volumes = [vec![0; 512 * BLOCK], vec![0; 64 * BLOCK]];
        for (writer, writes) in (0..).zip(writes) {
            for write in (1..=*writes).map(|index| plan.write(writer, index)) {
                let volume = &mut volumes[usize::from(write.volume == Volume::Log)];
                let at = write.first as usize * BLOCK;
                plan.fill(&mut volume[at..at + write.blocks as usize * BLOCK], writer, &write);
            }
        }
        volumes
    }

    fn plan() -> Plan {
        Plan { data: "/".into(), log: "/".into(), writers: 3, middle: 256, seed: 7 }
    }

    #[test]
    fn states_between_writes_are_right_and_no_others() {
        let plan = plan();
        let mut journals = Journals::new(plan.clone());
        for writes in [[0, 0, 0], [1, 0, 2], [7, 4, 2], [80, 4, 33]] {
            let [data, log] = after(&plan, &writes);
            journals.check(&data, &log).unwrap();
            assert_eq!(journals.positions.last().unwrap()[..], writes);
        }
        // The log's volume is of before the data's.
        let told = |writes: [u64; 3], log_writes: [u64; 3]| {
            let ([data, _], [_, log]) = (after(&plan, &writes), after(&plan, &log_writes));
            Journals::new(plan.clone()).check(&data, &log).unwrap_err().to_string()
        };
        assert!(told([80, 4, 34], [80, 4, 32]).contains("its log has 16 only"));
        // A change of data is lacking, though later ones are there or not.
        assert!(told([78, 4, 34], [81, 4, 34]).contains("is of transaction"));
        let [mut data, log] = after(&plan, &[80, 4, 34]);
        let write = plan.write(0, 80);
        data[write.first as usize * BLOCK..][..SECTOR].fill(0);
        let torn = format!("{:#}", Journals::new(plan.clone()).check(&data, &log).unwrap_err());
        assert!(torn.contains("but its sector"), "{torn}");
        // A position before the last one.
        let [data, log] = after(&plan, &[79, 4, 33]);
        assert!(journals.check(&data, &log).unwrap_err().to_string().contains("were before"));
    }

    #[test]
    fn what_had_ended_must_be_there() {
        let plan = plan();
        let mut journals = Journals::new(plan.clone());
        let [data, log] = after(&plan, &[2, 1, 0]);
        journals.check(&data, &log).unwrap();
        let ended_first = vec![vec![(1, 2), (5, 6)], vec![(3, 4)], vec![]];
        journals.check_order(&ended_first).unwrap();
        let lacking = vec![vec![(1, 2), (9, 10)], vec![(3, 4), (5, 6)], vec![]];
        assert!(journals.check_order(&lacking).unwrap_err().to_string().contains("had ended before"));
    }
}
