//! A coordinator that does not reach all, and a member that is away: by machines that do at once what they are told.

use highwater_delta::MachineId;
use highwater_group::{Input, Kind, Life, Machine, Membership, Message, Output, Tick, Timing};
use std::collections::VecDeque;

const STEP: Tick = 10;

/// What came of a run.
#[derive(Debug, Default)]
struct Run {
    /// When markers ended, by whom, and whether as points.
    ended: Vec<(Tick, usize, bool)>,
    /// When machines were told to prepare.
    prepared: Vec<Tick>,
}

/// Runs three machines, of which some pairs do not hear of each other, and one may fail to prepare.
fn run(reaches: fn(usize, usize) -> bool, fails: Option<usize>, until: Tick) -> Run {
    let timing = Timing {
        crash_every: Some(60_000),
        application_every: None,
        prepare_max: 1_000,
        freeze_max: 500,
        hold_max: 1_000,
        mark_max: 1_000,
        resend: 100,
        patience: 2_000,
        retry: 1_000,
    };
    let ids: Vec<MachineId> = (1..=3).map(|n| MachineId::from_bytes([n; 16])).collect();
    let membership = Membership::new(1, ids.clone()).unwrap_or_else(|error| panic!("{error}"));
    let life = |n: usize| Life { since: 1, nonce: n as u64 };
    let mut machines: Vec<Machine> =
        ids.iter().enumerate().map(|(n, id)| Machine::new(*id, life(n), timing)).collect();
    let mut inputs: VecDeque<(usize, Input)> =
        (0..3).map(|n| (n, Input::Membership(membership.clone()))).collect();
    let mut run = Run::default();
    for now in (0..until).step_by(STEP as usize) {
        inputs.extend((0..3).map(|n| (n, Input::Tick)));
        while let Some((n, input)) = inputs.pop_front() {
            for output in machines[n].on(now, input) {
                match output {
                    Output::Send { to, message } => {
                        let Some(to) = ids.iter().position(|id| *id == to) else { panic!("to nobody") };
                        if reaches(n, to) && reaches(to, n) {
                            inputs.push_back((to, Input::Message { from: ids[n], message }));
                        }
                    }
                    Output::Prepare { marker, kind } => {
                        assert_eq!(kind, Kind::Crash);
                        run.prepared.push(now);
                        inputs.push_back((n, Input::Prepared { marker, done: fails != Some(n) }));
                    }
                    Output::Freeze { marker } => inputs.push_back((n, Input::Frozen { marker, done: true })),
                    Output::Keep { marker } => inputs.push_back((n, Input::Kept { marker, intact: true })),
                    Output::Ended { result, .. } => run.ended.push((now, n, result.is_ok())),
                    Output::Drop { .. } | Output::Report { .. } | Output::Withdraw { .. } => {}
                }
            }
        }
    }
    run
}

/// The first in line does not reach the third; the second reaches both.
#[test]
fn one_that_does_not_reach_all_is_passed_over() {
    let Run { ended, .. } = run(|from, to| (from, to) != (0, 2), None, 60_000);
    let first = ended.iter().find(|(.., ok)| *ok).unwrap_or_else(|| panic!("no point: {ended:?}"));
    assert_eq!(first.1, 1, "{ended:?}");
}

/// One is away: nobody's applications stand still for that, and the others are asked ever more rarely.
#[test]
fn nothing_stands_still_while_a_member_is_away() {
    let Run { ended, prepared } = run(|from, to| from != 2 && to != 2, None, 300_000);
    assert_eq!(prepared, [], "{ended:?}");
    assert!(ended.iter().all(|(.., ok)| !ok));
    rarer(ended.iter().map(|(at, ..)| *at));
}

/// One cannot prepare, its hook fails: the others' applications stand still for that ever more rarely.
#[test]
fn pauses_grow_while_a_member_cannot_prepare() {
    let Run { ended, prepared } = run(|_, _| true, Some(1), 300_000);
    assert!(ended.iter().all(|(.., ok)| !ok));
    rarer(prepared.into_iter());
}

