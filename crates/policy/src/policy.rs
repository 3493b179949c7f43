//! A policy as its owner writes it.

use std::collections::BTreeSet;
use std::time::Duration;

use jiff::tz::TimeZone;
use model::authorization::VmPatterns;
use model::gate::Access;
use model::{RetryPolicy, Wanted};
use serde::Deserialize;

use crate::blackout::Blackout;
use crate::error::PolicyError;
use crate::retention::Retention;
use crate::schedule::Schedule;
use crate::select::Selection;
use crate::text::{optional_duration, texts};

/// A policy: which VMs are backed up when, how, where to, how long backups are kept, and what is promised.
#[derive(Debug, Clone)]
pub struct Policy {
    /// Which VMs.
    pub selection: Selection,
    /// When.
    pub schedule: Schedule,
    /// How consistent the point must be; the site's own wish if none is given.
    pub consistency: Option<Wanted>,
    /// What is read.
    pub view: Access,
    /// Replication is paused while an attempt runs.
    pub pause: bool,
    /// The repository's name.
    pub repository: String,
    /// Repositories that each backup is copied to.
    pub copies: Vec<String>,
    /// How old the newest backup may be.
    pub promise: Option<Duration>,
    /// How long backups are kept; for ever, if nothing is said.
    pub retention: Retention,
    /// What is otherwise than the site's own way to try again.
    pub retry: RetryChanges,
}

/// How consistent the point must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum ConsistencyWanted {
    /// Only an application-consistent one will do.
    Application,
    /// An application-consistent one if it is young enough, else the newest.
    PreferApplication,
    /// The newest.
    Crash,
}

/// What a policy changes of the site's own way to try again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RetryChanges {
    #[serde(deserialize_with = "optional_duration")]
    first_delay: Option<Duration>,
    factor: Option<u32>,
    #[serde(deserialize_with = "optional_duration")]
    delay_max: Option<Duration>,
    attempts: Option<u32>,
    barrier_after: Option<u32>,
}

impl RetryChanges {
    /// The site's way to try again, with these changes.
    #[must_use]
    pub fn applied_to(&self, site: &RetryPolicy) -> RetryPolicy {
        RetryPolicy {
            first_delay: self.first_delay.unwrap_or(site.first_delay),
            factor: self.factor.unwrap_or(site.factor),
            delay_max: self.delay_max.unwrap_or(site.delay_max),
            attempts_max: self.attempts.unwrap_or(site.attempts_max),
            barrier_after: self.barrier_after.unwrap_or(site.barrier_after),
        }
    }

    fn check(&self) -> Result<(), PolicyError> {
        if self.attempts == Some(0) || self.factor == Some(0) {
            return Err(PolicyError::setting("retry", "attempts and factor are at least 1"));
        }
        Ok(())
    }
}

/// The text, as TOML has it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    #[serde(default = "VmPatterns::none")]
    vms: VmPatterns,
    #[serde(default)]
    tags: BTreeSet<String>,
    #[serde(default = "VmPatterns::none")]
    except: VmPatterns,
    #[serde(deserialize_with = "texts")]
    schedule: Vec<String>,
    time_zone: Option<String>,
    #[serde(default, deserialize_with = "optional_duration")]
    window: Option<Duration>,
    #[serde(default, deserialize_with = "texts")]
    blackout: Vec<String>,
    consistency: Option<ConsistencyWanted>,
    #[serde(default, deserialize_with = "optional_duration")]
    application_max_age: Option<Duration>,
    view: Option<Access>,
    #[serde(default)]
    pause: bool,
    repository: String,
    #[serde(default)]
    copies: Vec<String>,
    #[serde(default, deserialize_with = "optional_duration")]
    promise: Option<Duration>,
    #[serde(default)]
    retention: Retention,
    #[serde(default)]
    retry: RetryChanges,
}

impl Policy {
    /// Reads and checks a policy. `zone` looks a time zone up by its name, or gives the site's own without one.
    pub fn parse(
        text: &str,
        zone: impl FnOnce(Option<&str>) -> Option<TimeZone>,
    ) -> Result<Self, PolicyError> {
        let written: Written = toml::from_str(text).map_err(|error| PolicyError::Text(error.to_string()))?;
        let name = written.time_zone.as_deref();
        let zone = zone(name).ok_or_else(|| PolicyError::TimeZone(name.unwrap_or_default().to_owned()))?;
        written.check()?;
        let blackouts =
            written.blackout.iter().map(|text| text.parse::<Blackout>()).collect::<Result<_, _>>()?;
        Ok(Self {
            schedule: Schedule::new(&written.schedule, zone, written.window, blackouts)?,
            consistency: written.wanted(),
            view: written.view.unwrap_or(Access::Pinned),
            pause: written.pause,
            selection: Selection { vms: written.vms, tags: written.tags, except: written.except },
            repository: written.repository,
            copies: written.copies,
            promise: written.promise,
            retention: written.retention,
            retry: written.retry,
        })
    }
}

