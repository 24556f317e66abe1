//! Tests that relative links and images in README files and in the book lead to existing files and
//! headings.

use std::collections::{BTreeSet, HashMap};
use std::path::{Component, Path, PathBuf};

use pulldown_cmark::{Event, Options, Parser, Tag, TagEnd};

/// The targets of a page's links and images, and the anchors of its headings.
#[derive(Default)]
struct Page {
    targets: Vec<String>,
    anchors: BTreeSet<String>,
}

impl Page {
    fn parse(text: &str) -> Self {
        let (mut page, mut heading, mut seen) = (Self::default(), None, HashMap::new());
        for event in Parser::new_ext(text, Options::ENABLE_TABLES) {
            match event {
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. }) => {
                    page.targets.push(dest_url.into_string());
                }
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::Text(text) | Event::Code(text) => {
                    if let Some(heading) = &mut heading {
                        heading.push_str(&text);
                    }
                }
                Event::End(TagEnd::Heading(_)) => {
                    let slug = slug(&heading.take().expect("the end of a heading that began"));
                    let same = seen.entry(slug.clone()).or_insert(0);
                    let suffix = if *same > 0 { format!("-{same}") } else { String::new() };
                    *same += 1;
                    page.anchors.insert(slug + &suffix);
                }
                _ => {}
            }
        }
        page
    }
}

/// Returns GitHub's anchor of a heading: lower case, hyphens for spaces, without punctuation.
fn slug(heading: &str) -> String {
    let kept = |c: &char| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_');
    heading.to_lowercase().chars().filter(kept).collect::<String>().replace(' ', "-")
}

/// Returns the Markdown files of a folder and the folders in it, except build outputs.
fn markdown(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            files.extend(markdown(&path));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            files.push(path);
        }
    }
    files
}

/// Returns the path without `..`, so that pages and targets compare.
fn normal(path: &Path) -> PathBuf {
    let mut parts = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(parts.pop()),
            Component::CurDir => {}
            part => parts.push(part),
        }
    }
    parts
}

/// Returns the broken links of the files. A page of `book` may only link to files of the book,
/// since the rendered book contains no others.
fn broken(files: &[PathBuf], book: &Path) -> Vec<String> {
    let parse = |file: &PathBuf| Page::parse(&std::fs::read_to_string(file).unwrap());
    let pages: HashMap<PathBuf, Page> = files.iter().map(|f| (normal(f), parse(f))).collect();
    let mut broken = Vec::new();
    for (file, page) in &pages {
        for target in page.targets.iter().filter(|target| !target.contains(':')) {
            let (path, anchor) = target.split_once('#').unwrap_or((target, ""));
            let path = match path {
                "" => file.clone(),
                path => normal(&file.parent().unwrap().join(path)),
            };
            let fault = if file.starts_with(book) && !(path.starts_with(book) && path.is_file()) {
                "not a file of the book"
            } else if !path.exists() {
                "no such file"
            } else if !anchor.is_empty()
                && !pages.get(&path).is_some_and(|page| page.anchors.contains(anchor))
            {
                "no such heading"
            } else {
                continue;
            };
            broken.push(format!("{}: {target}: {fault}", file.display()));
        }
    }
    broken.sort();
    broken
}

fn root() -> PathBuf {
    normal(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
}

#[test]
fn every_relative_link_has_a_target() {
    let files = markdown(&root());
    assert!(files.contains(&root().join("README.md")) && files.len() > 30);
    let broken = broken(&files, &root().join("docs"));
    assert!(broken.is_empty(), "{}", broken.join("\n"));
}

/// Reports of runs are separate HTML pages.
#[test]
fn the_summary_lists_every_page_of_the_book() {
    let docs = root().join("docs");
    let summary = docs.join("SUMMARY.md");
    let listed = Page::parse(&std::fs::read_to_string(&summary).unwrap()).targets;
    let listed: BTreeSet<PathBuf> = listed.iter().map(|target| docs.join(target)).collect();
    let page = |file: &PathBuf| *file != summary && !file.with_extension("html").exists();
    let pages: BTreeSet<PathBuf> = markdown(&docs).into_iter().filter(page).collect();
    assert_eq!(listed, pages);
}

#[test]
fn broken_links_are_found() {
    let folder = tempfile::tempdir().unwrap();
    let (page, book) = (folder.path().join("page.md"), folder.path().join("book"));
    std::fs::create_dir(&book).unwrap();
    let text = "# A `b`, c!\n# Twice\n# Twice\n[1](#a-b-c) [2](#twice-1) [3](book/in.md#there) \
        [4](https://nowhere) [5](book) `[6](gone)` [7](gone.md) ![8](gone.svg) [9](#twice-2) \
        [10](book/in.md#here)\n\n    [11](gone)\n";
    std::fs::write(&page, text).unwrap();
    let inside = book.join("in.md");
    std::fs::write(&inside, "# There\n[1](in.md#there) [2](../page.md)").unwrap();
    let name = |file: &Path, rest: &str| format!("{}: {rest}", file.display());
    let expected = [
        name(&inside, "../page.md: not a file of the book"),
        name(&page, "#twice-2: no such heading"),
        name(&page, "book/in.md#here: no such heading"),
        name(&page, "gone.md: no such file"),
        name(&page, "gone.svg: no such file"),
    ];
    assert_eq!(broken(&[page, inside], &book), expected);
}
