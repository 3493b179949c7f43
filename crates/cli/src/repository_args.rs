//! The arguments of `repository`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

/// What can be done with a repository as a whole.
#[derive(Debug, Subcommand)]
pub enum RepositoryCommand {
    /// The repositories in the config, where they are, and whether they can be reached.
    List,
    /// Make a repository where the config says it is.
    Init(Named),
    /// Check packs, index and backups; with --read-data every byte of them.
    Check {
        #[command(flatten)]
        repository: Named,
        /// Read every byte and compare it with its checksum.
        #[arg(long)]
        read_data: bool,
    },
    /// Take backups out of the list; their data stays until a prune.
    Forget {
        #[command(flatten)]
        repository: Named,
        /// The backups; the first digits of an id are enough.
        #[arg(required = true, value_name = "ID")]
        backups: Vec<String>,
    },
    /// Remove data that no backup needs any more. No backup runs meanwhile.
    Prune {
        #[command(flatten)]
        repository: Named,
        /// Forget this backup first; repeat it for more.
        #[arg(long = "forget", value_name = "ID")]
        forget: Vec<String>,
        /// Leave so much of the repository unused, in percent, before packs are written anew.
        #[arg(long, default_value_t = 5, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=100))]
        unused: u8,
        /// How long to wait for backups that run.
        #[arg(long, default_value = "0s", value_parser = humantime::parse_duration, value_name = "TIME")]
        wait: Duration,
    },
    /// Copy backups from one repository to another, without reading the replicas.
    Copy {
        /// From this one.
        #[arg(long, default_value = site::LOCAL_REPOSITORY, value_name = "NAME")]
        from: String,
        /// To this one.
        #[arg(long, value_name = "NAME")]
        to: String,
        /// The backups; the first digits of an id are enough. All if none is named.
        #[arg(value_name = "ID")]
        backups: Vec<String>,
    },
    /// Change the password: a new key, the file that the config names, and the old key is removed.
    Password {
        #[command(flatten)]
        repository: Named,
        /// The file with the new password, `-` for standard input.
        #[arg(long, value_name = "FILE")]
        new: PathBuf,
    },
    /// The keys of a repository: one for each password that opens it.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Remove locks whose owners are dead.
    Unlock {
        #[command(flatten)]
        repository: Named,
        /// All locks: only where nothing else uses the repository.
        #[arg(long)]
        all: bool,
    },
}

/// Keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// The keys there are.
    List(Named),
    /// Add a key with another password.
    Add {
        #[command(flatten)]
        repository: Named,
        /// The file with its password, `-` for standard input.
        #[arg(long, value_name = "FILE")]
        new: PathBuf,
        /// Whom it is for.
        #[arg(long = "for", default_value = "afterimage", value_name = "NAME")]
        user: String,
    },
    /// Remove a key; the one that the config's password opens stays.
    Remove {
        #[command(flatten)]
        repository: Named,
        /// The first digits of its id.
        key: String,
    },
}

/// A repository by its name.
#[derive(Debug, Args)]
pub struct Named {
    /// The repository, by its name in the config.
    #[arg(long = "repository", default_value = site::LOCAL_REPOSITORY, value_name = "NAME")]
    pub name: String,
}
