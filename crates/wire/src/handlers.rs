//! What each endpoint does with a request that was let in: reads it, bounds it, asks the site.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::Query;
use axum::response::{IntoResponse, Response};
use http::{StatusCode, header};
use model::{LogId, LogNumber, VmId};
use serde::Deserialize;

use crate::body::{check_length, read_json, read_segment};
use crate::endpoint::{Endpoint, Newcomer};
use crate::invite::check_address;
use crate::limits::{DIGESTS_MAX, SEGMENT_BYTES};
use crate::messages::{
    DigestRequest, HandOver, Introduction, Offer, Refused, RefusedClass, Relocate, Report, TakeOver,
    check_site_name, codes,
};
use crate::routes::{Call, Denied, bad_id, json};
use crate::succession::NextKey;

/// How long somebody should wait who came when too many segments were arriving.
const BUSY_RETRY_S: u64 = 1;

type Answer = Result<Response, Denied>;

/// `POST /v1/peers`
pub(crate) async fn accept_invite<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    // One who has guessed too often is not even read.
    if let Some(left) = call.network().and_then(|network| call.site.wrong_secrets.is_over(network)) {
        let message = "too many invites from there were wrong; try again later";
        let refused = Refused::new(RefusedClass::Busy, codes::TOO_MANY_ATTEMPTS, message);
        let refused = refused.retry_after(left.as_secs().max(1));
        return Err(Denied { status: StatusCode::TOO_MANY_REQUESTS, refused });
    }
    let introduction: Introduction = read_json(body, &call.site.limits).await?;
    check_site_name(&introduction.name).map_err(|error| bad_body(error.to_string()))?;
    check_address(&introduction.address).map_err(|error| bad_body(error.to_string()))?;
    let (Some(fingerprint), Some(client)) = (call.fingerprint(), call.client.clone()) else {
        return Err(bad_body("a client certificate is needed".to_owned()));
    };
    let newcomer = Newcomer {
        secret: introduction.secret,
        name: introduction.name,
        address: introduction.address,
        fingerprint,
        shown: client.shown,
        remote: client.remote,
    };
    match call.site.endpoint.accept_invite(newcomer).await {
        Ok(site) => Ok(json(StatusCode::OK, &site)),
        Err(refused) => {
            call.site.wrong_secrets.count(crate::doors::network(client.remote.ip()));
            Err(refused.into())
        }
    }
}

/// `POST /v1/next-key`
pub(crate) async fn announce<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let next: NextKey = read_json(body, &call.site.limits).await?;
    let shown = call.client.as_ref().and_then(|client| client.shown.clone());
    let proved = shown.and_then(|shown| next.prove(shown.key));
    let proved =
        proved.ok_or_else(|| bad_body("it is not signed by that key, to follow the one shown".to_owned()))?;
    call.site.endpoint.announce(call.peer()?, proved).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `PUT /v1/relationships/{vm}`
pub(crate) async fn offer<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let vm: VmId = call.id("vm")?;
    let mut offer: Offer = read_json(body, &call.site.limits).await?;
    offer.tidy();
    offer.check().map_err(bad_body)?;
    if offer.vm != vm {
        return Err(bad_body(format!("the offer is of VM {}, the address of VM {vm}", offer.vm)));
    }
    let status = call.site.endpoint.offer(call.peer()?, offer).await?;
    Ok(json(StatusCode::OK, &status))
}

/// `DELETE /v1/relationships/{vm}`
pub(crate) async fn withdraw<E: Endpoint>(call: Arc<Call<E>>, _body: Body) -> Answer {
    call.site.endpoint.withdraw(call.peer()?, call.id("vm")?).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `POST /v1/relationships/{vm}/report`
pub(crate) async fn report<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let vm = call.id("vm")?;
    let mut report: Report = read_json(body, &call.site.limits).await?;
    report.tidy();
    call.site.endpoint.report(call.peer()?, vm, report).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

/// `POST /v1/relationships/{vm}/hand-over`
pub(crate) async fn hand_over<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let vm = call.id("vm")?;
    let newest: HandOver = read_json(body, &call.site.limits).await?;
    let handed = call.site.endpoint.hand_over(call.peer()?, vm, newest).await?;
    Ok(json(StatusCode::OK, &handed))
}

