//! What a file is by its content, where it is not the text that it is taken for, or is data that is written as text.

use serde_json::Value;

/// What a file is that is not text in UTF-8, where its beginning tells.
pub(crate) fn kind(bytes: &[u8]) -> Option<&'static str> {
    let starts = |with: &[u8]| bytes.starts_with(with);
    let zeros = |from: usize| bytes.iter().take(64).skip(from).step_by(2).all(|&byte| byte == 0);
    Some(match bytes {
        _ if starts(b"\xFF\xFE\0\0") || starts(b"\0\0\xFE\xFF") => {
            "UTF-32 text, not UTF-8 (iconv -f UTF-32 -t UTF-8 converts it)"
        }
        _ if starts(b"\xFF\xFE") || starts(b"\xFE\xFF") => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16 -t UTF-8 converts it)"
        }
        _ if bytes.len() >= 4 && zeros(1) && !zeros(0) => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16LE -t UTF-8 converts it)"
        }
        _ if bytes.len() >= 4 && zeros(0) && !zeros(1) => {
            "UTF-16 text, not UTF-8 (iconv -f UTF-16BE -t UTF-8 converts it)"
        }
        _ if starts(b"\x1F\x8B") => "a packed file (gzip -d unpacks it)",
        _ if starts(b"\x28\xB5\x2F\xFD") => "a packed file (zstd -d unpacks it)",
        _ if starts(b"BZh") => "a packed file (bzip2 -d unpacks it)",
        _ if starts(b"\xFD7zXZ\0") => "a packed file (xz -d unpacks it)",
        _ if starts(b"PK\x03\x04") => "a ZIP archive (unzip unpacks it)",
        _ if starts(b"PAR1") => {
            "a Parquet table (data.jsonl reads the texts of a column, data.labelled_text texts with classes, data.chat \
             conversations)"
        }
        _ if starts(b"ARROW1") || starts(b"\xFF\xFF\xFF\xFF") => {
            "an Arrow table (data.jsonl reads the texts of a column, data.labelled_text texts with classes, data.chat \
             conversations)"
        }
        _ => return None,
    })
}

/// First bytes of formats that are no text, and what they are called.
const FORMATS: [(&[u8], &str); 16] = [
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"\x04\x22\x4d\x18", "lz4-compressed"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x89HDF", "HDF5"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"%PDF-", "PDF"),
    (b"{\\rtf", "RTF"),
    (b"\xd0\xcf\x11\xe0", "an old Word or Excel file"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"RIFF", "a RIFF file (WAV or WebP)"),
    (b"OggS", "Ogg audio"),
    (b"fLaC", "FLAC audio"),
    (b"ID3", "MP3 audio"),
    (b"\x7fELF", "a program"),
];

/// What bytes are that are not text in UTF-8, or `None`.
pub(crate) fn not_text(bytes: &[u8]) -> Option<String> {
    let head = &bytes[..bytes.len().min(4096)];
    let known = kind(head);
    if let Some(known) = known.filter(|known| known.starts_with("UTF-")) {
        return Some(known.to_owned());
    }
    // A letter and a zero in turn: UTF-16 without a mark, which can be valid UTF-8.
    let zeros = |from: usize| head.iter().skip(from).step_by(2).filter(|&&byte| byte == 0).count();
    if head.len() >= 8 && (zeros(0).max(zeros(1)) * 10 > head.len() / 2 * 4) && zeros(0).min(zeros(1)) * 8 < head.len()
    {
        return Some("UTF-16, not UTF-8".into());
    }
    // Protocols 2 to 5 of Python's pickle: the number, then a frame or an opcode, and a full stop at the end.
    if let [0x80, 2..=5, .., b'.'] = bytes {
        return Some("a Python pickle".into());
    }
    // safetensors: the length of a header, then the header, which is JSON.
    if let Some((length, rest)) = bytes.split_first_chunk::<8>()
        && rest.first() == Some(&b'{')
        && u64::from_le_bytes(*length) <= rest.len() as u64
    {
        return Some("safetensors".into());
    }
    let besides = || FORMATS.iter().find(|(mark, _)| head.starts_with(mark)).map(|(_, name)| *name);
    let format = known.or_else(besides).map(str::to_owned);
    match std::str::from_utf8(bytes) {
        // These few letters may begin a text, too; the formats go on with bytes that no text has.
        Ok(_) if !head.contains(&0) && !head.starts_with(b"%PDF-") && !head.starts_with(b"{\\rtf") => None,
        Ok(_) => format,
        Err(error) => Some(format.unwrap_or_else(|| {
            let binary = head.iter().filter(|&&byte| byte < 9 || (14..32).contains(&byte)).count() * 50 > head.len();
            match binary {
                true => "binary, not UTF-8".into(),
                false => format!(
                    "not UTF-8 (byte {:#04x} at {}; Latin-1 or Windows-1252?)",
                    bytes[error.valid_up_to()],
                    error.valid_up_to()
                ),
            }
        })),
    }
}

