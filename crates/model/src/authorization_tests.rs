//! The rules of `authorization`, over entries, names and owners that chance makes up.

use proptest::prelude::*;

use super::*;

fn patterns(text: &str) -> VmPatterns {
    text.parse().unwrap()
}

fn name(text: &str) -> VmName {
    text.parse().unwrap()
}

#[test]
fn patterns_are_whole_names_with_stars_and_question_marks() {
    for (pattern, name, fits) in [
        ("*", "web", true),
        ("web", "web", true),
        ("web", "web-2", false),
        ("web-*", "web-2", true),
        ("web-*", "web-", true),
        ("*-prod", "db-prod", true),
        ("*-prod", "db-prod-2", false),
        ("a*b*c", "a-b-b-c", true),
        ("web-?", "web-2", true),
        ("web-?", "web-12", false),
        ("?*", "w", true),
        ("db-*,web", "web", true),
        ("db-*, web", "web", true),
        ("db-*,web", "mail", false),
        ("WEB", "web", false),
    ] {
        assert_eq!(patterns(pattern).fits(name), fits, "{pattern} {name}");
    }
    assert!(!VmPatterns::none().fits("web"));
}

#[test]
fn a_pattern_that_no_name_can_fit_is_refused_with_the_reason() {
    for bad in
        ["", ",", "web,", "web/..", "a b", "wéb", "\u{1b}[2J", &"x".repeat(129), &vec!["a"; 65].join(",")]
    {
        let error = bad.parse::<VmPatterns>().unwrap_err().to_string();
        assert!(error.contains("fits no VM") && error.len() < 600, "{error}");
    }
}

#[test]
fn a_star_costs_no_more_than_its_length_times_the_names() {
    let pattern = patterns(&"a*".repeat(60));
    assert!(!pattern.fits(&"a".repeat(59)) && pattern.fits(&"a".repeat(64)));
    assert!(!patterns(&format!("{}b", "*a".repeat(60))).fits(&"a".repeat(64)));
}

/// The same by trying everything: slow, and easy to believe.
fn fits_naively(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern.split_first(), name.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=name.len()).any(|taken| fits_naively(rest, &name[taken..])),
        (Some((b'?', rest)), Some((_, name))) => fits_naively(rest, name),
        (Some((byte, rest)), Some((first, name))) => byte == first && fits_naively(rest, name),
        _ => false,
    }
}

fn entry() -> impl Strategy<Value = Entry> {
    let group = prop_oneof![Just(None), Just(Some("one")), Just(Some("two"))];
    ("[ab*?]{1,4}(,[ab*?]{1,4})?", proptest::option::of(any::<u64>()), group).prop_map(
        |(vms, quota_bytes, group)| Entry {
            vms: patterns(&vms),
            quota_bytes,
            group: group.map(|group| group.parse().unwrap()),
            ..Entry::default()
        },
    )
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![Just(Act::Offer), Just(Act::Use), Just(Act::Withdraw), Just(Act::TakeOver)]
}

/// Whose the VM is: nobody's, or one of three peers', of which the first asks.
fn owner() -> impl Strategy<Value = Option<usize>> {
    proptest::option::of(0..3_usize)
}

const PEERS: [&str; 3] = ["branch", "depot", "shop"];

proptest! {
    #[test]
    fn a_pattern_fits_as_trying_everything_says(pattern in "[ab*?]{1,8}", name in "[ab]{0,8}") {
        prop_assert_eq!(patterns(&pattern).fits(&name), fits_naively(pattern.as_bytes(), name.as_bytes()));
    }

    #[test]
    fn patterns_come_back_as_they_were_written(text in "[a-c.*?-]{1,5}(,[a-c.*?-]{1,5}){0,3}") {
        let read = patterns(&text);
        prop_assert_eq!(read.to_string(), text);
        let json = serde_json::to_string(&read).unwrap();
        prop_assert_eq!(serde_json::from_str::<VmPatterns>(&json).unwrap(), read);
    }

    /// Another peer's VM is out of reach, whatever is asked, but for a take-over within one group.
    #[test]
    fn a_peer_touches_anothers_vm_only_to_take_it_over_within_its_group(
        entries in [entry(), entry(), entry()], owner in owner(), act in act(), vm in "[ab]{1,4}", revoked: bool,
    ) {
        let vm = name(&vm);
        let of = owner.map(|owner| Owner { peer: PEERS[owner], group: entries[owner].group.as_ref() });
        let asked = Asked { peer: PEERS[0], entry: &entries[0], revoked, act, vm: &vm, owner: of };
        let granted = decide(&asked);
        if revoked {
            prop_assert_eq!(granted, Err(Denied::Revoked));
        } else if let Some(owner) = owner.filter(|owner| *owner != 0) {
            let one_group = entries[0].group.is_some() && entries[0].group == entries[owner].group;
            prop_assert!(granted.is_err() || (act == Act::TakeOver && one_group), "{:?}", asked);
        }
        if granted.is_ok() && act != Act::Withdraw {
            prop_assert!(entries[0].vms.fits(vm.as_str()));
        }
        if granted.is_ok() && act == Act::TakeOver {
            prop_assert!(owner.is_some());
        }
    }

    /// Its own VMs a peer can always give up, and use as long as its patterns fit: the others' entries do not matter.
    #[test]
    fn its_own_vms_are_its_own(entry in entry(), act in act(), vm in "[ab]{1,4}") {
        let vm = name(&vm);
        let owner = Some(Owner { peer: PEERS[0], group: entry.group.as_ref() });
        let asked = Asked { peer: PEERS[0], entry: &entry, revoked: false, act, vm: &vm, owner };
        let expected = act == Act::Withdraw || entry.vms.fits(vm.as_str());
        prop_assert_eq!(decide(&asked).is_ok(), expected);
    }

    /// Bytes admitted one after the other never come to more than the quota; what is left is what is still admitted.
    #[test]
    fn what_is_admitted_never_passes_the_quota(
        quota in 0..10_000_u64, pieces in proptest::collection::vec(0..4000_u64, 0..20),
    ) {
        let entry = Entry { quota_bytes: Some(quota), ..Entry::default() };
        let mut used = 0;
        for more in pieces {
            let left = entry.left_bytes(used).unwrap();
            match entry.admit_bytes(used, more) {
                Ok(()) => {
                    prop_assert!(more <= left);
                    used += more;
                }
                Err(over) => {
                    prop_assert!(more > left);
                    prop_assert_eq!(over, OverQuota { quota_bytes: quota, used_bytes: used, more_bytes: more });
                }
            }
            prop_assert!(used <= quota);
        }
    }

    /// A larger quota refuses nothing that a smaller one admits; none refuses nothing at all.
    #[test]
    fn a_larger_quota_admits_no_less(quota: u64, larger: u64, used: u64, more: u64) {
        let of = |quota_bytes| Entry { quota_bytes, ..Entry::default() };
        if of(Some(quota.min(larger))).admit_bytes(used, more).is_ok() {
            prop_assert!(of(Some(quota.max(larger))).admit_bytes(used, more).is_ok());
        }
        prop_assert!(of(None).admit_bytes(used, more).is_ok());
    }
}
