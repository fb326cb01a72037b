//! A small mutator for the ordinary tests: what libFuzzer does with coverage, this does with patience. The same seed gives
//! the same inputs.

/// Makes inputs out of others.
pub struct Mutator(u64);

impl Mutator {
    /// From a number that is not zero.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `below`, which is not zero.
    pub fn number(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % below
    }

    /// One of the corpus, changed in a few places.
    pub fn next(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        const EDGES: [u64; 12] =
            [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0xffff, 1 << 31, u32::MAX as u64, 1 << 51, 1 << 63, u64::MAX];
        if corpus.is_empty() {
            return Vec::new();
        }
        let mut bytes = corpus[self.number(corpus.len())].clone();
        for _ in 0..=self.number(4) {
            let at = self.number(bytes.len() + 1);
            let len = self.number(8.max(bytes.len() - at + 1)).min(bytes.len() - at);
            match self.number(7) {
                0 => bytes.truncate(at),
                1 => drop(bytes.drain(at..at + len)),
                2 => {
                    let copy = bytes[at..at + len.min(4096)].to_vec();
                    let to = self.number(bytes.len() + 1);
                    bytes.splice(to..to, copy);
                }
                3 => {
                    let width = [1, 2, 4, 8][self.number(4)];
                    let edge = EDGES[self.number(EDGES.len())].to_le_bytes();
                    for (place, byte) in bytes[at..].iter_mut().zip(&edge[..width]) {
                        *place = *byte;
                    }
                }
                4 => {
                    let other = corpus[self.number(corpus.len())].clone();
                    let from = self.number(other.len() + 1);
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
                _ => {
                    if let Some(byte) = bytes.get_mut(at) {
                        *byte ^= 1 << self.number(8);
                    }
                }
            }
        }
        bytes.truncate(1 << 20);
        bytes
    }
}