/// Data that is written as text but is none to read, and where it belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Structured {
    /// What it is: goes on after "is".
    pub(crate) what: &'static str,
    /// What reads it.
    pub(crate) instead: String,
}

/// Rows of JSON, whole files of JSON and tables; judged by content, so that prose with braces and commas stays prose. `table`:
/// whether the file is called one, so that a short one is believed.
pub(crate) fn structured(text: &str, table: bool) -> Option<Structured> {
    let trimmed = text.trim();
    match trimmed.starts_with(['{', '[']) {
        true => json_rows(trimmed).or_else(|| json_file(trimmed)),
        false => rows_of_cells(trimmed, table),
    }
}

/// Lines looked at to tell rows and tables.
const LOOKED_AT: usize = 50;

fn json_rows(text: &str) -> Option<Structured> {
    let lines = || text.lines().filter(|line| !line.trim().is_empty());
    let mut rows =
        lines().take(LOOKED_AT).map(|line| serde_json::from_str::<Value>(line).ok().filter(Value::is_object));
    let first = rows.next()??;
    let whole = rows.all(|row| row.is_some());
    whole.then(|| Structured { what: "JSON rows", instead: reader_of(&first) })
}

fn json_file(text: &str) -> Option<Structured> {
    let file: Value = serde_json::from_str(text).ok()?;
    let instead = match &file {
        Value::Array(rows) if rows.iter().any(Value::is_object) => reader_of(rows.iter().find(|row| row.is_object())?),
        Value::Object(_) => reader_of(&file),
        _ => "data.jsonl reads arrays of objects, or one object a line".into(),
    };
    Some(Structured { what: "a JSON file", instead })
}

/// The table of a recipe that reads such rows.
fn reader_of(row: &Value) -> String {
    let has = |key: &str| row.get(key).is_some();
    if has("features") || has("_data_files") {
        return "it describes a data set that `datasets` saved: write its rows with Dataset.to_json(\"rows.jsonl\"), and \
                data.jsonl, data.chat or data.labelled_text reads them"
            .into();
    }
    if has("messages") || has("conversations") {
        return "data.chat reads conversations".into();
    }
    if has("query") && has("positive") {
        return "`polyhead features --pairs` reads texts that belong together".into();
    }
    let text = row.as_object().and_then(|row| row.iter().find(|(_, value)| value.is_string()).map(|(key, _)| key));
    let field = if has("text") { None } else { text };
    let jsonl = match field {
        Some(field) => format!("data.jsonl (field = {field:?}) reads the texts of rows"),
        None => "data.jsonl reads the texts of rows".into(),
    };
    if has("label") { format!("{jsonl}, data.labelled_text texts with their classes") } else { jsonl }
}

