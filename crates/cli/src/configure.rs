//! `configure`: what can change of a VM that is protected, and what other command there is for what cannot.

use std::path::PathBuf;
use std::time::Duration;

use boot::SignOfLife;
use clap::Args;
use model::VmName;
use site::{Change, Changes, Code, Failure, Request};

use crate::absolute;
use crate::args::{PassArguments, bytes_per_second};
use crate::peer_args::{any_text, or_none};

#[derive(Debug, Args)]
pub struct Configure {
    pub vm: VmName,
    /// The time between two cycles, 5s to 15min.
    #[arg(long, value_parser = humantime::parse_duration, value_name = "TIME")]
    pub every: Option<Duration>,
    /// Hourly recovery points to keep beside the latest, 0 to 24. Pinned ones stay in any case.
    #[arg(long, value_name = "N")]
    pub points: Option<u8>,
    /// The time between application-consistent points; 'none' for no more of them.
    #[arg(long, value_parser = or_none(time), value_name = "TIME")]
    pub app_every: Option<Change<Duration>>,
    /// The guest agent's socket; 'none' for none.
    #[arg(long, value_parser = or_none(any_text), value_name = "SOCKET")]
    pub guest_agent: Option<Change<String>>,
    /// The most that is sent, in bytes per second (500k, 2M, 1G); 'none' for no limit.
    #[arg(long, value_parser = or_none(bytes_per_second), value_name = "RATE")]
    pub bandwidth: Option<Change<u64>>,
    /// What shows that the VM has booted: agent, console:TEXT, tcp:PORT or runs:30s; 'none' for nothing.
    #[arg(long, value_parser = or_none(sign), value_name = "SIGN")]
    pub sign_of_life: Option<Change<SignOfLife>>,
    /// Where the same VM's QMP socket is now.
    #[arg(long, value_name = "SOCKET")]
    pub qmp: Option<PathBuf>,
    /// The socket of QEMU's NBD server, where it has one already; 'none' for one of our own.
    #[arg(long, value_parser = or_none(any_text), value_name = "SOCKET")]
    pub nbd: Option<Change<String>>,
    #[command(flatten)]
    pub passes: PassArguments,
    #[command(flatten)]
    pub fixed: Fixed,
}

/// What `protect` takes and `configure` does not: known, for the answer to say what to do instead.
#[derive(Debug, Args)]
pub struct Fixed {
    #[arg(long, hide = true)]
    to: Option<String>,
    #[arg(long = "disk", hide = true)]
    disks: Vec<String>,
    #[arg(long = "exclude", hide = true)]
    excluded: Vec<String>,
    #[arg(long, hide = true)]
    libvirt: Option<String>,
    #[arg(long, hide = true)]
    domain: Option<String>,
}

impl Fixed {
    fn check(&self, vm: &VmName) -> Result<(), Failure> {
        let refuse = |message| Err(Failure::new(Code::Usage, message));
        if let Some(to) = &self.to {
            return refuse(format!(
                "the replica of {vm} is moved to another peer by 'afterimage migrate {vm} --to-site {to}'"
            ));
        }
        if !self.disks.is_empty() || !self.excluded.is_empty() {
            return refuse(format!(
                "disks of {vm} join and leave by 'afterimage disk add {vm} NODE' and 'afterimage disk remove {vm} DISK'"
            ));
        }
        if self.libvirt.is_some() || self.domain.is_some() {
            return refuse(format!(
                "how the QEMU of {vm} is found is said when it is protected: 'afterimage unprotect {vm}', and protect it anew"
            ));
        }
        Ok(())
    }
}

impl Configure {
    /// What the running site is asked.
    pub fn request(&self) -> Result<Request, Failure> {
        self.fixed.check(&self.vm)?;
        let changes = Changes {
            resync: self.passes.resync,
            initial: self.passes.initial.clone(),
            interval: self.every,
            points: self.points,
            app_every: self.app_every.unwrap_or_default(),
            guest_agent: socket(self.guest_agent.as_ref())?,
            bandwidth_bytes_per_s: self.bandwidth.unwrap_or_default(),
            sign_of_life: match &self.sign_of_life {
                None => Change::Keep,
                Some(Change::Set(sign)) => Change::Set(sign.to_string()),
                Some(_) => Change::Clear,
            },
            qmp: self.qmp.as_deref().map(absolute).transpose()?,
            nbd: socket(self.nbd.as_ref())?,
        };
        if changes == Changes::default() {
            return Err(Failure::new(
                Code::Usage,
                "say what is to be otherwise; 'afterimage configure --help' shows what can be",
            ));
        }
        Ok(Request::Configure { vm: self.vm.clone(), changes: Box::new(changes) })
    }
}

/// The site runs in another folder.
fn socket(named: Option<&Change<String>>) -> Result<Change<PathBuf>, Failure> {
    Ok(match named {
        None | Some(Change::Keep) => Change::Keep,
        Some(Change::Clear) => Change::Clear,
        Some(Change::Set(path)) => Change::Set(absolute(path.as_ref())?),
    })
}

fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|error| error.to_string())
}

fn sign(text: &str) -> Result<SignOfLife, String> {
    text.parse::<SignOfLife>().map_err(|error| error.to_string())
}
