//! Policies as files: `DIR/policies/NAME.toml`, one each, and `DIR/tags.toml`. They are read anew at every look, so a change
//! takes effect at once, and a file that cannot be used is told of and changes nothing else.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use jiff::tz::TimeZone;
use model::authorization::VmPatterns;
use model::{PolicyName, VmName};
use policy::Policy;

use crate::config::Config;
use crate::failure::{Code, Failure};

/// All that the files say.
#[derive(Debug, Default)]
pub(crate) struct Policies {
    /// Those that can be used.
    pub usable: BTreeMap<PolicyName, Policy>,
    /// What is wrong with the others.
    pub broken: BTreeMap<PolicyName, String>,
    /// Tags, and the VMs that have them.
    tags: BTreeMap<String, VmPatterns>,
}

fn folder(dir: &Path) -> PathBuf {
    dir.join("policies")
}

/// Where a policy is.
pub(crate) fn path(dir: &Path, name: &PolicyName) -> PathBuf {
    folder(dir).join(format!("{name}.toml"))
}

impl Policies {
    /// Reads the files. Blocks.
    pub fn load(dir: &Path, config: &Config) -> Result<Self, Failure> {
        let mut policies = Self { tags: tags(dir)?, ..Self::default() };
        for name in names(&folder(dir))? {
            match read(dir, &name).and_then(|policy| check(&policy, config).map(|()| policy)) {
                Ok(policy) => drop(policies.usable.insert(name, policy)),
                Err(why) => drop(policies.broken.insert(name, why)),
            }
        }
        Ok(policies)
    }

    /// The tags of a VM.
    pub fn tags_of(&self, vm: &VmName) -> BTreeSet<String> {
        self.tags.iter().filter(|(_, vms)| vms.fits(vm.as_str())).map(|(tag, _)| tag.clone()).collect()
    }

    /// The policies that select a VM.
    pub fn of(&self, vm: &VmName) -> impl Iterator<Item = (&PolicyName, &Policy)> {
        let tags = self.tags_of(vm);
        self.usable.iter().filter(move |(_, policy)| policy.selection.selects(vm, &tags))
    }

    /// The policy of this name.
    pub fn named(&self, name: &PolicyName) -> Result<&Policy, Failure> {
        self.usable.get(name).ok_or_else(|| {
            let message = match self.broken.get(name) {
                Some(why) => format!("policy {name} cannot be used: {why}"),
                None => format!("there is no policy {name}; 'afterimage policy list' lists those there are"),
            };
            Failure::new(Code::NoSuchPolicy, message)
        })
    }
}

/// The names of the files; what has no name that a policy can have is passed over, as an editor's copy.
fn names(folder: &Path) -> Result<Vec<PolicyName>, Failure> {
    let entries = match std::fs::read_dir(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Failure::io("read the folder", folder, &error))?,
    };
    let name = |entry: std::io::Result<std::fs::DirEntry>| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_suffix(".toml")?.parse().ok()
    };
    Ok(entries.filter_map(name).collect())
}

fn read(dir: &Path, name: &PolicyName) -> Result<Policy, String> {
    let path = path(dir, name);
    let text = std::fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    Policy::parse(&text, zone).map_err(|error| format!("{}: {error}", path.display()))
}

/// What the policy names must be there.
fn check(policy: &Policy, config: &Config) -> Result<(), String> {
    for repository in std::iter::once(&policy.repository).chain(&policy.copies) {
        if !config.repositories.contains_key(repository) {
            return Err(format!("config.toml has no repository named {repository:?}"));
        }
    }
    Ok(())
}

/// A time zone by its name: as the machine knows it, else as this program was built with; without a name the machine's own.
fn zone(name: Option<&str>) -> Option<TimeZone> {
    name.map_or_else(|| Some(TimeZone::system()), |name| TimeZone::get(name).ok())
}

fn tags(dir: &Path) -> Result<BTreeMap<String, VmPatterns>, Failure> {
    let path = dir.join("tags.toml");
    let text = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        text => text.map_err(|error| Failure::io("read", &path, &error))?,
    };
    toml::from_str(&text).map_err(|error| {
        Failure::new(Code::Config, format!("{}: {error}; write as: gold = \"web*,db\"", path.display()))
    })
}

