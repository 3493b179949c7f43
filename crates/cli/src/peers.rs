//! `peer`: what is asked, and what is shown.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;
use site::{Change, Code, EntryChange, Failure, Request};

use crate::absolute;
use crate::args::{Entry, Identity, Peer};
use crate::show::{bytes, list, moment, table, text};

/// What stands for the site's own storage folder.
const DEFAULT: &str = "default";

pub fn request(command: &Peer) -> Result<Request, Failure> {
    Ok(match command {
        Peer::Invite { name, entry, replace } => {
            Request::PeerInvite { name: name.clone(), change: change(entry)?, replace: *replace }
        }
        Peer::Accept { invite, entry, replace } => {
            Request::PeerAccept { invite: line_or_stdin(invite)?, change: change(entry)?, replace: *replace }
        }
        Peer::List => Request::PeerList,
        Peer::Show { name } => Request::PeerShow { name: name.clone() },
        Peer::Allow { name, entry } => {
            let change = change(entry)?;
            if change == EntryChange::default() {
                let message = format!(
                    "name what {name} is to be allowed: --vms, --storage, --quota, --bandwidth, --group or --certificate-name; 'afterimage peer show {name}' tells what it is allowed now"
                );
                return Err(Failure::new(Code::Usage, message));
            }
            Request::PeerAllow { name: name.clone(), change }
        }
        Peer::Revoke { name } => Request::PeerRevoke { name: name.clone() },
        Peer::Remove { name } => Request::PeerRemove { name: name.clone() },
    })
}

pub fn identity_request(command: &Identity) -> Result<Request, Failure> {
    Ok(match command {
        Identity::Show => Request::Identity,
        Identity::Renew { new_key, force } => Request::IdentityRenew { new_key: *new_key, force: *force },
        Identity::Use { cert, key, ca, force } => Request::IdentityUse {
            pair: match (cert, key) {
                (Some(cert), Some(key)) => Some((absolute(cert)?, absolute(key)?)),
                _ => None,
            },
            ca: ca.as_deref().map(absolute).transpose()?,
            force: *force,
        },
    })
}

fn change(entry: &Entry) -> Result<EntryChange, Failure> {
    let storage = match &entry.storage {
        None => Change::Keep,
        Some(folder) if folder == Path::new(DEFAULT) => Change::Clear,
        Some(folder) => Change::Set(absolute(folder)?),
    };
    Ok(EntryChange {
        vms: entry.vms.clone(),
        storage,
        quota_bytes: entry.quota.unwrap_or_default(),
        bandwidth_bytes_per_s: entry.bandwidth.unwrap_or_default(),
        group: entry.group.clone().unwrap_or_default(),
        certificate_name: entry.certificate_name.clone().unwrap_or_default(),
    })
}

/// `-` stands for a line on standard input: what is on a command line, everybody on this machine can read.
fn line_or_stdin(argument: &str) -> Result<String, Failure> {
    if argument != "-" {
        return Ok(argument.to_owned());
    }
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|error| Failure::new(Code::Io, format!("cannot read the invite: {error}")))?;
    Ok(line.trim().to_owned())
}

pub fn shown(request: &Request, answer: &Value) -> String {
    match request {
        Request::PeerInvite { name, replace, .. } => {
            let replace = if *replace { "--replace " } else { "" };
            format!(
                "Run this at {name}, within 15 minutes (it is good for one site):\n\n  afterimage peer accept {replace}{}\n",
                text(&answer["invite"])
            )
        }
        Request::PeerAccept { .. } => format!("{} and this site are peers now.", text(&answer["name"])),
        Request::PeerList => all(list(&answer["peers"])) + &warnings(answer),
        Request::Identity | Request::IdentityRenew { .. } | Request::IdentityUse { .. } => identity(answer),
        Request::PeerRevoke { name } => format!(
            "{name} is revoked: nothing of it is taken, and nothing is sent to it. Its replicas here ({}) stay.\n\
             'afterimage peer invite {name}' brings it back, and 'afterimage peer remove {name}' forgets it.",
            names(&answer["replicas"])
        ),
        Request::PeerShow { .. } => one(answer),
        Request::PeerAllow { change, .. } => {
            let mut shown = one(answer);
            let there_are = !list(&answer["replicas"]).is_empty();
            if matches!(change.storage, Change::Set(_) | Change::Clear) && there_are {
                let _ = write!(
                    shown,
                    "\nReplicas that are here stay where they are; 'afterimage migrate VM --storage DIR' moves one."
                );
            }
            shown
        }
        Request::PeerRemove { name } => format!("{name} is no peer any more; what it replicated here stays."),
        _ => answer.to_string(),
    }
}

