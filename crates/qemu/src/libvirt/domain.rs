//! One life of a domain: found, watched until it ends, and what can be said to it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::{broadcast, watch};
use tokio::task::AbortHandle;

use crate::libvirt::error::{Error, code};
use crate::libvirt::place::place;
use crate::libvirt::rpc::{Procedure, Program, Rpc, Told};
use crate::libvirt::xdr::{Malformed, Reader, Writer};
use crate::libvirt::xml::Description;

/// How long a question to the daemon may take. One that concerns QEMU waits in the daemon, for 30 s at the most,
/// until what it does with that domain just now has ended.
const CALL_TIME: Duration = Duration::from_secs(35);

const CONNECT_OPEN: Procedure = Procedure(Program::Remote, 1, "open the connection");
const DOMAIN_GET_XML_DESC: Procedure = Procedure(Program::Remote, 14, "describe the domain");
const DOMAIN_LOOKUP_BY_NAME: Procedure = Procedure(Program::Remote, 23, "find the domain");
const DOMAIN_LOOKUP_BY_UUID: Procedure = Procedure(Program::Remote, 24, "find the domain");
const AUTH_LIST: Procedure = Procedure(Program::Remote, 66, "list ways to authenticate");
const AUTH_POLKIT: Procedure = Procedure(Program::Remote, 70, "authenticate by polkit");
const DOMAIN_GET_STATE: Procedure = Procedure(Program::Remote, 212, "tell the domain's state");
const EVENT_REGISTER: Procedure = Procedure(Program::Remote, 316, "tell when the domain stops");
const LIFECYCLE: u32 = 318;
const MONITOR_COMMAND: Procedure = Procedure(Program::Qemu, 1, "pass a command to QEMU");
const AGENT_COMMAND: Procedure = Procedure(Program::Qemu, 3, "pass a command to the guest agent");
const MONITOR_EVENT_REGISTER: Procedure = Procedure(Program::Qemu, 4, "pass QEMU's events");
const MONITOR_EVENT: u32 = 6;

const AUTH_NONE: u32 = 0;
const POLKIT: u32 = 2;
const EVENT_STOPPED: i32 = 5;
/// The XML as it is defined, not as it runs.
const XML_INACTIVE: u32 = 2;

/// Where a domain is found again, whatever it is called then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainAddress {
    /// Libvirt's URI.
    pub uri: String,
    /// What it was called when it was found.
    pub name: String,
    /// What it is known by.
    pub uuid: String,
}

impl fmt::Display for DomainAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "domain {} of {}", self.name, self.uri)
    }
}

/// A domain that was looked for and runs.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where it is found again.
    pub address: DomainAddress,
    /// What it has.
    pub description: Description,
}

/// A running domain that we are connected to. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Domain {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    rpc: Rpc,
    address: DomainAddress,
    known: Known,
    /// Why this life of the domain is over, once it is.
    ended: watch::Receiver<Option<String>>,
    listener: AbortHandle,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// A domain as the daemon names it in its messages.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Known {
    name: String,
    uuid: [u8; 16],
    /// Of this life; -1 for a domain that does not run.
    id: i32,
}

impl Known {
    fn read(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = reader.text()?;
        let uuid = reader.fixed(16)?.try_into().map_err(|_| Malformed)?;
        Ok(Self { name, uuid, id: reader.signed()? })
    }

    fn write(&self, writer: Writer) -> Writer {
        writer.text(&self.name).fixed(&self.uuid).signed(self.id)
    }

    fn alone(&self) -> Writer {
        self.write(Writer::default())
    }
}

/// Finds a running domain by its name.
pub async fn find(uri: &str, name: &str) -> Result<Found, Error> {
    let rpc = open(uri).await?;
    let asked = Writer::default().text(name);
    let known = rpc.call(DOMAIN_LOOKUP_BY_NAME, asked, CALL_TIME, Known::read).await;
    let known = known.map_err(|error| no_domain(error, uri, name))?;
    let address =
        DomainAddress { uri: uri.to_owned(), name: known.name.clone(), uuid: uuid_text(&known.uuid) };
    let domain = Domain::watch(rpc, address.clone(), known).await?;
    Ok(Found { address, description: domain.describe().await? })
}

