//! The server against the clients of others.

mod support;

use std::sync::Arc;

use nbd::{CowDisk, Disk, FileDisk};
use support::{Ours, Server, layer_file, pattern, run, sparse_file, text};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SIZE: u64 = 96 * MIB + 512;

/// A disk with holes, an end that is no whole block, and a short stretch of data among holes.
fn image(ours: &Ours) -> std::path::PathBuf {
    let path = ours.folder.path().join("disk.raw");
    sparse_file(&path, SIZE, &[(3 * MIB, 9 << 20), (40 * MIB, 4096), (SIZE - 512, 512)]);
    path
}

/// Shows a new writable layer over `base`.
fn show_writable(ours: &Ours, base: &std::path::Path) -> String {
    let layer = layer_file(&ours.folder.path().join("layer"));
    ours.show("disk", CowDisk::new(Arc::new(FileDisk::open(base).unwrap()), layer).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_img_reads_a_disk() {
    let ours = Ours::start();
    let image = image(&ours);
    let uri = ours.show("vm 1/disk 'ä'?", FileDisk::open(&image).unwrap());
    let told = run("qemu-img", &["info", "--output=json", "-f", "raw", &uri]);
    assert!(told.contains(&format!("\"virtual-size\": {SIZE}")), "{told}");
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &uri]);
    let map = |of: &str| run("qemu-img", &["map", "--output=json", "-f", "raw", of]);
    assert_eq!(map(&uri), map(text(&image)));
    let copy = ours.folder.path().join("copy.raw");
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-m", "8", "-W", &uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&image).unwrap());
    run("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 50M 1M", "-c", "read 3M 64k", &uri]);
    assert!(!support::output("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]).status.success());
    ours.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn libnbd_reads_a_disk() {
    let ours = Ours::start();
    let image = image(&ours);
    let uri = ours.show("disk", FileDisk::open(&image).unwrap());
    ours.show("another", FileDisk::open(&image).unwrap());
    let map = run("nbdinfo", &["--map", &uri]);
    let map: Vec<Vec<&str>> = map.lines().map(|line| line.split_whitespace().collect()).collect();
    let extent = |start: u64, len: u64, zero: bool| {
        let (flags, name) = if zero { ("3", "hole,zero") } else { ("0", "data") };
        vec![start.to_string(), len.to_string(), flags.to_owned(), name.to_owned()]
    };
    // The file's last block is told whole, as far as the disk goes.
    let expected = [
        extent(0, 3 * MIB, true),
        extent(3 * MIB, 9 * MIB, false),
        extent(12 * MIB, 28 * MIB, true),
        extent(40 * MIB, 4 * KIB, false),
        extent(40 * MIB + 4096, 56 * MIB - 4096, true),
        extent(96 * MIB, 512, false),
    ];
    assert_eq!(map, expected);

    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), SIZE.to_string());
    for can in ["df", "multi-conn", "flush"] {
        run("nbdinfo", &["--can", can, &uri]);
    }
    run("nbdinfo", &["--is", "read-only", &uri]);
    let list = run("nbdinfo", &["--list", &ours.server.uri("")]);
    assert!(list.contains("\"disk\"") && list.contains("\"another\""), "{list}");

    let copy = ours.folder.path().join("copy.raw");
    for request in ["4096", "262144", "33554432"] {
        run("nbdcopy", &[&format!("--request-size={request}"), &uri, text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == std::fs::read(&image).unwrap());
        std::fs::remove_file(&copy).unwrap();
    }
    // The same without asking for extents: our server leaves the zeros out of the reads by itself.
    run("nbdcopy", &["--no-extents", &uri, text(&copy)]);
    assert!(std::fs::read(&copy).unwrap() == std::fs::read(&image).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn nbdkit_passes_a_disk_on() {
    let ours = Ours::start();
    let image = image(&ours);
    let uri = ours.show("disk", FileDisk::open(&image).unwrap());
    let between = Server::nbdkit(&["nbd", "shared=true", &format!("uri={uri}")]);
    let second = format!("nbd+unix:///?socket={}", text(&between.socket()));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&image), &second]);
    assert_eq!(run("nbdinfo", &["--map", &second]), run("nbdinfo", &["--map", &uri]));
}

