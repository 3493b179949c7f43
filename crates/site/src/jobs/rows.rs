//! Jobs in the catalog: every change of one is a row that is written before anything waits.

use catalog::column::{json, parsed, to_json};
use catalog::{Catalog, Transaction, params, rusqlite};
use model::{PolicyName, Timestamp, VmName};
use serde::Serialize;
use steps::durable_step;

use super::{Job, State};
use crate::clock::{from_rfc3339, serialize_moment};
use crate::failure::Failure;

const TABLES: &[&str] = &[
    "
    CREATE TABLE jobs (
        id       INTEGER PRIMARY KEY,
        vm       TEXT NOT NULL,         -- its name
        request  TEXT NOT NULL,         -- json: BackupRequest
        state    TEXT NOT NULL,         -- json: State
        attempts TEXT NOT NULL,         -- json: [Attempt], the refused ones
        made_at  INTEGER NOT NULL,
        deadline INTEGER NOT NULL
    ) STRICT;
",
    "
    ALTER TABLE jobs ADD COLUMN terms TEXT NOT NULL DEFAULT '{}';   -- json: Terms
    ALTER TABLE jobs ADD COLUMN policy TEXT;                        -- its name, of a policy's job
    ALTER TABLE jobs ADD COLUMN ended_at INTEGER;                   -- none before its end
    UPDATE jobs SET ended_at = made_at WHERE state LIKE '%\"state\":\"done\"%' OR state LIKE '%\"state\":\"failed\"%';
    CREATE INDEX jobs_unfinished ON jobs (id) WHERE ended_at IS NULL;
    CREATE INDEX jobs_made_at ON jobs (made_at);

    CREATE TABLE policy_vms (
        policy TEXT NOT NULL,           -- its name
        vm     TEXT NOT NULL,           -- its name
        since  INTEGER NOT NULL,        -- when it was selected
        seen   INTEGER NOT NULL,        -- what it was last backed up for; since, before that
        PRIMARY KEY (policy, vm)
    ) STRICT;

    CREATE TABLE backed_up (
        vm         TEXT NOT NULL,       -- its name
        repository TEXT NOT NULL,
        backup     TEXT NOT NULL,       -- the id of the backup with the newest point
        taken_at   INTEGER NOT NULL,    -- the moment of that point
        ended_at   INTEGER NOT NULL,
        PRIMARY KEY (vm, repository)
    ) STRICT;

    CREATE TABLE repository_upkeep (
        repository    TEXT PRIMARY KEY,
        forgot_at     INTEGER NOT NULL, -- when it was last looked for what no rule keeps
        pruned_at     INTEGER NOT NULL,
        has_forgotten INTEGER NOT NULL  -- something, since it was last pruned
    ) STRICT;
",
];

/// Ended jobs that are kept whatever their age.
const ENDED_KEPT: u32 = 1000;

const COLUMNS: &str = "id, request, terms, state, attempts, made_at, deadline, ended_at";

/// The newest backup of a VM in a repository.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct BackedUp {
    /// The VM.
    pub vm: VmName,
    /// The repository's name.
    pub repository: String,
    /// The backup's id.
    pub backup: String,
    /// The moment of its point.
    #[serde(serialize_with = "serialize_moment")]
    pub taken_at: Timestamp,
}

pub(super) fn migrate(catalog: &Catalog) -> Result<(), Failure> {
    Ok(catalog.migrate("jobs", TABLES)?)
}

pub(super) fn unfinished(catalog: &Catalog) -> Result<Vec<Job>, Failure> {
    select_jobs(catalog, "WHERE ended_at IS NULL ORDER BY id", [])
}

pub(super) fn newest(catalog: &Catalog) -> Result<Vec<Job>, Failure> {
    select_jobs(catalog, "ORDER BY id DESC LIMIT ?1", [ENDED_KEPT])
}

pub(super) fn made_since(catalog: &Catalog, since: Timestamp) -> Result<Vec<Job>, Failure> {
    select_jobs(catalog, "WHERE made_at >= ?1 ORDER BY made_at, id", [since.0])
}

