//! Tables (CSV, TSV), record by record, each with the line that it begins on.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io::{BufRead, Error, Read, Result};
use std::path::Path;
use std::rc::Rc;

use csv::{ByteRecord, StringRecord};

use super::not_text;
use crate::DataError;

/// A table whose cells are separated by commas, unless its first line has none: then by semicolons or tabs.
pub(crate) struct Table<'a, R> {
    reader: csv::Reader<Counted<R>>,
    lines: Rc<RefCell<Lines>>,
    path: &'a Path,
}

impl<'a, R: BufRead> Table<'a, R> {
    /// Reads a file's content; `settings` are the reader's, `longest` the bytes that a line may have.
    pub(crate) fn new(path: &'a Path, mut content: R, settings: &mut csv::ReaderBuilder, longest: usize) -> Self {
        let delimiter = delimiter(content.fill_buf().unwrap_or_default());
        let lines = Rc::new(RefCell::new(Lines { line: 1, ..Lines::default() }));
        let counted = Counted { content, lines: lines.clone(), longest };
        Self { reader: settings.has_headers(false).delimiter(delimiter).from_reader(counted), lines, path }
    }

    /// The next record, with its line.
    ///
    /// # Errors
    /// If the file cannot be read, or the record is no row of the table: its line and what is wrong.
    pub(crate) fn next_record(&mut self) -> std::result::Result<Option<(usize, StringRecord)>, DataError> {
        let mut record = ByteRecord::new();
        let read = self.reader.read_byte_record(&mut record);
        let position = read.as_ref().map_or_else(csv::Error::position, |_| record.position());
        let line = self.lines.borrow_mut().of(position);
        let wrong = |problem| Err(DataError::Row { path: self.path.to_owned(), line, problem });
        match read.map(|there| there.then(|| StringRecord::from_byte_record(record))) {
            Ok(None) => Ok(None),
            Ok(Some(Ok(record))) => Ok(Some((line, record))),
            Ok(Some(Err(error))) => {
                let cell = error.utf8_error().field();
                let record = error.into_byte_record();
                wrong(not_text(&record[cell]).unwrap_or_else(|| "not UTF-8".into()))
            }
            Err(error) => wrong(problem(&error)),
        }
    }

    /// Whether the quotes that were read so far close each other.
    pub(crate) fn quotes_close(&self) -> bool {
        self.lines.borrow().quotes.is_multiple_of(2)
    }
}

/// What separates the cells of a table.
fn delimiter(head: &[u8]) -> u8 {
    let line = head.split(|&byte| byte == b'\n').next().unwrap_or_default();
    [b',', b';', b'\t'].into_iter().find(|delimiter| line.contains(delimiter)).unwrap_or(b',')
}

/// What the reader of tables says, without the place, which precedes it.
fn problem(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::Io(cause) => cause.to_string(),
        csv::ErrorKind::UnequalLengths { expected_len, len, .. } => format!(
            "{len} cells, and {expected_len} columns are named: text that holds separators or line ends is quoted (\"...\")"
        ),
        _ => error.to_string(),
    }
}

/// The lines that were read. The csv crate counts its own, but says that a record begins before the line ends in front of it: the
/// second half of CR LF, and empty lines.
#[derive(Debug, Default)]
struct Lines {
    /// Where lines that are not empty begin that were not asked for yet, and their numbers from 1.
    starts: VecDeque<(u64, usize)>,
    /// Bytes that were read, and the quotes among them.
    read: u64,
    quotes: u64,
    /// The number of the line that they end in, how long it is so far, and whether it is known to hold anything.
    line: usize,
    length: usize,
    begun: bool,
}

impl Lines {
    /// The line that a record begins on; without a position the one that reading stopped in.
    fn of(&mut self, position: Option<&csv::Position>) -> usize {
        let Some(position) = position else { return self.line };
        while self.starts.front().is_some_and(|(start, _)| *start < position.byte()) {
            self.starts.pop_front();
        }
        self.starts.front().map_or(self.line, |(_, line)| *line)
    }
}

/// A reader that counts lines, and refuses those that are longer than a row can be: of a file that unpacks without end, no more
/// is kept.
struct Counted<R> {
    content: R,
    lines: Rc<RefCell<Lines>>,
    longest: usize,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let count = self.content.read(into)?;
        let mut lines = self.lines.borrow_mut();
        for piece in into[..count].split_inclusive(|&byte| byte == b'\n') {
            let first = piece.iter().position(|byte| !matches!(byte, b'\r' | b'\n'));
            if let Some(first) = first.filter(|_| !lines.begun) {
                let start = (lines.read + first as u64, lines.line);
                lines.starts.push_back(start);
                lines.begun = true;
            }
            lines.read += piece.len() as u64;
            lines.quotes += piece.iter().filter(|&&byte| byte == b'"').count() as u64;
            lines.length += piece.len();
            if lines.length > self.longest {
                return Err(Error::other(format!("a line of more than {} bytes is not a row of pixels", self.longest)));
            }
            if piece.ends_with(b"\n") {
                (lines.line, lines.length, lines.begun) = (lines.line + 1, 0, false);
            }
        }
        Ok(count)
    }
}
