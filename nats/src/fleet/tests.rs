use std::slice::from_ref;

use mcp_shared::timestamp::Timestamp;

use super::*;

const NOW: Now = Duration::from_secs(100);

fn worker(id: &str) -> NodeReport {
    NodeReport {
        id: WorkerId::from_stored(id),
        role: Role::Worker,
        version: "0.0.0".to_owned(),
        started: Timestamp::from_millis(0),
        wire: (1, 1),
        store: String::new(),
        keys: Vec::new(),
        capacity: 4,
        draining: false,
        servers: Vec::new(),
        per_user: Vec::new(),
    }
}

fn load(name: &str) -> ServerLoad {
    ServerLoad {
        name: server(name),
        status: ServerStatus::Connected,
        instances: 1,
        users: 0,
        slots: 10,
        in_flight: 0,
        waiting: 0,
        wait_ms: 0,
        since: Timestamp::from_millis(0),
    }
}

/// A worker that owns servers.
fn owner(id: &str, loads: &[ServerLoad]) -> NodeReport {
    NodeReport { servers: loads.to_vec(), ..worker(id) }
}

fn server(name: &str) -> ServerName {
    ServerName::from_stored(name)
}

fn id(id: &str) -> WorkerId {
    WorkerId::from_stored(id)
}

fn view(reports: impl IntoIterator<Item = NodeReport>) -> FleetView {
    let mut view = FleetView::default();
    reports.into_iter().for_each(|report| view.beat(NOW, report));
    view
}

fn five() -> Vec<NodeReport> {
    ["a", "b", "c", "d", "e"].map(worker).into()
}

fn names() -> Vec<ServerName> {
    (0..1_000).map(|at| server(&format!("server-{at}"))).collect()
}

/// How many servers each worker ranks first for.
fn shares(view: &FleetView) -> HashMap<WorkerId, usize> {
    let mut shares = HashMap::new();
    for name in names() {
        *shares.entry(view.first(NOW, &name).unwrap()).or_default() += 1;
    }
    shares
}

/// Chooses for a user, and draws the first two.
fn choose(view: &FleetView, name: &str, user: &str, wish: &Wish) -> Option<Choice> {
    view.choose(NOW, &server(name), &UserId::from_stored(user), wish, |_| 0)
}

fn chosen(view: &FleetView, name: &str, wish: &Wish) -> Option<(String, Placing)> {
    choose(view, name, "anna", wish).map(|choice| (choice.worker.to_string(), choice.placing))
}

fn some(worker: &str, placing: Placing) -> Option<(String, Placing)> {
    Some((worker.to_owned(), placing))
}

#[test]
fn routers_that_heard_the_same_rank_alike() {
    let (forward, backward) = (view(five()), view(five().into_iter().rev()));
    for name in names() {
        assert_eq!(forward.first(NOW, &name), backward.first(NOW, &name));
    }
}

#[test]
fn servers_are_spread_evenly_and_by_weight() {
    let even = shares(&view(five()));
    for (worker, share) in &even {
        // 200 each; four standard deviations are 50.
        assert!((150..=250).contains(share), "{worker}: {share}");
    }
    assert_eq!(even.len(), 5);

    let mut heavy = five();
    heavy[0].capacity = 16;
    let weighted = shares(&view(heavy));
    // It has half of the processors.
    assert!((430..=570).contains(&weighted[&id("a")]), "{weighted:?}");

    let mut none = five();
    none[0].capacity = 0;
    assert!(shares(&view(none))[&id("a")] > 0, "a worker that cannot count its processors has one");
}

#[test]
fn only_what_must_moves_when_a_worker_comes_or_goes() {
    let before = view(five());
    let mut after = view(five());
    after.left(&id("c"));
    let mut more = view(five());
    more.beat(NOW, worker("f"));
    for name in names() {
        let first = before.first(NOW, &name).unwrap();
        if first != id("c") {
            assert_eq!(after.first(NOW, &name).as_ref(), Some(&first));
        }
        let with_more = more.first(NOW, &name).unwrap();
        assert!(with_more == first || with_more == id("f"));
    }
}