fn select_jobs(catalog: &Catalog, which: &str, values: impl rusqlite::Params) -> Result<Vec<Job>, Failure> {
    let query = format!("SELECT {COLUMNS} FROM jobs {which}");
    Ok(catalog.read(|c| c.prepare_cached(&query)?.query_map(values, read)?.collect::<Result<_, _>>())?)
}

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Job> {
    Ok(Job {
        id: row.get(0)?,
        request: json(row, 1)?,
        terms: json(row, 2)?,
        state: json(row, 3)?,
        attempts: json(row, 4)?,
        made_at: Timestamp(row.get(5)?),
        deadline: Timestamp(row.get(6)?),
        ended_at: row.get::<_, Option<i64>>(7)?.map(Timestamp),
    })
}

/// Writes a new job down; what has ended before `forget_before` is forgotten. Gives its number.
pub(super) async fn add(catalog: &Catalog, job: &Job, forget_before: Timestamp) -> Result<i64, Failure> {
    let job = job.clone();
    durable_step("site::job::adding");
    let id = catalog.change(move |tx| {
        let id = insert(tx, &job)?;
        forget(tx, forget_before)?;
        Ok(id)
    });
    let id = id.await?;
    durable_step("site::job::added");
    Ok(id)
}

/// Writes a policy's jobs down, and what their VMs were seen to for. A VM of which the policy has an unfinished job
/// gets no other one.
pub(super) async fn plan(
    catalog: &Catalog,
    planned: Vec<Job>,
    forget_before: Timestamp,
) -> Result<Vec<Job>, Failure> {
    durable_step("site::policy::planning");
    let jobs = catalog.change(move |tx| {
        let open = "SELECT 1 FROM jobs WHERE ended_at IS NULL AND policy = ?1 AND vm = ?2";
        let seen = "UPDATE policy_vms SET seen = max(seen, ?3) WHERE policy = ?1 AND vm = ?2";
        let mut jobs = Vec::new();
        for mut job in planned {
            let policy = job.terms.policy.as_ref().map(PolicyName::as_str).map(str::to_owned);
            let vm = job.request.vm.as_str().to_owned();
            if let Some(start) = job.terms.start {
                tx.prepare_cached(seen)?.execute(params![policy, vm, start.0])?;
            }
            if !tx.prepare_cached(open)?.exists(params![policy, vm])? {
                job.id = insert(tx, &job)?;
                jobs.push(job);
            }
        }
        forget(tx, forget_before)?;
        Ok(jobs)
    });
    let jobs = jobs.await?;
    durable_step("site::policy::planned");
    Ok(jobs)
}

fn insert(tx: &Transaction<'_>, job: &Job) -> rusqlite::Result<i64> {
    let insert = "INSERT INTO jobs (vm, request, terms, policy, state, attempts, made_at, deadline)
                  VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)";
    tx.prepare_cached(insert)?.execute(params![
        job.request.vm.as_str(),
        to_json(&job.request),
        to_json(&job.terms),
        job.terms.policy.as_ref().map(PolicyName::as_str),
        to_json(&job.state),
        to_json(&job.attempts),
        job.made_at.0,
        job.deadline.0,
    ])?;
    Ok(tx.last_insert_rowid())
}

fn forget(tx: &Transaction<'_>, before: Timestamp) -> rusqlite::Result<()> {
    let forget = "DELETE FROM jobs WHERE made_at < ?1 AND ended_at IS NOT NULL AND id <= (SELECT max(id) FROM jobs) - ?2";
    tx.prepare_cached(forget)?.execute(params![before.0, ENDED_KEPT]).map(drop)
}