/// The text of a new policy.
pub fn template(vms: &str, at: &str, repository: &str) -> Result<String, Failure> {
    let refuse = |message: String| Failure::new(Code::Usage, message);
    let vms: VmPatterns =
        vms.parse().map_err(|error: model::authorization::PatternError| refuse(error.to_string()))?;
    let at: jiff::civil::Time =
        at.parse().map_err(|_| refuse(format!("{at:?} is no time of the day; write it as 22:00")))?;
    Ok(format!(
        r#"# A policy: which VMs are backed up when. A change takes effect within seconds; 'afterimage policy list' says whether
# it can be used, 'afterimage policy show NAME' what follows from it.
vms = "{vms}"                     # names; '*' for anything, '?' for one character, commas between
# tags = ["gold"]                 # also VMs with a tag, as tags.toml says: gold = "web*,db"
# except = "web-test"             # but not these

schedule = "{minute} {hour} * * *"           # minute, hour, day of the month, month, day of the week; or a list of such
# time-zone = "Europe/Berlin"     # the machine's own if none is given
window = "8h"                     # how long a backup is tried after it was due; the next one ends it too
# blackout = ["Mon-Fri 08:00-18:00"]   # no attempt begins in these hours

# consistency = "application"     # or "prefer-application" (with application-max-age = "12h"), or "crash"
# view = "strict"                 # refused while logs are applied; "hold" reads the flat files
# pause = true                    # replication is paused while an attempt runs; changes wait at the VM's site
repository = "{repository}"
# copies = ["offsite"]            # each backup is copied there too

promise = "26h"                   # the newest backup is never older: 'afterimage backup report' watches over it

[retention]                       # by the moments of their points; the newest of each hour, day, ...
daily = 14
weekly = 5
monthly = 12
# last = 3, hourly = 24, yearly = 2, within = "3d"

[retry]                           # what is otherwise than in config.toml
# first-delay = "2s"
# delay-max = "15m"
# attempts = 16
# barrier-after = 3               # collisions with an apply in a row until applies are held off
"#,
        minute = at.minute(),
        hour = at.hour(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> (tempfile::TempDir, Config) {
        let dir = tempfile::tempdir().unwrap();
        let listen = "127.0.0.1:7443".parse().unwrap();
        std::fs::create_dir(dir.path().join("policies")).unwrap();
        (dir, Config::parse(&Config::template("head", listen)).unwrap())
    }

    #[test]
    fn a_new_policy_can_be_used_as_it_is() {
        let (dir, config) = site();
        let text = template("web*,db", "22:30", "local").unwrap();
        std::fs::write(dir.path().join("policies/nightly.toml"), text).unwrap();
        let policies = Policies::load(dir.path(), &config).unwrap();
        assert!(policies.broken.is_empty(), "{:?}", policies.broken);
        let of = |vm: &str| {
            policies.of(&vm.parse().unwrap()).map(|(name, _)| name.to_string()).collect::<Vec<_>>()
        };
        assert_eq!(of("web1"), ["nightly"]);
        assert!(of("mail").is_empty());
        assert!(template("../x", "22:00", "local").is_err() && template("web", "25:00", "local").is_err());
    }

    #[test]
    fn what_cannot_be_used_is_told_of_and_changes_nothing_else() {
        let (dir, config) = site();
        let put =
            |name: &str, text: &str| std::fs::write(dir.path().join("policies").join(name), text).unwrap();
        put("good.toml", "tags = [\"gold\"]\nschedule = \"0 1 * * *\"\nrepository = \"local\"");
        put("bad.toml", "vms = \"*\"\nschedule = \"at night\"\nrepository = \"local\"");
        put("gone.toml", "vms = \"*\"\nschedule = \"0 1 * * *\"\nrepository = \"offsite\"");
        put(".good.toml.swp", "");
        put("notes.txt", "");
        std::fs::write(dir.path().join("tags.toml"), "gold = \"web*\"").unwrap();
        let policies = Policies::load(dir.path(), &config).unwrap();
        assert_eq!(policies.of(&"web1".parse().unwrap()).count(), 1);
        let broken: Vec<_> =
            policies.broken.iter().map(|(name, why)| (name.as_str(), why.as_str())).collect();
        assert!(
            matches!(broken[..], [("bad", bad), ("gone", gone)] if bad.contains("at night") && gone.contains("offsite"))
        );
        assert!(policies.named(&"bad".parse().unwrap()).unwrap_err().message.contains("bad.toml"));
    }
}
