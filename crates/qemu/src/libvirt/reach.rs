//! The folder in which QEMU and this site meet: its NBD socket and the scratch. Libvirt runs QEMU as another user and
//! may confine it, so that a folder that is fine for us can be out of its reach.

use std::fs::{DirBuilder, Metadata, Permissions, set_permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Makes the folder, or makes sure that it is QEMU's; nobody else but root may look into it. The one that it lies in is
/// ours: others may pass through it and not list it.
pub(crate) fn make_folder(path: &Path, runs_as: Option<(u32, Option<u32>)>) -> Result<(), Error> {
    let failed = |what| move |source| Error::Scratch { what, path: path.to_owned(), source };
    let make = |path: &Path, mode| match DirBuilder::new().mode(mode).create(path) {
        // Whatever our umask: QEMU's user must get through.
        Ok(()) => set_permissions(path, Permissions::from_mode(mode)),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
    };
    let above = path.parent().map_or(Ok(()), |above| make(above, 0o711));
    above.and_then(|()| make(path, 0o700)).map_err(failed("make the folder"))?;
    let found = path.metadata().map_err(failed("use the folder"))?;
    match runs_as {
        Some((user, group)) if found.uid() != user => chown(path, Some(user), group).map_err(|error| {
            if error.kind() != io::ErrorKind::PermissionDenied {
                return failed("give QEMU the folder")(error);
            }
            let why = format!(
                "QEMU runs as user {user}, and this site as user {}: run the site as root, or as that user",
                found.uid()
            );
            Error::OutOfReach { folder: path.to_owned(), why }
        }),
        _ => Ok(()),
    }
}

/// Why QEMU could not use the folder although it was given it.
pub(crate) fn explain(path: &Path, runs_as: Option<(u32, Option<u32>)>, confined_by: Option<&str>) -> String {
    let above = path.parent().unwrap_or(path);
    if let Some((user, group)) = runs_as
        && let Some(closed) = closed_to(above, user, group)
    {
        let closed = closed.display();
        return format!(
            "QEMU runs as user {user}, who may not pass through {closed}: run 'chmod o+x {closed}' (it lets nobody list it, and what is in it keeps its own permissions)"
        );
    }
    let above = above.display();
    match confined_by {
        Some("apparmor") => format!(
            "AppArmor keeps QEMU from it: put the line '{above}/** rwk,' into /etc/apparmor.d/local/abstractions/libvirt-qemu, then shut the domain down and start it again"
        ),
        Some("selinux") => format!(
            "SELinux keeps QEMU from it: run \"semanage fcontext -a -t svirt_image_t '{above}(/.*)?'\" and 'restorecon -R {above}'"
        ),
        _ => "the user that QEMU runs as must be able to make files in it".to_owned(),
    }
}

/// The first folder on the way to this one, it included, that such a user cannot pass through by the permissions of
/// user, group and others.
fn closed_to(path: &Path, user: u32, group: Option<u32>) -> Option<PathBuf> {
    let mut way: Vec<&Path> = path.ancestors().filter(|folder| !folder.as_os_str().is_empty()).collect();
    way.reverse();
    let is_closed = |folder: &&Path| folder.metadata().is_ok_and(|found| !may_pass(&found, user, group));
    way.into_iter().find(is_closed).map(Path::to_owned)
}

fn may_pass(folder: &Metadata, user: u32, group: Option<u32>) -> bool {
    let mode = folder.permissions().mode();
    let bit = match folder {
        _ if user == 0 => return true,
        folder if folder.uid() == user => 0o100,
        folder if Some(folder.gid()) == group => 0o010,
        _ => 0o001,
    };
    mode & bit != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_closed_to_qemu_is_named_with_the_way_to_open_it() {
        let dir = tempfile::tempdir().unwrap();
        set_permissions(dir.path(), Permissions::from_mode(0o700)).unwrap();
        let folder = dir.path().join("libvirt/vm");
        make_folder(&folder, None).unwrap();
        assert_eq!(folder.metadata().unwrap().permissions().mode() & 0o777, 0o700);
        let own = dir.path().metadata().unwrap().uid();
        let stranger = Some((own + 4242, Some(4242)));
        let why = explain(&folder, stranger, Some("apparmor"));
        let closed = dir.path().display();
        assert!(why.contains(&format!("'chmod o+x {closed}'")), "{why}");
        set_permissions(dir.path(), Permissions::from_mode(0o711)).unwrap();
        let why = explain(&folder, stranger, Some("apparmor"));
        assert!(why.contains("/libvirt/** rwk,'"), "{why}");
        assert!(explain(&folder, stranger, Some("selinux")).contains("svirt_image_t"));
        assert!(explain(&folder, Some((own, None)), None).contains("make files"));
    }
}
