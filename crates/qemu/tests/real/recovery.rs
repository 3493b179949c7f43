//! Killed, cut off or refused at each command of a cycle: nothing stays behind, and no change is forgotten.

use model::{LogNumber, Tracking};
use qemu::{Disk, Error, Vm};

use crate::support::{
    Fault, PREFIX, Process, Proxy, assert_same, bitmaps, connect, daemon, leftovers, replicate,
};

/// A cycle as the primary runs it. Gives whether the replica has acknowledged the log.
async fn cycle(
    vm: &Vm,
    process: &Process,
    disks: &[Disk],
    k: u64,
    ack: bool,
    replica: &mut [Vec<u8>],
) -> (bool, Result<(), Error>) {
    let (base, next) = (LogNumber(k), LogNumber(k + 1));
    let capture = match vm.begin_capture(process.request(disks, Some(k), k + 1)).await {
        Ok(capture) => capture,
        Err(error) => return (false, Err(error)),
    };
    let mut a = process.guest("a");
    a.fill(k % 512 + 600, 1); // while it is read
    let mut copy = replica.to_vec();
    if ack {
        replicate(&mut copy, &capture);
    }
    let ended = vm.end_reading(capture).await;
    if ended.is_err() {
        return (false, ended);
    }
    if ack {
        replica.clone_from_slice(&copy);
        return (true, vm.commit(disks, Some(base), next).await);
    }
    (false, vm.give_back(disks, Some(base)).await)
}

async fn each_command_with(fault: Fault) {
    let process = daemon(&[]).await;
    let mut replica = vec![vec![]; 2];
    let mut k = 1;
    let disks = {
        let vm = process.vm().await;
        let disks = vm.disks().await.unwrap();
        let capture = vm.begin_capture(process.request(&disks, None, 1)).await.unwrap();
        replicate(&mut replica, &capture);
        vm.end_reading(capture).await.unwrap();
        disks
    };
    let mut struck = 0;
    for ack in [true, false] {
        for nth in 0.. {
            assert!(nth < 200, "a cycle has an end");
            let mut b = process.guest("b");
            b.fill(nth as u64, nth as u8 + 1);
            let proxy = Proxy::start(&process);
            let mut address = process.address();
            address.monitor = qemu::Monitor::Socket(process.path("proxy"));
            let vm = connect(address).await;
            proxy.arm(nth, fault);
            let (acked, outcome) = cycle(&vm, &process, &disks, k, ack, &mut replica).await;
            let command = proxy.struck();
            proxy.disarm();
            if fault == Fault::Refuse && outcome.is_err() {
                // What failed was undone at once, over the same connection.
                assert_eq!(leftovers(vm.qmp()).await, Vec::<String>::new(), "after {command:?} ({nth})");
            }
            drop(vm);

            k += u64::from(acked);
            let vm = process.vm().await;
            vm.cleanup(&disks, Some(LogNumber(k))).await.unwrap();
            let at = format!("after {fault:?} of {command:?} ({nth}): {outcome:?}");
            assert_eq!(leftovers(vm.qmp()).await, Vec::<String>::new(), "{at}");
            assert_eq!(bitmaps(vm.qmp(), "a").await, [format!("{PREFIX}-{k}")], "{at}");
            assert_eq!(vm.inspect(&disks, LogNumber(k)).await.unwrap(), Tracking::Intact, "{at}");
            check_changes(&vm, &process, &disks, k, &mut replica).await;
            k += 1;
            assert_eq!(process.scratch_files(), 0, "{at}");
            if command.is_none() {
                assert!(outcome.is_ok(), "{outcome:?}");
                break;
            }
            struck += 1;
        }
    }
    assert!(struck > 40, "only {struck} commands were struck");
}

/// A cycle without faults brings the replica to exactly what the disks are.
async fn check_changes(vm: &Vm, process: &Process, disks: &[Disk], k: u64, replica: &mut [Vec<u8>]) {
    let capture = vm.begin_capture(process.request(disks, Some(k), k + 1)).await.unwrap();
    replicate(replica, &capture);
    assert_same(replica, &capture);
    vm.end_reading(capture).await.unwrap();
    vm.commit(disks, Some(LogNumber(k)), LogNumber(k + 1)).await.unwrap();
}

#[tokio::test]
async fn refused_at_each_command() {
    each_command_with(Fault::Refuse).await;
}

#[tokio::test]
async fn killed_before_each_command() {
    each_command_with(Fault::CutBefore).await;
}

#[tokio::test]
async fn killed_after_each_command() {
    each_command_with(Fault::CutAfter).await;
}

#[tokio::test]
async fn a_cancelled_caller_leaves_nothing() {
    let process = daemon(&[]).await;
    let vm = process.vm().await;
    let disks = vm.disks().await.unwrap();
    for polls in 0..3 {
        let request = process.request(&disks, None, 1);
        let mut begun = Box::pin(vm.begin_capture(request));
        for _ in 0..=polls {
            tokio::select! { biased; _ = &mut begun => {}, () = tokio::task::yield_now() => {} }
        }
        drop(begun);
        // It waits for what was begun to be taken down.
        vm.cleanup(&disks, Some(LogNumber(0))).await.unwrap();
        vm.cleanup(&disks, Some(LogNumber(0))).await.unwrap();
        assert!(leftovers(vm.qmp()).await.is_empty());
        assert!(bitmaps(vm.qmp(), "a").await.is_empty());
        assert_eq!(process.scratch_files(), 0);
    }
}
