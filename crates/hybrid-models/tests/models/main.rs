//! All models beside public implementations and by law.

mod common;
mod errors;
mod laws;
mod reference;
mod world;
