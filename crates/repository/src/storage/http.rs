//! HTTP as REST servers and S3 need it: one request, one answer, told apart by what they mean for a repository.

use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::{Request, Response, StatusCode, header};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};
use ureq::{Agent, Body};

use super::{Trouble, TroubleKind};
use crate::error::Error;
use crate::location::Access;

/// Packs are written by this many threads: most of the time they wait for the server.
pub(crate) const WRITERS: usize = 4;
/// How long a server may take to be reached.
const CONNECT: Duration = Duration::from_secs(10);
/// The delays after which a request that met trouble is sent again.
const AGAIN: [Duration; 3] = [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3)];
/// No answer of a server is longer: a pack, and lists of files.
const ANSWER_BYTES_MAX: u64 = 512 << 20;
/// Where Linux distributions keep the certificates of the authorities that they trust.
const AUTHORITIES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// A request that can be sent again: how it is made, since a signature has a time in it.
pub(crate) type Make<'a> = dyn Fn() -> Result<Request<&'a [u8]>, Trouble> + 'a;

/// What a server answered.
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
    /// What it says of the length; for HEAD, that of the file.
    pub(crate) length: Option<u64>,
}

/// A client with its connections.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    timeout: Duration,
}

impl Client {
    /// A client for this base URL.
    pub(crate) fn new(base: &str, access: &Access) -> Result<Self, Error> {
        let timeout = access.timeout;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("afterimage/", env!("CARGO_PKG_VERSION")))
            .proxy(None)
            .max_idle_connections_per_host(2 * WRITERS)
            .timeout_connect(Some(CONNECT.min(timeout)))
            .timeout_global(Some(timeout));
        if base.starts_with("https://") {
            config = config.tls_config(tls(access)?);
        }
        Ok(Self { agent: config.build().new_agent(), timeout })
    }

    /// Sends a request until it is answered, or will not be. What was sent before may have been done all the same.
    pub(crate) fn send(&self, make: &Make<'_>) -> Result<Answer, Trouble> {
        let began = Instant::now();
        let mut delays = AGAIN.iter();
        loop {
            let trouble = match self.send_once(make()?) {
                Err(trouble) if trouble.is_transient() => trouble,
                settled => return settled,
            };
            match delays.next() {
                Some(delay) if began.elapsed() < self.timeout => {
                    tracing::debug!(%trouble, "asking the server again");
                    std::thread::sleep(*delay);
                }
                _ => return Err(trouble),
            }
        }
    }

    fn send_once(&self, request: Request<&[u8]>) -> Result<Answer, Trouble> {
        let answer = self.agent.run(request).map_err(of_line)?;
        let status = answer.status();
        let length = answer
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok()?.parse().ok());
        if status.is_success() {
            return Ok(Answer { bytes: body_of(answer)?, length });
        }
        // What goes wrong is said in the body; a body that cannot be read says nothing.
        let said = body_of(answer).unwrap_or_default();
        Err(of_status(status, &said))
    }
}

fn body_of(answer: Response<Body>) -> Result<Vec<u8>, Trouble> {
    answer.into_body().into_with_config().limit(ANSWER_BYTES_MAX).read_to_vec().map_err(of_line)
}

/// Of a request that was not answered at all.
fn of_line(error: ureq::Error) -> Trouble {
    use ureq::Error as E;
    match error {
        E::Rustls(_) | E::Tls(_) | E::Pem(_) => {
            Trouble::other(format!("the server's certificate is not accepted ({error}); set 'ca-file'"))
        }
        E::BadUri(_) | E::Http(_) | E::BodyExceedsLimit(_) => Trouble::other(error.to_string()),
        E::Timeout(_) => Trouble::unavailable(format!("the server does not answer in time ({error})")),
        E::HostNotFound => Trouble::unavailable("the server's name is not known"),
        E::Io(error) if error.get_ref().is_some_and(|inner| inner.is::<rustls::Error>()) => {
            Trouble::other(format!("the server's certificate is not accepted ({error}); set 'ca-file'"))
        }
        E::Io(error) => Trouble::unavailable(format!("the server cannot be reached ({error})")),
        error => Trouble::unavailable(format!("the connection to the server failed ({error})")),
    }
}

/// Of an answer that is none of success.
fn of_status(status: StatusCode, said: &[u8]) -> Trouble {
    let said = first_words(said);
    let (kind, what) = match status.as_u16() {
        404 => (TroubleKind::Missing, "the server has no such file"),
        416 => (TroubleKind::Short, "the file is shorter"),
        401 => (TroubleKind::Denied, "the server does not accept the user and the secret"),
        403 => (TroubleKind::Denied, "the server does not allow it"),
        507 => (TroubleKind::Unavailable, "the server has no space left"),
        408 | 425 | 429 | 500.. => (TroubleKind::Unavailable, "the server cannot now"),
        _ => (TroubleKind::Other, "the server refuses"),
    };
    let mut why = format!("{what} (HTTP {status}");
    if !said.is_empty() {
        why = format!("{why}: {said}");
    }
    why.push(')');
    Trouble::new(kind, why)
}

/// The first words of what a server says: XML of S3 by its code and message, else text.
fn first_words(said: &[u8]) -> String {
    let text = String::from_utf8_lossy(said);
    let tag = |name: &str| {
        let from = text.split_once(&format!("<{name}>"))?.1;
        from.split_once('<').map(|(inner, _)| inner.trim().to_owned())
    };
    let words = match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) if !message.is_empty() => format!("{code}, {message}"),
        (Some(code), _) => code,
        _ if text.trim_start().starts_with('<') => String::new(),
        _ => text.lines().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned(),
    };
    words.chars().filter(|letter| !letter.is_control()).take(200).collect()
}

fn tls(access: &Access) -> Result<TlsConfig, Error> {
    let roots = authorities(access)?;
    Ok(TlsConfig::builder()
        .provider(TlsProvider::Rustls)
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .root_certs(RootCerts::Specific(Arc::new(roots)))
        .build())
}

fn authorities(access: &Access) -> Result<Vec<Certificate<'static>>, Error> {
    let known = AUTHORITIES.iter().map(std::path::Path::new).find(|path| path.exists());
    let path = access.ca_file.as_deref().or(known).ok_or_else(|| Error::Unsupported {
        what:
            "this machine has no file of certificate authorities; install 'ca-certificates', or set 'ca-file'"
                .into(),
    })?;
    let pem = std::fs::read(path).map_err(|source| Error::io("cannot read", path, source))?;
    let certificates: Vec<_> = parse_pem(&pem)
        .filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        })
        .collect();
    if certificates.is_empty() {
        return Err(Error::Unsupported { what: format!("{} has no certificate in it", path.display()) });
    }
    Ok(certificates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_server_says_is_told_in_few_words() {
        let xml = "<?xml?><Error><Code>SlowDown</Code><Message>Please wait</Message></Error>";
        assert_eq!(first_words(xml.as_bytes()), "SlowDown, Please wait");
        assert_eq!(first_words(b"<html><body>nginx</body></html>"), "");
        assert_eq!(first_words(b"\nno space\x07 left\nmore"), "no space left");
    }

    #[test]
    fn only_what_may_clear_is_transient() {
        for (status, transient) in
            [(500, true), (503, true), (507, true), (429, true), (403, false), (400, false), (301, false)]
        {
            let trouble = of_status(StatusCode::from_u16(status).unwrap(), b"");
            assert_eq!(trouble.is_transient(), transient, "{trouble}");
        }
        assert_eq!(of_status(StatusCode::NOT_FOUND, b"").kind, TroubleKind::Missing);
    }
}
