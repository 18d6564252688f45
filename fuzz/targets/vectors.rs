//! Bytes as `inkling::fuzzing::vectors` reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| inkling_fuzz::bounded(inkling::fuzzing::vectors, bytes));
