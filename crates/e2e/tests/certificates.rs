//! Certificates that are renewed, revoked, replaced and issued by an own CA, while a VM is replicated.

mod common;

use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use common::{LONG, MIB, VM, World, forged_offer, path};
use model::VmId;
use rig::{Output, Site, wait_for};
use serde_json::Value;
use wire::{Client, ErrorKind, Identity};

const QUICK: Duration = Duration::from_millis(2);
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

fn replicated(seed: u64) -> World {
    let mut world = World::new(seed);
    world.write(1, QUICK);
    world.protect("1s", &[]);
    world.replicating();
    world
}

/// Cycles end well again, by themselves, and the replica shows a state that the VM was in.
fn goes_on(world: &World) {
    let received = world.head.vm(VM).unwrap()["received"].as_u64();
    let later = |vm: &Value| vm["received"].as_u64() > received;
    world.head.wait_vm(VM, "a newer log", LONG, later).unwrap();
    let branch = world.branch.wait_vm(VM, "no error", LONG, |vm| vm["error"].is_null()).unwrap();
    assert_eq!(branch["state"], "replicating");
    let resynchronized = world.branch.log().matches("resynchronization is required").count();
    assert_eq!(resynchronized, 0, "nothing was lost that had to be compared");
    let backup = world.head.ok(&["backup", VM]).unwrap();
    world.state(&world.restore(backup["backup"].as_str().unwrap()));
}

fn stands_still(world: &World, word: &str) -> Value {
    let told = |vm: &Value| vm["error"]["message"].as_str().is_some_and(|message| message.contains(word));
    world.branch.wait_vm(VM, word, LONG, told).unwrap()
}

fn is_noted(site: &Site, kind: &str) -> bool {
    let events = site.ok(&["events", "--count", "500"]).unwrap();
    events["events"].as_array().unwrap().iter().any(|event| event["kind"] == kind)
}

fn shown(site: &Site) -> (String, String) {
    let identity = site.ok(&["identity", "show"]).unwrap();
    let text = |key: &str| identity[key].as_str().unwrap().to_owned();
    (text("fingerprint"), text("key"))
}

fn known(site: &Site, peer: &str) -> (String, String) {
    let row = site.ok(&["peer", "show", peer]).unwrap();
    let text = |key: &str| row[key].as_str().unwrap_or_default().to_owned();
    (text("fingerprint"), text("key"))
}

fn invite(world: &World, more: &[&str]) {
    let invite = world.head.ok(&[&["peer", "invite", "branch"], more].concat()).unwrap();
    world.branch.ok(&["peer", "accept", invite["invite"].as_str().unwrap()]).unwrap();
}

#[test]
fn a_revoked_peer_is_refused_with_the_reason_and_comes_back_with_all_it_had() {
    let mut world = replicated(91);
    world.head.ok(&["peer", "allow", "branch", "--quota", "3G"]).unwrap();
    let before = world.head.vm(VM).unwrap();
    let revoked = world.head.ok(&["peer", "revoke", "branch"]).unwrap();
    assert_eq!(revoked["replicas"], serde_json::json!([VM]));
    let refused = stands_still(&world, "has revoked branch");
    assert_eq!(
        (&refused["error"]["code"], &refused["error"]["transient"]),
        (&Value::from("not-authorized"), &Value::from(false))
    );
    assert!(is_noted(&world.head, "peer-revoked") && is_noted(&world.head, "revoked"));
    let client = common::client(&world.branch);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let refused = runtime.block_on(client.withdraw(before["id"].as_str().unwrap().parse().unwrap()));
    assert!(refused.unwrap_err().has_code("revoked"), "nothing at all is taken of it");
    // It is still an entry, across a restart too; and what it replicated is there.
    world.head.kill();
    world.head.serve().unwrap();
    assert!(!world.head.ok(&["peer", "show", "branch"]).unwrap()["revoked_at"].is_null());
    assert_eq!(world.head.vm(VM).unwrap()["withdrawn"], false);

    invite(&world, &[]);
    goes_on(&world);
    assert_eq!(world.head.vm(VM).unwrap()["id"], before["id"]);
    assert_eq!(world.head.ok(&["peer", "show", "branch"]).unwrap()["quota_bytes"], 3_u64 << 30);
}

