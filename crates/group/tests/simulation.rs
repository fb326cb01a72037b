//! The protocol against a hostile world: messages are lost, late, twice, out of order, and come again much later, also to another life of
//! a machine; the network falls apart; machines crash, and begin again; clocks run at different speeds; hooks and freezes fail, hang, and
//! are thawed behind the protocol's back; members come and go. All of it by a seed.
//!
//! What must hold in every step:
//! * A marker that the vault has of every member was frozen on all of them at one instant.
//! * Nobody stays frozen past its deadline by its own clock.
//! * A marker that its coordinator ended well is kept by all its members.
//!
//! That a marker is decided once, in one place, is the vault's doing, and tested there. Here memberships may also come in the wrong order.

#[path = "simulation/world.rs"]
mod world;

use world::{World, Worldly};

/// Steps of one world.
const STEPS: u64 = 20_000;

fn run(seeds: std::ops::Range<u64>, sizes: &[usize], how: impl Fn(u64, usize) -> Worldly) -> (u64, u64) {
    let (mut steps, mut complete) = (0, 0);
    for seed in seeds {
        for &size in sizes {
            let mut world = World::new(seed, size, how(seed, size));
            world.run(STEPS);
            steps += world.steps();
            complete += world.complete();
        }
    }
    (steps, complete)
}

/// Where nothing fails, markers come at their times, and each becomes a point.
#[test]
fn in_a_good_world_every_marker_is_complete() {
    for size in [1, 2, 5, 16, 64] {
        let mut world = World::new(7, size, Worldly::good());
        world.run(STEPS);
        assert!(world.complete() >= 10, "{size} members: {} complete", world.complete());
        assert_eq!(world.failed(), [], "{size} members");
        // Linear: prepare, ready, freeze, frozen, mark, marked for each of the others; prepare is said again while they take their time.
        let most = 12 * (size as u64 - 1) * (world.complete() + 1);
        assert!(world.sent() <= most, "{} messages for {} markers of {size}", world.sent(), world.complete());
    }
}

#[test]
fn in_a_bad_world_nothing_is_complete_that_is_not() {
    let (steps, complete) = run(0..60, &[2, 3, 5], |seed, _| Worldly::bad(seed));
    println!("{steps} steps, {complete} markers complete");
    assert!(complete > 300, "{complete}");
}

#[test]
fn many_members() {
    let (steps, complete) = run(100..106, &[16, 64], |seed, _| Worldly { loss: 200, ..Worldly::bad(seed) });
    println!("{steps} steps, {complete} markers complete");
    assert!(complete > 0);
}

/// The coordinator dies for good: the next in line takes its place, and when that dies too, the one after.
#[test]
fn a_dead_coordinator_is_replaced() {
    let mut world = World::new(3, 5, Worldly::good());
    world.run(STEPS / 4);
    let before = world.complete();
    world.remove(0);
    world.run(STEPS / 4);
    let between = world.complete();
    assert!(between > before, "nobody took its place");
    world.remove(1);
    world.run(STEPS / 4);
    assert!(world.complete() > between, "nobody took its place again");
}

/// A machine's clock was set back, and its new life counts lower than its last one.
#[test]
fn a_life_that_counts_lower_is_told_so() {
    let mut world = World::new(4, 3, Worldly::good());
    world.run(STEPS / 4);
    let before = world.complete();
    world.restart_in_life(0, 1);
    world.run(STEPS / 2);
    assert!(world.complete() > before + 3, "{} after {before}", world.complete());
}
