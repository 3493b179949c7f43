#![no_main]

#[global_allocator]
static MEMORY: fuzzing::memory::Counting = fuzzing::memory::Counting;

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzzing::run("media", data));
