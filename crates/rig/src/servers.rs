//! Servers that keep repositories: a REST server, an S3 server and an SFTP server, as real processes on this
//! machine, each with a folder of its own.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::programs::{Process, need, need_crate, tool, wait_for};
use crate::{Result, Trouble, doing, free_address};

/// What the servers know who asks by.
const USER: &str = "afterimage";
const SECRET: &str = "open-sesame";
/// The kinds of servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServerKind {
    /// `rclone serve restic`.
    Rest,
    /// The same, with `--append-only`.
    AppendOnlyRest,
    /// `s3s-fs`.
    S3,
    /// OpenSSH's `sshd`, for SFTP alone.
    Sftp,
}

/// A server; it ends with its owner.
pub struct RepositoryServer {
    kind: ServerKind,
    dir: PathBuf,
    address: String,
    /// The size of the file system that it writes to, if that is small.
    limit_mib: Option<u32>,
    process: Option<Process>,
}

/// A server's program, its arguments, and what is added to its environment.
type Parts = (String, Vec<String>, Vec<(&'static str, &'static str)>);

impl RepositoryServer {
    /// Starts a server that keeps its files below `dir`; with a limit, in a file system in memory of this size, which
    /// is gone when the server ends.
    pub fn start(kind: ServerKind, dir: &Path, limit_mib: Option<u32>) -> Result<Self> {
        fs::create_dir_all(dir.join("files")).map_err(doing(dir.display()))?;
        let mut server =
            Self { kind, dir: dir.to_owned(), address: free_address()?, limit_mib, process: None };
        match kind {
            ServerKind::Rest | ServerKind::AppendOnlyRest => need("rclone", "rclone")?,
            ServerKind::S3 => need_crate("s3s-fs")?,
            ServerKind::Sftp => server.prepare_sshd()?,
        }
        server.start_again()?;
        Ok(server)
    }

    /// Starts it again, at the same address.
    pub fn start_again(&mut self) -> Result<()> {
        let mut command = self.command()?;
        let log = fs::File::create(self.dir.join("log")).map_err(doing("the server's log"))?;
        command.stdout(log.try_clone().map_err(doing("the server's log"))?).stderr(log);
        self.process = Some(Process::start(&mut command)?);
        wait_for(&format!("{:?} at {}", self.kind, self.address), Duration::from_secs(60), || {
            if self.process.as_mut().is_none_or(Process::has_ended) {
                let said = fs::read_to_string(self.dir.join("log")).unwrap_or_default();
                return Err(Trouble(format!("the server has ended: {said}")));
            }
            Ok(std::net::TcpStream::connect(&self.address).ok().map(drop))
        })
    }

    /// SIGKILL, at once, with whatever serves its connections.
    pub fn kill(&mut self) {
        let Some(process) = self.process.take() else { return };
        let serving = descendants(process.id());
        drop(process);
        for process in serving {
            let _ = tool(Command::new("kill").args(["-KILL", &process.to_string()]));
        }
    }

