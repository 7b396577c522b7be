//! What of a folder of rows is trained on and what is held out. The names of files tell, as the Hugging Face hub reads them:
//! `train-00000-of-00002.parquet`, `data/validation.jsonl`, `test/a.csv`. Files and patterns are what they are, whatever they are
//! called.

use std::path::{Path, PathBuf};

use super::{Search, rows_of};
use crate::DataError;

/// A part of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Split {
    Train,
    Validation,
    Test,
    /// Neither its name nor that of its folder has a word for a split.
    Unnamed,
}

/// The words that the hub knows (`SPLIT_KEYWORDS` of its library `datasets`).
const WORDS: [(Split, &[&str]); 3] = [
    (Split::Train, &["train", "training"]),
    (Split::Validation, &["validation", "valid", "dev", "val"]),
    (Split::Test, &["test", "testing", "eval", "evaluation"]),
];

impl Split {
    fn name(self) -> &'static str {
        match self {
            Self::Train => "train",
            Self::Validation => "validation",
            Self::Test => "test",
            Self::Unnamed => "no split by their names",
        }
    }

    /// The split of a file in a folder: by its own name, or by that of the nearest folder inside that has one.
    fn of(file: &Path, folder: &Path) -> Self {
        let inside = file.strip_prefix(folder).unwrap_or(file);
        let parts = inside.iter().rev().map(|part| part.to_string_lossy().to_lowercase());
        parts.filter_map(|part| Self::of_name(&part)).next().unwrap_or(Self::Unnamed)
    }

    /// Words are what is between `-._`, spaces and digits: "latest" and "pretrained" have none for a split.
    fn of_name(name: &str) -> Option<Self> {
        let separates = |sign: char| "-._ ".contains(sign) || sign.is_ascii_digit();
        name.split(separates)
            .find_map(|word| WORDS.iter().find(|(_, words)| words.contains(&word)))
            .map(|(split, _)| *split)
    }
}

/// The files of rows that a source trains on, and those that it is validated on.
#[derive(Debug, Default)]
pub(crate) struct Sides {
    pub(crate) train: Search,
    /// `None` where a share of the others is held out.
    pub(crate) validation: Option<Search>,
    /// What was taken of folders with several splits, and what was left out.
    pub(crate) notes: Vec<String>,
}

/// What `paths` and `validation_paths` of a source of rows mean. Of a folder with splits, train is trained on; validation is held
/// out, unless `validation_paths` names what is; test is left out. A folder in `validation_paths` gives its validation, or else
/// its test files.
///
/// # Errors
/// If a path matches nothing, or a folder has only files that are not to be trained on.
pub(crate) fn sides(paths: &[String], validation_paths: &[String]) -> Result<Sides, DataError> {
    let mut sides = Sides::default();
    if paths.is_empty() {
        rows_of(paths)?;
    }
    for path in paths {
        let splits = Splits::of(path)?;
        let holds_out = validation_paths.is_empty();
        let Some(trained) = splits.first(&[Split::Train, Split::Unnamed]) else {
            let there = splits.named(|_| true);
            return Err(unusable!(
                "the folder \"{path}\" holds nothing to train on by the names of its files: {there}; to train on them, name files, or a \
                 pattern such as \"{}/*\"",
                path.trim_end_matches('/')
            ));
        };
        let held_out = (holds_out && splits.has(Split::Validation)).then_some(Split::Validation);
        sides.notes.extend(splits.note(path, trained, "is trained on", held_out));
        if let Some(held_out) = held_out {
            add(sides.validation.get_or_insert_default(), splits.files_of(held_out));
        }
        add(&mut sides.train, splits.files_of(trained));
        sides.train.left_out.extend(splits.left_out);
    }
    for path in validation_paths {
        let splits = Splits::of(path)?;
        let order = [Split::Validation, Split::Test, Split::Unnamed, Split::Train];
        let given = sides.validation.get_or_insert_default();
        if let Some(held_out) = splits.first(&order) {
            sides.notes.extend(splits.note(path, held_out, "is validated on", None));
            add(given, splits.files_of(held_out));
        }
        given.left_out.extend(splits.left_out);
    }
    Ok(sides)
}

/// What a path means, divided by splits; undivided where it is no folder.
struct Splits {
    files: Vec<(Split, PathBuf, bool)>,
    left_out: super::LeftOut,
}

impl Splits {
    fn of(path: &str) -> Result<Self, DataError> {
        let Search { files, left_out } = rows_of(&[path.to_owned()])?;
        let folder = Path::new(path);
        let split = |file: &Path| if folder.is_dir() { Split::of(file, folder) } else { Split::Unnamed };
        let files = files.into_iter().map(|(file, named)| (split(&file), file, named)).collect();
        Ok(Self { files, left_out })
    }

    fn has(&self, split: Split) -> bool {
        self.files.iter().any(|(own, ..)| *own == split)
    }

    /// The first of these that there are files of.
    fn first(&self, order: &[Split]) -> Option<Split> {
        order.iter().copied().find(|&split| self.has(split))
    }

