//! The background text of the needle test.

use std::fs;
use std::path::Path;

use rand::prelude::*;
use rand_chacha::ChaCha8Rng;

use crate::{Error, Result, python};

/// An unlimited background text: documents, repeated in order until a length is reached.
#[derive(Debug, Clone)]
pub struct Haystack {
    documents: Vec<String>,
}

/// The largest number of words of a prompt: more than any model reads.
pub(crate) const MAX_WORDS: usize = 10_000_000;

/// Number of documents of a generated haystack, of some 600 words each.
const DOCUMENTS: usize = 48;

impl Haystack {
    /// Generates plain English-like prose from `seed`. It contains no digits, so that the needle's
    /// number is the only one.
    pub fn generated(seed: u64) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        Self { documents: (0..DOCUMENTS).map(|_| prose::document(&mut rng)).collect() }
    }

    /// Reads the text files of a folder, in the order of their names, or one file. Of a JSON file
    /// it reads the field `text`, as in RULER's `PaulGrahamEssays.json`.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read; [`Error::Setting`] if they contain no word.
    pub fn from_path(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut files = vec![path.to_path_buf()];
        if path.is_dir() {
            let entries = fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
            files = entries.map_err(Error::io(path))?.iter().map(fs::DirEntry::path).collect();
            files.retain(|file| file.is_file());
            files.sort();
        }
        let documents = files.iter().map(|file| document(file)).collect::<Result<Vec<_>>>()?;
        if !documents.iter().any(|text| python::split(text).next().is_some()) {
            return Err(Error::setting("haystack", "files with words in them", path.display()));
        }
        Ok(Self { documents })
    }

    /// Returns all documents, concatenated.
    pub fn text(&self) -> String {
        self.documents.concat()
    }

    /// Returns the first `count` words, with the white space between them.
    ///
    /// # Errors
    /// [`Error::Setting`] for more than 10 million words.
    pub fn words(&self, count: usize) -> Result<String> {
        if count > MAX_WORDS {
            return Err(Error::setting("words", format!("at most {MAX_WORDS}"), count));
        }
        let mut text = String::new();
        let mut have = 0;
        for document in self.documents.iter().cycle() {
            if have >= count {
                break;
            }
            text.push_str(document);
            have += python::split(document).count();
        }
        Ok(word_range(&text, 0, count).to_owned())
    }
}

fn document(path: &Path) -> Result<String> {
    #[derive(serde::Deserialize)]
    struct Essays {
        text: String,
    }
    let text = fs::read_to_string(path).map_err(Error::io(path))?;
    if path.extension().is_none_or(|extension| extension != "json") {
        return Ok(text);
    }
    let parsed: Essays = serde_json::from_str(&text).map_err(|error| Error::Record {
        path: path.to_owned(),
        line: error.line(),
        field: "text".into(),
        fault: error.to_string(),
    })?;
    Ok(parsed.text)
}

/// Returns the words `start..end` of `text` with the white space between them, without white space
/// at the ends.
pub fn word_range(text: &str, start: usize, end: usize) -> &str {
    if start >= end {
        return "";
    }
    let mut starts =
        python::split(text).map(|word| word.as_ptr() as usize - text.as_ptr() as usize);
    let from = starts.by_ref().nth(start).unwrap_or(text.len());
    let to = starts.nth(end - start - 1).unwrap_or(text.len());
    python::strip(&text[from..to])
}

/// A small grammar of everyday English.
mod prose {
    use super::*;

