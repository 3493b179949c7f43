//! Debian's packages, as `scripts/setup guest` has downloaded them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use rig::{Result, Trouble, doing, tool};

/// What a user is told where something is missing.
const INSTALL: &str = "run ./scripts/setup guest";

/// The downloaded packages: name without version → file. For several versions of one package, the last by name.
pub(crate) struct Packages(BTreeMap<String, PathBuf>);

impl Packages {
    /// The folder that `scripts/setup` downloads to.
    pub fn find() -> Result<Self> {
        let named = std::env::var_os("AFTERIMAGE_GUEST_PACKAGES").map(PathBuf::from);
        let cache = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = || std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache"));
        let dir = named
            .or_else(|| Some(cache().or_else(home)?.join("afterimage/guest")))
            .ok_or_else(|| Trouble("neither AFTERIMAGE_GUEST_PACKAGES nor HOME is set".into()))?;
        Self::in_dir(&dir)
    }

    fn in_dir(dir: &Path) -> Result<Self> {
        let missing =
            |error| Trouble(format!("a guest's packages are not at {}: {error}; {INSTALL}", dir.display()));
        let mut files = BTreeMap::new();
        let mut paths = std::fs::read_dir(dir)
            .map_err(missing)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(missing)?;
        paths.sort();
        for path in paths {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if let Some((package, _)) = name.strip_suffix(".deb").and_then(|name| name.split_once('_')) {
                files.insert(package.to_owned(), path);
            }
        }
        Ok(Self(files))
    }

    /// The kernel's package: its name has the kernel's version in it.
    pub fn kernel(&self) -> Result<&str> {
        let is_kernel = |name: &&String| name.starts_with("linux-image-") && name.ends_with("-cloud-amd64");
        let found = self.0.keys().rfind(is_kernel).map(String::as_str);
        found.ok_or_else(|| Trouble(format!("no kernel's package was downloaded; {INSTALL}")))
    }

    /// Names and versions of all.
    pub fn versions(&self) -> impl Iterator<Item = std::borrow::Cow<'_, str>> {
        self.0.values().filter_map(|path| path.file_name()).map(|name| name.to_string_lossy())
    }

    /// The names of all but kernels.
    pub fn programs_and_libraries(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).filter(|name| !name.starts_with("linux-image-")).collect()
    }

    /// Unpacks packages; nothing of them is run.
    pub fn unpack(&self, names: &[&str], to: &Path) -> Result<()> {
        std::fs::create_dir_all(to).map_err(doing(to.display()))?;
        for name in names {
            let file = self.0.get(*name);
            let file =
                file.ok_or_else(|| Trouble(format!("package {name} was not downloaded; {INSTALL}")))?;
            tool(Command::new("dpkg-deb").arg("-x").arg(file).arg(to))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_the_line_that_brings_it() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["libc6_2.36-9_amd64.deb", "sqlite3_3.40_amd64.deb", "sqlite3_3.41_amd64.deb", "notes"] {
            std::fs::write(dir.path().join(name), b"").unwrap();
        }
        let packages = Packages::in_dir(dir.path()).unwrap();
        assert_eq!(packages.programs_and_libraries(), ["libc6", "sqlite3"]);
        assert_eq!(
            packages.versions().collect::<Vec<_>>(),
            ["libc6_2.36-9_amd64.deb", "sqlite3_3.41_amd64.deb"]
        );
        let said = packages.kernel().unwrap_err().0;
        assert!(said.contains("kernel") && said.contains(INSTALL), "{said}");
        let said = packages.unpack(&["xfsprogs"], dir.path()).unwrap_err().0;
        assert!(said.contains("xfsprogs") && said.contains(INSTALL), "{said}");
        let said = Packages::in_dir(&dir.path().join("nowhere")).map(drop).unwrap_err().0;
        assert!(said.contains("nowhere") && said.contains(INSTALL), "{said}");
    }
}
