//! Documents as tokens: made once, kept in a memory-mapped file, split into training and validation.

use std::fs::File;
use std::io::{BufWriter, ErrorKind, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polyhead_models::MappedFile;

use crate::error::At;
use crate::texts::{Contents, Documents, TextDocument};
use crate::tokenizer::{PIECES, pieces_of};
use crate::{DataError, Tokenizer};

const MAGIC: &[u8; 8] = b"polytok1";
/// Magic, number of tokens, number of documents, bytes per token, hash of what follows.
const HEADER: usize = 8 + 8 + 8 + 8 + 32;
/// Bytes kept per document: first token, and a hash of its text that decides its side of the split.
const ENTRY: usize = 16;
/// With fewer documents than this, a split by document would be too coarse.
const ENOUGH_DOCUMENTS: usize = 20;

/// The tokens of a set of documents, one after the other.
pub struct TokenFile {
    key: String,
    path: PathBuf,
    file: MappedFile,
    tokens: u64,
    width: usize,
    // Whether a token that ends it follows each document.
    ends: bool,
    starts: Vec<u64>,
    hashes: Vec<u64>,
}

/// Documents as tokens, and what was known of them once they had been read.
pub struct Tokenized {
    /// The tokens.
    pub file: Arc<TokenFile>,
    /// What the documents are.
    pub contents: Contents,
    /// Parts of the first texts, on which a tokenizer can be tried.
    pub pieces: Vec<String>,
}

impl TokenFile {
    /// Opens the file for these documents and this tokenizer, making it if it is missing, altered or cut short; where
    /// `cache_dir` may not be written to, for this time only. The documents are read once, and again where the file is made;
    /// memory holds one of them, and 32 bytes for each. `progress` gets bytes done and bytes in all while it is made.
    ///
    /// # Errors
    /// If a document cannot be read, the tokenizer fails, the file cannot be written, or the documents change meanwhile.
    pub fn open_or_build(
        documents: &Documents,
        tokenizer: &Tokenizer,
        cache_dir: &Path,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Tokenized, DataError> {
        let (mut key, mut pieces) = (Key::of(tokenizer), Vec::new());
        let contents = documents.for_each(&mut |document| {
            key.add(&document);
            let room = PIECES - pieces.len();
            pieces.extend(pieces_of(&document.text).take(room).map(str::to_owned));
            Ok(())
        })?;
        let name = key.name();
        let path = cache_dir.join(format!("{name}.tokens"));
        let ends = tokenizer.end_of_text().is_some();
        let tokenized = |file| Tokenized { file: Arc::new(file), contents: contents.clone(), pieces: pieces.clone() };
        if let Some(file) = Self::open(&path, ends) {
            return Ok(tokenized(file));
        }
        let created = std::fs::create_dir_all(cache_dir).and_then(|()| unfinished(cache_dir));
        let (mut file, kept) = match created {
            Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
                let folder = std::env::temp_dir();
                (tempfile::NamedTempFile::new_in(&folder).at(&folder)?, false)
            }
            created => (created.at(cache_dir)?, true),
        };
        let written = write((file.as_file_mut(), &path), documents, &contents, tokenizer, progress)?;
        if written != name {
            return Err(unusable!("{}: files changed while they were read: start again", contents.description));
        }
        file.as_file().sync_all().at(&path)?;
        let opened = if kept {
            file.persist(&path).map_err(|error| error.error).at(&path)?;
            Self::open(&path, ends)
        } else {
            // Read through the map, which outlives the file's name.
            Self::open(file.path(), ends).map(|opened| Self { key: name.clone(), ..opened })
        };
        opened
            .map(tokenized)
            .ok_or_else(|| unusable!("{}: written, but it does not read back; is the disk sound?", path.display()))
    }

    /// The file if it is there and whole. `ends`: whether a token that ends it follows each document.
    fn open(path: &Path, ends: bool) -> Option<Self> {
        // Only ever replaced as a whole (by rename), never written in place by us; checked against its hash before use.
        let file = MappedFile::open(path).ok()?;
        let map = file.all().ok()?;
        let number = |at: usize| Some(u64::from_le_bytes(map.get(at..at + 8)?.try_into().ok()?));
        let (tokens, documents, width) = (number(8)?, number(16)? as usize, number(24)? as usize);
        let table = documents.checked_mul(ENTRY)?;
        let whole = HEADER.checked_add(table)?.checked_add((tokens as usize).checked_mul(width)?)? == map.len();
        let sound = map.get(..8)? == MAGIC && (width == 2 || width == 4) && whole;
        if !sound || hash_of(&file, map).as_bytes() != map.get(32..64)? {
            return None;
        }
        let starts = (0..documents).map(|i| number(HEADER + i * ENTRY)).collect::<Option<_>>()?;
        let hashes = (0..documents).map(|i| number(HEADER + i * ENTRY + 8)).collect::<Option<_>>()?;
        let key = path.file_stem()?.to_str()?.to_owned();
        Some(Self { key, path: path.to_owned(), tokens, width, ends, starts, hashes, file })
    }

    /// Tells texts and tokenizers apart: the hash of both.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Tokens in all.
    pub fn len(&self) -> u64 {
        self.tokens
    }

    /// Where each document is.
    pub fn documents(&self) -> impl Iterator<Item = Range<u64>> {
        let ends = self.starts.iter().skip(1).copied().chain([self.tokens]);
        self.starts.iter().copied().zip(ends).map(|(start, end)| start..end)
    }

    /// Whether a document starts at this token.
    pub fn starts_document(&self, token: u64) -> bool {
        self.starts.binary_search(&token).is_ok()
    }

    /// The beginnings of pieces of the ranges, up to `seq_len` tokens each: one per document, or where documents are few
    /// as many as follow each other; at most `most`, spread evenly.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn texts(&self, ranges: &[Range<u64>], seq_len: usize, most: usize) -> Result<Vec<Vec<u32>>, DataError> {
        let long = seq_len as u64;
        let pieces: Vec<Range<u64>> = match ranges.len() >= most {
            true => ranges.to_vec(),
            false => ranges.iter().flat_map(|r| r.clone().step_by(seq_len).map(|at| at..r.end)).collect(),
        };
        let pieces: Vec<Range<u64>> = pieces.into_iter().filter(|piece| piece.end - piece.start > 1).collect();
        let count = pieces.len().min(most);
        let text = |index: usize| {
            let piece = &pieces[index * pieces.len() / count];
            let mut ids = Vec::new();
            self.read(piece.start..piece.end.min(piece.start + long), &mut ids)?;
            Ok(ids)
        };
        (0..count).map(text).collect()
    }

    /// Appends the ids of a range.
    ///
    /// # Errors
    /// If the file is shorter by now.
    pub fn read(&self, range: Range<u64>, into: &mut Vec<u32>) -> Result<(), DataError> {
        let start = HEADER + self.starts.len() * ENTRY;
        let place = start + range.start as usize * self.width..start + range.end as usize * self.width;
        let bytes = self.file.bytes(place).at(&self.path)?;
        if self.width == 2 {
            into.extend(bytes.as_chunks::<2>().0.iter().map(|&id| u32::from(u16::from_le_bytes(id))));
        } else {
            into.extend(bytes.as_chunks::<4>().0.iter().map(|&id| u32::from_le_bytes(id)));
        }
        Ok(())
    }
}