/// Lines that all have as many cells: at least three by commas or semicolons, or two by tabs of which the first does not indent,
/// over ten lines and more. Prose does not come like that.
fn rows_of_cells(text: &str, table: bool) -> Option<Structured> {
    let lines = || text.lines().filter(|line| !line.trim().is_empty()).take(LOOKED_AT);
    if lines().count() < if table { 2 } else { 10 } {
        return None;
    }
    let cells = |text: &str, delimiter: u8| -> Vec<usize> {
        let mut reader = csv::ReaderBuilder::new();
        let reader = reader.delimiter(delimiter).has_headers(false).flexible(true).from_reader(text.as_bytes());
        reader.into_records().take(LOOKED_AT).map(|record| record.map_or(0, |record| record.len())).collect()
    };
    [(b'\t', 2), (b',', 3), (b';', 3)].into_iter().find_map(|(delimiter, least)| {
        let least = if table { 2 } else { least };
        if delimiter == b'\t' && lines().any(|line| line.starts_with('\t')) {
            return None;
        }
        // A cell of a table may hold line ends; text that is not called one is taken line by line.
        let counts = match table {
            true => cells(text, delimiter),
            false => lines().flat_map(|line| cells(line, delimiter)).collect(),
        };
        let even = counts.len() > 1 && counts.iter().all(|&count| count >= least && count == counts[0]);
        even.then(|| Structured {
            what: "a table (CSV)",
            instead: "data.jsonl (field = \"...\") reads the texts of a column, data.labelled_text texts with their classes, \
                      data.csv_images pixels with a class, of tables that are called .csv or .tsv"
                .into(),
        })
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_no_text_is_named() {
        let utf16: Vec<u8> = "Moby Dick".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked = [&[0xff, 0xfe][..], &utf16].concat();
        for (bytes, name) in [
            (&b"\x1f\x8b\x08\0"[..], "gzip -d"),
            (&marked, "UTF-16"),
            (&utf16, "UTF-16"),
            ("Grüße".encode_utf16().flat_map(u16::to_be_bytes).collect::<Vec<_>>().as_slice(), "UTF-16"),
            (b"caf\xe9 au lait", "not UTF-8 (byte 0xe9 at 3; Latin-1"),
            (b"PAR1\x15\x04\x15\0\xff", "Parquet"),
            (b"ARROW1\0\0\xff\xff", "Arrow"),
            (b"\x80\x04\x95\x05\0\0\0\0\0\0\0]\x94.", "a Python pickle"),
            (b"PK\x03\x04\x14\0", "a ZIP archive"),
            (b"%PDF-1.7\n", "PDF"),
            (b"\x02\0\0\0\0\0\0\0{}", "safetensors"),
        ] {
            let found = not_text(bytes);
            assert!(found.as_ref().is_some_and(|found| found.contains(name)), "{found:?} for {name}");
        }
        for text in ["", "a", "PAR1 is how Parquet begins.", "BZh is not a word.", "Ὁ βίος βραχύς", "GIF8", "a\0b"]
        {
            assert_eq!(not_text(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn data_that_is_written_as_text_is_named_with_what_reads_it() {
        let rows = "{\"text\": \"a\", \"label\": 1}\n{\"text\": \"b\", \"label\": 0}\n";
        let table: String = (0..12).map(|i| format!("{i},\"one, two\",{}\r\n", i % 2)).collect();
        let tabs: String = (0..12).map(|i| format!("spam\tbuy {i}, now\n")).collect();
        for (text, what, instead) in [
            (rows, "JSON rows", "data.labelled_text"),
            ("{\"messages\": []}\n\n{\"messages\": []}", "JSON rows", "data.chat"),
            ("{\"body\": \"one row\"}\n", "JSON rows", "field = \"body\""),
            ("[\n {\"text\": \"a\"},\n {\"text\": \"b\"}\n]", "a JSON file", "data.jsonl"),
            ("{\n \"features\": {},\n \"splits\": {}\n}", "a JSON file", "Dataset.to_json"),
            (&table, "a table", "data.csv_images"),
            (&tabs, "a table", "data.labelled_text"),
        ] {
            let found = structured(text, false).unwrap_or_else(|| panic!("{text}"));
            assert!(found.what.contains(what) && found.instead.contains(instead), "{found:?}");
        }
    }

    #[test]
    fn prose_and_source_are_text() {
        let poem: String = (0..20).map(|i| format!("Line {i}, and so on\n")).collect();
        let listed: String = (0..20).map(|i| format!("{}\n", ["one, two, three", "and then"][i % 2])).collect();
        for text in [
            poem.as_str(),
            &listed,
            "[Chapter 1]\n\nIt was a dark night.",
            "{ braces } begin this text.\n{\"and\": 1}\n",
            "fn main() {\n    let a = [1, 2];\n}\n",
            "{\"one\": 1}\nand then prose\n",
            "a,b,c\n1,2,3\n",
            "",
        ] {
            assert_eq!(structured(text, false), None, "{text}");
        }
        assert!(structured("a,b,c\n1,2,3\n", true).is_some(), "called a table, and one");
        assert!(structured("a,b\n1,\"2\n\n3\"\n", true).is_some(), "with a cell of several lines");
        assert_eq!(structured("Dear all,\n\nthis is but called a table.\n", true), None);
        let indented: String = (0..20).map(|i| format!("\tcall({i});\n")).collect();
        assert_eq!(structured(&format!("x\n{indented}"), false), None);
    }
}