#[test]
fn the_less_pressed_of_two_drawn_owners_is_chosen() {
    let busy = ServerLoad { in_flight: 8, ..load("s") };
    let free = ServerLoad { in_flight: 15, slots: 100, ..load("s") };
    let view = view([owner("a", from_ref(&busy)), owner("b", &[free]), owner("c", &[busy])]);
    let mut hit = 0;
    for first in 0..3 {
        for second in 0..2 {
            let mut draws = vec![second, first];
            let choice = view
                .choose(NOW, &server("s"), &UserId::from_stored("u"), &Wish::default(), |_| {
                    draws.pop().unwrap()
                })
                .unwrap();
            assert_eq!(choice.placing, Placing::Owned);
            hit += usize::from(choice.worker == id("b"));
        }
    }
    // Of six pairs, four have it.
    assert_eq!(hit, 4);
}

#[test]
fn who_leaves_is_silent_or_unheard_is_out() {
    let wish = Wish::default();
    let mut view = view([owner("a", &[load("s")]), worker("b")]);
    assert_eq!(chosen(&view, "s", &wish), some("a", Placing::Owned));

    view.beat(NOW, NodeReport { draining: true, ..owner("a", &[load("s")]) });
    assert_eq!(chosen(&view, "s", &wish), some("b", Placing::Take), "draining");
    assert_eq!(view.live(NOW).len(), 2);
    assert_eq!(view.staying(NOW), [id("b")]);

    view.beat(NOW, owner("a", &[load("s")]));
    view.silent(&id("a"));
    assert_eq!(chosen(&view, "s", &wish), some("b", Placing::Take), "silent");
    assert_eq!(view.live(NOW), [id("b")]);
    assert_eq!(view.workers().len(), 2, "it may be back at work before it beats");
    view.excuse(NOW + OUT_AFTER);
    assert_eq!(
        view.live(NOW + OUT_AFTER),
        [id("b")],
        "an absent bus excuses nobody who was known to be gone"
    );
    view.heard(NOW, &id("a"));
    assert_eq!(chosen(&view, "s", &wish), some("a", Placing::Owned), "an answer shows that it is there");

    let later = NOW + OUT_AFTER;
    view.heard(later, &id("b"));
    let choice = view.choose(later, &server("s"), &UserId::from_stored("u"), &wish, |_| 0).unwrap();
    assert_eq!(choice.worker, id("b"), "unheard");
    view.excuse(later);
    assert!(view.owners(later, &server("s")).contains(&id("a")), "it was the bus that was away");

    view.left(&id("a"));
    view.left(&id("b"));
    assert_eq!(chosen(&view, "s", &wish), None, "nobody is left");
    view.beat(NOW, NodeReport { role: Role::Gateway, ..owner("g", &[load("s")]) });
    assert_eq!(chosen(&view, "s", &wish), None, "a gateway runs nothing");
}

#[test]
fn who_is_long_unheard_is_forgotten() {
    let mut view = view([worker("a")]);
    view.beat(NOW + FORGOTTEN_AFTER - Duration::from_millis(1), worker("b"));
    assert_eq!(view.workers().len(), 2);
    view.beat(NOW + FORGOTTEN_AFTER, worker("b"));
    assert_eq!(view.workers(), [id("b")]);
    assert_eq!(view.silence(NOW, &id("a")), None);
}