    const NAMES: &[&str] = &[
        "Anna", "Bruno", "Clara", "Daniel", "Edith", "Felix", "Greta", "Henry", "Ida", "Jonas",
        "Katrin", "Leo", "Marta", "Nils", "Olga", "Peter", "Rosa", "Simon", "Tilda", "Viktor",
    ];
    const PEOPLE: &[&str] = &[
        "the baker",
        "the gardener",
        "the ferryman",
        "the librarian",
        "the teacher",
        "the mason",
        "the clockmaker",
        "the young clerk",
        "the old sailor",
        "the neighbour",
        "the postman",
        "the carpenter",
        "the innkeeper",
        "the painter",
        "the doctor",
        "the miller",
    ];
    const THINGS: &[&str] = &[
        "lantern",
        "letter",
        "wooden box",
        "map",
        "bicycle",
        "basket",
        "notebook",
        "ladder",
        "blue coat",
        "kettle",
        "rope",
        "mirror",
        "violin",
        "cart",
        "drawing",
        "hammer",
        "bench",
        "clock",
        "window",
        "book",
        "boat",
        "chair",
        "photograph",
        "stone",
        "key ring",
        "jar",
    ];
    const QUALITIES: &[&str] = &[
        "heavy",
        "narrow",
        "bright",
        "quiet",
        "broken",
        "useful",
        "strange",
        "simple",
        "worn",
        "expensive",
        "patient",
        "careful",
        "slow",
        "cheerful",
        "dusty",
        "warm",
        "cold",
        "small",
    ];
    const PLACES: &[&str] = &[
        "by the river",
        "in the market hall",
        "behind the church",
        "at the station",
        "on the hill",
        "in the library",
        "near the old bridge",
        "at the edge of the forest",
        "in the kitchen",
        "under the lime trees",
        "at the harbour",
        "along the canal",
        "in the workshop",
        "on the upper floor",
        "beside the well",
        "at the end of the street",
    ];
    const ACTIONS: &[&str] = &[
        "repaired",
        "carried",
        "forgot",
        "painted",
        "borrowed",
        "sold",
        "found",
        "described",
        "measured",
        "hid",
        "admired",
        "washed",
        "lost",
        "kept",
        "bought",
        "returned",
        "studied",
    ];
    const TIMES: &[&str] = &[
        "In the morning",
        "Late in the evening",
        "After the rain",
        "Before the winter",
        "On a quiet Sunday",
        "During the harvest",
        "At noon",
        "Some weeks later",
        "On the day of the fair",
        "When the bells rang",
        "Long before sunrise",
        "That same week",
    ];
    const REASONS: &[&str] = &[
        "because nobody else had the time",
        "since the weather had turned",
        "as everyone in the village knew",
        "though it was not easy",
        "which surprised the whole family",
        "and thought no more about it",
        "while the others talked about the price of bread",
        "so that the work could go on",
        "for the road was still wet",
        "and that was the end of the matter",
    ];
    const OPINIONS: &[&str] = &[
        "It takes longer to learn a trade than most people admit",
        "A good plan is worth little without a steady hand",
        "Some things are better left as they are",
        "There is always more work than daylight",
        "People remember the beginning and the end of a story and forget the middle",
        "What is cheap in spring is often dear in autumn",
        "The best answer is sometimes to wait and see",
        "A long walk settles more questions than a long talk",
        "Nobody can say when the habit began",
        "The smallest details turned out to matter most",
    ];

    /// Returns eight paragraphs.
    pub fn document(rng: &mut ChaCha8Rng) -> String {
        (0..8).map(|_| paragraph(rng) + "\n\n").collect()
    }

    fn paragraph(rng: &mut ChaCha8Rng) -> String {
        let count = rng.random_range(5..9);
        (0..count).map(|_| sentence(rng)).collect::<Vec<_>>().join(" ")
    }

    fn sentence(rng: &mut ChaCha8Rng) -> String {
        let pick =
            |rng: &mut ChaCha8Rng, from: &[&'static str]| from[rng.random_range(0..from.len())];
        let (name, person) = (pick(rng, NAMES), pick(rng, PEOPLE));
        let (thing, other) = (pick(rng, THINGS), pick(rng, THINGS));
        let (quality, action) = (pick(rng, QUALITIES), pick(rng, ACTIONS));
        let (place, time) = (pick(rng, PLACES), pick(rng, TIMES));
        let (reason, opinion) = (pick(rng, REASONS), pick(rng, OPINIONS));
        match rng.random_range(0..8) {
            0 => format!("{time}, {name} {action} the {thing} {place}, {reason}."),
            1 => format!("{opinion}, said {name}, and {person} agreed."),
            2 => format!("The {thing} {place} was {quality}, {reason}."),
            3 => format!("{name} and {person} met {place} and spoke about the {quality} {thing}."),
            4 => format!("{time}, {person} {action} the {other}, but the {thing} stayed {place}."),
            5 => format!("{opinion}."),
            6 => format!("\"The {thing} is too {quality},\" said {person}, {reason}."),
            _ => format!("{name} {action} the {quality} {other} and left the {thing} {place}."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_text_has_the_requested_words_and_no_digits() {
        let haystack = Haystack::generated(7);
        for count in [0, 1, 512, 20_480, 60_000] {
            let text = haystack.words(count).unwrap();
            assert_eq!(python::split(&text).count(), count);
            assert!(!text.contains(|c: char| c.is_ascii_digit()));
        }
        let words = |count| haystack.words(count).unwrap();
        assert!(words(900).starts_with(&words(300)));
        assert_ne!(words(50), Haystack::generated(8).words(50).unwrap());
        let error = haystack.words(usize::MAX).unwrap_err().to_string();
        assert!(error.contains("at most 10000000"), "{error}");
    }

    #[test]
    fn word_ranges_keep_inner_space() {
        let text = " a  b\nc d ";
        assert_eq!(word_range(text, 0, 2), "a  b");
        assert_eq!(word_range(text, 1, 3), "b\nc");
        assert_eq!(word_range(text, 3, 9), "d");
        assert_eq!(word_range(text, 2, 2), "");
    }

    #[test]
    fn folders_are_read_by_name() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("b.txt"), "three four ").unwrap();
        fs::write(folder.path().join("a.txt"), "one two ").unwrap();
        let haystack = Haystack::from_path(folder.path()).unwrap();
        assert_eq!(haystack.words(5).unwrap(), "one two three four one");
        let missing = Haystack::from_path(folder.path().join("c")).unwrap_err();
        assert!(missing.to_string().contains("c: "), "{missing}");
        fs::write(folder.path().join("empty"), " \n").unwrap();
        assert!(Haystack::from_path(folder.path().join("empty")).is_err());
    }
}
