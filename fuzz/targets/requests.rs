//! Bytes as `inkling::fuzzing::requests` reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| inkling_fuzz::bounded(
    inkling::fuzzing::requests,
    bytes
));