/// Writes down where a job stands; with its backup, if it has one now.
pub(super) async fn save(catalog: &Catalog, job: &Job) -> Result<(), catalog::Error> {
    let (id, state, attempts) = (job.id, to_json(&job.state), to_json(&job.attempts));
    let (terms, deadline) = (to_json(&job.terms), job.deadline.0);
    let ended_at = job.ended_at.map(|at| at.0);
    let backed_up = made_by(job);
    durable_step("site::job::saving");
    let saved = catalog
        .change(move |tx| {
            let update = "UPDATE jobs SET state = ?2, attempts = ?3, ended_at = ?4, terms = ?5, deadline = ?6 WHERE id = ?1";
            tx.prepare_cached(update)?.execute(params![id, state, attempts, ended_at, terms, deadline])?;
            match backed_up {
                Some(made) => put_backup(tx, &made, ended_at),
                None => Ok(()),
            }
        })
        .await;
    durable_step("site::job::saved");
    saved
}

fn put_backup(tx: &Transaction<'_>, made: &BackedUp, ended_at: Option<i64>) -> rusqlite::Result<()> {
    let newest =
        "INSERT INTO backed_up VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT (vm, repository) DO UPDATE SET
        backup = excluded.backup, taken_at = excluded.taken_at, ended_at = excluded.ended_at
        WHERE excluded.taken_at >= taken_at";
    let (vm, taken_at) = (made.vm.as_str(), made.taken_at.0);
    tx.prepare_cached(newest)?
        .execute(params![vm, made.repository, made.backup, taken_at, ended_at])
        .map(drop)
}

/// The backup that a job has made.
fn made_by(job: &Job) -> Option<BackedUp> {
    let State::Done { report } = &job.state else { return None };
    Some(BackedUp {
        vm: job.request.vm.clone(),
        repository: job.request.repository.clone(),
        backup: report["backup"].as_str()?.to_owned(),
        taken_at: from_rfc3339(report["taken_at"].as_str()?)?,
    })
}

pub(super) fn backed_up(catalog: &Catalog) -> Result<Vec<BackedUp>, Failure> {
    let query = "SELECT vm, repository, backup, taken_at FROM backed_up ORDER BY vm, repository";
    let read = |row: &rusqlite::Row<'_>| {
        Ok(BackedUp {
            vm: parsed(row, 0)?,
            repository: row.get(1)?,
            backup: row.get(2)?,
            taken_at: Timestamp(row.get(3)?),
        })
    };
    Ok(catalog.read(|c| c.prepare_cached(query)?.query_map([], read)?.collect::<Result<_, _>>())?)
}

/// The moment of the newest backup's point, of a VM in a repository.
pub(crate) fn newest_backup(
    catalog: &Catalog,
    vm: &VmName,
    repository: &str,
) -> Result<Option<Timestamp>, Failure> {
    let query = "SELECT max(taken_at) FROM backed_up WHERE vm = ?1 AND repository = ?2";
    let found: Option<i64> = catalog
        .read(|c| c.prepare_cached(query)?.query_row(params![vm.as_str(), repository], |row| row.get(0)))?;
    Ok(found.map(Timestamp))
}

/// What a policy knows of its VMs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selected {
    /// The VM.
    pub vm: VmName,
    /// When it was selected.
    pub since: Timestamp,
    /// What it was last seen to for; `since` before that.
    pub seen: Timestamp,
}

pub(super) fn selected(catalog: &Catalog, policy: &PolicyName) -> Result<Vec<Selected>, Failure> {
    let query = "SELECT vm, since, seen FROM policy_vms WHERE policy = ?1 ORDER BY vm";
    let read = |row: &rusqlite::Row<'_>| {
        Ok(Selected { vm: parsed(row, 0)?, since: Timestamp(row.get(1)?), seen: Timestamp(row.get(2)?) })
    };
    let found = catalog
        .read(|c| c.prepare_cached(query)?.query_map([policy.as_str()], read)?.collect::<Result<_, _>>());
    Ok(found?)
}

pub(super) fn policies(catalog: &Catalog) -> Result<Vec<PolicyName>, Failure> {
    let query = "SELECT DISTINCT policy FROM policy_vms ORDER BY policy";
    Ok(catalog
        .read(|c| c.prepare_cached(query)?.query_map([], |row| parsed(row, 0))?.collect::<Result<_, _>>())?)
}