#[test]
fn wishes_are_heeded() {
    let view = view([owner("a", &[load("s")]), owner("b", &[load("s")]), worker("c"), worker("d")]);
    let avoid = |ids: &[&str]| Wish { avoid: ids.iter().map(|one| id(one)).collect(), ..Wish::default() };
    assert_eq!(chosen(&view, "s", &avoid(&["a"])), some("b", Placing::Owned));
    assert_eq!(chosen(&view, "s", &avoid(&["a", "b", "c"])), some("d", Placing::Take));
    assert_eq!(chosen(&view, "s", &avoid(&["a", "b", "c", "d"])), None);

    // Who said that it does not own the server may still come to own it.
    let not_owners = Wish { not_owners: vec![id("a"), id("b")], ..avoid(&["c", "d"]) };
    assert!(matches!(chosen(&view, "s", &not_owners), Some((_, Placing::Take))));

    // A lease knows better than beats who the owner is, if that one answers.
    let hint = Wish { owner: Some(id("c")), ..Wish::default() };
    assert_eq!(chosen(&view, "s", &hint), some("c", Placing::Take));
    let asked = Wish { owner: Some(id("c")), ..avoid(&["c"]) };
    assert!(matches!(chosen(&view, "s", &asked), Some((other, Placing::TakeOver)) if other != "c"));
    for lost in [
        Wish { owner: Some(id("gone")), ..Wish::default() },
        Wish { lost_owner: Some(id("gone")), ..Wish::default() },
    ] {
        assert!(matches!(chosen(&view, "s", &lost), Some((_, Placing::TakeOver))));
    }
}

#[test]
fn an_owner_that_runs_goes_before_one_that_does_not() {
    let failed = ServerLoad { status: ServerStatus::Error, ..load("s") };
    let view = view([owner("a", from_ref(&failed)), owner("b", &[load("s")]), owner("c", &[failed])]);
    assert_eq!(chosen(&view, "s", &Wish::default()), some("b", Placing::Owned));
    let rest = Wish { avoid: vec![id("b")], ..Wish::default() };
    assert!(matches!(chosen(&view, "s", &rest), Some((_, Placing::Owned))));
    assert_eq!(view.running(NOW, &server("s")), [id("b")]);
    assert_eq!(view.owners(NOW, &server("s")).len(), 3);
}

#[test]
fn crowded_owners_bring_in_the_next_in_rank() {
    let wait_ms = u64::try_from(CROWDED.as_millis()).unwrap();
    let crowded = ServerLoad { wait_ms, ..load("s") };
    let mut view = view([owner("a", from_ref(&crowded)), owner("b", &[load("s")]), worker("c")]);
    let choice = choose(&view, "s", "anna", &Wish::default()).unwrap();
    assert!(!choice.expands && choice.placing == Placing::Owned, "one of them has room");

    view.beat(NOW, owner("b", from_ref(&crowded)));
    let choice = choose(&view, "s", "anna", &Wish::default()).unwrap();
    assert_eq!((choice.worker, choice.placing, choice.expands), (id("c"), Placing::Take, true));
    assert!(choice.underway.is_none());
    let owner_all_the_same = view.choose_owner(NOW, &server("s"), &Wish::default()).unwrap();
    assert!(owner_all_the_same.placing == Placing::Owned && owner_all_the_same.worker != id("c"));

    // Where everybody is crowded, or has been asked, an owner has to do.
    let asked = Wish { avoid: vec![id("c")], ..Wish::default() };
    assert_eq!(choose(&view, "s", "anna", &asked).unwrap().placing, Placing::Owned);
    view.beat(NOW, owner("c", &[crowded]));
    let choice = choose(&view, "s", "anna", &Wish::default()).unwrap();
    assert!(choice.placing == Placing::Owned && !choice.expands);
}

