//! The model: a device of sectors with versions, writes in flight to it that take effect at any time before they complete,
//! a stream of their submissions and completions, bits of all that completes, and a vault that gets what is sealed and what is read
//! again.

use super::*;
use proptest::prelude::*;

const SECTOR: usize = 512;
const BLOCKS: usize = 4;
const SECTORS: usize = BLOCKS * 8 - 3;
const DISK: DiskId = DiskId::from_bytes([7; 16]);

type Image = Vec<u32>;

#[derive(Clone, Debug)]
enum Op {
    /// First sector, sectors, and whether it is zeroing instead of data.
    Submit(usize, usize, bool),
    /// The same, begun before capture did: in no record but that of its completion.
    Unseen(usize, usize),
    /// Which of those in flight takes effect.
    TakeEffect(usize),
    /// Which completes, and whether that is shown.
    Complete(usize, bool),
    /// Which fails; whether it takes effect all the same is as it may be.
    Fail(usize),
    /// The engine reads a block of its own accord (a copy that goes on), and stores it at once.
    Live(u64),
    /// How many records are applied.
    Process(usize),
    /// A read that was asked for begins, or one that has begun is over.
    Read,
    /// With what the reader does when somebody waits for a position (see `reader`), or without.
    Seal(bool),
    Again,
    Explain,
    /// All that is in flight is taken to be over, because it was not heard of for long; or because the kernel counts nothing.
    Age,
    Rest,
}

struct Write {
    bio: u64,
    from: usize,
    to: usize,
    version: u32,
    done: bool,
    unseen: bool,
    /// Taken to be over.
    aged: bool,
}

struct World {
    device: Image,
    vault: Image,
    first: Image,
    in_flight: Vec<Write>,
    stream: Vec<(Header, Vec<u8>)>,
    processed: usize,
    assembler: Assembler,
    reads: Vec<(Wanted, Option<Vec<[u8; BLOCK_BYTES]>>)>,
    floor: StreamPosition,
    next: u32,
    by_bio: bool,
    /// Completions are lost.
    lose: bool,
    /// Blocks of what completed in this epoch: the tracker's programs are not skipped.
    bits: std::collections::BTreeSet<u64>,
    /// Addresses of bios that are over, to be used again.
    free: Vec<u64>,
}

fn position(index: usize) -> StreamPosition {
    StreamPosition(index as u64 * 48)
}

fn bytes_of(image: &[u32], block: u64) -> [u8; BLOCK_BYTES] {
    let mut content = [0; BLOCK_BYTES];
    for sector in 0..8 {
        let Some(version) = image.get(block as usize * 8 + sector) else { continue };
        for word in content[sector * SECTOR..][..SECTOR].chunks_exact_mut(4) {
            word.copy_from_slice(&version.to_le_bytes());
        }
    }
    content
}

fn set_block(image: &mut Image, block: u64, content: &[u8; BLOCK_BYTES]) {
    for sector in 0..8 {
        let at = block as usize * 8 + sector;
        let words = content[sector * SECTOR..][..SECTOR].as_chunks::<4>().0;
        assert!(words.iter().all(|w| *w == words[0]), "a sector is torn");
        match image.get_mut(at) {
            Some(version) => *version = u32::from_le_bytes(words[0]),
            None => assert_eq!(words[0], [0; 4], "zeros behind the disk's end"),
        }
    }
}

impl World {
    fn new(by_bio: bool, lose: bool) -> Self {
        let first: Image = (0..SECTORS as u32).map(|s| 1000 + s).collect();
        let disk = CapturedDisk {
            id: DISK,
            dev: 5,
            start: 63 * 512,
            bytes: (SECTORS * SECTOR) as u64,
            by_bio,
            skip: vec![],
        };
        let pool = BlockPool::new(1 << 24);
        Self {
            device: first.clone(),
            vault: first.clone(),
            first,
            in_flight: vec![],
            stream: vec![],
            processed: 0,
            assembler: Assembler::new(pool, vec![disk], position(0)),
            reads: vec![],
            floor: position(0),
            next: 1,
            by_bio,
            lose,
            bits: std::collections::BTreeSet::new(),
            free: vec![],
        }
    }

