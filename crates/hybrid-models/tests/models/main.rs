//! All models against public implementations and laws.

mod common;
mod configs;
mod errors;
mod faults;
mod laws;
mod mixed;
mod reference;
mod sequences;
mod stack;
mod world;