impl Domain {
    /// Finds a domain again; it must run.
    pub async fn connect(address: &DomainAddress) -> Result<Self, Error> {
        let rpc = open(&address.uri).await?;
        let uuid = uuid_bytes(&address.uuid).ok_or_else(|| Error::Answer {
            what: DOMAIN_LOOKUP_BY_UUID.2,
            why: format!("{:?} is not a UUID", address.uuid),
        })?;
        let asked = Writer::default().fixed(&uuid);
        let known = rpc.call(DOMAIN_LOOKUP_BY_UUID, asked, CALL_TIME, Known::read).await;
        let named = format!("{} ({})", address.name, address.uuid);
        let known = known.map_err(|error| no_domain(error, &address.uri, &named))?;
        let address = DomainAddress { name: known.name.clone(), ..address.clone() };
        Self::watch(rpc, address, known).await
    }

    /// Listens for the domain's end from now on, and makes sure that it has not come before.
    async fn watch(rpc: Rpc, address: DomainAddress, known: Known) -> Result<Self, Error> {
        let told = rpc.told();
        let lifecycle = known.write(Writer::default().signed(0).some());
        rpc.call(EVENT_REGISTER, lifecycle, CALL_TIME, |it| it.signed()).await?;
        let asked = known.alone().number(0);
        let state = rpc.call(DOMAIN_GET_STATE, asked, CALL_TIME, |it| Ok((it.signed()?, it.signed()?))).await;
        let (state, reason) = state.map_err(|error| no_domain(error, &address.uri, &address.name))?;
        if let Some(why) = not_running(state, reason) {
            return Err(Error::NotRunning { domain: address.name, why });
        }
        let (end, ended) = watch::channel(None);
        let listener = tokio::spawn(listen(rpc.clone(), told, known.uuid, end)).abort_handle();
        Ok(Self { inner: Arc::new(Inner { rpc, address, known, ended, listener }) })
    }

    /// Where it is found again.
    #[must_use]
    pub fn address(&self) -> &DomainAddress {
        &self.inner.address
    }

    /// The user that the daemon runs as: one that is not root runs QEMU as itself.
    pub(crate) fn daemon_uid(&self) -> Option<u32> {
        self.inner.rpc.daemon_uid
    }

    /// Waits until this life of the domain is over, or the daemon gone, and says why. Keeps nothing alive.
    pub(crate) fn ended(&self) -> impl Future<Output = String> + Send + use<> {
        let mut ended = self.inner.ended.clone();
        async move {
            let why = ended.wait_for(Option::is_some).await.ok().and_then(|why| why.clone());
            why.unwrap_or_else(|| "nobody watches it any more".into())
        }
    }

    /// What it has now, as it runs.
    pub async fn describe(&self) -> Result<Description, Error> {
        let xml = self.xml(0).await?;
        Description::read(&xml).map_err(|why| Error::Answer { what: DOMAIN_GET_XML_DESC.2, why })
    }

    /// The XML that it can be defined by elsewhere; without passwords.
    pub async fn definition(&self) -> Result<String, Error> {
        self.xml(XML_INACTIVE).await
    }

    async fn xml(&self, flags: u32) -> Result<String, Error> {
        let asked = self.inner.known.alone().number(flags);
        self.inner.rpc.call(DOMAIN_GET_XML_DESC, asked, CALL_TIME, |it| it.text()).await
    }

    /// Passes a command to QEMU's monitor; its answer, or its error, as JSON.
    pub(crate) async fn monitor_command(&self, command: &str) -> Result<String, Error> {
        let asked = self.inner.known.alone().text(command).number(0);
        self.inner.rpc.call(MONITOR_COMMAND, asked, CALL_TIME, |it| it.text()).await
    }