    fn header(&self, bio: u64, from: usize, to: usize, kind: u16, flags: u32) -> Header {
        let at = (63 + from as u64) * 512;
        Header { at, bio, dev: 5, bytes: ((to - from) * SECTOR) as u32, kind, more: 0, flags }
    }

    fn submit(&mut self, from: usize, to: usize, zero: bool, overlap: bool) {
        let meets = |w: &Write| w.from < to && w.to > from;
        // What was taken to be over and ends without being shown to is told by its bits alone. Where its block was written to meanwhile,
        // they tell nothing.
        let hides =
            |w: &Write| w.aged && self.lose && w.from / 8 < to.div_ceil(8) && w.to.div_ceil(8) > from / 8;
        if from >= to || self.in_flight.iter().any(|w| hides(w) || (!overlap && meets(w))) {
            return;
        }
        let version = if zero { 0 } else { self.next };
        let again = self.next.is_multiple_of(2).then(|| self.free.pop()).flatten();
        let bio = again.unwrap_or(u64::from(self.next) * 8);
        self.next += 1;
        if zero {
            let header = self.header(bio, from, to, kind::ZEROES, 1);
            self.stream.push((header, vec![]));
        } else {
            // Two records, not cut at a sector's end.
            let payload: Vec<u8> =
                std::iter::repeat_n(version.to_le_bytes(), (to - from) * 128).flatten().collect();
            let cut = if self.next.is_multiple_of(3) { payload.len() / 2 + 4 } else { payload.len() };
            let mut header = self.header(bio, from, to, kind::WRITE, 1);
            for piece in [&payload[..cut], &payload[cut..]] {
                if !piece.is_empty() {
                    header.bytes = piece.len() as u32;
                    header.more = (header.at + u64::from(header.bytes) < (63 + to as u64) * 512).into();
                    self.stream.push((header, piece.to_vec()));
                    header.at += piece.len() as u64;
                }
            }
        }
        self.in_flight.push(Write { bio, from, to, version, done: false, unseen: false, aged: false });
    }

    fn unseen(&mut self, from: usize, to: usize) {
        let version = self.next;
        self.next += 1;
        self.in_flight.push(Write {
            bio: version.into(),
            from,
            to,
            version,
            done: false,
            unseen: true,
            aged: false,
        });
    }

    fn take_effect(&mut self, at: usize) {
        if let Some(write) = self.in_flight.get_mut(at)
            && !write.done
        {
            write.done = true;
            self.device[write.from..write.to].fill(write.version);
        }
    }

    fn complete(&mut self, at: usize, shown: bool) {
        if at >= self.in_flight.len() {
            return;
        }
        self.take_effect(at);
        let write = self.in_flight.remove(at);
        self.bits.extend((write.from / 8) as u64..write.to.div_ceil(8) as u64);
        if shown || write.unseen {
            self.tell_end(&write, 0);
        }
        self.free.push(write.bio);
    }

    /// What the engine does at the end of an epoch: all that was submitted before is applied, and what nothing explains is read.
    fn explain(&mut self) {
        let bits = std::mem::take(&mut self.bits);
        self.process(usize::MAX);
        let explained = self.assembler.explain().pop().expect("one disk").1;
        for block in bits.into_iter().filter(|block| !explained.contains(*block)) {
            self.live(block);
        }
    }

    fn rest(&mut self) {
        self.process(usize::MAX);
        self.assembler.rest(20);
        let wanted = self.assembler.take_wanted();
        self.reads.extend(wanted.into_iter().map(|wanted| (wanted, None)));
    }

    fn age(&mut self) {
        if self.lose {
            // So long ago that whatever was written over it lies in the stream by now.
            self.process(usize::MAX);
        }
        self.assembler.age(20, 5);
        self.in_flight.iter_mut().for_each(|write| write.aged = true);
        let wanted = self.assembler.take_wanted();
        self.reads.extend(wanted.into_iter().map(|wanted| (wanted, None)));
    }

    fn tell_end(&mut self, write: &Write, status: u32) {
        let op = if write.version == 0 { 9 } else { OP_WRITE };
        let mut header = self.header(write.bio, write.from, write.to, kind::COMPLETE, op << 8 | status);
        if self.by_bio {
            (header.at, header.bytes) = (0, 0);
        }
        self.stream.push((header, vec![]));
    }

    fn fail(&mut self, at: usize) {
        if at < self.in_flight.len() && !self.in_flight[at].unseen {
            let write = self.in_flight.remove(at);
            self.tell_end(&write, 10);
        }
    }

