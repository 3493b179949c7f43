//! TLS 1.3, and nothing older, with both certificates judged by what their holders are known by.
//!
//! A client takes what fits its [`Pin`]. A server takes any certificate or none, and each request is then judged by what was
//! shown; so a peer that is removed loses its rights with its next request, not with its next connection.
//! What is always checked is that the other side holds the key of the certificate it shows. Sessions are
//! never resumed: every connection shows both certificates.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use model::Timestamp;
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use rustls::server::NoServerSessionStorage;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError,
    ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};

use crate::certificate::Shown;
use crate::identity::{Identity, provider};
use crate::trust::{Ca, Pin};

/// The protocol that both sides name, so that a stray HTTP/2 client learns at once.
const ALPN: &[u8] = b"http/1.1";

/// What a server needs for TLS.
pub(crate) fn server_config(identity: &Identity) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AnyClient))
        .with_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// What a client needs for TLS to the one server that is known by this.
pub(crate) fn client_config(identity: &Identity, known: KnownServer) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(known))
        .with_client_cert_resolver(Arc::new(identity.clone()));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The name that clients ask for; nobody looks at it, and it tells a listener nothing.
pub(crate) fn server_name() -> ServerName<'static> {
    const NAME: &str = "afterimage.invalid";
    ServerName::try_from(NAME).expect("the name is a valid one")
}

/// Takes the certificates of one server.
#[derive(Debug, Clone)]
pub(crate) struct KnownServer {
    pub pin: Pin,
    pub ca: Option<Ca>,
    /// The certificate that it has shown last.
    pub seen: Arc<Mutex<Option<Shown>>>,
}

impl ServerCertVerifier for KnownServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let chain = [std::slice::from_ref(end_entity), intermediates].concat();
        let Some(shown) = Shown::of(&chain) else {
            return Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        };
        let now = Timestamp::from(SystemTime::now());
        self.pin.check(&shown, self.ca.as_ref(), now).map_err(|distrust| {
            Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(distrust))))
        })?;
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(shown);
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Takes any client certificate whose key the client holds, or none.
#[derive(Debug)]
struct AnyClient;

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}
