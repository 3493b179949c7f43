//! What a site must be able to do for its peers to talk to it.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use model::{LogId, LogNumber, VmId};

use crate::certificate::{KeyId, Shown};
use crate::identity::Fingerprint;
use crate::invite::Secret;
use crate::limiter::RateLimiter;
use crate::messages::{
    DigestRequest, HandOver, HandedOver, Offer, Refused, RelationshipStatus, Relocate, Relocation, Report,
    SiteInfo, TakeOver, TakenOver, UploadState,
};

/// Another site that this one trusts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// What this site calls it.
    pub name: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
}

/// Who is at the other end of a connection. [`crate::serve`] puts it into the extensions of each request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientIdentity {
    /// Its address.
    pub remote: SocketAddr,
    /// The certificate that it showed, if it did. It holds that certificate's key.
    pub fingerprint: Option<Fingerprint>,
    /// What that certificate says, as far as it can be read.
    pub shown: Option<Arc<Shown>>,
}

/// A site that brings an invite.
#[derive(Debug, Clone)]
pub struct Newcomer {
    /// What proves that it was invited; compare it with [`crate::SecretHash::matches`].
    pub secret: Secret,
    /// What it calls itself.
    pub name: String,
    /// Where it says that it can be reached, `host:port`.
    pub address: String,
    /// Its certificate.
    pub fingerprint: Fingerprint,
    /// What that says, as far as it can be read.
    pub shown: Option<Arc<Shown>>,
    /// Where it really called from.
    pub remote: SocketAddr,
}

/// Something that was not granted, for the site's events.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WireEvent {
    /// Where the request came from.
    pub remote: Option<SocketAddr>,
    /// The certificate shown, if one was.
    pub fingerprint: Option<Fingerprint>,
    /// The peer whose certificate it is, if it is one's.
    pub peer: Option<String>,
    /// The VM that it was about.
    pub vm: Option<VmId>,
    /// What was asked for, such as `append`.
    pub operation: &'static str,
    /// The HTTP status of the answer.
    pub status: u16,
    /// Why not; the refusal's code.
    pub code: String,
    /// The same for a person.
    pub message: String,
}

/// A site, as its peers see it. [`crate::router`] makes it speak HTTP.
///
/// What the implementation can rely on:
/// * a request of somebody who is no peer never comes here (but [`Self::accept_invite`]'s do);
/// * a call is never cancelled because the peer went away: it runs to its end;
/// * [`Self::append`] and [`Self::upload_state`] of one VM never run at once, and the bytes of an `append`
///   are all that the peer meant to send in it: 0 to [`crate::SEGMENT_BYTES`], never a part of them;
/// * every [`Refused`] that it gives is passed to [`Self::note`] too; it need not do so itself.
///
/// What it must do itself: decide whether that peer may do that to that VM.
pub trait Endpoint: Send + Sync + 'static {
    /// The peer that somebody with a certificate is, if it is one. Asked for every request, so that removing a peer works
    /// at once. One that is known and turned away, whatever it asks, is told why.
    fn find_peer(&self, who: &ClientIdentity) -> impl Future<Output = Result<Option<Peer>, Refused>> + Send;

    /// A site brings an invite: checks secret and expiry, uses the invite up and remembers the peer.
    fn accept_invite(&self, newcomer: Newcomer) -> impl Future<Output = Result<SiteInfo, Refused>> + Send;

    /// A peer tells which key it will have next, and has proved that it holds it: it is the same peer with that key, until it has shown it, with both. A
    /// site that cannot remember it refuses.
    fn announce(&self, peer: &Peer, _next: KeyId) -> impl Future<Output = Result<(), Refused>> + Send {
        let message =
            format!("this site cannot know {} by another key; it has to be invited anew", peer.name);
        std::future::ready(Err(Refused::forbidden("not-remembered", message)))
    }

    /// A primary offers a relationship, for the first time or again.
    fn offer(
        &self,
        peer: &Peer,
        offer: Offer,
    ) -> impl Future<Output = Result<RelationshipStatus, Refused>> + Send;

    /// A primary tells where it stands.
    fn report(
        &self,
        peer: &Peer,
        vm: VmId,
        report: Report,
    ) -> impl Future<Output = Result<(), Refused>> + Send;

    /// A primary no longer protects the VM. What is here stays until a person removes it.
    fn withdraw(&self, peer: &Peer, vm: VmId) -> impl Future<Output = Result<(), Refused>> + Send;

    /// A primary whose VM is off gives it to this site: from now on it runs here. Asked again, the answer is the same.
    fn hand_over(
        &self,
        peer: &Peer,
        vm: VmId,
        newest: HandOver,
    ) -> impl Future<Output = Result<HandedOver, Refused>> + Send;

    /// A peer to whose site a VM was moved becomes its primary in another one's place. Asked again, the answer is the
    /// same. A site may let nobody do so.
    fn take_over(
        &self,
        _peer: &Peer,
        vm: TakeOver,
    ) -> impl Future<Output = Result<TakenOver, Refused>> + Send {
        let message = format!("VM {} is not given to another peer here", vm.vm_name);
        std::future::ready(Err(Refused::forbidden("forbidden", message)))
    }

    /// A primary has the replica of its VM moved to another site. Asked again, each step's answer is the same. A site may
    /// not be able to do so.
    fn relocate(
        &self,
        peer: &Peer,
        _vm: VmId,
        _relocate: Relocate,
    ) -> impl Future<Output = Result<Relocation, Refused>> + Send {
        let message = format!("this site moves no replica of {} to another one", peer.name);
        std::future::ready(Err(Refused::forbidden("not-moved", message)))
    }

    /// How much of a log is here. A log of which nothing is here yet has offset 0; one that is durable says
    /// so, for as long as it is the newest.
    fn upload_state(
        &self,
        peer: &Peer,
        vm: VmId,
        number: LogNumber,
        id: LogId,
    ) -> impl Future<Output = Result<UploadState, Refused>> + Send;

    /// Takes the next bytes of a log; with `last` it answers only once the log is durable. Bytes at another
    /// offset than the one reached are refused with [`Refused::wrong_offset`].
    #[expect(clippy::too_many_arguments, reason = "they are what one request says")]
    fn append(
        &self,
        peer: &Peer,
        vm: VmId,
        number: LogNumber,
        id: LogId,
        offset: u64,
        bytes: Bytes,
        last: bool,
    ) -> impl Future<Output = Result<UploadState, Refused>> + Send;

    /// How fast the logs of a peer are read, over all its VMs; none for as fast as they come.
    fn pace(&self, _peer: &Peer) -> Option<RateLimiter> {
        None
    }

    /// The digests of a stretch of a disk in its newest state, 16 bytes each, one after the other.
    fn digests(
        &self,
        peer: &Peer,
        vm: VmId,
        request: DigestRequest,
    ) -> impl Future<Output = Result<Vec<u8>, Refused>> + Send;

    /// Writes an event down. The answer waits for it, so it should not take long.
    fn note(&self, event: WireEvent) -> impl Future<Output = ()> + Send;
}
