//! Bytes as `inkling::fuzzing::tokenizer` reads them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| inkling_fuzz::bounded(
    inkling::fuzzing::tokenizer,
    bytes
));
