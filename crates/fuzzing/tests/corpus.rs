//! Every input that was kept, through the function that the fuzzer ran it through.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use fuzzing::{TARGETS, memory};

#[global_allocator]
static MEMORY: memory::Counting = memory::Counting;

#[test]
fn every_input_that_was_kept_passes_its_door() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    let mut failed = Vec::new();
    for target in TARGETS {
        let folder = corpus.join(target.name);
        let mut inputs: Vec<_> = fs::read_dir(&folder)
            .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{} has a corpus", target.name);
        for input in inputs {
            let bytes = fs::read(&input).unwrap();
            if catch_unwind(AssertUnwindSafe(|| target.run(&bytes))).is_err() {
                failed.push(input);
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn memory_is_really_counted() {
    let took = |bytes: usize| memory::within(1 << 20, || drop(std::hint::black_box(vec![1_u8; bytes])));
    took(1000);
    assert!(catch_unwind(AssertUnwindSafe(|| took(2 << 20))).is_err());
}