/// `POST /v1/relationships/{vm}/relocate`
pub(crate) async fn relocate<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let vm = call.id("vm")?;
    let wanted: Relocate = read_json(body, &call.site.limits).await?;
    let relocation = call.site.endpoint.relocate(call.peer()?, vm, wanted).await?;
    Ok(json(StatusCode::OK, &relocation))
}

/// `POST /v1/take-over`
pub(crate) async fn take_over<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let wanted: TakeOver = read_json(body, &call.site.limits).await?;
    let taken = call.site.endpoint.take_over(call.peer()?, wanted).await?;
    Ok(json(StatusCode::OK, &taken))
}

/// `POST /v1/relationships/{vm}/digests`
pub(crate) async fn digests<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let vm = call.id("vm")?;
    let request: DigestRequest = read_json(body, &call.site.limits).await?;
    let blocks_are_usable = request.block_bytes >= model::BLOCK_BYTES;
    if !blocks_are_usable
        || request.digests() > DIGESTS_MAX
        || request.offset.checked_add(request.len).is_none()
    {
        return Err(bad_body(format!(
            "digests of {} bytes from {} in blocks of {} are not given: at most {DIGESTS_MAX} blocks, of at least {} bytes",
            request.len,
            request.offset,
            request.block_bytes,
            model::BLOCK_BYTES
        )));
    }
    let peer = call.peer()?;
    let limits = &call.site.limits;
    let turn = tokio::time::timeout(limits.segment_turn, call.site.digests.take(peer.fingerprint)).await;
    let _turn = turn.map_err(|_| busy("more digests are asked for than this site computes at once"))?;
    let digests = call.site.endpoint.digests(peer, vm, request).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], digests).into_response())
}

/// `GET /v1/relationships/{vm}/logs/{number}/{id}`
pub(crate) async fn upload_state<E: Endpoint>(call: Arc<Call<E>>, _body: Body) -> Answer {
    let (vm, number, id) = log_of(&call)?;
    let peer = call.peer()?;
    let _turn = call.site.locks.lock(vm).await;
    let state = call.site.endpoint.upload_state(peer, vm, number, id).await?;
    Ok(json(StatusCode::OK, &state))
}

/// The query of an upload.
#[derive(Deserialize)]
struct Place {
    offset: u64,
    last: bool,
}

/// `PATCH /v1/relationships/{vm}/logs/{number}/{id}?offset=N&last=B`
pub(crate) async fn append<E: Endpoint>(call: Arc<Call<E>>, body: Body) -> Answer {
    let (vm, number, id) = log_of(&call)?;
    let Query(place) = Query::<Place>::try_from_uri(&call.parts.uri)
        .map_err(|error| bad_id(format!("the query is not ?offset=N&last=true|false: {error}")))?;
    let length = check_length(&body, SEGMENT_BYTES)?;
    if place.offset.checked_add(length as u64).is_none() {
        return Err(bad_id(format!("no log has {length} bytes from offset {} on", place.offset)));
    }
    let peer = call.peer()?;
    let limits = &call.site.limits;
    let room = tokio::time::timeout(limits.segment_turn, call.site.segments.take(peer.fingerprint)).await;
    let _room = room.map_err(|_| busy("more uploads arrive than this site takes at once"))?;
    let bytes = read_segment(body, limits, call.site.endpoint.pace(peer)).await?;
    let _turn = call.site.locks.lock(vm).await;
    let state = call.site.endpoint.append(peer, vm, number, id, place.offset, bytes, place.last).await?;
    Ok(json(StatusCode::OK, &state))
}

fn log_of<E: Endpoint>(call: &Call<E>) -> Result<(VmId, LogNumber, LogId), Denied> {
    Ok((call.id("vm")?, LogNumber(call.id("number")?), call.id("id")?))
}

fn busy(message: &str) -> Denied {
    Refused::new(RefusedClass::Busy, codes::BUSY, message).retry_after(BUSY_RETRY_S).into()
}

fn bad_body(message: String) -> Denied {
    Refused::new(RefusedClass::Invalid, codes::BAD_BODY, message).into()
}
