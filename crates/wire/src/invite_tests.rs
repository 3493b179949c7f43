use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn invite() -> Invite {
    Invite::new(
        "dr.example.org:8443",
        Fingerprint::from_bytes([0xab; 32]),
        Secret([0xcd; 32]),
        Timestamp(1_700_000_000_000_000),
    )
    .unwrap()
}

#[test]
fn the_line_is_the_documented_one() {
    let line = invite().to_string();
    assert_eq!(
        line,
        "afterimage1.q6urq6urq6urq6urq6urq6urq6urq6urq6urq6urq6vNzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3Nzc3NzQAGCiQYHkAAE2RyLmV4YW1wbGUub3JnOjg0NDN-6WfV"
    );
    let read: Invite = format!("  {line}\n").parse().unwrap();
    assert_eq!((read.address.as_str(), read.fingerprint), ("dr.example.org:8443", invite().fingerprint));
    assert_eq!((read.secret.0, read.expires_at), (invite().secret.0, invite().expires_at));
}

#[test]
fn a_line_that_is_cut_says_so_wherever_it_was_cut() {
    let line = invite().to_string();
    for end in PREFIX.len()..line.len() {
        let error = line[..end].parse::<Invite>().unwrap_err();
        let InviteError::Truncated { has, wanted } = error else { panic!("{end}: {error}") };
        assert_eq!(has, end);
        // Before the address's length is there, only a lower bound is known.
        assert!(wanted == line.len() || wanted > end, "{end}: {wanted}");
    }
}

#[test]
fn what_is_no_invite_says_what_it_is() {
    let parse = |line: &str| line.parse::<Invite>().unwrap_err();
    assert_eq!(parse(""), InviteError::NotAnInvite);
    assert_eq!(parse("https://dr.example.org"), InviteError::NotAnInvite);
    assert_eq!(parse("afterimage2.AAAA"), InviteError::Version("2".to_owned()));
    let spaced = invite().to_string().replacen("q6u", "q u", 1);
    assert_eq!(parse(&spaced), InviteError::Character { character: ' ', position: 14 });
    assert_eq!(parse(&format!("{}A", invite())), InviteError::Mistyped);
    assert_eq!(parse(&format!("{}AAAA", invite())), InviteError::Mistyped);
}

#[test]
fn an_invite_that_is_too_late_says_how_late() {
    let invite = invite();
    let at = |seconds| invite.expires_at.plus(Duration::from_secs(seconds));
    assert!(invite.check_time(Timestamp(invite.expires_at.0 - 1)).is_ok());
    assert!(invite.check_time(at(0)).is_err());
    let message = invite.check_time(at(3 * 3600 + 300)).unwrap_err().to_string();
    assert!(message.contains("expired 3 h 5 min ago") && message.contains("ask for a new one"), "{message}");
}

#[test]
fn addresses_are_host_and_port() {
    for good in ["h:1", "10.0.0.1:8443", "[2001:db8::1]:65535", "my_host-2.example.org:443"] {
        assert!(check_address(good).is_ok(), "{good}");
    }
    let long = format!("{}:1", "h".repeat(254));
    for bad in [
        "",
        "h",
        ":1",
        "h:",
        "h:0",
        "h:65536",
        "h:+1",
        "2001:db8::1:443",
        "[::1]",
        "[h]:1",
        "a b:1",
        "h/x:1",
        "ä:1",
        &long,
    ] {
        assert!(check_address(bad).is_err(), "{bad}");
    }
}

#[test]
fn a_secret_is_known_by_its_hash_and_not_shown() {
    let (secret, other) = (Secret::generate().unwrap(), Secret::generate().unwrap());
    let hash: SecretHash = serde_json::from_str(&serde_json::to_string(&secret.hash()).unwrap()).unwrap();
    assert!(hash.matches(&secret) && !hash.matches(&other));
    let read: Secret = serde_json::from_str(&serde_json::to_string(&secret).unwrap()).unwrap();
    assert!(hash.matches(&read));
    assert_eq!(format!("{secret:?}"), "Secret(..)");
    assert!(!format!("{hash:?}").contains(&String::from(secret)));
    assert!(serde_json::from_str::<Secret>("\"AAAA\"").is_err());
}

proptest! {
    #[test]
    fn every_single_typing_error_is_noticed(at in 0_usize..1000, with in "[A-Za-z0-9_-]") {
        let line = invite().to_string();
        let at = PREFIX.len() + at % (line.len() - PREFIX.len());
        let mut typed = line.clone();
        typed.replace_range(at..=at, &with);
        prop_assume!(typed != line);
        let error = typed.parse::<Invite>().unwrap_err();
        prop_assert!(matches!(error, InviteError::Mistyped | InviteError::Truncated { .. }), "{}", error);
    }

    #[test]
    fn no_line_is_a_panic(line in ".*", tail in "[A-Za-z0-9_-]{0,400}") {
        let _ = line.parse::<Invite>();
        let _ = format!("{PREFIX}{tail}").parse::<Invite>();
        let _ = check_address(&line);
    }

    #[test]
    fn every_invite_comes_back(host in "[a-z0-9.-]{1,200}", port in 1_u16.., secret: [u8; 32], expires_at: i64) {
        let invite = Invite::new(
            format!("{host}:{port}"),
            Fingerprint::from_bytes(secret),
            Secret(secret),
            Timestamp(expires_at),
        ).unwrap();
        let read: Invite = invite.to_string().parse().unwrap();
        prop_assert_eq!(&read.address, &invite.address);
        prop_assert_eq!((read.secret.0, read.expires_at), (secret, invite.expires_at));
    }
}
