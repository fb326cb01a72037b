//! A block of which the stream has told a part only: the rest must be read from the device.

use super::super::pool::PoolBlock;
use super::in_flight::Sectors;
use highwater_delta::BLOCK_BYTES;

/// See the module.
#[derive(Debug)]
pub struct Partial {
    content: PoolBlock,
    /// Which bytes are told, one bit each.
    told: Box<[u64; BLOCK_BYTES / 64]>,
    /// The number of the question by which the rest was asked for.
    pub asked: Option<u64>,
}

impl Partial {
    /// Nothing is told yet; bytes from `end` on are behind the disk's end, and zeros.
    #[must_use]
    pub fn new(mut content: PoolBlock, end: usize) -> Self {
        content.fill(0);
        let mut partial = Self { content, told: Box::new([0; BLOCK_BYTES / 64]), asked: None };
        partial.tell(end.min(BLOCK_BYTES), BLOCK_BYTES);
        partial
    }

    fn tell(&mut self, from: usize, to: usize) {
        for at in from..to {
            self.told[at / 64] |= 1 << (at % 64);
        }
    }

    /// Bytes from `at` on are told.
    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        self.content[at..at + bytes.len()].copy_from_slice(bytes);
        self.tell(at, at + bytes.len());
    }
    /// `count` bytes from `at` on are zeros.
    pub fn zero(&mut self, at: usize, count: usize) {
        self.content[at..at + count].fill(0);
        self.tell(at, at + count);
    }
    /// Whether all of it is told.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.told.iter().all(|word| *word == !0)
    }
    /// Sectors of which something is not told.
    #[must_use]
    pub fn untold(&self) -> Sectors {
        let mut sectors = 0;
        for (at, words) in self.told.chunks_exact(8).enumerate() {
            if words.iter().any(|word| *word != !0) {
                sectors |= 1 << at;
            }
        }
        sectors
    }
    /// The whole block, its rest from `base`.
    #[must_use]
    pub fn over(mut self, base: &[u8; BLOCK_BYTES]) -> PoolBlock {
        for (at, byte) in base.iter().enumerate() {
            if self.told[at / 64] >> (at % 64) & 1 == 0 {
                self.content[at] = *byte;
            }
        }
        self.content
    }
    /// The whole block, if all of it is told.
    #[must_use]
    pub fn into_whole(self) -> PoolBlock {
        self.content
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::pool::BlockPool, *};

    #[test]
    fn what_is_told_lies_over_the_rest() {
        let pool = BlockPool::new(1 << 20);
        let mut partial = Partial::new(pool.take().unwrap(), 4096 - 512);
        assert_eq!(partial.untold(), 0x7f);
        partial.write(510, &[7; 514]);
        partial.zero(2048, 512);
        assert_eq!((partial.untold(), partial.is_whole()), (0b110_1101, false));
        let content = partial.over(&[9; BLOCK_BYTES]);
        assert_eq!((content[509], content[510], content[1023], content[1024]), (9, 7, 7, 9));
        assert_eq!((content[2048], content[2560], content[4096 - 512]), (0, 9, 0));
    }
}