    /// Passes a command to the guest's agent, which may take so long; its answer as JSON.
    pub(crate) async fn agent_command(&self, command: &str, limit: Duration) -> Result<String, Error> {
        let seconds = i32::try_from(limit.as_secs()).unwrap_or(i32::MAX);
        let asked = self.inner.known.alone().text(command).signed(seconds).number(0);
        let answer =
            self.inner.rpc.call(AGENT_COMMAND, asked, limit + CALL_TIME, |it| it.optional_text()).await?;
        answer.ok_or_else(|| Error::Answer { what: AGENT_COMMAND.2, why: "there is none".into() })
    }

    /// Has QEMU's events passed on, and listens to them.
    pub(crate) async fn monitor_events(&self) -> Result<MonitorEvents, Error> {
        let told = self.inner.rpc.told();
        let asked = self.inner.known.write(Writer::default().some()).none().number(0);
        self.inner.rpc.call(MONITOR_EVENT_REGISTER, asked, CALL_TIME, |it| it.signed()).await?;
        Ok(MonitorEvents { told, uuid: self.inner.known.uuid })
    }
}

/// QEMU's events.
pub(crate) struct MonitorEvents {
    told: broadcast::Receiver<Told>,
    uuid: [u8; 16],
}

impl MonitorEvents {
    /// The next one: its name, and what it says as JSON; `None` where some were missed.
    pub async fn next(&mut self) -> Option<(String, Option<String>)> {
        loop {
            match self.told.recv().await {
                Ok(told) if told.program == Program::Qemu as u32 && told.procedure == MONITOR_EVENT => {
                    if let Ok((uuid, name, data)) = monitor_event(&told.payload)
                        && uuid == self.uuid
                    {
                        return Some((name, data));
                    }
                }
                Ok(_) => {}
                Err(broadcast::error::RecvError::Lagged(_)) => return None,
                // The connection is gone, and whoever waits hears it elsewhere.
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }
}

fn monitor_event(payload: &[u8]) -> Result<([u8; 16], String, Option<String>), Malformed> {
    let mut reader = Reader::new(payload);
    let _callback = reader.signed()?;
    let known = Known::read(&mut reader)?;
    let name = reader.text()?;
    let (_seconds, _micros) = (reader.long()?, reader.number()?);
    Ok((known.uuid, name, reader.optional_text()?))
}

/// Waits for the end of the domain's life.
async fn listen(
    rpc: Rpc,
    mut told: broadcast::Receiver<Told>,
    uuid: [u8; 16],
    end: watch::Sender<Option<String>>,
) {
    let why = loop {
        let told = tokio::select! {
            biased;
            told = told.recv() => told,
            why = rpc.closed() => break format!("the connection to libvirt is gone: {why}"),
        };
        match told {
            Ok(told) if told.program == Program::Remote as u32 && told.procedure == LIFECYCLE => {
                if let Ok((of, EVENT_STOPPED, detail)) = lifecycle(&told.payload)
                    && of == uuid
                {
                    break stopped(detail).to_owned();
                }
            }
            Ok(_) => {}
            // Its end may have been among what was missed; a new connection finds out.
            Err(broadcast::error::RecvError::Lagged(_)) => {
                break "libvirt told more than could be read".into();
            }
            Err(broadcast::error::RecvError::Closed) => break "the connection to libvirt is gone".into(),
        }
    };
    end.send_replace(Some(why));
}

fn lifecycle(payload: &[u8]) -> Result<([u8; 16], i32, i32), Malformed> {
    let mut reader = Reader::new(payload);
    let _callback = reader.signed()?;
    let known = Known::read(&mut reader)?;
    Ok((known.uuid, reader.signed()?, reader.signed()?))
}

/// Connects to the daemon, and is let in.
async fn open(uri: &str) -> Result<Rpc, Error> {
    let runtime_dir = std::env::var_os("XDG_RUNTIME_DIR").map(Into::into);
    let place = place(uri, runtime_dir)?;
    let rpc = Rpc::connect(&place.sockets).await?;
    let ways = rpc.call(AUTH_LIST, Writer::default(), CALL_TIME, |it| {
        let count = it.number()?;
        (0..count).map(|_| it.number()).collect::<Result<Vec<u32>, Malformed>>()
    });
    let ways = ways.await?;
    if !ways.is_empty() && !ways.contains(&AUTH_NONE) {
        let refused = |why: String| Error::Auth { socket: rpc.socket(), why };
        if !ways.contains(&POLKIT) {
            return Err(refused("it wants a password (SASL); run the site as root".into()));
        }
        let polkit = rpc.call(AUTH_POLKIT, Writer::default(), CALL_TIME, |_| Ok(())).await;
        polkit.map_err(|error| {
            refused(format!("{error}; run the site as root, or put its user into the group libvirt"))
        })?;
    }
    let asked = Writer::default().some().text(place.uri).number(0);
    rpc.call(CONNECT_OPEN, asked, CALL_TIME, |_| Ok(())).await?;
    Ok(rpc)
}

fn no_domain(error: Error, uri: &str, domain: &str) -> Error {
    match error {
        Error::Refused { code: code::NO_DOMAIN, .. } => {
            Error::NoDomain { uri: uri.to_owned(), domain: domain.to_owned() }
        }
        error => error,
    }
}

/// Why a domain in this state does not run here; nothing if it does.
fn not_running(state: i32, reason: i32) -> Option<&'static str> {
    match (state, reason) {
        (5, 1) => Some("it was shut down"),
        (5, 2) => Some("it was destroyed"),
        (5 | 6, 3) => Some("it crashed"),
        (5, 4) => Some("it was migrated to another host; protect it there"),
        (5, 5) => Some("it was saved; 'virsh start' goes on with it"),
        (5, 6) => Some("it could not be started"),
        (5, _) => Some("it is shut off; 'virsh start' starts it"),
        (6, _) => Some("it crashed"),
        _ => None,
    }
}

/// How a life of a domain has ended.
fn stopped(detail: i32) -> &'static str {
    match detail {
        0 => "the domain was shut down",
        1 => "the domain was destroyed",
        2 => "the domain crashed",
        3 => "the domain was migrated to another host; protect it there",
        4 => "the domain was saved",
        5 => "the domain failed",
        6 => "the domain was put back to a snapshot",
        _ => "the domain has stopped",
    }
}

