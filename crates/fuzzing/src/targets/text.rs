//! Texts: invites that people paste, the config file, commands on the control socket.

use base64::Engine;
use site::{Config, Request};
use wire::Invite;

/// A line that somebody pasted.
pub(crate) fn invite(data: &[u8]) {
    invite_bytes(data);
    let Ok(line) = std::str::from_utf8(data) else { return };
    match line.parse::<Invite>() {
        Ok(invite) => assert_eq!(invite.to_string(), line.trim(), "an invite has one spelling"),
        // The error is for a person: it must not carry a secret or control a terminal.
        Err(error) => assert!(!error.to_string().contains('\u{1b}'), "{error}"),
    }
}

/// The bytes of an invite, which get their check digits: who makes one up can make them right.
fn invite_bytes(data: &[u8]) {
    let bytes = [data, &blake3::hash(data).as_bytes()[..4]].concat();
    let line = format!("afterimage1.{}", base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes));
    if let Ok(invite) = line.parse::<Invite>() {
        assert_eq!(invite.to_string(), line, "an invite has one spelling");
        let secret = String::from(invite.secret.clone());
        assert!(!format!("{invite:?}").contains(&secret), "a secret is not shown");
        let _ = invite.check_time(model::Timestamp::default()).map_err(|error| error.to_string());
    }
}

/// The text of `config.toml`.
pub(crate) fn config(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(config) = Config::parse(text) {
        let _ = (config.retry_policy(), config.thresholds(), config.backoff(), config.advertised());
        for name in config.repositories.keys() {
            let _ = config.repository(std::path::Path::new("/site"), name);
        }
    }
}

/// A request on the control socket.
pub(crate) fn command(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let text = serde_json::to_vec(&request).expect("a request can be written");
        assert_eq!(serde_json::from_slice::<Request>(&text).expect("and read"), request);
    }
}
