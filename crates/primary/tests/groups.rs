//! Groups over ports in memory: how they come, are kept and go, and what the replica's site is told of their moments. How
//! several VMs wait for each other is shown in `qemu` and, with real ones, end to end.

mod world;

use std::time::Duration;

use model::group::{Group, GroupMember};
use model::{GroupName, VmName};
use primary::{Error, Primary};
use world::{BLOCK, Fault, World, request};

const SIZES: [usize; 2] = [1 << 20, 4 * BLOCK];

fn shop(vm: &str) -> Group {
    let member = GroupMember { vm: vm.parse().unwrap(), delay_s: 0 };
    Group { name: "shop".parse().unwrap(), members: vec![member] }
}

/// With the clock of the wall: one that stands jumps ahead whenever the catalog is waited for, and doors have no patience.
fn with_clock<T>(story: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(story)
}

async fn replicated(site: &Primary<World>) -> (VmName, GroupName) {
    site.protect(request()).await.unwrap();
    let (vm, group) = ("web".parse().unwrap(), "shop".parse().unwrap());
    site.sync(&vm).await.unwrap();
    (vm, group)
}

#[test]
fn a_group_is_of_vms_that_are_protected_here_and_its_interval_is_theirs() {
    with_clock(async {
        let dir = tempfile::tempdir().unwrap();
        let catalog = dir.path().join("catalog.sqlite");
        let world = World::new(21, &SIZES);
        let site = world.site(&catalog);
        let (vm, name) = replicated(&site).await;
        let refused = site.create_group(shop("db"), None).await.unwrap_err();
        assert!(matches!(refused, Error::NoSuchVm(_)), "{refused}");
        let refused = site.create_group(shop("web"), Some(Duration::from_secs(1))).await.unwrap_err();
        assert!(matches!(refused, Error::Setting(_)), "{refused}");
        let minute = Duration::from_secs(60);
        assert_eq!(site.create_group(shop("web"), Some(minute)).await.unwrap().interval, minute);
        for taken in [shop("web"), Group { name: "other".parse().unwrap(), ..shop("web") }] {
            let refused = site.create_group(taken, None).await.unwrap_err();
            assert!(matches!(refused, Error::Taken(_)), "{refused}");
        }
        site.sync_group(&name).await.unwrap();
        let status = site.get(&vm).unwrap();
        assert_eq!((status.group, status.settings.interval), (Some(name.clone()), minute));
        site.shutdown().await;
        drop(site);

        // It is there again after a start, until it is removed.
        let site = world.site(&catalog);
        assert_eq!(site.group(&name).unwrap().interval, minute);
        site.sync_group(&name).await.unwrap();
        site.remove_group(&name).await.unwrap();
        site.sync(&vm).await.unwrap();
        let status = site.get(&vm).unwrap();
        assert_eq!((status.group, status.settings.interval), (None, Duration::from_secs(30)));
        assert!(matches!(site.sync_group(&name).await, Err(Error::NoSuchGroup(_))));
        site.create_group(shop("web"), None).await.unwrap();
        site.unprotect(&vm).await.unwrap();
        assert!(site.group_list().is_empty(), "nobody is left");
        site.shutdown().await;
    });
}

#[test]
fn a_moment_is_told_before_the_log_that_makes_its_point_has_ended() {
    with_clock(async {
        let dir = tempfile::tempdir().unwrap();
        let world = World::new(22, &SIZES);
        let site = world.site(&dir.path().join("catalog.sqlite"));
        let (vm, name) = replicated(&site).await;
        site.create_group(shop("web"), Some(Duration::from_secs(600))).await.unwrap();
        let synced = site.sync_group(&name).await.unwrap();
        assert!(synced.moment.is_whole() && synced.failed.is_empty(), "{synced:?}");
        let told = |world: &World| {
            world.lock().replica.reported.last().and_then(|report| report.moment.clone()).unwrap()
        };
        let (announced, durable) = (told(&world), world.lock().replica.durable);
        assert_eq!(
            (announced.number, announced.id, &announced.moment),
            (durable.number, durable.id, &synced.moment)
        );
        let log = world.lock().replica.logs.last().unwrap().clone();
        let header = log::verify(&mut &log[..]).unwrap().header;
        assert_eq!(header.moment, synced.moment.at, "the log says the group's moment");

        // A moment that was fixed, and whose log does not arrive: its changes are in the next one.
        (0..20).for_each(|_| world.lock().guest_writes());
        world.lock().replica.fault = Some(Fault::Break);
        let cut = site.sync_group(&name).await.unwrap();
        assert_eq!((cut.moment.members.len(), cut.failed.len()), (1, 1), "{cut:?}");
        assert_eq!((told(&world).moment, world.lock().replica.durable), (cut.moment, durable));
        let alone = site.sync_group(&name).await.unwrap();
        let why = &alone.moment.missing[0].why;
        assert!(alone.moment.members.is_empty() && why.contains("its last cycle failed"), "{alone:?}");
        site.sync(&vm).await.unwrap();
        let again = site.sync_group(&name).await.unwrap();
        assert!(again.moment.is_whole(), "{again:?}");
        let newest = world.lock().vm.moments.values().last().cloned().unwrap();
        assert!(world.lock().replica.data() == newest, "nothing was lost on the way");
        site.shutdown().await;
    });
}
