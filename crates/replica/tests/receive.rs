//! Receiving: broken links, wrong logs, spoilt bytes, other peers, and what is still there after a restart.

mod common;

use std::fs;
use std::time::Duration;

use common::*;
use log::Header;
use model::{Head, LogClass, LogId, LogNumber, Phase, Purpose, ResyncReason, VmId};
use replica::{Error, UploadState};

struct Bench {
    dir: tempfile::TempDir,
    clock: TestClock,
    site: Site,
    primary: Primary,
}

/// A replica that has its first point.
fn bench() -> Bench {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let site = Site::open(dir.path(), &clock);
    let mut primary = Primary::new(VM, &[("vda", 300 * 1024)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    primary.write("vda", 0..200_000, |at| at as u8 | 1);
    primary.ship(&site, Purpose::Initial, POINT);
    primary.phase = Phase::Replicating;
    Bench { dir, clock, site, primary }
}

impl Bench {
    fn next(&mut self) -> (Header, Vec<u8>) {
        let mark = self.primary.head.number.0;
        self.primary.write("vda", 10_000..90_000, |at| (at.wrapping_mul(mark + 77) >> 2) as u8);
        self.primary.make_log(Purpose::Changes, POINT, self.clock.now())
    }

    fn append(&self, header: &Header, offset: u64, bytes: &[u8], last: bool) -> replica::Result<UploadState> {
        self.site.store.append(PEER, header.vm, header.number, header.id, offset, bytes, last)
    }

    fn reopen(&mut self) {
        let other = tempfile::tempdir().unwrap();
        self.site = Site::open(other.path(), &self.clock);
        self.site = Site::open(self.dir.path(), &self.clock);
    }

    fn incoming(&self) -> usize {
        fs::read_dir(self.site.store.status(VM).unwrap().folder.join("incoming")).unwrap().count()
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(outcome: replica::Result<T>, code: &str, transient: bool) {
    match outcome {
        Err(Error::Refused(refused)) => {
            assert_eq!((refused.code, refused.transient), (code, transient), "{refused}")
        }
        other => panic!("{code} was expected: {other:?}"),
    }
}

#[test]
fn an_upload_goes_on_where_it_was_cut_off_even_by_a_restart() {
    let mut bench = bench();
    let (header, bytes) = bench.next();
    let cut = bytes.len() as u64 / 3;
    bench.append(&header, 0, &bytes[..cut as usize], false).unwrap();
    // Sent twice, or too far on: nothing is taken, the answer says where to go on.
    for offset in [0, cut + 1] {
        let state = bench.append(&header, offset, b"something", false).unwrap();
        assert_eq!(state, UploadState { offset: cut, durable: false });
    }
    bench.reopen();
    let state = bench.site.store.upload_state(PEER, VM, header.number, header.id).unwrap();
    assert_eq!(state, UploadState { offset: cut, durable: false });
    let state = bench.append(&header, cut, &bytes[cut as usize..], true).unwrap();
    assert_eq!(state, UploadState { offset: bytes.len() as u64, durable: true });
    bench.primary.shipped(&header);
    // The answer was lost: asked or sent again, it is durable.
    assert!(bench.append(&header, cut, &bytes[cut as usize..], true).unwrap().durable);
    bench.reopen();
    assert!(bench.site.store.upload_state(PEER, VM, header.number, header.id).unwrap().durable);
    assert_eq!(bench.site.store.head(VM).unwrap(), Head { number: header.number, id: header.id });
    bench.site.check_points(&bench.primary);
}

#[test]
fn another_attempt_takes_the_place_of_an_older_one() {
    let mut bench = bench();
    let (given_up, bytes) = bench.next();
    bench.append(&given_up, 0, &bytes[..700], false).unwrap();
    let (header, bytes) = bench.next();
    assert_eq!(bench.append(&header, 500, &bytes[500..], true).unwrap().offset, 0, "it starts at its start");
    bench.append(&header, 0, &bytes[..500], false).unwrap();
    assert_eq!(bench.incoming(), 1);
    assert_eq!(bench.site.store.upload_state(PEER, VM, given_up.number, given_up.id).unwrap().offset, 0);
    bench.append(&header, 500, &bytes[500..], true).unwrap();
    bench.primary.shipped(&header);
    assert_eq!(bench.incoming(), 0);
    refused(bench.append(&given_up, 0, &bytes[..1], false), "wrong-number", false);
    bench.site.check_points(&bench.primary);
}

#[test]
fn a_log_that_does_not_continue_the_chain_is_refused_with_its_header() {
    let mut bench = bench();
    let (good, _) = bench.next();
    for code in ["wrong-predecessor", "wrong-vm"] {
        let (vm, head) = (bench.primary.vm, bench.primary.head);
        match code {
            "wrong-vm" => bench.primary.vm = VmId::from_bytes([9; 16]),
            _ => bench.primary.head.id = LogId::from_bytes([9; 16]),
        }
        let (header, bytes) = bench.next();
        (bench.primary.vm, bench.primary.head) = (vm, head);
        // Long before its end.
        let header = Header { vm: VM, ..header };
        refused(bench.append(&header, 0, &bytes[..400], false), code, false);
        assert_eq!(bench.incoming(), 0);
    }
    for number in [0, 1, 3] {
        let outcome = bench.site.store.append(PEER, VM, LogNumber(number), good.id, 0, b"", false);
        refused(outcome, "wrong-number", false);
    }
    let (header, bytes) = bench.next();
    let announced = Header { id: LogId::from_bytes([3; 16]), ..header.clone() };
    refused(bench.append(&announced, 0, &bytes, true), "wrong-number", false);
    bench.append(&header, 0, &bytes, true).unwrap();
}

#[test]
fn spoilt_and_cut_off_bytes_leave_nothing_behind() {
    let mut bench = bench();
    let (header, bytes) = bench.next();
    for place in [0, 20, 300, bytes.len() / 2, bytes.len() - 40, bytes.len() - 1] {
        let mut spoilt = bytes.clone();
        spoilt[place] ^= 0x10;
        let error = bench.append(&header, 0, &spoilt, true).unwrap_err();
        assert!(error.code().starts_with("log-") || error.code().starts_with("wrong-"), "{error}");
        assert_eq!(bench.incoming(), 0);
    }
    refused(bench.append(&header, 0, &bytes[..bytes.len() - 1], true), "log-truncated", true);
    let mut longer = bytes.clone();
    longer.push(0);
    refused(bench.append(&header, 0, &longer, true), "log-trailing-bytes", true);
    refused(bench.append(&header, 0, b"", true), "log-truncated", true);
    assert_eq!(bench.site.store.head(VM).unwrap().number, LogNumber(1));
    bench.append(&header, 0, &bytes, true).unwrap();
    bench.primary.shipped(&header);
    bench.site.check_points(&bench.primary);
}

#[test]
fn only_the_peer_that_a_vm_belongs_to_may_send_for_it_and_names_are_taken_once() {
    let mut bench = bench();
    let (header, bytes) = bench.next();
    let store = &bench.site.store;
    let other = "somebody-else";
    refused(store.append(other, VM, header.number, header.id, 0, &bytes, true), "forbidden", false);
    refused(store.upload_state(other, VM, header.number, header.id), "forbidden", false);
    refused(store.offer(other, bench.primary.offer()), "forbidden", false);
    refused(store.report(other, VM, Phase::Replicating, None, false), "forbidden", false);
    refused(store.withdraw(other, VM), "forbidden", false);
    refused(store.digests(other, VM, &disk("vda"), 0, 65536, 65536), "forbidden", false);
    let same_name = replica::Offer { vm: VmId::from_bytes([9; 16]), ..bench.primary.offer() };
    refused(store.offer(PEER, same_name), "name-taken", false);
    let unknown = store.append(PEER, VmId::from_bytes([9; 16]), header.number, header.id, 0, &bytes, true);
    assert!(matches!(unknown, Err(Error::NoSuchVm(_))));
}

#[test]
fn changes_are_not_taken_while_what_they_change_is_not_complete() {
    let mut bench = bench();
    let phase = Phase::ResyncRequired { why: ResyncReason::Requested };
    bench.site.store.report(PEER, VM, phase, None, false).unwrap();
    let (header, bytes) = bench.next();
    refused(bench.append(&header, 0, &bytes, true), "wrong-phase", true);
    bench.primary.ship(&bench.site, Purpose::Resync, LogClass::Partial);
    assert!(matches!(bench.site.store.facts(VM).unwrap().phase, Phase::Resynchronizing { .. }));
    let (header, bytes) = bench.next();
    refused(bench.append(&header, 0, &bytes, true), "wrong-phase", true);
    bench.primary.ship(&bench.site, Purpose::Resync, POINT);
    assert_eq!(bench.site.store.facts(VM).unwrap().phase, Phase::Replicating);
    bench.site.check_points(&bench.primary);
}

#[test]
fn a_vm_that_was_withdrawn_stays_until_it_is_removed() {
    let mut bench = bench();
    bench.site.store.withdraw(PEER, VM).unwrap();
    bench.reopen();
    assert!(bench.site.store.status(VM).unwrap().withdrawn);
    bench.site.check_points(&bench.primary);
    let view = bench.site.view(VM, LogNumber(1)).unwrap();
    let folder = bench.site.store.status(VM).unwrap().folder;
    bench.site.store.remove(VM).unwrap();
    assert_eq!(view.still_valid().unwrap_err().code(), "view-revoked");
    assert!(!folder.exists() && bench.site.store.list().is_empty());
    bench.reopen();
    assert!(bench.site.store.list().is_empty());
    let standing = bench.site.store.offer(PEER, bench.primary.offer()).unwrap();
    assert_eq!(standing.head, Head::EMPTY);
}

#[test]
fn workers_do_by_themselves_what_there_is_to_do() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), TestClock::new());
    let config =
        replica::Config { workers: 2, tick: Duration::from_millis(50), ..config(dir.path(), &clock) };
    let site = Site::open_with(config, &clock);
    let mut primary = Primary::new(VM, &[("vda", 300 * 1024)]);
    site.store.offer(PEER, primary.offer()).unwrap();
    let mut chance = Chance(1);
    primary.write_some(&mut chance, 100);
    primary.ship(&site, Purpose::Initial, POINT);
    for _ in 0..5 {
        primary.write_some(&mut chance, 100);
        primary.ship(&site, Purpose::Changes, POINT);
    }
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while site.store.applied(VM).unwrap() != primary.head.number {
        assert!(std::time::Instant::now() < until, "the workers do not apply");
        std::thread::sleep(Duration::from_millis(20));
    }
    site.check_points(&primary);
    site.store.shutdown();
}