    fn files_of(&self, split: Split) -> impl Iterator<Item = (PathBuf, bool)> + '_ {
        self.files.iter().filter(move |(own, ..)| *own == split).map(|(_, file, named)| (file.clone(), *named))
    }

    /// "train (3 files), test (1 file)", of the splits that are there and meant.
    fn named(&self, meant: impl Fn(Split) -> bool) -> String {
        let all = [Split::Train, Split::Validation, Split::Test, Split::Unnamed];
        let named = |split: Split| {
            let count = self.files_of(split).count();
            format!("{} ({count} file{})", split.name(), if count == 1 { "" } else { "s" })
        };
        let there = all.into_iter().filter(|&split| self.has(split) && meant(split));
        there.map(named).collect::<Vec<_>>().join(", ")
    }

    /// What is taken and what is left out, where there are several splits.
    fn note(&self, path: &str, taken: Split, how: &str, held_out: Option<Split>) -> Option<String> {
        let one = |meant: Split| self.named(|split| split == meant);
        let held = held_out.map_or(String::new(), |split| format!(", {} is held out", one(split)));
        let rest = self.named(|split| split != taken && Some(split) != held_out);
        let rest = if rest.is_empty() { rest } else { format!("; left out: {rest}") };
        (self.files.iter().any(|(split, ..)| *split != taken))
            .then(|| format!("of \"{path}\", {} {how}{held}{rest}", one(taken)))
    }
}

fn add(to: &mut Search, files: impl Iterator<Item = (PathBuf, bool)>) {
    for (file, named) in files {
        *to.files.entry(file).or_default() |= named;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::testing::Folder;

    fn names(search: &Search) -> Vec<String> {
        search.files.keys().map(|file| file.file_name().unwrap().to_string_lossy().into_owned()).collect()
    }

    fn text(path: &Path) -> String {
        path.display().to_string()
    }

    #[test]
    fn names_of_files_and_folders_tell_the_split() {
        for (name, split) in [
            ("train-00000-of-00002.parquet", Split::Train),
            ("data/dev.jsonl", Split::Validation),
            ("data/My_Valid set.csv", Split::Validation),
            ("val2.csv", Split::Validation),
            ("plain_text/test/a.csv", Split::Test),
            ("test/train.csv", Split::Train),
            ("chats_eval.jsonl.gz", Split::Test),
            ("latest.jsonl", Split::Unnamed),
            ("pretrained/validations.jsonl", Split::Unnamed),
        ] {
            assert_eq!(Split::of(&Path::new("/home/test").join(name), Path::new("/home/test")), split, "{name}");
        }
    }

    #[test]
    fn of_a_folder_train_is_trained_on_validation_is_held_out_and_test_is_left_out() {
        let dir = Folder::new();
        for name in ["data/train-0.jsonl", "data/train-1.jsonl", "data/validation.jsonl", "data/test.jsonl", "x.jsonl"]
        {
            dir.write(name, "{}");
        }
        let folder = text(dir.path());
        let found = sides(std::slice::from_ref(&folder), &[]).unwrap();
        assert_eq!(names(&found.train), ["train-0.jsonl", "train-1.jsonl"]);
        assert_eq!(names(found.validation.as_ref().unwrap()), ["validation.jsonl"]);
        let note = "train (2 files) is trained on, validation (1 file) is held out; left out: test (1 file), no split by their \
                    names (1 file)";
        assert_eq!(found.notes, [format!("of \"{folder}\", {note}")]);

        // A recipe that names what is held out has it so.
        let other = text(&dir.path().join("x.jsonl"));
        let found = sides(std::slice::from_ref(&folder), std::slice::from_ref(&other)).unwrap();
        assert_eq!(names(found.validation.as_ref().unwrap()), ["x.jsonl"]);
        assert!(found.notes[0].contains("left out: validation (1 file), test"), "{:?}", found.notes);
        let found = sides(&[other], std::slice::from_ref(&folder)).unwrap();
        assert_eq!(names(found.validation.as_ref().unwrap()), ["validation.jsonl"]);

        // Files and patterns are what they are.
        let pattern = text(&dir.path().join("data/*.jsonl"));
        let found = sides(&[pattern], &[]).unwrap();
        assert_eq!((found.train.files.len(), found.validation.is_none(), found.notes.len()), (4, true, 0));
    }

    #[test]
    fn folders_without_splits_are_read_whole_and_folders_of_test_files_are_refused() {
        let dir = Folder::new();
        for name in ["plain/a.jsonl", "plain/b.jsonl", "only/test-0.jsonl", "some/a.jsonl", "some/test.jsonl"] {
            dir.write(name, "{}");
        }
        let of = |name: &str| sides(&[text(&dir.path().join(name))], &[]);
        let plain = of("plain").unwrap();
        assert_eq!((plain.train.files.len(), plain.validation.is_none(), plain.notes.len()), (2, true, 0));
        let some = of("some").unwrap();
        assert_eq!(names(&some.train), ["a.jsonl"]);
        assert!(some.notes[0].contains("left out: test (1 file)"), "{:?}", some.notes);
        let error = of("only").unwrap_err().to_string();
        assert!(error.contains("holds nothing to train on") && error.contains("test (1 file)"), "{error}");
        assert!(error.contains("only/*\""), "{error}");
        assert!(sides(&[], &[]).unwrap_err().to_string().contains("paths is empty"));
    }
}