#[tokio::test(flavor = "multi_thread")]
async fn qemu_writes_to_a_layer() {
    let ours = Ours::start();
    let image = image(&ours);
    let before = std::fs::read(&image).unwrap();
    let uri = show_writable(&ours, &image);
    for can in ["fua", "trim", "zero", "flush", "multi-conn"] {
        run("nbdinfo", &["--can", can, &uri]);
    }
    let commands = [
        "write -P 0x11 5M 3M",
        "write -P 0x22 -f 41943552 512",
        "write -z 6M 64k",
        "write -z -u 7M 1000",
        "discard 10M 1M",
        "write -P 0x33 100663296 512",
        "flush",
        "read -P 0x11 5M 1M",
        "read -P 0 6M 64k",
        "read -P 0x11 7341032 1000",
        "read -P 0 7M 1000",
        "read -P 0x22 41943552 512",
        "read -P 0 10M 1M",
        "read -P 0x33 100663296 512",
        "read -P 0 60M 2M",
    ];
    let commands: Vec<&str> = commands.iter().flat_map(|&command| ["-c", command]).collect();
    let said = run("qemu-io", &[&["-f", "raw", "-d", "unmap"], &commands[..], &[&uri]].concat());
    assert!(!said.contains("failed"), "{said}");
    assert!(std::fs::read(&image).unwrap() == before, "the disk below is as it was");

    // What QEMU sees is what the layer has, also when it is opened again.
    let mut expected = before;
    expected[5 << 20..8 << 20].fill(0x11);
    expected[41_943_552..][..512].fill(0x22);
    expected[6 << 20..][..65536].fill(0);
    expected[7 << 20..][..1000].fill(0);
    expected[10 << 20..11 << 20].fill(0);
    expected[SIZE as usize - 512..].fill(0x33);
    let copy = ours.folder.path().join("copy.raw");
    std::fs::write(&copy, &expected).unwrap();
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&copy), &uri]);
    assert!(ours.server.remove("disk").await);
    let uri = show_writable(&ours, &image);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&copy), &uri]);
}

#[tokio::test(flavor = "multi_thread")]
async fn whole_disks_are_copied_in() {
    let ours = Ours::start();
    let (base, source) = (ours.folder.path().join("base"), ours.folder.path().join("source"));
    sparse_file(&base, 64 * MIB, &[(0, 20 << 20)]);
    sparse_file(&source, 64 * MIB, &[(10 * MIB, 30 << 20), (50 * MIB, 5000)]);
    let uri = show_writable(&ours, &base);
    run("nbdcopy", &["--destination-is-zero", text(&source), &uri]);
    // Its promise was false: the base shows through where the source is zeros.
    assert!(!support::output("qemu-img", &["compare", "-f", "raw", text(&source), &uri]).status.success());
    run("nbdcopy", &["--flush", text(&source), &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&source), &uri]);

    let flat = ours.folder.path().join("flat");
    sparse_file(&flat, 64 * MIB, &[(60 * MIB, 1 << 20)]);
    let uri = ours.show("flat", FileDisk::open_writable(&flat).unwrap());
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", text(&source), &uri]);
    assert!(std::fs::read(&flat).unwrap() == std::fs::read(&source).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn fio_verifies_what_it_wrote() {
    let ours = Ours::start();
    let base = ours.folder.path().join("base");
    sparse_file(&base, 32 * MIB, &[(0, 32 << 20)]);
    let uri = show_writable(&ours, &base);
    // Mixed sizes at places that are no multiples of a block, many at once.
    run(
        "fio",
        &[
            "--name=write",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
            "--bsrange=512-64k",
            "--bs_unaligned=1",
            "--iodepth=32",
            "--size=24M",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--do_verify=1",
            "--fsync=50",
            "--verify_state_save=0",
            "--output=/dev/null",
        ],
    );
    let disk =
        CowDisk::new(Arc::new(FileDisk::open(&base).unwrap()), layer_file(&ours.folder.path().join("other")));
    let mut bytes = vec![0; MIB as usize];
    disk.unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes == pattern(0, MIB as usize), "the disk below is as it was");
}