fn uuid_text(uuid: &[u8; 16]) -> String {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    [&uuid[..4], &uuid[4..6], &uuid[6..8], &uuid[8..10], &uuid[10..]].map(hex).join("-")
}

fn uuid_bytes(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|&c| c != '-').collect();
    let is_uuid = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let number = is_uuid.then(|| u128::from_str_radix(&digits, 16).ok()).flatten()?;
    Some(number.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_is_written_as_it_is_read() {
        let text = "c7a5fdbd-edaf-9455-926a-d65c16db1809";
        assert_eq!(uuid_text(&uuid_bytes(text).unwrap()), text);
        for bad in ["", "c7a5", "g7a5fdbd-edaf-9455-926a-d65c16db1809", "+7a5fdbdedaf9455926ad65c16db1809"] {
            assert_eq!(uuid_bytes(bad).map(|uuid| uuid_text(&uuid)), None, "{bad}");
        }
    }

    #[test]
    fn messages_about_a_domain_are_read_and_cut_ones_are_not() {
        let web = Known { name: "web".into(), uuid: [7; 16], id: 3 };
        let message = web.write(Writer::default().signed(1)).signed(EVENT_STOPPED).signed(3).done();
        assert_eq!(lifecycle(&message), Ok(([7; 16], EVENT_STOPPED, 3)));
        assert_eq!(lifecycle(&message[..message.len() - 1]), Err(Malformed));
        let event = web.write(Writer::default().signed(1)).text("JOB_STATUS_CHANGE").number(0).number(5);
        let event = event.number(6).some().text("{}").done();
        assert_eq!(monitor_event(&event), Ok(([7; 16], "JOB_STATUS_CHANGE".into(), Some("{}".into()))));
        assert_eq!(monitor_event(&event[..40]), Err(Malformed));
    }

    #[test]
    fn only_a_domain_with_a_qemu_runs() {
        for state in [1, 2, 3, 4, 7] {
            assert_eq!(not_running(state, 0), None);
        }
        assert!(not_running(5, 4).unwrap().contains("another host") && not_running(5, 0).is_some());
        assert!(stopped(3).contains("another host"));
    }
}
