//! Every decoder against changed real input, for a moment each: no panic, no overflow, no endless work. `cargo xtask fuzz`
//! does the same for as long as one likes, led by coverage. `HIGHWATER_FUZZ_SEED` gives other inputs.

use highwater_fuzz::{Mutator, TARGETS, seeds};
use std::time::{Duration, Instant};

const EACH: Duration = Duration::from_millis(800);
/// No input may take longer.
const ONE_MAX: Duration = Duration::from_secs(5);

#[test]
fn no_decoder_panics_or_hangs() {
    let seed = std::env::var("HIGHWATER_FUZZ_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let seeds = seeds().expect("seeds");
    for (name, target) in TARGETS {
        let corpus: Vec<Vec<u8>> = seeds.iter().filter(|(of, _)| *of == name).map(|s| s.1.clone()).collect();
        assert!(!corpus.is_empty(), "{name} has no seeds");
        corpus.iter().for_each(|bytes| target(bytes));
        let mut mutator = Mutator::new(seed);
        let (begun, mut inputs) = (Instant::now(), 0_u64);
        while begun.elapsed() < EACH {
            let input = mutator.next(&corpus);
            let one = Instant::now();
            if let Err(panic) = std::panic::catch_unwind(|| target(&input)) {
                eprintln!("{name} fails on {} bytes: {input:02x?}", input.len());
                std::panic::resume_unwind(panic);
            }
            assert!(one.elapsed() < ONE_MAX, "{name} took {:?} for {input:02x?}", one.elapsed());
            inputs += 1;
        }
        println!("{name}: {inputs} inputs");
        assert!(inputs >= 20, "{name} is too slow: {inputs} inputs in {EACH:?}");
    }
}
