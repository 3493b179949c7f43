//! What the catalog remembers of groups: one row each.

use std::time::Duration;

use catalog::column::{json, to_json};
use catalog::{Catalog, params};
use model::group::Group;
use model::{GroupName, Timestamp};
use serde::{Deserialize, Serialize};
use steps::durable_step;

pub(crate) const TABLE: &str = "
    CREATE TABLE vm_groups (
        name TEXT PRIMARY KEY,
        doc  TEXT NOT NULL              -- json: GroupRow
    ) STRICT;
";

/// A group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GroupRow {
    pub group: Group,
    pub interval: Duration,
    pub made_at: Timestamp,
}

pub(crate) fn load(catalog: &Catalog) -> Result<Vec<GroupRow>, catalog::Error> {
    catalog.read(|c| {
        c.prepare("SELECT doc FROM vm_groups ORDER BY name")?.query_map([], |row| json(row, 0))?.collect()
    })
}

/// Writes a group, or that there is none any more: durable when this returns.
pub(crate) async fn write(
    catalog: &Catalog,
    name: &GroupName,
    row: Option<&GroupRow>,
) -> Result<(), catalog::Error> {
    let (name, doc) = (name.to_string(), row.map(to_json));
    durable_step("primary::group::writing");
    catalog
        .change(move |tx| match doc {
            Some(doc) => tx.execute("INSERT OR REPLACE INTO vm_groups VALUES (?1, ?2)", params![name, doc]),
            None => tx.execute("DELETE FROM vm_groups WHERE name = ?1", [name]),
        })
        .await?;
    durable_step("primary::group::written");
    Ok(())
}

#[cfg(test)]
mod tests {
    use model::group::GroupMember;

    use super::*;

    #[tokio::test]
    async fn a_group_comes_back_as_it_was_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(dir.path().join("catalog.sqlite")).unwrap();
        crate::rows::migrate(&catalog).unwrap();
        let name: GroupName = "shop".parse().unwrap();
        let members = vec![GroupMember { vm: "db".parse().unwrap(), delay_s: 7 }];
        let group = Group { name: name.clone(), members };
        let row = GroupRow { group, interval: Duration::from_secs(30), made_at: Timestamp(5) };
        write(&catalog, &name, Some(&row)).await.unwrap();
        assert_eq!(load(&catalog).unwrap(), [row]);
        write(&catalog, &name, None).await.unwrap();
        assert!(load(&catalog).unwrap().is_empty());
    }
}
