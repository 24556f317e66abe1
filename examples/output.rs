//! Output of examples: printing that tolerates a closed pipe, and checks of output folders.

use std::fmt::Arguments;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result};

/// Prints like `println!`, but ignores a closed pipe (`| head`), so that the program continues and
/// saves its results.
#[macro_export]
macro_rules! say {
    ($($words:tt)*) => { $crate::output::line(format_args!($($words)*)) };
}

/// The implementation of [`say!`].
pub fn line(words: Arguments<'_>) {
    if let Err(error) = writeln!(io::stdout(), "{words}")
        && error.kind() != ErrorKind::BrokenPipe
    {
        eprintln!("standard output: {error}");
    }
}

/// Creates the folder, and a temporary file in it, so that an error is found before the work.
pub fn check_writable(folder: &Path) -> Result<()> {
    let name = || format!("{}: can't be written to", folder.display());
    fs::create_dir_all(folder).with_context(name)?;
    let probe = folder.join(format!(".writable-{}", std::process::id()));
    fs::write(&probe, "").with_context(name)?;
    fs::remove_file(&probe).with_context(name)
}

/// Parses a number of the command line, from `MIN` to `MAX`.
pub fn number<const MIN: usize, const MAX: usize>(text: &str) -> Result<usize, String> {
    let fits = |number: &usize| (MIN..=MAX).contains(number);
    text.parse().ok().filter(fits).ok_or_else(|| format!("expected {MIN} to {MAX}"))
}

/// Returns a parser of a number of the command line that is within a range. NaN is in no range.
pub fn within(range: RangeInclusive<f64>) -> impl Fn(&str) -> Result<f64, String> + Clone {
    move |text| {
        let fits = |number: &f64| range.contains(number);
        let expected = || format!("expected a number from {} to {}", range.start(), range.end());
        text.parse().ok().filter(fits).ok_or_else(expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_unbounded_length_are_refused() {
        let words = number::<1, 1000>;
        assert_eq!((words("1"), words("1000")), (Ok(1), Ok(1000)));
        for text in ["0", "1001", "18446744073709551615", "99999999999999999999", "-1", "x"] {
            assert_eq!(words(text).unwrap_err(), "expected 1 to 1000");
        }
    }

    #[test]
    fn numbers_that_are_not_finite_are_refused() {
        let percent = within(0.0..=100.0);
        assert_eq!((percent("0"), percent("2.5"), percent("1e2")), (Ok(0.0), Ok(2.5), Ok(100.0)));
        for text in ["nan", "-nan", "inf", "-inf", "1e999", "-0.1", "100.1", "x", ""] {
            assert_eq!(percent(text).unwrap_err(), "expected a number from 0 to 100");
        }
    }

    #[test]
    fn unwritable_folders_are_named() {
        let folder = tempfile::tempdir().unwrap();
        check_writable(&folder.path().join("a/b")).unwrap();
        assert_eq!(fs::read_dir(folder.path().join("a/b")).unwrap().count(), 0);
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let error = format!("{:#}", check_writable(&file.join("c")).unwrap_err());
        assert!(error.contains("file/c: can't be written to"), "{error}");
    }
}