/// Less than half as often at the end as in the beginning, but still.
fn rarer(times: impl Iterator<Item = Tick> + Clone) {
    let count = |from: Tick, to: Tick| times.clone().filter(|at| (from..to).contains(at)).count();
    let (early, late) = (count(0, 30_000), count(270_000, 300_000));
    println!("{early} in the first 30 s, {late} in the last");
    assert!(late * 2 <= early && late > 0, "{early} and {late}");
}

/// An operator changes how often there are markers: from never, and to a shorter time.
#[test]
fn new_times_hold_at_once() {
    let timing = |crash_every| Timing { crash_every, application_every: None, ..Timing::default() };
    let own = MachineId::from_bytes([1; 16]);
    let mut machine = Machine::new(own, Life { since: 1, nonce: 1 }, timing(None));
    let Ok(membership) = Membership::new(1, vec![own]) else { panic!("one member") };
    machine.on(0, Input::Membership(membership));
    assert_eq!(machine.next(), None);
    machine.set_timing(1_000, timing(Some(3_600_000)));
    assert_eq!(machine.next(), Some(1_000));
    let begun = machine.on(1_000, Input::Tick);
    assert!(begun.iter().any(|output| matches!(output, Output::Prepare { .. })), "{begun:?}");
    let Some(Output::Prepare { marker, .. }) =
        begun.into_iter().find(|o| matches!(o, Output::Prepare { .. }))
    else {
        panic!("it was looked for")
    };
    machine.on(1_001, Input::Prepared { marker, done: false });
    // Nothing changes: the next one comes when it would.
    let next = machine.next();
    machine.set_timing(2_000, timing(Some(3_600_000)));
    assert_eq!(machine.next(), next);
    machine.set_timing(2_000, timing(Some(5_000)));
    assert!(machine.next().is_some_and(|next| next <= 7_000), "{:?}", machine.next());
    machine.set_timing(2_000, timing(None));
    assert_eq!(machine.next(), None);
}

/// A member is gone while another's applications stand still: nobody waits for it. When all were told to keep the marker, its word may have been the last.
#[test]
fn who_is_gone_is_not_waited_for() {
    let ids = [1, 2].map(|n| MachineId::from_bytes([n; 16]));
    let Ok(membership) = Membership::new(1, ids.to_vec()) else { panic!("two members") };
    for frozen in [false, true] {
        let mut machine = Machine::new(ids[0], Life { since: 1, nonce: 1 }, Timing::default());
        machine.on(0, Input::Membership(membership.clone()));
        let life = Life { since: 2, nonce: 2 };
        let begun = machine.on(0, Input::Wanted(Kind::Application));
        let asked = begun.iter().find_map(|output| match output {
            Output::Send { message, .. } => Some(message.marker()),
            _ => None,
        });
        let Some(marker) = asked else { panic!("nobody was asked: {begun:?}") };
        let mut said = vec![Message::Here { marker }];
        if frozen {
            said.extend([Message::Ready { marker, life }, Message::Frozen { marker, life }]);
        }
        let mut told = vec![];
        for message in said {
            let mut inputs = VecDeque::from([Input::Message { from: ids[1], message }]);
            while let Some(input) = inputs.pop_front() {
                for output in machine.on(1, input) {
                    match output {
                        Output::Prepare { marker, .. } => {
                            inputs.push_back(Input::Prepared { marker, done: true })
                        }
                        Output::Freeze { marker } => inputs.push_back(Input::Frozen { marker, done: true }),
                        Output::Keep { marker } => inputs.push_back(Input::Kept { marker, intact: true }),
                        other => told.push(other),
                    }
                }
            }
        }
        let gone = machine.on(2, Input::Gone(ids[1]));
        let ended = gone.iter().any(|output| matches!(output, Output::Ended { result: Err(_), .. }));
        let goes_on = gone.iter().any(|output| matches!(output, Output::Drop { .. }));
        assert_eq!((ended, goes_on), (!frozen, !frozen), "{frozen}: {gone:?} after {told:?}");
    }
}