/// What starts the names of files that are being made.
const UNFINISHED: &str = ".tokens-";

/// A file to be filled, locked as long as it is; those that killed processes left are swept first.
fn unfinished(cache_dir: &Path) -> std::io::Result<tempfile::NamedTempFile> {
    loop {
        sweep(cache_dir);
        let file = tempfile::Builder::new().prefix(UNFINISHED).tempfile_in(cache_dir)?;
        // Another process may sweep it in the moment before it is locked.
        let locked = file.as_file().try_lock().is_ok();
        if file.path().exists() {
            return Ok(file);
        }
        if !locked {
            std::thread::yield_now();
        }
    }
}

/// Removes unfinished files that nobody makes any more: the system drops a lock with its process. As good as it goes: what
/// cannot be removed is in nobody's way.
fn sweep(cache_dir: &Path) {
    let Ok(entries) = std::fs::read_dir(cache_dir) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Before they had a name of their own, they had the usual one and no lock.
        let usual = name.strip_prefix(".tmp").is_some_and(|rest| rest.len() == 6 && !rest.contains('.'));
        let old =
            || path.metadata().and_then(|meta| meta.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age > OLD));
        let free = || std::fs::File::open(&path).is_ok_and(|file| file.try_lock().is_ok());
        if (name.starts_with(UNFINISHED) || (usual && old())) && free() {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// An unlocked file that was not written for so long is nobody's; chosen by us.
const OLD: std::time::Duration = std::time::Duration::from_secs(3600);

/// The hash of texts and tokenizer, by which the file is called.
struct Key(blake3::Hasher);

impl Key {
    fn of(tokenizer: &Tokenizer) -> Self {
        let mut key = blake3::Hasher::new();
        key.update(MAGIC).update(tokenizer.fingerprint().as_bytes());
        Self(key)
    }

    fn add(&mut self, document: &TextDocument) {
        self.0.update(&(document.text.len() as u64).to_le_bytes()).update(document.text.as_bytes());
    }

    fn name(&self) -> String {
        self.0.finalize().to_hex()[..24].to_owned()
    }
}

/// The hash of all that follows the header; what was hashed does not stay in memory.
fn hash_of(file: &MappedFile, map: &[u8]) -> blake3::Hash {
    const AT_ONCE: usize = 1 << 24;
    let mut hash = blake3::Hasher::new();
    for start in (HEADER..map.len()).step_by(AT_ONCE) {
        let range = start..(start + AT_ONCE).min(map.len());
        hash.update(&map[range.clone()]);
        file.release(range);
    }
    hash.finalize()
}

/// Writes header, table and tokens, document by document: the tokens first, as their place is known, then what goes before them.
/// Gives the name of the key of what was read.
fn write(
    (file, path): (&mut File, &Path),
    documents: &Documents,
    contents: &Contents,
    tokenizer: &Tokenizer,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<String, DataError> {
    let width = if tokenizer.vocab_size() <= 1 << 16 { 2 } else { 4 };
    let before = HEADER + contents.documents * ENTRY;
    let (mut key, mut table) = (Key::of(tokenizer), Vec::with_capacity(before - HEADER));
    let (mut tokens, mut done) = (0u64, 0u64);
    file.seek(SeekFrom::Start(before as u64)).at(path)?;
    let mut body = BufWriter::with_capacity(1 << 20, &*file);
    documents.for_each(&mut |document| {
        key.add(&document);
        table.extend(tokens.to_le_bytes());
        table.extend(&blake3::hash(document.text.as_bytes()).as_bytes()[..8]);
        for id in tokenizer.encode(&document.text)?.into_iter().chain(tokenizer.end_of_text()) {
            body.write_all(&id.to_le_bytes()[..width]).at(path)?;
            tokens += 1;
        }
        done += document.text.len() as u64;
        progress(done, contents.bytes);
        Ok(())
    })?;
    body.flush().at(path)?;
    drop(body);
    file.seek(SeekFrom::Start(HEADER as u64)).at(path)?;
    file.write_all(&table).at(path)?;
    file.seek(SeekFrom::Start(HEADER as u64)).at(path)?;
    let hash = blake3::Hasher::new().update_reader(&*file).at(path)?.finalize();
    let numbers = [tokens, contents.documents as u64, width as u64].map(u64::to_le_bytes);
    file.rewind().at(path)?;
    file.write_all(&[&MAGIC[..], numbers.as_flattened(), hash.as_bytes()].concat()).at(path)?;
    Ok(key.name())
}

/// Which tokens are learned from and which are kept back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Split {
    /// Ranges of tokens to learn from.
    pub train: Vec<Range<u64>>,
    /// Ranges of tokens kept back.
    pub validation: Vec<Range<u64>>,
    /// Ranges of tokens that are neither learned from nor validated on.
    pub tracking: Vec<Range<u64>>,
    /// How the split was made, in words.
    pub description: String,
}

/// Keeps back about `fraction` of the documents, each by the hash of its own text, so that adding documents moves none.
/// With few documents, the last `fraction` of each one is kept back instead (as nanoGPT does with its one file). In the
/// same way a share of `tracking` is kept out of both, taken from what would be learned from. Where the last `given` documents
/// are for validation, the others keep nothing back for it.
///
/// # Errors
/// If `fraction` is not between 0 and 1, or a side would be empty.
pub fn split(file: &TokenFile, given: usize, fraction: f64, tracking: f64) -> Result<Split, DataError> {
    if !(fraction > 0.0 && fraction < 1.0) {
        return Err(unusable!("validation.fraction ({fraction}) must be greater than 0 and less than 1"));
    }
    let (count, fraction) = (file.starts.len() - given, if given > 0 { 0.0 } else { fraction });
    let (mut train, mut tracked) = (Vec::new(), Vec::new());
    let mut validation: Vec<Range<u64>> = file.documents().skip(count).collect();
    let description = if count >= ENOUGH_DOCUMENTS {
        let [held_out, kept_out] = [fraction, fraction + tracking].map(|share| (share * u64::MAX as f64) as u64);
        for (range, &hash) in file.documents().zip(&file.hashes).take(count) {
            let side = match hash {
                _ if hash < held_out => &mut validation,
                _ if hash < kept_out => &mut tracked,
                _ => &mut train,
            };
            side.push(range);
        }
        let watched = if tracking > 0.0 { format!(", {} for tracking", tracked.len()) } else { String::new() };
        format!("{} documents for training, {} for validation{watched}", train.len(), validation.len())
    } else {
        for range in file.documents().take(count) {
            // The token that ends the text is not counted, so that the cut is the one nanoGPT makes.
            let text = (range.end - range.start).saturating_sub(u64::from(file.ends));
            let at = |share: f64| range.start + ((text as f64) * (1.0 - share)).floor() as u64;
            let cut = if given > 0 { range.end } else { at(fraction) };
            let first = if tracking > 0.0 { at((fraction + tracking).min(1.0)) } else { cut };
            train.push(range.start..first);
            tracked.push(first..cut);
            validation.push(cut..range.end);
        }
        let (percent, before) = (fraction * 100.0, tracking * 100.0);
        let watched = if tracking > 0.0 { format!(", the {before:.0} % before for tracking") } else { String::new() };
        match given {
            0 => format!("the last {percent:.0} % of each of the {count} documents is kept for validation{watched}"),
            _ => format!("{count} documents for training, {given} for validation{watched}"),
        }
    };
    let join = |ranges: Vec<Range<u64>>| ranges.into_iter().filter(|range| !range.is_empty()).collect::<Vec<_>>();
    let (train, validation, tracked) = (join(train), join(validation), join(tracked));
    let tracking_is_due = tracking > 0.0;
    for (side, ranges, due) in
        [("training", &train, true), ("validation", &validation, true), ("tracking", &tracked, tracking_is_due)]
    {
        if ranges.is_empty() && due {
            return Err(unusable!("no text is left for {side}: {count} documents, validation.fraction = {fraction}"));
        }
    }
    Ok(Split { train, validation, tracking: tracked, description })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::single_range_in_vec_init)]
    use super::*;

    fn documents(texts: impl IntoIterator<Item = String>) -> Documents {
        let texts = texts.into_iter().map(|text| TextDocument { name: String::new(), text }).collect();
        Documents::described("texts", texts)
    }

    fn build(texts: &Documents, dir: &Path) -> Arc<TokenFile> {
        TokenFile::open_or_build(texts, &Tokenizer::bytes(), dir, &mut |_, _| {}).unwrap().file
    }

    /// The file as it was made while all of it was in memory: by this files of caches and hashes of runs are known.
    fn plainly(texts: &[&str], tokenizer: &Tokenizer) -> (String, Vec<u8>) {
        let mut key = blake3::Hasher::new();
        key.update(MAGIC).update(tokenizer.fingerprint().as_bytes());
        let (mut table, mut body, mut tokens) = (Vec::new(), Vec::new(), 0u64);
        for text in texts {
            key.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
            table.extend(tokens.to_le_bytes());
            table.extend(&blake3::hash(text.as_bytes()).as_bytes()[..8]);
            for id in tokenizer.encode(text).unwrap().into_iter().chain(tokenizer.end_of_text()) {
                body.extend((id as u16).to_le_bytes());
                tokens += 1;
            }
        }
        let mut file = MAGIC.to_vec();
        [tokens, texts.len() as u64, 2].iter().for_each(|number| file.extend(number.to_le_bytes()));
        let rest = [table, body].concat();
        file.extend(blake3::hash(&rest).as_bytes());
        (key.finalize().to_hex()[..24].to_owned(), [file, rest].concat())
    }

    #[test]
    fn files_have_the_names_and_bytes_that_they_had() {
        let texts = ["It was a dark night.", "", "zwei ü\n", "and so on "];
        let dir = tempfile::tempdir().unwrap();
        let file = build(&documents(texts.map(str::to_owned)), dir.path());
        let (key, bytes) = plainly(&texts, &Tokenizer::bytes());
        assert_eq!(file.key(), key);
        assert_eq!(std::fs::read(dir.path().join(format!("{key}.tokens"))).unwrap(), bytes);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing unfinished stays");
    }

    #[test]
    fn documents_that_change_while_they_are_read_are_refused_and_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let times = std::cell::Cell::new(0);
        let changing = Documents::counted("text", "text", move |take| {
            times.set(times.get() + 1);
            take(TextDocument { name: String::new(), text: format!("read {} times", times.get()) })?;
            Ok(Vec::new())
        });
        let built = TokenFile::open_or_build(&changing, &Tokenizer::bytes(), dir.path(), &mut |_, _| {});
        let error = built.err().unwrap().to_string();
        assert!(error.contains("changed while they were read"), "{error}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    fn ids(file: &TokenFile, range: Range<u64>) -> Vec<u32> {
        let mut ids = Vec::new();
        file.read(range, &mut ids).unwrap();
        ids
    }

    #[test]
    fn a_damaged_cache_is_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let texts = documents(["ab".into(), "c".into()]);
        let file = build(&texts, dir.path());
        assert_eq!(ids(&file, 0..5), [97, 98, 256, 99, 256]);
        assert_eq!(file.documents().collect::<Vec<_>>(), [0..3, 3..5]);
        let path = std::fs::read_dir(dir.path()).unwrap().next().unwrap().unwrap().path();
        let good = std::fs::read(&path).unwrap();
        let mut altered = good.clone();
        *altered.last_mut().unwrap() ^= 1;
        for bad in [&good[..good.len() - 1], &altered, b"polytok1", b""] {
            std::fs::write(&path, bad).unwrap();
            assert!(TokenFile::open(&path, true).is_none());
            assert_eq!(ids(&build(&texts, dir.path()), 0..5), [97, 98, 256, 99, 256]);
        }
    }

    #[test]
    fn what_killed_processes_left_is_swept_and_what_others_make_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "half").unwrap();
            path
        };
        let (left, other, notes) = (write(".tokens-dead01"), write(".tmpAbC123"), write(".tmp-notes"));
        let made = unfinished(dir.path()).unwrap();
        assert!(!left.exists() && other.exists() && notes.exists(), "recent files of the usual name may be in use");
        build(&documents(["ab".into()]), dir.path());
        assert!(made.path().exists(), "locked");
        let long_ago = std::time::SystemTime::now() - 2 * OLD;
        std::fs::File::options().write(true).open(&other).unwrap().set_modified(long_ago).unwrap();
        sweep(dir.path());
        assert!(!other.exists() && made.path().exists() && notes.exists());
    }

    #[test]
    fn one_file_is_cut_at_its_end() {
        let dir = tempfile::tempdir().unwrap();
        // 999 and 1009: the token that ends the text must not move the cut to the next token.
        for (length, cut) in [(1000, 900), (999, 899), (1009, 908)] {
            let text: String = (0..length).map(|i| char::from(b'a' + (i % 26) as u8)).collect();
            let split = split(&build(&documents([text]), dir.path()), 0, 0.1, 0.0).unwrap();
            assert_eq!((split.train, split.validation), (vec![0..cut], vec![cut..length + 1]));
        }
    }

    #[test]
    fn a_fraction_that_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = build(&documents(["some text".into()]), dir.path());
        for fraction in [-0.5, 0.0, 1.0, 2.0, f64::NAN] {
            let error = split(&file, 0, fraction, 0.0).unwrap_err().to_string();
            assert!(error.contains("validation.fraction"), "{error}");
        }
    }

    #[test]
    fn adding_documents_moves_none() {
        let dir = tempfile::tempdir().unwrap();
        let text = |i: usize| format!("document number {i}");
        let kept_back = |n: usize| {
            let file = build(&documents((0..n).map(text)), dir.path());
            let split = split(&file, 0, 0.3, 0.0).unwrap();
            let index = |range: &Range<u64>| file.starts.binary_search(&range.start).unwrap();
            split.validation.iter().map(index).collect::<Vec<_>>()
        };
        let (few, many) = (kept_back(40), kept_back(80));
        assert_eq!(few, many.into_iter().filter(|&i| i < 40).collect::<Vec<_>>());
        assert!((5..20).contains(&few.len()), "{few:?}");
    }

    #[test]
    fn what_is_tracked_is_on_no_other_side() {
        let dir = tempfile::tempdir().unwrap();
        for count in [3, 60] {
            let texts = (0..count).map(|i| format!("{i} ").repeat(40));
            let file = build(&documents(texts), dir.path());
            let without = split(&file, 0, 0.2, 0.0).unwrap();
            let Split { train, validation, tracking, .. } = split(&file, 0, 0.2, 0.2).unwrap();
            assert_eq!(validation, without.validation, "tracking takes nothing from validation");
            let mut all: Vec<u64> = [train, validation, tracking.clone()].concat().into_iter().flatten().collect();
            all.sort_unstable();
            assert_eq!(all, (0..file.len()).collect::<Vec<_>>(), "every token once");
            let texts = file.texts(&tracking, 7, 4).unwrap();
            assert!((2..=4).contains(&texts.len()) && texts.iter().all(|text| (2..=7).contains(&text.len())));
        }
    }
}
