//! All models against public implementations, and their properties.

mod common;
mod configs;
mod errors;
mod faults;
mod mixed;
mod properties;
mod reference;
mod sequences;
mod stack;
mod world;
