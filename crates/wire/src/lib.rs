//! Sites talking: HTTPS with client certificates, invites, resumable uploads.
//!
//! One port per site: HTTP/1.1 over TLS 1.3. [`serve`] runs it, [`router`] makes a site (an [`Endpoint`]) speak
//! to its peers on it, and further routes can be merged beside. [`Client`] and [`Uploader`] are the other end.
//! `docs/format/wire-v1.md` and `docs/format/invite-v1.md` describe what travels.
//!
//! What holds:
//! * A site is its key, or a name that a CA vouches for ([`Pin`]). A client talks to exactly the one it was told; a
//!   server learns which one asks, and the site is asked about it for every request.
//! * No certificate: 401. One of nobody we know, or of a peer that was removed: 403. Each such request, and
//!   each [`Refused`], comes to [`Endpoint::note`] before it is answered.
//! * A segment of a log reaches [`Endpoint::append`] whole or not at all. An upload is done only when the
//!   replica has said that the log is durable.
//! * Everything a stranger can make us keep or wait for is bounded ([`Limits`]). Whoever takes more than others
//!   of what is bounded (connections, segments in memory, digests, lines in the events) takes it from himself.
//!
//! What it does not do: decide which peer may do what ([`Endpoint`]), look into logs, store anything but the
//! [`Identity`].

mod attempts;
mod body;
mod certificate;
mod client;
mod connection;
mod digest;
mod doors;
mod endpoint;
mod error;
mod handlers;
mod identity;
mod invite;
mod limiter;
mod limits;
mod locks;
mod messages;
mod outgoing;
mod routes;
mod server;
mod shares;
mod socket;
mod succession;
mod tls;
mod trust;
mod upload;

pub use certificate::{KeyId, Shown};
pub use client::{Accepted, Client};
pub use digest::{block_digest, zero_digest};
pub use endpoint::{ClientIdentity, Endpoint, Newcomer, Peer, WireEvent};
pub use error::{Error, ErrorKind, Result};
pub use identity::{Fingerprint, FingerprintError, Identity, IdentityError, RENEW_BEFORE};
pub use invite::{Invite, InviteError, Secret, SecretHash};
pub use limiter::RateLimiter;
pub use limits::{CONNECTIONS_MAX, DIGESTS_MAX, JSON_BYTES_MAX, Limits, SEGMENT_BYTES, SEGMENTS_MAX};
pub use messages::{
    Announced, DigestRequest, HandOver, HandedOver, HandedOverDisk, InStep, Offer, OfferedDisk, OfferedMedia,
    Refused, RefusedClass, RelationshipStatus, Relocate, RelocateStep, Relocation, Report, SiteInfo,
    SiteNameError, TakeOver, TakenOver, UploadState, check_site_name, codes,
};
pub use routes::{router, router_with};
pub use server::{serve, serve_with};
pub use succession::NextKey;
pub use trust::{Ca, Distrust, Pin, check_certificate_name};
pub use upload::Uploader;