impl Written {
    fn check(&self) -> Result<(), PolicyError> {
        if self.vms == VmPatterns::none() && self.tags.is_empty() {
            return Err(PolicyError::setting(
                "vms",
                "no VM is selected; name patterns in vms, as \"web*,db\", or tags",
            ));
        }
        if self.schedule.is_empty() {
            return Err(PolicyError::setting("schedule", "it is empty; write as \"0 22 * * *\""));
        }
        if self.window.is_some_and(|window| window.is_zero()) {
            return Err(PolicyError::setting("window", "it has no length"));
        }
        if self.application_max_age.is_some()
            && self.consistency != Some(ConsistencyWanted::PreferApplication)
        {
            let why = "it goes with consistency = \"prefer-application\" alone";
            return Err(PolicyError::setting("application-max-age", why));
        }
        if self.copies.contains(&self.repository) {
            return Err(PolicyError::setting("copies", "the policy's own repository is among them"));
        }
        if self.promise.is_some_and(|promise| promise.is_zero()) {
            return Err(PolicyError::setting("promise", "no backup is that young"));
        }
        self.retry.check()
    }

    fn wanted(&self) -> Option<Wanted> {
        let max_age = self.application_max_age;
        match self.consistency? {
            ConsistencyWanted::Application => Some(Wanted::Application),
            ConsistencyWanted::Crash => Some(Wanted::Crash),
            ConsistencyWanted::PreferApplication => {
                max_age.map(|max_age| Wanted::PreferApplication { max_age })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Policy, PolicyError> {
        Policy::parse(text, |name| TimeZone::get(name.unwrap_or("UTC")).ok())
    }

    const LEAST: &str = "vms = \"web*\"\nschedule = \"0 22 * * *\"\nrepository = \"local\"\n";

    #[test]
    fn the_least_policy_says_who_when_and_where() {
        let policy = parse(LEAST).unwrap();
        assert!(policy.selection.selects(&"web1".parse().unwrap(), &BTreeSet::new()));
        assert_eq!((policy.view, policy.consistency, policy.promise), (Access::Pinned, None, None));
        assert!(policy.retention.is_empty() && policy.copies.is_empty());
        assert_eq!(policy.retry.applied_to(&RetryPolicy::default()), RetryPolicy::default());
    }

    #[test]
    fn everything_can_be_said() {
        let text = r#"
            vms = "web*,db"
            tags = ["gold"]
            except = "web-test"
            schedule = ["0 22 * * Mon-Fri", "0 6 * * Sat,Sun"]
            time-zone = "Europe/Berlin"
            window = "8h"
            blackout = "Mon-Fri 08:00-18:00"
            consistency = "prefer-application"
            application-max-age = "12h"
            view = "strict"
            repository = "local"
            copies = ["offsite"]
            promise = "26h"
            [retention]
            daily = 14
            monthly = 12
            within = "3d"
            [retry]
            first-delay = "5s"
            delay-max = "10m"
            attempts = 40
            barrier-after = 2
        "#;
        let policy = parse(text).unwrap();
        let max_age = Duration::from_secs(12 * 3600);
        assert_eq!(policy.consistency, Some(Wanted::PreferApplication { max_age }));
        assert_eq!(policy.retention.within, Some(Duration::from_secs(3 * 24 * 3600)));
        let retry = policy.retry.applied_to(&RetryPolicy::default());
        assert_eq!((retry.attempts_max, retry.barrier_after, retry.factor), (40, 2, 2));
        assert_eq!(retry.first_delay, Duration::from_secs(5));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let refused = |more: &str| parse(&format!("{LEAST}{more}")).unwrap_err().to_string();
        assert!(refused("time-zone = \"Mars/Olympus\"").contains("Mars/Olympus"));
        assert!(refused("window = \"soon\"").contains("\"8h\""));
        assert!(refused("blackout = \"lunch\"").contains("lunch"));
        assert!(refused("copies = [\"local\"]").contains("copies"));
        assert!(refused("application-max-age = \"1h\"").contains("prefer-application"));
        assert!(refused("retain = 3").contains("retain"));
        assert!(refused("[retention]\ndayly = 3").contains("dayly"));
        assert!(
            parse("schedule = \"0 22 * * *\"\nrepository = \"local\"")
                .unwrap_err()
                .to_string()
                .contains("vms")
        );
    }
}