    fn live(&mut self, block: u64) {
        self.assembler.will_read(DISK, &[BlockRange::new(block, 1)]);
        let content = bytes_of(&self.device, block);
        set_block(&mut self.vault, block, &content);
        self.assembler.forget(DISK, &[BlockRange::new(block, 1)]);
        self.floor = position(self.stream.len());
    }

    fn process(&mut self, count: usize) {
        for _ in 0..count {
            let Some((header, payload)) = self.stream.get(self.processed) else { return };
            self.processed += 1;
            self.assembler.apply(header, payload, position(self.processed), 10);
            let wanted = self.assembler.take_wanted();
            self.reads.extend(wanted.into_iter().map(|wanted| (wanted, None)));
        }
    }

    /// What the state is at a position, by the stream alone.
    fn replay(&self, until: StreamPosition) -> Vec<u8> {
        let mut image: Vec<u8> = (0..BLOCKS as u64).flat_map(|b| bytes_of(&self.first, b)).collect();
        for (index, (header, payload)) in self.stream.iter().enumerate() {
            if position(index + 1) > until {
                break;
            }
            let at = header.at.wrapping_sub(63 * 512) as usize;
            match header.kind {
                kind::WRITE => image[at..at + payload.len()].copy_from_slice(payload),
                kind::ZEROES => image[at..at + header.bytes as usize].fill(0),
                _ => {}
            }
        }
        image
    }

    fn read(&mut self) {
        let Some(pending) = self.reads.first().cloned() else { return };
        match pending {
            (wanted, None) => {
                let blocks = wanted.block..=wanted.block + wanted.ahead;
                self.reads[0].1 = Some(blocks.map(|block| bytes_of(&self.device, block)).collect());
            }
            (wanted, Some(contents)) => {
                self.reads.remove(0);
                let until = position(self.stream.len());
                self.assembler.base(wanted, &contents[0], until);
                for (block, content) in (wanted.block + 1..).zip(&contents[1..]) {
                    self.assembler.ahead(wanted, block, content, until);
                }
                let wanted = self.assembler.take_wanted();
                self.reads.extend(wanted.into_iter().map(|wanted| (wanted, None)));
            }
        }
    }

    fn settle_here(&mut self) {
        if !self.assembler.waits_for_reads_only() {
            return;
        }
        let Some(until) = self.assembler.all_read() else { return };
        let ahead = self.stream.iter().enumerate().skip(self.processed);
        let mut ahead = ahead.filter(|(index, _)| position(index + 1) <= until);
        if !ahead.any(|(_, (header, _))| self.assembler.touches_what_was_read(header)) {
            self.assembler.settle_here();
        }
    }

    fn again(&mut self) {
        for (_, again) in self.assembler.take_again() {
            for block in again.lacking.into_iter().chain(again.healing) {
                let content = bytes_of(&self.device, block);
                set_block(&mut self.vault, block, &content);
                self.assembler.forget(DISK, &[BlockRange::new(block, 1)]);
                self.floor = position(self.stream.len());
            }
        }
    }

    /// Answers the position, if there was one.
    fn seal(&mut self) -> Option<StreamPosition> {
        let sealed = self.assembler.seal(self.floor)?;
        for disk in sealed.disks {
            let (data, zeros) = disk.batch.into_parts();
            for range in zeros {
                for block in range.start.0..range.end() {
                    set_block(&mut self.vault, block, &[0; BLOCK_BYTES]);
                }
            }
            for (block, content) in data {
                set_block(&mut self.vault, block, &content);
            }
        }
        Some(sealed.position)
    }

