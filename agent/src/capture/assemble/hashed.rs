//! Maps and sets by number, for what every write asks: hashed by a function that is fast for short keys, and seeded, since writers choose
//! the numbers of blocks.

use foldhash::fast::RandomState;

/// By number.
pub type Map<K, V> = std::collections::HashMap<K, V, RandomState>;
/// Of numbers.
pub type Set<K> = std::collections::HashSet<K, RandomState>;
