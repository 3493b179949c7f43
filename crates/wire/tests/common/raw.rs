//! TLS by hand, for what a well-behaved client never does.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, Error, SignatureScheme, SupportedProtocolVersion};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use wire::Fingerprint;

/// A certificate and key that are not kept.
pub struct RawIdentity {
    certificate: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl RawIdentity {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        wire::Identity::create(dir.path(), "raw").unwrap();
        Self {
            certificate: CertificateDer::from_pem_file(dir.path().join("identity.crt")).unwrap(),
            key: PrivateKeyDer::from_pem_file(dir.path().join("identity.key")).unwrap(),
        }
    }

    /// One whose certificate has run out long ago.
    pub fn expired() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(2001, 1, 1);
        let certificate = params.self_signed(&key).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        Self { certificate: certificate.der().clone(), key }
    }

    /// This one's certificate with the key of another: what a thief has who saw only what is public.
    pub fn with_key_of(&self, other: &Self) -> Self {
        Self { certificate: self.certificate.clone(), key: other.key.clone_key() }
    }

    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(&self.certificate)
    }
}

/// Shows a certificate without asking whether the key is its own.
#[derive(Debug)]
struct Shows(Arc<rustls::sign::CertifiedKey>);

impl rustls::client::ResolvesClientCert for Shows {
    fn resolve(
        &self,
        _hints: &[&[u8]],
        _schemes: &[SignatureScheme],
    ) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// Connects with or without a certificate, and looks at the server's not at all.
pub async fn connect(
    address: &str,
    identity: Option<&RawIdentity>,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let config = match identity {
        None => builder.with_no_client_auth(),
        Some(raw) => {
            let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&raw.key).unwrap();
            let shown = rustls::sign::CertifiedKey::new(vec![raw.certificate.clone()], key);
            builder.with_client_cert_resolver(Arc::new(Shows(Arc::new(shown))))
        }
    };
    let tcp = TcpStream::connect(address).await?;
    TlsConnector::from(Arc::new(config)).connect(ServerName::try_from("anybody").unwrap(), tcp).await
}

/// Connects with TLS 1.3.
pub async fn tls(address: &str, identity: Option<&RawIdentity>) -> TlsStream<TcpStream> {
    connect(address, identity, &[&rustls::version::TLS13]).await.unwrap()
}

/// Sends `head` (its lines without the last, empty one) and `body`, and reads until the server hangs up.
pub async fn ask(address: &str, identity: Option<&RawIdentity>, head: &str, body: &[u8]) -> String {
    let mut stream = tls(address, identity).await;
    let head = format!("{head}\r\nHost: site\r\nConnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(body).await.unwrap();
    stream.flush().await.unwrap();
    rest(stream).await
}

/// What the server says until it hangs up, however it does.
pub async fn rest(mut stream: TlsStream<TcpStream>) -> String {
    let mut answer = Vec::new();
    let reading = tokio::time::timeout(super::SOON, async {
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer).await {
            answer.extend_from_slice(&buffer[..n]);
        }
    });
    reading.await.expect("the server hangs up");
    String::from_utf8_lossy(&answer).into_owned()
}

#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms.supported_schemes()
    }
}
