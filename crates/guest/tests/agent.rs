//! A guest by itself: what it acknowledged survives a kill, and its agent brings its file systems to rest.

use std::time::Duration;

use guest::{BOOT, Guest, GuestImage, Mode, check};
use qemu::GuestAgent;

#[test]
fn what_was_acknowledged_survives_a_kill_and_nothing_is_written_while_frozen() {
    let image = GuestImage::build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let disks = image.install(dir.path()).unwrap();
    let mut guest = Guest::start(&image, &disks, Mode::Run, dir.path()).unwrap();
    guest.console().wait_for("ack relay-sqlite 5", BOOT).unwrap();

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut agent = GuestAgent::connect(&guest.agent()).await.unwrap();
        assert_eq!(agent.freeze(Duration::from_secs(30)).await.unwrap(), 2, "both file systems");
        // What was committed before may still be on its way to the console.
        tokio::time::sleep(Duration::from_millis(500)).await;
        let frozen = guest.acked();
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(guest.acked(), frozen, "nothing is committed by a guest at rest");
        assert_eq!(agent.thaw().await.unwrap(), 2);
    });
    let thawed = guest.acked().of_ledger("relay-sqlite");
    guest.console().wait_for(&format!("ack relay-sqlite {}", thawed + 3), BOOT).unwrap();

    guest.kill();
    let acked = guest.acked();
    let checked = check(&image, &disks, &dir.path().join("check")).unwrap();
    checked.judge(&acked, None).unwrap();
    println!("acknowledged {acked}; found {checked}");
}
