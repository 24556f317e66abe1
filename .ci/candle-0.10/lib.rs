//! Compiles its dependencies with candle 0.10.
