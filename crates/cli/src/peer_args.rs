//! The arguments of `peer` and `identity`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use model::authorization::VmPatterns;
use model::{GroupName, VmName};
use site::Change;

use crate::args::{bytes, bytes_per_second};

#[derive(Debug, Subcommand)]
pub enum Peer {
    /// Print a line that makes another site a peer: it is good for 15 minutes and for one site.
    Invite {
        /// What the peer will be called here.
        name: VmName,
        #[command(flatten)]
        entry: Entry,
        /// A peer of this name has a new identity: whoever accepts takes its place, and its relationships.
        #[arg(long)]
        replace: bool,
    },
    /// Become a peer of the site that printed this line; `-` reads it from standard input.
    Accept {
        invite: String,
        #[command(flatten)]
        entry: Entry,
        /// The peer of that name has a new identity: this one takes its place, and its relationships.
        #[arg(long)]
        replace: bool,
    },
    /// The peers there are.
    List,
    /// Everything about one peer: what it may do here, and what its replicas take up.
    Show { name: String },
    /// Change what a peer may do at this site; what is not named stays as it is.
    Allow {
        name: String,
        #[command(flatten)]
        entry: Entry,
    },
    /// Take back all that a peer may do here, at once; its replicas stay, and an invite brings it back.
    Revoke { name: String },
    /// End the trust in a peer, and forget it.
    Remove { name: String },
}

/// This site's certificate.
#[derive(Debug, Subcommand)]
pub enum Identity {
    /// Which certificate this site shows, and until when it is good.
    Show,
    /// Make a new certificate now: over the same key, which needs nothing else, or with another one.
    Renew {
        /// Another key: all peers are told of it first, and know the site by it from then on.
        #[arg(long)]
        new_key: bool,
        /// Even if a peer cannot be told; it has to be invited anew, with --replace.
        #[arg(long, requires = "new_key")]
        force: bool,
    },
    /// Show a certificate from your own CA, know peers by it, or both.
    Use {
        /// The certificate in PEM, with those between it and the CA after it.
        #[arg(long, value_name = "FILE", requires = "key", required_unless_present = "ca")]
        cert: Option<PathBuf>,
        /// Its key in PEM, which only you can read.
        #[arg(long, value_name = "FILE", requires = "cert")]
        key: Option<PathBuf>,
        /// The CA's certificate in PEM: it vouches for peers with a --certificate-name.
        #[arg(long, value_name = "FILE")]
        ca: Option<PathBuf>,
        /// Even if a peer cannot be told; it has to be invited anew, with --replace.
        #[arg(long, requires = "cert")]
        force: bool,
    },
}

/// What a peer may do at this site.
#[derive(Debug, Clone, Default, Args)]
pub struct Entry {
    /// Which VMs it may replicate to this site, by name: '*' stands for anything, '?' for one character (web-*,db-?).
    #[arg(long, value_name = "PATTERNS")]
    pub vms: Option<VmPatterns>,
    /// The folder that its new replicas are made in; 'default' is the site's own.
    #[arg(long, value_name = "DIR")]
    pub storage: Option<PathBuf>,
    /// How much its replicas may take up here, such as 500G or 2T; 'none' for all there is.
    #[arg(long, value_parser = or_none(bytes), value_name = "SIZE")]
    pub quota: Option<Change<u64>>,
    /// How fast its logs are taken, over all its VMs, in bytes per second (500k, 2M, 1G); 'none' for as they come.
    #[arg(long, value_parser = or_none(bytes_per_second), value_name = "RATE")]
    pub bandwidth: Option<Change<u64>>,
    /// Its trust group: peers of one group may take over each other's VMs; 'none' for no group.
    #[arg(long, value_parser = or_none(group), value_name = "NAME")]
    pub group: Option<Change<GroupName>>,
    /// Know it by any certificate that your CA has issued for this DNS name or address ('identity use --ca'), instead of
    /// by its key; 'none' for its key again.
    #[arg(long, value_parser = or_none(any_text), value_name = "NAME")]
    pub certificate_name: Option<Change<String>>,
}

/// What takes an option away again.
const NONE: &str = "none";

pub(crate) fn or_none<T>(
    parse: impl Fn(&str) -> Result<T, String> + Clone,
) -> impl Fn(&str) -> Result<Change<T>, String> + Clone {
    move |text| if text == NONE { Ok(Change::Clear) } else { parse(text).map(Change::Set) }
}

pub(crate) fn any_text(text: &str) -> Result<String, String> {
    Ok(text.to_owned())
}

fn group(name: &str) -> Result<GroupName, String> {
    name.parse().map_err(|error: model::NameError| error.to_string())
}