fn serve_after(site: &mut Site, days: u64) {
    assert!(Path::new(FAKETIME).exists(), "libfaketime is needed: apt-get install faketime");
    let ahead = format!("+{}", days * 86_400);
    site.kill();
    let clock = [("LD_PRELOAD", FAKETIME), ("FAKETIME", &ahead), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")];
    site.serve_with(&clock).unwrap();
}

#[test]
fn certificates_are_renewed_in_time_and_a_site_that_slept_past_the_end_comes_back() {
    let mut world = replicated(92);
    let (first, key) = shown(&world.branch);
    assert_eq!(known(&world.head, "branch"), (first.clone(), key.clone()));

    // A site that runs renews by itself before the end is near; its peers know it by its key, and learn the new one.
    serve_after(&mut world.head, 600);
    serve_after(&mut world.branch, 600);
    let renewed = wait_for("a renewed certificate", LONG, || {
        Ok(Some(shown(&world.branch)).filter(|(fingerprint, _)| *fingerprint != first))
    });
    let (second, same) = renewed.unwrap();
    assert_eq!(same, key);
    goes_on(&world);
    wait_for("head to learn it", LONG, || Ok((known(&world.head, "branch").0 == second).then_some(())))
        .unwrap();
    assert!(is_noted(&world.branch, "certificate-renewed") && is_noted(&world.head, "peer-certificate"));

    // Down for years, past its certificate's end: it is still itself.
    world.branch.kill();
    serve_after(&mut world.head, 3000);
    let warned = world.head.ok(&["peer", "list"]).unwrap();
    assert_eq!(warned["warnings"][0]["code"], "certificate-ended", "{warned}");
    serve_after(&mut world.branch, 3000);
    goes_on(&world);
    wait_for("a renewed certificate", LONG, || Ok((shown(&world.branch).0 != second).then_some(()))).unwrap();
    wait_for("no warning any more", LONG, || {
        Ok((world.head.ok(&["status"])?["warnings"] == serde_json::json!([])).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_key_is_replaced_with_the_peers_told_or_else_by_a_new_invite() {
    let world = replicated(93);
    let (_, key) = shown(&world.branch);
    let renewed = world.branch.ok(&["identity", "renew"]).unwrap();
    assert_eq!(renewed["key"], key.as_str(), "over the same key");
    goes_on(&world);

    // Another key: head is told, and takes it when it is shown.
    let replaced = world.branch.ok(&["identity", "renew", "--new-key"]).unwrap();
    assert_eq!(replaced["told"], serde_json::json!(["head"]));
    assert_ne!(replaced["key"], key.as_str());
    goes_on(&world);
    wait_for("head to know it", LONG, || {
        Ok((known(&world.head, "branch") == shown(&world.branch)).then_some(()))
    })
    .unwrap();

    // Head's turn: branch is its peer, and knows it on.
    world.head.ok(&["identity", "renew", "--new-key"]).unwrap();
    goes_on(&world);
    wait_for("branch to know it", LONG, || {
        Ok((known(&world.branch, "head") == shown(&world.head)).then_some(()))
    })
    .unwrap();

    // With head out of reach nothing changes, unless a person wants it; then an invite makes the two peers again.
    let before = shown(&world.branch);
    world.line.cut();
    let refused: Output = world.branch.run(&["identity", "renew", "--new-key"]).unwrap();
    assert!(refused.status == 75 && refused.json.to_string().contains("--force"), "{refused:?}");
    assert_eq!(shown(&world.branch), before);
    let forced = world.branch.ok(&["identity", "renew", "--new-key", "--force"]).unwrap();
    assert_eq!(forced["missed"], serde_json::json!(["head"]));
    world.line.mend();
    stands_still(&world, "is of no peer of this site");
    let again = world.head.run(&["peer", "invite", "branch"]).unwrap();
    assert_eq!(again.code(), Some("exists"), "not by accident: {again:?}");
    invite(&world, &["--replace"]);
    goes_on(&world);
    assert_eq!(known(&world.head, "branch"), shown(&world.branch));
}

/// A CA of one's own.
struct Authority {
    dir: PathBuf,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(dir: &Path, name: &str) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let dir = dir.join(name);
        std::fs::create_dir(&dir).unwrap();
        std::fs::write(dir.join("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { dir, issuer: rcgen::Issuer::new(params, key) }
    }

    fn ca(&self) -> PathBuf {
        self.dir.join("ca.crt")
    }

    /// A certificate for `name` that is good for so many days from now, and its key.
    fn issue(&self, name: &str, days: u64) -> [PathBuf; 2] {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let end = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() / 86_400 + days;
        params.not_after = rcgen::date_time_ymd(1970, 1, 1) + Duration::from_secs(end * 86_400);
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        let files = ["crt", "key"].map(|kind| self.dir.join(format!("{name}-{days}.{kind}")));
        std::fs::write(&files[0], certificate.pem()).unwrap();
        let mut secret = std::fs::OpenOptions::new();
        let mut secret = secret.write(true).create(true).truncate(true).mode(0o600).open(&files[1]).unwrap();
        std::io::Write::write_all(&mut secret, key.serialize_pem().as_bytes()).unwrap();
        files
    }
}

fn install(site: &Site, [certificate, key]: &[PathBuf; 2], more: &[&str]) -> Output {
    let arguments = ["identity", "use", "--cert", path(certificate), "--key", path(key)];
    site.run(&[&arguments[..], more].concat()).unwrap()
}

#[test]
fn a_ca_of_ones_own_vouches_for_names_and_its_dates_count() {
    let mut world = replicated(94);
    let authority = Authority::new(world.dir.path(), "corporate");
    let ca = authority.ca();
    for (site, name, days) in
        [(&world.head, "head.example.org", 400), (&world.branch, "branch.example.org", 20)]
    {
        let installed = install(site, &authority.issue(name, days), &["--ca", path(&ca)]);
        assert_eq!(installed.status, 0, "{installed:?}");
        assert_eq!(installed.json["issued_by"], "a CA");
    }
    goes_on(&world);
    world.head.ok(&["peer", "allow", "branch", "--certificate-name", "branch.example.org"]).unwrap();
    world.branch.ok(&["peer", "allow", "head", "--certificate-name", "head.example.org"]).unwrap();
    goes_on(&world);
    let renewed = world.branch.run(&["identity", "renew"]).unwrap();
    assert!(renewed.json.to_string().contains("issued by a CA"), "{renewed:?}");

    // The end is near: said where people look.
    let status = wait_for("a warning", LONG, || {
        let status = world.head.ok(&["status"])?;
        Ok((status["warnings"][0]["peer"] == "branch").then_some(status))
    });
    let status = status.unwrap();
    assert_eq!(
        (&status["vms"][0]["health"], &status["warnings"][0]["code"]),
        (&Value::from("warning"), &Value::from("certificate-ends"))
    );
    assert!(status["vms"][0]["health_reason"].as_str().unwrap().contains("ends in"), "{status}");

    // Another key, of which nobody was told: the CA and the name are enough.
    world.line.cut();
    let installed = install(&world.branch, &authority.issue("branch.example.org", 25), &["--force"]);
    assert_eq!(installed.json["missed"], serde_json::json!(["head"]), "{installed:?}");
    world.line.mend();
    goes_on(&world);

    // Another CA's certificate for the name, and our CA's for another name, are strangers'.
    let forger = Authority::new(world.dir.path(), "forger");
    for [certificate, key] in
        [forger.issue("branch.example.org", 30), authority.issue("other.example.org", 30)]
    {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(certificate, dir.path().join("identity.crt")).unwrap();
        std::fs::copy(key, dir.path().join("identity.key")).unwrap();
        let identity = Identity::load(dir.path()).unwrap();
        let head = known(&world.branch, "head").0.parse().unwrap();
        let client = Client::new(&identity, world.head.address(), head).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime
            .block_on(client.offer(&forged_offer(VmId::from_bytes([9; 16]), "forged", MIB)))
            .unwrap_err();
        assert!(error.kind() == ErrorKind::Forbidden && error.has_code("unknown-peer"), "{error}");
    }

    // Past its end it is refused, by the name; with a new one it goes on by itself.
    serve_after(&mut world.head, 26);
    let refused = stands_still(&world, "not good today");
    assert_eq!(
        (&refused["error"]["code"], &refused["error"]["transient"]),
        (&Value::from("certificate"), &Value::from(true))
    );
    let installed = install(&world.branch, &authority.issue("branch.example.org", 300), &["--force"]);
    assert_eq!(installed.status, 0, "{installed:?}");
    goes_on(&world);
    let status = world.head.ok(&["status"]).unwrap();
    assert_eq!(status["warnings"], serde_json::json!([]), "{status}");
}