#[test]
fn users_of_a_per_user_server_are_ranked_one_by_one() {
    let per_user = |id: &str| NodeReport { per_user: vec![server("s")], ..owner(id, &[load("s")]) };
    let mut view = view(["a", "b", "c"].map(per_user));
    let users: Vec<String> = (0..300).map(|at| format!("user-{at}")).collect();
    let mut shares: HashMap<WorkerId, usize> = HashMap::new();
    for user in &users {
        let choice = choose(&view, "s", user, &Wish::default()).unwrap();
        assert_eq!((choice.placing, choice.expands), (Placing::Take, false));
        let again = choose(&view, "s", user, &Wish::default()).unwrap();
        assert_eq!(again.worker, choice.worker, "a user stays where they are");
        *shares.entry(choice.worker).or_default() += 1;
    }
    assert!(shares.len() == 3 && shares.values().all(|share| (60..=140).contains(share)), "{shares:?}");

    // What a worker that is gone last said counts no more.
    for id in ["a", "b"] {
        view.beat(NOW, owner(id, &[load("s")]));
    }
    assert_eq!(choose(&view, "s", "anna", &Wish::default()).unwrap().placing, Placing::Take);
    view.silent(&id("c"));
    assert_eq!(choose(&view, "s", "anna", &Wish::default()).unwrap().placing, Placing::Owned);
}

#[test]
fn calls_under_way_count_until_they_end_and_beats_replace_only_what_was_told() {
    let mut view = view([owner("a", &[load("s")]), owner("b", &[load("s")])]);
    let first = choose(&view, "s", "anna", &Wish::default()).unwrap();
    let second = choose(&view, "s", "anna", &Wish::default()).unwrap();
    assert_ne!(first.worker, second.worker, "the one with a call under way is fuller");
    let pressure = |view: &FleetView, id: &WorkerId| owned_pressure(&view.nodes[id].owned[&server("s")]);
    assert!((pressure(&view, &first.worker) - 0.1).abs() < 1e-9);

    // A beat that already counts the call does not count it twice.
    let told = ServerLoad { in_flight: 1, ..load("s") };
    view.beat(NOW, owner(first.worker.as_str(), from_ref(&told)));
    assert!((pressure(&view, &first.worker) - 0.1).abs() < 1e-9);
    let third =
        view.choose_owner(NOW, &server("s"), &Wish { avoid: vec![second.worker.clone()], ..Wish::default() });
    let third = third.unwrap();
    assert_eq!(third.worker, first.worker);
    assert!((pressure(&view, &first.worker) - 0.2).abs() < 1e-9);

    // A beat that does not know of them yet does not hide them.
    view.beat(NOW, owner(first.worker.as_str(), &[load("s")]));
    assert!((pressure(&view, &first.worker) - 0.2).abs() < 1e-9);
    drop(third);
    let worker = first.worker.clone();
    drop(first);
    assert!(pressure(&view, &worker).abs() < 1e-9);
    // A worker that is gone takes its counts along, and calls that end later do no harm.
    view.left(&second.worker);
    drop(second);
    view.beat(NOW, owner(worker.as_str(), &[told]));
    assert!((pressure(&view, &worker) - 0.1).abs() < 1e-9);
}

#[test]
fn people_see_who_is_there() {
    let mut view = view([worker("b"), worker("a"), NodeReport { role: Role::Gateway, ..worker("g") }]);
    view.beat(NOW, NodeReport { started: Timestamp::from_millis(-1), ..worker("z") });
    view.silent(&id("b"));
    let fleet = view.view(NOW + Duration::from_millis(10));
    let ids: Vec<_> = fleet.workers.iter().map(|node| node.report.id.as_str()).collect();
    assert_eq!(ids, ["z", "a"], "oldest first");
    assert_eq!(fleet.gateways.len(), 1);
    assert_eq!(fleet.workers[0].heard_ms, 10);
    assert!(view.view(NOW + OUT_AFTER).workers.is_empty());
}

#[test]
fn a_worker_that_answers_is_there_although_its_beats_are_not_read() {
    let mut view = view([worker("a"), worker("b")]);
    let later = NOW + OUT_AFTER;
    view.answered(later, &id("a"));
    assert_eq!(view.live(later), [id("a")]);
    // An answer that was sent before it went does not bring it back.
    view.silent(&id("a"));
    view.answered(later, &id("a"));
    assert!(view.live(later).is_empty());
}