/// Makes the VMs that a policy selects these ones: who is new counts from `at`, who is not there any more is forgotten.
pub(super) async fn select(
    catalog: &Catalog,
    policy: PolicyName,
    joined: Vec<VmName>,
    left: Vec<VmName>,
    at: Timestamp,
) -> Result<(), Failure> {
    durable_step("site::policy::selecting");
    let change = catalog.change(move |tx| {
        let policy = policy.as_str();
        for vm in joined {
            tx.prepare_cached("INSERT OR IGNORE INTO policy_vms VALUES (?1, ?2, ?3, ?3)")?
                .execute(params![policy, vm.as_str(), at.0])?;
        }
        for vm in left {
            tx.prepare_cached("DELETE FROM policy_vms WHERE policy = ?1 AND vm = ?2")?
                .execute(params![policy, vm.as_str()])?;
        }
        Ok(())
    });
    change.await?;
    durable_step("site::policy::selected");
    Ok(())
}

/// Notes a backup that no job of its own has made: a copy.
pub(super) fn note_backup(catalog: &Catalog, made: BackedUp, at: Timestamp) -> Result<(), Failure> {
    write_down(catalog, move |tx| put_backup(tx, &made, Some(at.0)))
}

/// Whether there are backups in a repository that were made since backups were last forgotten there, and no policy's job
/// into it is under way.
pub(super) fn is_forgetting_due(catalog: &Catalog, repository: &str) -> Result<bool, Failure> {
    let query = "SELECT EXISTS (SELECT 1 FROM backed_up WHERE repository = ?1 AND ended_at >
                     coalesce((SELECT forgot_at FROM repository_upkeep WHERE repository = ?1), 0))
                 AND NOT EXISTS (SELECT 1 FROM jobs WHERE ended_at IS NULL AND policy IS NOT NULL
                     AND json_extract(request, '$.repository') = ?1)";
    Ok(catalog.read(|c| c.prepare_cached(query)?.query_row([repository], |row| row.get(0)))?)
}

/// Whether something was forgotten in a repository since it was last pruned, and that was before this moment.
pub(super) fn is_pruning_due(
    catalog: &Catalog,
    repository: &str,
    before: Timestamp,
) -> Result<bool, Failure> {
    let query = "SELECT EXISTS (SELECT 1 FROM repository_upkeep
                 WHERE repository = ?1 AND has_forgotten AND pruned_at < ?2)";
    Ok(catalog
        .read(|c| c.prepare_cached(query)?.query_row(params![repository, before.0], |row| row.get(0)))?)
}

pub(super) fn note_forgetting(
    catalog: &Catalog,
    repository: String,
    at: Timestamp,
    has_forgotten: bool,
) -> Result<(), Failure> {
    write_down(catalog, move |tx| {
        let put =
            "INSERT INTO repository_upkeep VALUES (?1, ?2, 0, ?3) ON CONFLICT (repository) DO UPDATE SET
                   forgot_at = excluded.forgot_at, has_forgotten = has_forgotten OR excluded.has_forgotten";
        tx.prepare_cached(put)?.execute(params![repository, at.0, has_forgotten]).map(drop)
    })
}

pub(super) fn note_pruning(catalog: &Catalog, repository: String, at: Timestamp) -> Result<(), Failure> {
    write_down(catalog, move |tx| {
        let put = "UPDATE repository_upkeep SET pruned_at = ?2, has_forgotten = 0 WHERE repository = ?1";
        tx.prepare_cached(put)?.execute(params![repository, at.0]).map(drop)
    })
}

/// One change, written before anything follows from it. Blocks.
fn write_down(
    catalog: &Catalog,
    change: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()> + Send + 'static,
) -> Result<(), Failure> {
    durable_step("site::policy::noting");
    catalog.write(change)?;
    durable_step("site::policy::noted");
    Ok(())
}