fn all(peers: &[Value]) -> String {
    let row = |peer: &Value| {
        let cell = |key: &str| text(&peer[key]).to_owned();
        vec![
            cell("name"),
            cell("address"),
            may_send(peer),
            bytes(&peer["quota_bytes"]),
            cell("group"),
            moment(&peer["since"]),
            cell("fingerprint").chars().take(16).collect(),
        ]
    };
    let rows: Vec<_> = peers.iter().map(row).collect();
    if rows.is_empty() {
        return "No peers; 'afterimage peer invite NAME' makes one.".into();
    }
    table(&["PEER", "ADDRESS", "MAY SEND", "QUOTA", "GROUP", "SINCE", "FINGERPRINT"], &rows)
}

/// What is to be said of certificates, if anything.
pub fn warnings(answer: &Value) -> String {
    let lines =
        list(&answer["warnings"]).iter().map(|warning| format!("\nWarning: {}", text(&warning["message"])));
    lines.collect()
}

fn identity(answer: &Value) -> String {
    let mut shown = format!(
        "  fingerprint  {}\n  key          {}\n  issued by    {}\n  good until   {}\n",
        text(&answer["fingerprint"]),
        text(&answer["key"]),
        text(&answer["issued_by"]),
        moment(&answer["expires_at"]),
    );
    if !list(&answer["told"]).is_empty() {
        let _ = writeln!(shown, "  told         {}", names(&answer["told"]));
    }
    for peer in list(&answer["missed"]) {
        let peer = text(peer);
        let _ = writeln!(shown, "{peer} does not know it: run 'afterimage peer invite {peer} --replace'");
    }
    shown
}

fn may_send(peer: &Value) -> String {
    match peer["revoked_at"].as_str() {
        Some(_) => "nothing: revoked".to_owned(),
        None => text(&peer["vms"]).to_owned(),
    }
}

fn one(peer: &Value) -> String {
    let mut shown = format!("{}\n", text(&peer["name"]));
    let mut line = |what: &str, value: String| {
        let _ = writeln!(shown, "  {what:<12} {value}");
    };
    line("address", text(&peer["address"]).to_owned());
    line("since", moment(&peer["since"]));
    if let Some(at) = peer["revoked_at"].as_str() {
        line("revoked", format!("at {}: nothing of it is taken", moment(&at.into())));
    }
    line("may send", text(&peer["vms"]).to_owned());
    line("storage", peer["storage"].as_str().unwrap_or("the site's own folder").to_owned());
    line(
        "quota",
        match peer["quota_bytes"].is_u64() {
            false => "none".to_owned(),
            true => format!("{}, {} left", bytes(&peer["quota_bytes"]), bytes(&peer["left_bytes"])),
        },
    );
    line(
        "bandwidth",
        peer["bandwidth_bytes_per_s"].as_u64().map_or_else(
            || "not limited here".to_owned(),
            |rate| format!("{} per second for all its VMs together", indicatif::DecimalBytes(rate)),
        ),
    );
    line("group", peer["group"].as_str().unwrap_or("none").to_owned());
    line("replicas", format!("{}; they take up {}", names(&peer["replicas"]), bytes(&peer["used_bytes"])));
    line("protected", format!("{} (replicated there from here)", names(&peer["protected"])));
    line("fingerprint", text(&peer["fingerprint"]).to_owned());
    line("certificate", format!("good until {}", moment(&peer["expires_at"])));
    let known_by = match (peer["certificate_name"].as_str(), peer["key"].as_str()) {
        (Some(name), _) => format!("a certificate of our CA for {name}"),
        (None, Some(key)) => format!("its key {key}"),
        (None, None) => "this certificate alone; its key is learnt with the next connection".to_owned(),
    };
    line("known by", known_by);
    if let Some(next) = peer["next_key"].as_str() {
        line("next key", format!("{next}, announced and not yet shown"));
    }
    shown
}

fn names(value: &Value) -> String {
    let names: Vec<&str> = list(value).iter().map(text).collect();
    if names.is_empty() { "none".to_owned() } else { names.join(", ") }
}