    fn finish(&mut self) {
        while !self.in_flight.is_empty() {
            self.complete(0, !self.lose);
        }
        for _ in 0..400 {
            self.process(usize::MAX);
            self.assembler.age(20_000, 5_000);
            let wanted = self.assembler.take_wanted();
            self.reads.extend(wanted.into_iter().map(|wanted| (wanted, None)));
            while !self.reads.is_empty() {
                self.read();
            }
            // Something must move the position beyond the reads.
            let header = self.header(0, 0, 0, kind::FLUSH, 0);
            self.stream.push((header, vec![]));
            self.process(usize::MAX);
            if self.seal().is_none() {
                assert!(
                    self.assembler.broken().is_some(),
                    "nothing is in flight, so every position is clean"
                );
                // The mode is left: all of it is read.
                self.vault.clone_from(&self.device);
                return;
            }
            if self.assembler.doubtful() == 0 && self.bits.is_empty() {
                return;
            }
            self.again();
            self.explain();
        }
        panic!("something stays in doubt");
    }
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..SECTORS, 1usize..30, prop::bool::weighted(0.15)).prop_map(|(a, n, z)| Op::Submit(a, n, z)),
        1 => (0..SECTORS, 1usize..10).prop_map(|(a, n)| Op::Unseen(a, n)),
        4 => (0usize..6).prop_map(Op::TakeEffect),
        4 => (0usize..6, prop::bool::weighted(0.9)).prop_map(|(a, s)| Op::Complete(a, s)),
        1 => (0usize..6).prop_map(Op::Fail),
        1 => (0..BLOCKS as u64).prop_map(Op::Live),
        6 => (1usize..4).prop_map(Op::Process),
        4 => Just(Op::Read),
        4 => any::<bool>().prop_map(Op::Seal),
        1 => Just(Op::Again),
        1 => Just(Op::Explain),
        1 => Just(Op::Age),
        1 => Just(Op::Rest),
    ]
}

fn run(ops: Vec<Op>, overlap: bool, lose: bool, by_bio: bool) -> Result<(), TestCaseError> {
    let mut world = World::new(by_bio, lose);
    for op in ops {
        match op {
            Op::Submit(from, count, zero) => {
                world.submit(from, (from + count).min(SECTORS), zero, overlap);
            }
            // Where completions are lost too, such a one can pass for that of a write to the same sectors.
            Op::Unseen(from, count) if overlap && !lose && !by_bio => {
                world.unseen(from, (from + count).min(SECTORS))
            }
            Op::Unseen(..) => {}
            Op::TakeEffect(at) => world.take_effect(at),
            Op::Complete(at, shown) => world.complete(at, shown || !lose),
            // What failed is in order only when it was read again.
            Op::Fail(at) if overlap => world.fail(at),
            Op::Fail(_) => {}
            Op::Live(block) => world.live(block),
            Op::Process(count) => world.process(count),
            Op::Read => world.read(),
            Op::Again => world.again(),
            // What was taken to be over completes later, shown or not.
            Op::Age if overlap => world.age(),
            // Wrongly, if something is in flight: then it is shown that it ends.
            Op::Rest if overlap && !lose => world.rest(),
            Op::Rest if lose && world.in_flight.is_empty() => world.rest(),
            Op::Age | Op::Rest => {}
            Op::Explain => world.explain(),
            Op::Seal(settle) => {
                if settle {
                    world.settle_here();
                }
                let position = world.seal();
                if let Some(position) = position
                    && !overlap
                    && position >= world.floor
                    && !world.assembler.is_lacking(position)
                {
                    let expected = world.replay(position);
                    for block in 0..BLOCKS as u64 {
                        let vault = bytes_of(&world.vault, block);
                        let at = block as usize * BLOCK_BYTES;
                        prop_assert!(
                            vault[..] == expected[at..at + BLOCK_BYTES],
                            "block {} at {:?}",
                            block,
                            position
                        );
                    }
                }
            }
        }
    }
    world.finish();
    prop_assert_eq!(&world.vault, &world.device);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    /// Without two writes in flight to one sector, every sealed position is the stream's prefix, exactly.
    #[test]
    fn sealed_is_the_prefix(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, false, false, false)?;
    }

    /// The same where completions are told by bio.
    #[test]
    fn sealed_is_the_prefix_by_bio(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, false, false, true)?;
    }

    /// Whatever overlaps: in the end the vault is the device.
    #[test]
    fn overlaps_are_healed(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, true, false, false)?;
    }

    /// The same where completions are told by bio.
    #[test]
    fn overlaps_are_healed_by_bio(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, true, false, true)?;
    }

    /// Also where completions are lost.
    #[test]
    fn lost_completions_are_healed(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, true, true, false)?;
    }

    /// The same where completions are told by bio.
    #[test]
    fn lost_completions_are_healed_by_bio(ops in proptest::collection::vec(op(), 1..120)) {
        run(ops, true, true, true)?;
    }
}
