//! What others make of our backups: stock restic reads them whole, qemu-img reads the images we restore.

mod support;

use std::process::Command;
use std::sync::atomic::AtomicBool;

use repository::{Format, Repository, RestoreOptions};
use support::*;

#[test]
fn restic_checks_dumps_and_restores_what_we_restore() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("repository");
    let repository = Repository::create(&path, PASSWORD).unwrap();
    let (root, data) = (image(1, 20 * CHUNK + 1234), image(2, 3 * CHUNK));
    let first_disks =
        [("root", &root[..]), ("data", &data[..]), ("empty", &[][..]), ("blank", &[0; 1000][..])];
    let first = backup(&repository, &Disks::new(4, &first_disks), None).unwrap().backup;

    let mut changed = root.clone();
    changed[CHUNK + 5..CHUNK + 9].copy_from_slice(b"news");
    let second_disks = [("root", &changed[..]), first_disks[1], first_disks[2], first_disks[3]];
    let touched = vec![vec![CHUNK as u64 + 5..CHUNK as u64 + 9], vec![], vec![], vec![]];
    let source = Disks::new(5, &second_disks).with_changes(4, touched);
    let second = backup(&repository, &source, Some(&first)).unwrap();
    assert_eq!(second.incremental_disks, 4);
    assert!(second.bytes_read > 0 && second.bytes_read < root.len() as u64, "{second:?}");

    restic_ok(&path, &["check", "--read-data"]);
    for (info, disks) in [(&first, &first_disks), (&second.backup, &second_disks)] {
        let id = info.id.to_string();
        let target = folder.path().join(info.id.short());
        restic_ok(&path, &["restore", &id, "--target", target.to_str().unwrap()]);
        for (name, bytes) in disks {
            let file = format!("{name}.raw");
            assert!(restic_ok(&path, &["dump", &id, &format!("/{file}")]) == *bytes, "dump of {file}");
            assert!(std::fs::read(target.join(&file)).unwrap() == *bytes, "restore of {file}");
        }
        let definition = restic_ok(&path, &["dump", &id, "/definition.json"]);
        let definition: serde_json::Value = serde_json::from_slice(&definition).unwrap();
        assert_eq!(definition, repository.definition(info).unwrap());
        assert_restores(&repository, info, disks);
    }
}

#[test]
fn restic_lists_our_backups_sensibly_and_can_retag_them() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path(), PASSWORD).unwrap();
    let disk = image(3, 2 * CHUNK);
    let info = backup(&repository, &Disks::new(4, &[("root", &disk)]), None).unwrap().backup;

    let json = restic_ok(folder.path(), &["snapshots", "--json"]);
    let listed: serde_json::Value = serde_json::from_slice(&json).unwrap();
    let shown = &listed[0];
    assert_eq!(shown["id"], info.id.to_string());
    assert_eq!(shown["short_id"], info.id.short());
    assert_eq!(shown["hostname"], "web");
    assert_eq!(shown["time"], "2026-09-21T14:17:20Z");
    assert_eq!(shown["paths"], serde_json::json!(["/root.raw"]));
    let tags = shown["tags"].as_array().unwrap();
    for tag in
        ["afterimage", "application", "number:4", &format!("vm:{VM}"), &format!("point:{}", info.point.id)]
    {
        assert!(tags.iter().any(|known| known == tag), "{tag} in {tags:?}");
    }

    // restic writes the snapshot anew, with what it knows: the rest comes from the manifest.
    restic_ok(folder.path(), &["tag", "--add", "kept", "latest"]);
    let again = repository.backups(Some(VM)).unwrap();
    assert_eq!(again.len(), 1);
    assert_ne!(again[0].id, info.id);
    assert_eq!((again[0].point, &again[0].disks), (info.point, &info.disks));
    assert_restores(&repository, &again[0], &[("root", &disk)]);

    // A snapshot of restic's own, in the same repository, is not ours, and ours go on beside it.
    restic_ok(folder.path(), &["backup", concat!(env!("CARGO_MANIFEST_DIR"), "/src")]);
    assert_eq!(repository.backups(None).unwrap().len(), 1);
    let next = Disks::new(6, &[("root", &disk)]).with_changes(4, vec![vec![]]);
    let report = backup(&repository, &next, Some(&again[0])).unwrap();
    assert_eq!((report.bytes_read, report.chunks_read), (0, 0));
    restic_ok(folder.path(), &["check", "--read-data"]);
    restic_ok(folder.path(), &["forget", "--keep-last", "1", "--group-by", "host", "--prune"]);
    restic_ok(folder.path(), &["check", "--read-data"]);
    assert_restores(&repository, &repository.find(&report.backup.id.short()).unwrap(), &[("root", &disk)]);
}

fn qemu_img(arguments: &[&std::ffi::OsStr]) {
    let mut program: Command = need("qemu-img", "qemu-utils");
    let output = program.args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "qemu-img {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
fn qcow2_and_vhdx_are_what_qemu_says_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let repository = Repository::create(folder.path().join("repository"), PASSWORD).unwrap();
    // Several level-2 tables, with nothing under the middle one.
    let mut large = vec![0; 1200 << 20];
    large[..3 * CHUNK].copy_from_slice(&image(4, 3 * CHUNK));
    large[(1100 << 20)..(1100 << 20) + 2 * CHUNK].copy_from_slice(&image(5, 2 * CHUNK));
    let odd = image(6, 2 * CHUNK + 70_001);
    let disks = [("large", &large[..]), ("odd", &odd[..]), ("empty", &[][..])];
    let info = backup(&repository, &Disks::new(1, &disks), None).unwrap().backup;
    for format in [Format::Raw, Format::Qcow2, Format::Vhdx] {
        let options = RestoreOptions { format, ..RestoreOptions::to(folder.path()) };
        let report = repository.restore(&info, &options, &|_| (), &AtomicBool::new(false)).unwrap();
        for (disk, (name, bytes)) in report.disks.iter().zip(&disks) {
            let raw = folder.path().join(format!("{name}.raw"));
            let restored = disk.path.as_os_str();
            if format == Format::Raw {
                assert!(std::fs::read(&raw).unwrap() == *bytes, "{name}");
                // The list counts in sectors; the rest of the last one is zero.
                let sectors = bytes.len().next_multiple_of(512) as u64;
                std::fs::File::options().write(true).open(&raw).unwrap().set_len(sectors).unwrap();
                continue;
            }
            let kind = format.extension().as_ref();
            qemu_img(&[
                "compare".as_ref(),
                "-f".as_ref(),
                "raw".as_ref(),
                "-F".as_ref(),
                kind,
                raw.as_os_str(),
                restored,
            ]);
            qemu_img(&["check".as_ref(), "-f".as_ref(), kind, restored]);
        }
    }
    let blocks = |name: &str| {
        use std::os::unix::fs::MetadataExt;
        std::fs::metadata(folder.path().join(name)).unwrap().blocks() * 512
    };
    assert!(blocks("large.raw") < 8 << 20 && blocks("large.qcow2") < 8 << 20, "both are sparse");
}
