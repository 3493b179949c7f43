//! Reads the bodies of requests: whole or not at all, within bounds of size and time.

use std::time::Duration;

use axum::body::Body;
use bytes::{Bytes, BytesMut};
use http::StatusCode;
use http_body_util::BodyExt;
use hyper::body::Body as _;
use serde::de::DeserializeOwned;
use tokio::time::{Instant, timeout_at};

use crate::limiter::RateLimiter;
use crate::limits::{JSON_BYTES_MAX, Limits, SEGMENT_BYTES};
use crate::messages::{Refused, RefusedClass, codes};
use crate::routes::Denied;

/// What is read of a body that nobody wants, so that its sender gets to hear why.
const DRAIN_TIME: Duration = Duration::from_secs(5);

/// How long a body may pause, and how long it may take.
#[derive(Debug, Clone)]
struct Pace {
    idle: Duration,
    all: Duration,
    /// What keeps us from reading on at once. How long it does counts for neither of the two.
    limiter: Option<RateLimiter>,
}

/// Reads a JSON body.
pub(crate) async fn read_json<T: DeserializeOwned>(body: Body, limits: &Limits) -> Result<T, Denied> {
    let pace = Pace { idle: limits.body_idle, all: limits.json_body, limiter: None };
    let bytes = read(body, JSON_BYTES_MAX, pace).await?;
    serde_json::from_slice(&bytes).map_err(|error| {
        let message = format!("the body is not the JSON that is expected here: {error}");
        Refused::new(RefusedClass::Invalid, codes::BAD_BODY, message).into()
    })
}

/// Reads the bytes of a segment, no faster than `limiter` lets: the sender's connection fills, and he waits.
pub(crate) async fn read_segment(
    body: Body,
    limits: &Limits,
    limiter: Option<RateLimiter>,
) -> Result<Bytes, Denied> {
    read(body, SEGMENT_BYTES, Pace { idle: limits.body_idle, all: limits.segment_body, limiter }).await
}

/// The body's length as its head says, if that is within `max`.
pub(crate) fn check_length(body: &Body, max: usize) -> Result<usize, Denied> {
    let Some(length) = body.size_hint().exact() else {
        let message = "the body has no Content-Length";
        return Err(denied(StatusCode::LENGTH_REQUIRED, codes::NO_LENGTH, message));
    };
    match usize::try_from(length) {
        Ok(length) if length <= max => Ok(length),
        _ => {
            let message = format!("the body has {length} bytes; at most {max} are taken");
            Err(denied(StatusCode::PAYLOAD_TOO_LARGE, codes::TOO_LARGE, message))
        }
    }
}

async fn read(mut body: Body, max: usize, pace: Pace) -> Result<Bytes, Denied> {
    let length = check_length(&body, max)?;
    let mut end = Instant::now() + pace.all;
    let mut first = Bytes::new();
    let mut whole = BytesMut::new();
    let mut has = 0;
    while has < length {
        let frame = timeout_at(end.min(Instant::now() + pace.idle), body.frame()).await;
        let data = match frame {
            Err(_) => return Err(too_slow(has, length)),
            // A connection that ends may show as an error or as an early end.
            Ok(None | Some(Err(_))) => return Err(truncated(has, length)),
            Ok(Some(Ok(frame))) => frame.into_data().unwrap_or_default(),
        };
        has += data.len();
        if let Some(limiter) = &pace.limiter {
            let before = Instant::now();
            limiter.take(data.len()).await;
            end += before.elapsed();
        }
        match () {
            () if has == data.len() => first = data, // what comes in one piece is not copied
            () if whole.is_empty() => {
                whole.reserve(length);
                whole.extend_from_slice(&std::mem::take(&mut first));
                whole.extend_from_slice(&data);
            }
            () => whole.extend_from_slice(&data),
        }
    }
    Ok(if whole.is_empty() { first } else { whole.freeze() })
}

/// Reads and forgets a body, so that the answer is not lost in a connection that is reset.
pub(crate) async fn drain(mut body: Body) {
    if check_length(&body, SEGMENT_BYTES).is_ok() {
        let all = async { while let Some(Ok(_)) = body.frame().await {} };
        let _ = tokio::time::timeout(DRAIN_TIME, all).await;
    }
}

fn truncated(has: usize, length: usize) -> Denied {
    let message = format!("the body ended after {has} of its {length} bytes; none of them was taken");
    denied(StatusCode::BAD_REQUEST, codes::TRUNCATED, message)
}

fn too_slow(has: usize, length: usize) -> Denied {
    let message = format!("the body came too slowly: {has} of its {length} bytes; none of them was taken");
    denied(StatusCode::REQUEST_TIMEOUT, codes::TOO_SLOW, message)
}

fn denied(status: StatusCode, code: &str, message: impl Into<String>) -> Denied {
    Denied { status, refused: Refused::new(RefusedClass::Invalid, code, message) }
}