    /// SIGSTOP: it is there, and does not answer. With false, SIGCONT.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        let Some(process) = &self.process else { return Ok(()) };
        let signal = if frozen { "-STOP" } else { "-CONT" };
        for process in [vec![process.id()], descendants(process.id())].concat() {
            tool(Command::new("kill").args([signal, &process.to_string()]))?;
        }
        Ok(())
    }

    /// Where a repository in it is, as `url`.
    #[must_use]
    pub fn url(&self) -> String {
        match self.kind {
            ServerKind::Rest | ServerKind::AppendOnlyRest => format!("rest:http://{}/", self.address),
            ServerKind::S3 => format!("s3:http://{}/backups/site", self.address),
            ServerKind::Sftp => {
                format!("sftp://{}@{}/{}", user(), self.address, self.folder().display())
            }
        }
    }

    /// Who asks, and the secret; of SFTP none.
    #[must_use]
    pub fn credentials(&self) -> Option<(&'static str, &'static str)> {
        (self.kind != ServerKind::Sftp).then_some((USER, SECRET))
    }

    /// What `ssh` must be told, of SFTP.
    #[must_use]
    pub fn ssh_options(&self) -> Vec<String> {
        if self.kind != ServerKind::Sftp {
            return Vec::new();
        }
        let path = |name: &str| self.dir.join(name).display().to_string();
        vec![
            "-F/dev/null".into(),
            format!("-i{}", path("user_key")),
            "-oIdentitiesOnly=yes".into(),
            format!("-oUserKnownHostsFile={}", path("known_hosts")),
        ]
    }

    /// Stock restic on the repository in it, over the same protocol but for S3.
    #[must_use]
    pub fn restic(&self, password: &str) -> Command {
        let mut restic = Command::new("restic");
        restic.env("RESTIC_PASSWORD", password).arg("--no-cache").stdin(Stdio::null());
        match self.kind {
            ServerKind::Rest | ServerKind::AppendOnlyRest => {
                restic.args(["-r", &format!("rest:http://{USER}:{SECRET}@{}/", self.address)]);
            }
            // Its lists are not as restic 0.14 asks for them (it does not find its own packs again); but objects are
            // files here, and make a repository of restic's own layout.
            ServerKind::S3 => {
                restic.arg("-r").arg(self.folder().join("backups/site"));
            }
            ServerKind::Sftp => {
                let (host, port) = self.address.split_once(':').unwrap_or((&self.address, "22"));
                let options = self.ssh_options().join(" ");
                let command = format!("ssh {options} -p {port} {}@{host} -s sftp", user());
                restic.args(["-o", &format!("sftp.command={command}"), "-r", &self.url()]);
            }
        }
        restic
    }

    /// The folder that it writes to.
    #[must_use]
    pub fn folder(&self) -> PathBuf {
        self.dir.join("files")
    }

    /// The server's program, in a mount namespace of its own where it needs a file system of its own.
    fn command(&self) -> Result<Command> {
        let (program, arguments, variables) = self.parts()?;
        let mut mounts = Vec::new();
        if let Some(mib) = self.limit_mib {
            mounts.push(format!("mount -t tmpfs -o size={mib}m none \"$AFTERIMAGE_SERVER/files\""));
        }
        if self.kind == ServerKind::Sftp && is_root() {
            // As root OpenSSH's wants a user and a folder that only its own package makes.
            mounts.push("mount --bind \"$AFTERIMAGE_SERVER/passwd\" /etc/passwd".into());
            mounts.push("mount -t tmpfs none /run && mkdir -m 755 /run/sshd".into());
        }
        let mut command = Command::new(if mounts.is_empty() { program.as_str() } else { "unshare" });
        if !mounts.is_empty() {
            command.args(if is_root() { &["--mount"][..] } else { &["--mount", "--map-root-user"] });
            command
                .args(["sh", "-c", &format!("{} && exec \"$0\" \"$@\"", mounts.join(" && "))])
                .arg(&program);
            command.env("AFTERIMAGE_SERVER", &self.dir);
        }
        command.args(arguments).envs(variables);
        Ok(command)
    }

    fn parts(&self) -> Result<Parts> {
        let folder = self.folder().display().to_string();
        let owned = |arguments: &[&str]| arguments.iter().map(|&argument| argument.to_owned()).collect();
        Ok(match self.kind {
            ServerKind::Rest | ServerKind::AppendOnlyRest => {
                let mut arguments: Vec<String> = owned(&["serve", "restic", "--addr", &self.address]);
                if self.kind == ServerKind::AppendOnlyRest {
                    arguments.push("--append-only".into());
                }
                arguments.push(folder);
                let variables = vec![("RCLONE_USER", USER), ("RCLONE_PASS", SECRET), ("RCLONE_CONFIG", "")];
                ("rclone".into(), arguments, variables)
            }
            ServerKind::S3 => {
                let (host, port) = self.address.split_once(':').unwrap_or((&self.address, "0"));
                let keys = ["--access-key", USER, "--secret-key", SECRET];
                let arguments = [&["--host", host, "--port", port], &keys[..], &[&folder]].concat();
                ("s3s-fs".into(), owned(&arguments), Vec::new())
            }
            ServerKind::Sftp => {
                let config = self.dir.join("sshd_config").display().to_string();
                (sshd()?, owned(&["-D", "-e", "-f", &config]), Vec::new())
            }
        })
    }

    /// Keys, and a config of its own.
    fn prepare_sshd(&self) -> Result<()> {
        for key in ["host_key", "user_key"] {
            let path = self.dir.join(key);
            tool(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(path))?;
        }
        let read = |name: &str| fs::read_to_string(self.dir.join(name)).map_err(doing(name));
        let (host, port) = self.address.split_once(':').unwrap_or((&self.address, "22"));
        let known = format!("[{host}]:{port} {}", read("host_key.pub")?);
        let config = format!(
            "ListenAddress {}\nHostKey {dir}/host_key\nAuthorizedKeysFile {dir}/user_key.pub\nPidFile none\n\
             StrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\n\
             Subsystem sftp internal-sftp\n",
            self.address,
            dir = self.dir.display(),
        );
        for (name, text) in [("known_hosts", known), ("sshd_config", config)] {
            fs::write(self.dir.join(name), text).map_err(doing(name))?;
        }
        if is_root() {
            let users = fs::read_to_string("/etc/passwd").map_err(doing("/etc/passwd"))?;
            let users = format!("{users}sshd:x:65533:65534::/run/sshd:/usr/sbin/nologin\n");
            fs::write(self.dir.join("passwd"), users).map_err(doing("a list of users"))?;
        }
        Ok(())
    }
}

impl Drop for RepositoryServer {
    fn drop(&mut self) {
        self.kill();
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The user that an SFTP server runs as, and serves.
fn user() -> String {
    if is_root() { "root".into() } else { std::env::var("USER").unwrap_or_default() }
}

/// The processes that this one has started, and theirs.
fn descendants(process: u32) -> Vec<u32> {
    let parent_of = |entry: fs::DirEntry| {
        let id: u32 = entry.file_name().to_str()?.parse().ok()?;
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        // After the name in parentheses: the state, then the parent.
        let parent: u32 = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
        Some((id, parent))
    };
    let all: Vec<(u32, u32)> =
        fs::read_dir("/proc").into_iter().flatten().flatten().filter_map(parent_of).collect();
    let mut found = vec![process];
    let mut next = 0;
    while let Some(parent) = found.get(next).copied() {
        found.extend(all.iter().filter(|(_, of)| *of == parent).map(|(id, _)| *id));
        next += 1;
    }
    found.split_off(1)
}

/// OpenSSH's server: the machine's, or the one that the tests' set-up has unpacked without installing a service.
fn sshd() -> Result<String> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .unwrap_or_else(|| PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache"));
    let unpacked = cache.join("afterimage/sshd/usr/sbin/sshd");
    [PathBuf::from("/usr/sbin/sshd"), unpacked]
        .into_iter()
        .find(|path| path.exists())
        .map(|path| path.display().to_string())
        .ok_or_else(|| Trouble("sshd is needed: ./scripts/setup servers".into()))
}
